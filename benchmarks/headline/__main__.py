"""Run the rows that have no result yet, or time the networks that were kept.

    python -m benchmarks.headline --path NAME=PATH ... [--networks N ...] [--budgets B ...] [--arms A ...]
        [--stage compress|timing] [--keep DIR] [--force] [--list]

Several may run at a time on one file of results. A network whose paths are not all given is named and passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.headline import store, timing
from benchmarks.headline.arms import ARMS
from benchmarks.headline.network import Network, names, plugin
from benchmarks.headline.rows import DENSE, Key, row

HERE = Path(__file__).parent
TARGET = HERE.parent / "results" / "headline.json"
CONFIG = HERE.parent / "experiments" / "headline.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline", description=__doc__)
    parser.add_argument("--path", action="append", default=[], metavar="NAME=PATH", help="what networks need")
    parser.add_argument("--networks", nargs="+", choices=names(), default=names())
    parser.add_argument("--budgets", nargs="+", help="those of the network by default")
    parser.add_argument("--arms", nargs="+", choices=[DENSE, *ARMS], default=[DENSE, *ARMS])
    parser.add_argument("--stage", choices=["compress", "timing"], default="compress")
    parser.add_argument(
        "--keep", type=Path, default=Path(tempfile.gettempdir()) / "spectrim-headline", help="folder of the networks"
    )
    parser.add_argument("--target", type=Path, default=TARGET, help="file of the results")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that a row may take")
    parser.add_argument("--threads", type=int, default=1, help="of the timing")
    parser.add_argument("--force", action="store_true", help="measure again what has a row")
    parser.add_argument("--list", action="store_true", help="print the rows that would be run")
    options = parser.parse_args(arguments)
    paths = {name: Path(path) for name, _, path in (each.partition("=") for each in options.path)}
    config = json.loads(CONFIG.read_text())
    options.keep.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        kind = plugin(name)
        if missing := [need for need in kind.needs if need not in paths]:
            print(f"{name}: not run, needs --path {missing[0]}=PATH", file=sys.stderr)
        elif options.stage == "timing":
            _time(options, config, kind(paths))
        else:
            _compress(options, config, kind, paths)
    return 0


def _compress(
    options: argparse.Namespace, config: Mapping[str, Any], kind: type[Network], paths: Mapping[str, Path]
) -> None:
    stands = {(r["network"], r["budget"], r["arm"]) for r in store.read(options.target)["rows"]}
    for key in keys(kind, options.budgets or kind.budgets, options.arms):
        if options.force or (key.network, key.budget, key.arm) not in stands:
            print(f"{key.network}, {key.budget or 'dense'}: {key.arm}", file=sys.stderr, flush=True)
            if not options.list:
                found = row(key, config, paths, options.keep, options.limit)
                store.keep(options.target, config, store.with_row(found))
                print(found, flush=True)


def keys(kind: type[Network], budgets: Sequence[str], arms: Sequence[str]) -> Iterator[Key]:
    """The rows of a network: the dense one, and at every budget the arms that fit."""
    if DENSE in arms:
        yield Key(kind.name, "", DENSE)
    for budget in budgets:
        for arm in (name for name in arms if name in ARMS):
            fits = ARMS[arm].only in (None, budget.partition("=")[0])
            if fits and (kind.arms is None or arm in kind.arms):
                yield Key(kind.name, budget, arm)


def _time(options: argparse.Namespace, config: Mapping[str, Any], network: Network) -> None:
    held = store.read(options.target)
    names_of = ("network", "budget", "arm", "runtime", "batch", "threads")
    stands = {tuple(each[name] for name in names_of) for each in held.get("times", ())}
    for each in held["rows"]:
        key = Key(each["network"], each["budget"], each["arm"])
        file = options.keep / f"{key.stem}.pt"
        if key.network != network.name or key.arm not in options.arms or key.arm == DENSE or not file.exists():
            continue
        for runtime in timing.RUNTIMES:
            for batch in config["batches"]:
                line = (key.network, key.budget, key.arm, runtime, batch, options.threads)
                if line in stands and not options.force:
                    continue
                print(f"{', '.join(map(str, line))}", file=sys.stderr, flush=True)
                if not options.list:
                    found = timing.timed(
                        each, network.build(), torch.load(file, weights_only=False), network.example(batch),
                        runtime=runtime, batch=batch, threads=options.threads, repeats=config["repeats"],
                    )  # fmt: skip
                    store.keep(options.target, config, store.with_time(found))
                    print(found, flush=True)


if __name__ == "__main__":
    sys.exit(main())
