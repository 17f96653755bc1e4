"""Run the experiments that have no result yet.

    python -m benchmarks.run [NAME ...] [--cifar10 DIR] [--fashion-mnist DIR] [--weights FILE ...] [--minilm DIR]
                             [--text FILE] [--efficientnet DIR] [--photographs DIR] [--ocr DIR]
                             [--work DIR] [--force]

An experiment file names its task, a module of this package, and the task's options. What a task needs from outside is
given by path; experiments whose paths are not given are named and passed over.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import code_version, environment, today

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", help="experiments; all if none")
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="folder with the binary CIFAR-10 files")
    parser.add_argument("--fashion-mnist", type=Path, metavar="DIR", help="folder with the IDX files, plain or .gz")
    parser.add_argument(
        "--weights", type=Path, action="append", default=[], metavar="FILE", help="resnet20.safetensors, ..."
    )
    parser.add_argument("--minilm", type=Path, metavar="DIR", help="folder with the encoder's weights and tokenizer")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a long English text")
    parser.add_argument(
        "--efficientnet", type=Path, metavar="DIR", help="folder with the packages of EfficientNet-Lite0"
    )
    parser.add_argument("--photographs", type=Path, metavar="DIR", help="folder with imagenet_*.png or .jpg")
    parser.add_argument("--ocr", type=Path, metavar="DIR", help="folder with craft_mlt_25k.pth")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where runs keep checkpoints and caches")
    parser.add_argument("--force", action="store_true", help="run again what has a result")
    options = parser.parse_args(arguments)
    known = {path.stem: path for path in sorted((HERE / "experiments").glob("*.json"))}
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no experiment {unknown[0]!r}; there are {', '.join(known)}")
    paths: dict[str, Any] = {
        "cifar10": options.cifar10,
        "fashion-mnist": options.fashion_mnist,
        "minilm": options.minilm,
        "text": options.text,
        "efficientnet": options.efficientnet,
        "photographs": options.photographs,
        "ocr": options.ocr,
        "weights": {path.stem: path for path in options.weights},
        "work": options.work or Path(tempfile.gettempdir()) / "spectrim-benchmarks",
    }
    for name in options.names or known:
        target = HERE / "results" / f"{name}.json"
        config = json.loads(known[name].read_text())
        missing = _missing(config, paths)
        if whole := config.get("part_of"):
            print(f"{name}: measured by python -m benchmarks.{whole}", file=sys.stderr)
        elif target.exists() and not options.force:
            print(f"{name}: has a result", file=sys.stderr)
        elif missing:
            print(f"{name}: not run, needs {missing}", file=sys.stderr)
        else:
            run(name, config, paths, target)
    return 0


def run(name: str, config: dict[str, Any], paths: dict[str, Any], target: Path) -> dict[str, Any]:
    """Run one experiment and write its result."""
    print(f"{name}: running", file=sys.stderr)
    task = importlib.import_module(f"benchmarks.{config['task']}")
    before, version, start = environment(), code_version(), time.perf_counter()
    (paths["work"] / name).mkdir(parents=True, exist_ok=True)
    found = task.run(config, {**paths, "work": paths["work"] / name, "shared": paths["work"]})
    needs = "".join(f" --{need} {need.upper()}" for need in config.get("needs", []))
    command = f"python -m benchmarks.run {name}{needs}"
    for claim in found.get("claims", {}).values():
        claim.setdefault("command", command)
    result = {
        "experiment": name,
        "config": config,
        "date": today(),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "environment": before,
        "code": version,
        **found,
    }
    part = target.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, target)
    return result


def _missing(config: dict[str, Any], paths: dict[str, Any]) -> str:
    for need in config.get("needs", []):
        if need == "weights":
            if config["network"] not in paths["weights"]:
                return f"--weights {config['network']}.safetensors"
        elif paths[need] is None:
            return f"--{need}"
    return ""


def claim(value: float | None, unit: str, target: str, met: bool, note: str = "") -> dict[str, Any]:
    """One row of the claims table."""
    return {"value": value, "unit": unit, "target": target, "met": bool(met), **({"note": note} if note else {})}


if __name__ == "__main__":
    sys.exit(main())
