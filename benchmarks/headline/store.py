"""The one file of results: read whole, written whole, by several processes in turns."""

from __future__ import annotations

import contextlib
import fcntl
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import code_version, environment, today
from benchmarks.headline import detector
from benchmarks.headline.claims import claims
from benchmarks.headline.network import names, plugin
from spectrim.network.files import write_text

NOTES = (
    "Networks, budgets and arms without a row have not been run; failed says why a row has no figures.",
    "A row is one network, one budget and one arm. All arms start from the same weights and the same unlabelled "
    "training inputs; no weight is trained unless the arm says so. What was chosen was chosen on held-out training "
    "data; the test data were looked at once a row.",
    "MACs are counted on the finished network for one input, all operations included; file_bytes of ours is the file "
    "that spectrim.save writes, of others their tensors as safetensors. error is the standard error of value over n "
    "test samples. search_s is the whole call, of peers with the choice on held-out data, on a machine shared with "
    "others; peak_mb of the whole process, of which "
    "peak_mb_before was there before the call.",
    "BALF, SVD-LLM, spatial SVD, Tucker-2 and CP are written from their descriptions (CP and Tucker-2 with TensorLy); "
    "none is the authors' own program. Of peers, the better of BatchNorm as it was and estimated anew, by the held-out "
    "data. Taylor importance takes the classes that the network itself finds as labels.",
)


def read(target: Path) -> dict[str, Any]:
    """What the file holds; an empty result if there is none."""
    if target.exists():
        return json.loads(target.read_text())
    return {"rows": [], "times": []}


def keep(target: Path, config: Mapping[str, Any], change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the file holds, with claims and facts brought up to date."""
    with _alone(target):
        held = read(target)
        change(held)
        held["rows"].sort(key=_place)
        now = {"date": today(), "environment": environment(), "code": code_version()}
        found = claims(held["rows"]) | detector.claims(held["rows"], held.get("times", []))
        whole = {
            "experiment": target.stem, "config": dict(config), **now, "wall_seconds": None, "claims": found,
            "measured": _measured(held, found, now), "seeds": [config["seed"]], "notes": list(NOTES),
            "rows": held["rows"],
        }  # fmt: skip
        if held.get("times"):
            whole["times"] = held["times"]
        write_text(target, json.dumps(whole, indent=1) + "\n")


def _measured(held: Mapping[str, Any], found: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """When, where and by what code every claim came to say what it says."""
    before = {key: held[key] for key in now if key in held}
    same = {name for name, claim in found.items() if held.get("claims", {}).get(name) == claim}
    return {name: held.get("measured", {}).get(name, before) if name in same else dict(now) for name in found}


def with_row(row: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A row in place of the one of the same network, budget and arm."""
    return _with("rows", row, ("network", "budget", "arm"))


def with_time(row: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    return _with("times", row, ("network", "budget", "arm", "runtime", "batch", "threads"))


def _with(name: str, row: Mapping[str, Any], key: tuple[str, ...]) -> Callable[[dict[str, Any]], None]:
    def change(held: dict[str, Any]) -> None:
        others = [each for each in held.get(name, ()) if any(each[k] != row[k] for k in key)]
        held[name] = [*others, dict(row)]

    return change


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    from benchmarks.headline.arms import ARMS

    known, arms = names(), ["dense", *sorted(ARMS, key=lambda arm: ARMS[arm].kind != "auto")]
    if row["network"] not in known:
        return (len(known), row["network"], row["budget"], row["arm"])
    budgets = ["", *plugin(row["network"]).budgets]
    at = budgets.index(row["budget"]) if row["budget"] in budgets else len(budgets)
    return known.index(row["network"]), "", at, arms.index(row["arm"]) if row["arm"] in arms else -1


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    with (Path(tempfile.gettempdir()) / f"spectrim-{target.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
