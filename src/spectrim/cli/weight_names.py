"""Names of the tensors in a file of weights, as the model has them that they are for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectrim.network.state_values import equal
from spectrim.network.tensor_files import owners

if TYPE_CHECKING:
    from torch import Tensor

# What torch's wrappers (compile, FSDP, activation checkpoints) put into the names of what they hold.
_WRAPPED = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# BatchNorm counts its batches only for momentum=None; older files lack the counter. AveragedModel counts its models.
_COUNTER, _AVERAGED = "num_batches_tracked", "n_averaged"


def as_named(state: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file under the names of a model's, where these can be told.

    What wrappers put into names is left out, and what all begin with where they fit without. A tensor that the model
    has under several names is there under each, if the file has it under one.
    """
    plain = {name if name in mine else _WRAPPED.sub("", name): each for name, each in state.items()}
    if len(plain) < len(state):  # two would have one name
        plain = dict(state)
    if _AVERAGED not in mine:
        plain.pop(_AVERAGED, None)
    for prefix in prefixes(plain, mine):
        found = {name.removeprefix(prefix): each for name, each in plain.items() if name.startswith(prefix)}
        if len(found) == len(plain) and found.keys() <= mine.keys():
            plain = found
            break
    for names in _tied(mine):
        there = next((plain[name] for name in names if name in plain), None)
        plain |= {name: there for name in names if there is not None and name not in plain}
    return plain


def missing(state: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> list[str]:
    """Names of a model's tensors that a file lacks and that it must have."""
    return [name for name in mine if name not in state and not name.endswith(_COUNTER)]


def untied(state: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Two names of one tensor of the model under which a file has different numbers; None if there are none."""
    for first, *others in _tied(mine):
        for name in others:
            if first in state and name in state and not equal(state[first], state[name]):
                return first, name
    return None


def prefixes(state: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> list[str]:
    """What stands before the names of all of a model's tensors in a file, as ``model.``; several in one of several."""
    also = {name for names in _tied(mine) for name in names}
    needed = [name for name in missing({}, mine) if name not in also]
    if not needed:
        return []
    found = [name.removesuffix(needed[0]) for name in state if name.endswith(f".{needed[0]}")]
    return [prefix for prefix in found if all(f"{prefix}{name}" in state for name in needed)]


def _tied(mine: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that stand for one tensor of a model, together."""
    groups: dict[str, list[str]] = {}
    for name, first in owners(mine)[1].items():
        groups.setdefault(first, [first]).append(name)
    return list(groups.values())
