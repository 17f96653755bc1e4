"""The house: its structure, extensions from outside and the time that it takes to start (H3 to H6)."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import structure
from benchmarks.environment import ROOT
from benchmarks.run import claim

PACKAGE = ROOT / "src" / "spectrim"
# The public verbs and commands take what their users may say; they are left out of the count of parameters.
VERBS = ("compress", "learn_ranks", "budget_path", "fine_tune", "sweep", "tabulate", "apply")


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Measure all claims."""
    measured = {"structure": _structure(), "extension": _extension(), "start": _start(config["starts"])}
    claims = {
        "H3": _rooms(measured["structure"], config["structure"]),
        "H4": claim(
            measured["structure"]["lines"],
            "lines of src",
            f"< {config['lines']}",
            measured["structure"]["lines"] < config["lines"],
        ),
        "H5": _extended(measured["extension"]),
        "H6": _light(measured["start"], config["start"]),
    }
    notes = [
        "Branches are McCabe's number. Parameters are those of all functions but the public verbs "
        f"({', '.join(VERBS)}), the constructors of public classes and the commands of the command line.",
        "Starts are whole processes; the time that Python alone takes to start is in the row and not taken off.",
    ]
    return {
        "claims": claims,
        "rows": measured["structure"]["largest"],
        "measured": measured,
        "seeds": [0],
        "notes": notes,
    }


def _structure() -> dict[str, Any]:
    functions = list(structure.functions(PACKAGE))
    counted = [f for f in functions if not _is_verb(f)]
    largest = {
        "lines": max(functions, key=lambda f: f.lines),
        "branches": max(functions, key=lambda f: f.branches),
        "parameters": max(counted, key=lambda f: f.parameters),
    }
    return {
        "root modules": len(list(PACKAGE.glob("*.py"))),
        "rooms": len({structure.room(PACKAGE, path) for path in structure.sources(PACKAGE)}),
        "arrows": len(structure.arrows(PACKAGE)),
        "lines": structure.lines(PACKAGE),
        "largest": [{"figure": k, "value": getattr(f, k), "function": f.place} for k, f in largest.items()],
    }


def _is_verb(function: structure.Function) -> bool:
    place, _, name = function.place.rpartition(":")
    return name in VERBS or name == "__init__" or (place.startswith("cli/") and name == Path(place).stem)


def _rooms(found: dict[str, Any], most: dict[str, int]) -> dict[str, Any]:
    figures = {"root modules": found["root modules"], "arrows": found["arrows"]}
    figures |= {row["figure"]: row["value"] for row in found["largest"]}
    over = {name: value for name, value in figures.items() if value > most[name]}
    target = ", ".join(f"{name} <= {value}" for name, value in most.items())
    told = ", ".join(f"{name} {value}" for name, value in figures.items())
    return claim(len(over), f"figures above target; {told}", target, not over, told)


def _extension() -> dict[str, Any]:
    """The tests of a package of its own that adds a method, a cost, a selector and a training trick."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/extension"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    named = subprocess.run(
        ["grep", "-rl", "--include=*.py", "tests.extension", str(PACKAGE)], capture_output=True, text=True
    ).stdout.split()
    return {
        "exit": done.returncode,
        "last": (done.stdout.strip().splitlines() or ["nothing"])[-1],
        "named_in_src": named,
    }


def _extended(found: dict[str, Any]) -> dict[str, Any]:
    met = found["exit"] == 0 and not found["named_in_src"]
    return claim(found["exit"], f"exit code; {found['last']}", "all of it, src untouched", met, found["last"])


def _start(times: int) -> list[dict[str, Any]]:
    rows = []
    for name, words in {
        "python alone": [sys.executable, "-c", "pass"],
        "import spectrim": [sys.executable, "-c", "import spectrim, sys; assert 'torch' not in sys.modules"],
        "spectrim --help": [str(Path(sys.executable).parent / "spectrim"), "--help"],
    }.items():
        samples = []
        for _ in range(times + 1):
            start = time.perf_counter()
            subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
            samples.append(time.perf_counter() - start)
        # The first may read files from the disk.
        rows.append({"what": name, "median_seconds": round(statistics.median(samples[1:]), 4), "times": times})
    return rows


def _light(rows: list[dict[str, Any]], most: dict[str, float]) -> dict[str, Any]:
    seconds = {row["what"]: row["median_seconds"] for row in rows}
    met = all(seconds[name] <= limit for name, limit in most.items())
    told = "; ".join(f"{name}: {value:.3f} s" for name, value in seconds.items())
    target = "; ".join(f"{name} <= {limit:g} s" for name, limit in most.items())
    return claim(max(seconds[name] / limit for name, limit in most.items()), f"of the limit; {told}", target, met, told)
