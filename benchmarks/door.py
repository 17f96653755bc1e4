"""What a stranger sees first (D1 to D6): every claim is measured by itself and kept in ``results/door.json``.

    python -m benchmarks.door [CLAIM ...] [--force] [--work DIR]

A claim names the module that measures it, whose ``run(config, paths)`` is that of any task of :mod:`benchmarks.run`:
it returns ``claims`` and lists of records. Claims that stand in the file are passed over, and the file is written after
each, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import code_version, environment, today
from spectrim.network.files import write_text

CLAIMS = {
    "D1": "door_readme",
    "D2": "door_fresh",
    "D3": "door_pages",
    "D4": "door_mistakes",
    "D5": "door_examples",
    "D6": "door_types",
}
TARGET = Path(__file__).parent / "results" / "door.json"


def main(
    arguments: list[str] | None = None,
    target: Path = TARGET,
    claims: Mapping[str, str] = CLAIMS,
    description: str | None = __doc__,
) -> int:
    """Measure claims, each by its module, into one file; its name is that of the module that is called."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{target.stem}", description=description)
    parser.add_argument("claims", nargs="*", help="D1, ...; all if none")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where runs keep files")
    parser.add_argument("--force", action="store_true", help="measure again what has a result")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.claims if name not in claims]:
        parser.error(f"no claim {unknown[0]!r}; there are {', '.join(claims)}")
    work = options.work or Path(tempfile.gettempdir()) / "spectrim-benchmarks" / target.stem
    for name in options.claims or claims:
        stands = json.loads(target.read_text())["measured"] if target.exists() else {}
        if name in stands and not options.force:
            print(f"{name}: has a result", file=sys.stderr)
        elif not (Path(__file__).parent / f"{claims[name]}.py").exists():
            print(f"{name}: not run, there is no benchmarks/{claims[name]}.py", file=sys.stderr)
        else:
            keep(name, measured(name, claims[name], work, target.stem), target)
    return 0


def measured(name: str, module: str, work: Path, program: str = "door") -> dict[str, Any]:
    """What one claim's module finds by its experiment's options, with what it was measured on."""
    print(f"{name}: running", file=sys.stderr)
    (work / name).mkdir(parents=True, exist_ok=True)
    on, start = {"environment": environment(), "code": code_version()}, time.perf_counter()
    experiment = Path(__file__).parent / "experiments" / f"{module}.json"
    config = json.loads(experiment.read_text()) if experiment.exists() else {}
    found = importlib.import_module(f"benchmarks.{module}").run(config, {"work": work / name})
    if rows := found.pop("rows", None):
        found[module] = rows
    for claim in found["claims"].values():
        claim.setdefault("command", f"python -m benchmarks.{program} {name}")
    seconds = round(time.perf_counter() - start, 1)
    figures = found.get("measured", {})
    return {**found, "measured": {name: {"date": today(), "wall_seconds": seconds, **on, **figures}}}


def keep(name: str, found: Mapping[str, Any], target: Path) -> None:
    """Put what one claim's module found in place of what stands of it in the file, and leave the rest as it is.

    Read again here, so that two claims may be measured at the same time.
    """
    whole: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    lists = {key: value for key, value in found.items() if key not in ("claims", "measured", "seeds", "notes")}
    ours = {key: {**whole.get(key, {}), **found[key]} for key in ("claims", "measured")}
    notes = {**whole.get("notes_by_claim", {}), name: list(found.get("notes", ()))}
    on = found["measured"][name]
    text = json.dumps(
        {
            **whole,
            "experiment": target.stem,
            "config": {"task": target.stem},
            "date": on["date"],
            "wall_seconds": round(sum(each["wall_seconds"] or 0 for each in ours["measured"].values()), 1),
            "environment": on["environment"],
            "code": on["code"],
            "rows": [],
            **lists,
            **{key: dict(sorted(value.items())) for key, value in ours.items()},
            "seeds": sorted({*whole.get("seeds", ()), *found.get("seeds", ())}),
            "notes_by_claim": notes,
            "notes": [note for each in sorted(notes) for note in notes[each]],
        },
        indent=1,
    )
    write_text(target, text + "\n")


if __name__ == "__main__":
    sys.exit(main())
