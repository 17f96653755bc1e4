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


def main(arguments: list[str] | None = None, target: Path = TARGET, claims: Mapping[str, str] = CLAIMS) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.door", description=__doc__)
    parser.add_argument("claims", nargs="*", help="D1, ...; all if none")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where runs keep files")
    parser.add_argument("--force", action="store_true", help="measure again what has a result")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.claims if name not in claims]:
        parser.error(f"no claim {unknown[0]!r}; there are {', '.join(claims)}")
    work = options.work or Path(tempfile.gettempdir()) / "spectrim-benchmarks" / "door"
    for name in options.claims or claims:
        stands = json.loads(target.read_text())["measured"] if target.exists() else {}
        if name in stands and not options.force:
            print(f"{name}: has a result", file=sys.stderr)
        elif not (Path(__file__).parent / f"{claims[name]}.py").exists():
            print(f"{name}: not run, there is no benchmarks/{claims[name]}.py", file=sys.stderr)
        else:
            keep(name, measured(name, claims[name], work), target)
    return 0


def measured(name: str, module: str, work: Path) -> dict[str, Any]:
    """What one claim's module finds, with what it was measured on."""
    print(f"{name}: running", file=sys.stderr)
    (work / name).mkdir(parents=True, exist_ok=True)
    on, start = {"environment": environment(), "code": code_version()}, time.perf_counter()
    found = importlib.import_module(f"benchmarks.{module}").run({}, {"work": work / name})
    for claim in found["claims"].values():
        claim.setdefault("command", f"python -m benchmarks.door {name}")
    seconds = round(time.perf_counter() - start, 1)
    return {**found, "measured": {name: {"date": today(), "wall_seconds": seconds, **on}}}


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
            "experiment": "door",
            "config": {"task": "door"},
            "date": on["date"],
            "wall_seconds": round(sum(each["wall_seconds"] for each in ours["measured"].values()), 1),
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
