"""Proof that a copy of a model does what the model does, with layers of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from spectrim.errors import ProofError
from spectrim.nn.copying import MEANS, cannot_run
from spectrim.nn.merge_proof import alike
from spectrim.nn.proof import COPIES, Expected
from spectrim.nn.standing import LAYERS
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.junctions import Junction, scanned
from spectrim.nn.watch.nesting import output_tensors
from spectrim.nn.watch.observe import observe, on_each, on_few


def check_copy(
    model: nn.Module, copied: nn.Module, expected: Expected, batch: Any, feed: Feed
) -> Mapping[str, Junction] | None:
    """Raise ProofError if a copy of a model calls layers of the model itself, or computes something else than it does.

    What is done to such a copy would not matter, or not show what it does to the model. The run also shows the sums
    behind the layers of a copy that has all channels, which are given; None where they could not be looked for.
    """
    names, removes = expected.changed, expected.removes
    shared = [name for name in names if copied.get_submodule(name) is model.get_submodule(name)]
    if shared:
        raise ProofError(
            f"copy.deepcopy of the {type(model).__name__} gives layer {shared[0]!r} itself and no copy of it, so that "
            "compressing it would change the original: see its __deepcopy__"
        )
    strays: list[str] = []
    originals = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    hooks = [*on_each(originals, lambda name, *_: strays.append(name), before=True)]
    sums: dict[str, Junction] = {}
    answers: list[Tensor] = []

    def run(part: Any) -> None:
        strays.clear()
        with observe(copied, hooks, forward=feed) as running:
            answers[:] = output_tensors(running(part))

    def seen(part: Any) -> None:
        with scanned(copied, [name for name, _ in originals], sums):
            run(part)

    found: Mapping[str, Junction] | None = None
    try:
        if not removes:
            with contextlib.suppress(Exception):  # what cannot be watched so may be run all the same
                part = on_few(seen, batch, feed)
                found = sums
        if found is None:
            part = on_few(run, batch, feed)
    except Exception as error:
        reads = "Something reads how many channels there were; skip= the layers before it"
        raise cannot_run(model, error, reads if removes else MEANS) from error
    if strays:
        raise ProofError(
            f"a copy of the {type(model).__name__} calls layer {strays[0]!r} of the original, so that it cannot be "
            f"replaced: {COPIES}, or skip={strays[0]!r}"
        )
    if not removes:
        _check_same(model, answers, part, feed)
    return found


def _check_same(model: nn.Module, answers: Sequence[Tensor], part: Any, feed: Feed) -> None:
    """Raise ProofError if these answers of a copy are not the model's, unless it differs from itself, too."""
    with observe(model, forward=feed) as running:
        wanted = output_tensors(running(part))
        if all(map(alike, wanted, answers)) or not all(map(alike, wanted, output_tensors(running(part)))):
            return
    raise ProofError(f"a copy of the {type(model).__name__} computes something else than the model does. {MEANS}")
