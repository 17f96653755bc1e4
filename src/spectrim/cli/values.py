"""Values of options that are more than a word: costs, budgets, shapes, groups, recipes, folders.

They are read without torch, so that what cannot be used is told at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spectrim.cli.common import LARGEST, usage
from spectrim.cli.references import Reference, UsageError, factory, halves, nearest
from spectrim.cli.sources import check_factory
from spectrim.errors import did_you_mean
from spectrim.network.files import each_once, read_document
from spectrim.selection.budget import COSTS, OTHER_NAMES, Budget

# Device types of torch that people have.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "auto")
_OTHER_DEVICES = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "metal": "mps", "apple": "mps", "intel": "xpu"}
_LARGEST_PLAN, _LARGEST_GROUPS = 64 << 20, 1 << 20


def read_costs(texts: Sequence[str] | None) -> dict[str, Callable[[Any], float]]:
    """The functions of layers that ``--cost NAME=package.module:function`` names, by the cost."""
    return {name: factory(reference, "cost") for name, reference in named_costs(texts).items()}


def named_costs(texts: Sequence[str] | None) -> dict[str, Reference]:
    """Where the functions are that ``--cost`` names, by the cost; nothing is imported."""
    found: dict[str, Reference] = {}
    for text in texts or ():
        name, equals, place = text.partition("=")
        module, function = halves(place)
        if not equals or not name or len(re.split(r"[,\s]", name)) > 1 or not function:
            raise UsageError(f"--cost {text!r}: write NAME=package.module:function, as joules=energy:joules")
        if name.lower() in COSTS or name in found:
            raise UsageError(f"--cost {text!r}: there is a cost {name!r} already; choose another name")
        found[name] = Reference(place, module, function)
        check_factory(found[name], "cost", arguments=1)
    return found


def read_budget(limits: Sequence[str], costs: Collection[str] = ()) -> Budget:
    """The budget that ``--budget`` states, over the library's costs and those of ``--cost``."""
    with usage("--budget"):
        budget = Budget.parse(*limits).meant()
    known = (*COSTS, *costs)
    for cost in budget.costs:
        if cost not in known:
            own = f", or give --cost {cost}=package.module:function" if cost.isidentifier() else ""
            raise UsageError(
                f"--budget limits {cost!r}, which is not counted; choose from {', '.join(known)}{own}."
                f"{did_you_mean(cost, known, OTHER_NAMES)}"
            )
    return budget


def read_shape(text: str) -> tuple[int, ...]:
    """The shape of one sample, as ``3x224x224``."""
    try:
        shape = [int(size) for size in text.lower().split("x")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        numbers = text.lower().replace(",", " ").replace("x", " ").strip("()[] ").split()
        meant = len(numbers) > 1 and all(part.isdigit() and int(part) for part in numbers)
        close = f" Did you mean {'x'.join(numbers)}?" if meant else ""
        raise UsageError(f"--input {text!r} is no shape: write the sizes of one sample, as 3x224x224.{close}")
    if math.prod(shape) > LARGEST:
        raise UsageError(f"--input {text!r} has {math.prod(shape):.3g} numbers: write the sizes of one sample")
    return tuple(shape)


def one_of(
    option: str, known: Sequence[str], other_names: Mapping[str, str] = MappingProxyType({})
) -> Callable[[str], None]:
    """What refuses a value of an option that is none of those that are known."""

    def check(text: str) -> None:
        if text not in known:
            close = did_you_mean(text, known, other_names)
            raise UsageError(f"{option} {text!r} is not known; choose from {', '.join(known)}.{close}")

    return check


def check_device(text: str) -> None:
    """Refuse a device whose name is misspelt; whether it can be reached is torch's to say."""
    name, colon, number = text.partition(":")
    if name not in _DEVICES and (close := did_you_mean(name, _DEVICES, _OTHER_DEVICES)):
        raise UsageError(f"--device {text!r} is not known: write cpu, cuda, cuda:1, mps or auto.{close}")
    if colon and not number.isdigit():
        raise UsageError(f"--device {text!r}: the number of a device follows the colon, as cuda:0")


def recipe_share(text: str) -> float | None:
    """The share of energy that ``--recipe`` names; None for ``kl``, which has none."""
    name, equals, value = text.partition("=")
    if text == "kl":
        return None
    if name != "energy" or not equals:
        close = did_you_mean(name, ("kl", "energy"))
        raise UsageError(f"--recipe {text!r} is not known; choose kl, or energy=SHARE, as energy=0.95.{close}")
    try:
        share = float(value)
    except ValueError as error:
        raise UsageError(f"--recipe {text}: {value!r} is not a number") from error
    if not 0 < share <= 1:
        raise UsageError(f"--recipe {text}: the share of energy is {share}; expected above 0 and at most 1, as 0.95")
    return share


def check_results_folder(folder: Path) -> None:
    """Refuse a folder for results that is a file, or would lie in one."""
    for each in (folder, *folder.parents):
        if each.is_file():
            raise UsageError(f"results cannot go to {str(folder)!r}: {str(each)!r} is a file, not a folder")


def check_plan(file: Path, option: str = "--plan ") -> None:
    """Refuse what is no plan, as far as that is seen without torch: a folder, another file of the same run."""
    inside = file / "plan.json" if file.is_dir() else file.parent / "plan.json"
    there = inside.is_file() and inside != file
    if not file.is_file():
        close = f"; compress writes plan.json beside the model.{nearest(file, '*.json')}".removesuffix(".")
        raise UsageError(f"{option}{str(file)!r} is not a file{f': write {inside}' if there else close}")
    with file.open("rb") as opened:
        text = opened.read(_LARGEST_PLAN)
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict) or "entries" not in held:
        cure = f"write {inside}" if there else "give plan.json, as compress writes it"
        raise UsageError(f"{option}{str(file)!r} is no plan: {cure}")


def read_groups(file: Path) -> dict[str, tuple[str, ...]]:
    """Names of layers by the name of the group, from a JSON object."""
    try:
        found = read_document(file, _grouped, _LARGEST_GROUPS)
    except OSError as error:
        close = nearest(file, "*.json")
        raise UsageError(f"--groups {str(file)!r} cannot be read: {error.strerror}{close and f'.{close}'}") from error
    except (ValueError, RecursionError) as error:
        said = getattr(error, "said", error)
        raise UsageError(f"--groups {str(file)!r} cannot be read as JSON: {said}") from error
    if not isinstance(found, dict):
        raise UsageError(f'--groups {str(file)!r} holds {_short(found)}; expected an object, as {{"name": ["a", "b"]}}')
    for name, members in found.items():
        if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
            raise UsageError(
                f"--groups {str(file)!r}: group {name!r} is {_short(members)}; expected a list of names of layers"
            )
    return {name: tuple(members) for name, members in found.items()}


def _grouped(text: bytes) -> Any:
    """What a file of groups holds; ValueError if it is no JSON."""
    if len(text) > _LARGEST_GROUPS:
        raise ValueError(f"it has more than {_LARGEST_GROUPS:,} bytes")
    found = json.loads(text.decode("utf-8-sig"), object_pairs_hook=each_once)
    json.dumps(found, ensure_ascii=False).encode()  # half of a pair of surrogates is no name
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
