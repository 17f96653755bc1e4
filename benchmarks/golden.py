"""The golden set: twenty small cases whose plans, tables and applied models are compared bit for bit before and after.

    python -m benchmarks.golden --out FILE              run all cases and write what they give
    python -m benchmarks.golden --compare BEFORE AFTER  compare two such files; exit status 1 if a case differs
    python -m benchmarks.golden --base COMMIT           the same for the source of a commit and the present one

The cases use the public names of the package alone, so that one script runs on the source of any commit: which one is
imported is up to ``PYTHONPATH``. One thread, fixed seeds, a made-up clock: on one machine a case gives the same bits
each time.

A file holds what every case left: plans and tables of choices as JSON, and tensors: errors, costs and spectra of the
tables in float64, the state of every applied model, its output for fixed inputs. Two files are compared as values. Keys
may come in any order; in ``facts`` there may be new ones, and the record of a method may have got a ``module``. Words
for people are not kept. Of numbers that differ the relative difference is told, for tensors relative to the largest
entry; a case is equal if there is none above 1e-12. In float32 this means the same bits.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import spectrim
from benchmarks.golden_cases import CASES, Record

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-12
# Smaller differences than this are rounding of sums of shares, however small the numbers are.
_ROUNDING = 1e-15


def run(names: Iterable[str] | None = None) -> dict[str, Record]:
    """The records of some cases, or of all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Record] = {}
    try:
        for name in names or CASES:
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002 - the global one, which user code may draw from
            torch.manual_seed(0)
            begin = time.process_time()
            found[name] = Record()
            CASES[name](found[name])
            print(f"{name}: {time.process_time() - begin:.1f} s", file=sys.stderr)
    finally:
        torch.set_num_threads(threads)
    return found


def write(records: Mapping[str, Record], path: Path) -> None:
    """One file of tensors, with the JSON values in its metadata."""
    tensors = {f"{case}|{name}": t for case, record in records.items() for name, t in record.tensors.items()}
    values = {case: record.values for case, record in records.items()}
    save_file(tensors, path, {"golden": json.dumps(values)})


def read(path: Path) -> dict[str, Record]:
    """What :func:`write` wrote."""
    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()["golden"])
        records = {case: Record(held) for case, held in values.items()}
        for key in file.keys():  # noqa: SIM118 - not a mapping
            case, _, name = key.partition("|")
            records[case].tensors[name] = file.get_tensor(key)
    return records


# Comparison.


@dataclass(frozen=True)
class Difference:
    """Where two records differ, and by how much; infinitely where one lacks it or it is no number."""

    where: str
    size: float

    def __str__(self) -> str:
        return self.where if math.isinf(self.size) else f"{self.where} by {self.size:.1e}"


def compare(before: Mapping[str, Record], after: Mapping[str, Record]) -> dict[str, tuple[Difference, ...]]:
    """The differences of every case that either has; none where all bits are equal."""
    return {name: tuple(differences(before.get(name), after.get(name))) for name in dict.fromkeys([*before, *after])}


def differences(before: Record | None, after: Record | None) -> Iterator[Difference]:
    """Where the records of one case differ."""
    if before is None or after is None:
        yield Difference(f"there is no such case {'before' if before is None else 'after'}", math.inf)
        return
    yield from _values(before.values, after.values, ())
    for name in dict.fromkeys([*before.tensors, *after.tensors]):
        one, other = before.tensors.get(name), after.tensors.get(name)
        size = math.inf if one is None or other is None else _tensors(one, other)
        if size is not None:
            yield Difference(name, size)


def _values(before: Any, after: Any, where: tuple[str, ...]) -> Iterator[Difference]:
    size: float | None = math.inf
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            if key not in after or (key not in before and not _may_be_new(where, key)):
                yield Difference("/".join((*where, key)), math.inf)
            elif key in before:
                yield from _values(before[key], after[key], (*where, key))
        return
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from _values(*pair, (*where, str(number)))
        return
    if before == after and isinstance(before, bool) == isinstance(after, bool):
        return
    numbers = [value for value in (before, after) if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) == 2 and all(map(math.isfinite, numbers)):
        gap = abs(before - after)
        size = gap / max(abs(before), abs(after)) if gap > _ROUNDING else gap
    yield Difference("/".join(where), size)


def _may_be_new(where: tuple[str, ...], key: str) -> bool:
    return where[-1:] == ("facts",) or (where[-2:-1] == ("methods",) and key == "module")


def _tensors(before: Tensor, after: Tensor) -> float | None:
    """How far two tensors are apart; None if all bits are equal."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return math.inf
    if torch.equal(before.reshape(-1).view(torch.uint8), after.reshape(-1).view(torch.uint8)):
        return None
    if not before.is_floating_point():
        return math.inf
    one, other = before.double(), after.double()
    gap = float((one - other).abs().max())
    return gap / max(float(one.abs().max()), float(other.abs().max())) if gap > _ROUNDING else gap


def summary(found: Mapping[str, Sequence[Difference]]) -> dict[str, Any]:
    """Numbers of cases, those with equal bits and those equal within 1e-12, and what differs in the others.

    ``largest`` is the largest difference of numbers; None where there is more than numbers to tell apart.
    """
    sizes = {name: _largest(differing) for name, differing in found.items()}
    equal = [name for name, size in sizes.items() if size <= TOLERANCE]
    largest = max(sizes.values(), default=0.0)
    return {
        "cases": len(found),
        "equal": len(equal),
        "equal_bits": sum(not differing for differing in found.values()),
        "largest": None if math.isinf(largest) else largest,
        "different": {name: list(map(str, found[name])) for name in found if name not in equal},
    }


def _largest(differing: Sequence[Difference]) -> float:
    # A difference that is not a number counts as infinite.
    return max((math.inf if math.isnan(d.size) else d.size for d in differing), default=0.0)


def compare_with(commit: str, root: Path = ROOT) -> dict[str, Any]:
    """Run the cases of this script on the source of a commit and on the present one, and sum up how they compare."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        packed = subprocess.run(["git", "archive", commit, "src"], cwd=root, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(base, filter="data")
        before, after = base / "before.safetensors", base / "after.safetensors"
        _run_apart(base / "src", before)
        _run_apart(root / "src", after)
        return {"commit": commit, **summary(compare(read(before), read(after)))}


def _run_apart(source: Path, out: Path) -> None:
    """Run this script in a process that imports the package from a folder."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.golden", "--out", str(out), "--source", str(source)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.golden", description=__doc__.partition("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE", help="run the cases and write what they give")
    what.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="compare two such files")
    what.add_argument("--base", metavar="COMMIT", help="compare the source of a commit with the present one")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help="run these cases alone")
    parser.add_argument("--source", type=Path, metavar="DIR", help="refuse to run a package from another folder")
    options = parser.parse_args(arguments)
    if options.out:
        home = Path(spectrim.__file__).resolve().parent.parent
        if options.source and options.source.resolve() != home:
            parser.error(f"spectrim was imported from {home} and not from {options.source}: set PYTHONPATH")
        write(run(options.only), options.out)
        return 0
    if options.base:
        found = compare_with(options.base)
        print(json.dumps(found, indent=1))
        return int(found["equal"] < found["cases"])
    found = compare(*map(read, options.compare))
    for name, differing in found.items():
        size = _largest(differing)
        verdict = "equal bits" if not differing else f"largest difference {size:.1e}"
        print(f"{name}: {verdict if math.isfinite(size) else 'DIFFERENT'}")
        for difference in differing[:5]:
            print(f"    {difference}")
        if len(differing) > 5:
            print(f"    and {len(differing) - 5} more")
    return int(any(_largest(differing) > TOLERANCE for differing in found.values()))


if __name__ == "__main__":
    sys.exit(main())
