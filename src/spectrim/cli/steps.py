"""Steps that several commands take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.application import apply
from spectrim.cli.common import Output, usage
from spectrim.cli.data import load_data
from spectrim.cli.filters import METHOD as FILTERS
from spectrim.cli.filters import Filters
from spectrim.cli.references import UsageError
from spectrim.cli.sharing import Wanted, offer
from spectrim.cli.sparsity import METHOD, Sparsity
from spectrim.cost.latency import Latency
from spectrim.methods import ActivationSVD, JointSVD, Method, WeightSVD
from spectrim.network.sites import Sites
from spectrim.nn.find import find
from spectrim.nn.watch.batches import resized
from spectrim.pipeline import Report, Result
from spectrim.preparation import Prepared, prepare
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.tables import tabulate
from spectrim.train.batches import length, split

METHODS: Mapping[str, tuple[type[Method], ...]] = {
    "auto": (ActivationSVD, WeightSVD),
    "weight-svd": (WeightSVD,),
    "activation-svd": (ActivationSVD,),
    "joint": (ActivationSVD, WeightSVD),
    METHOD: (ActivationSVD, WeightSVD),
    FILTERS: (ActivationSVD, WeightSVD),
}


def device_named(device: str, threads: int | None) -> str:
    """The device that a name stands for; sets the number of threads, too.

    Raises
    ------
    UsageError
        For a device that torch does not know or cannot reach.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def random_input(text: str, samples: int, device: str) -> Tensor:
    """A batch of normal noise of a shape given as ``3x224x224``.

    Raises
    ------
    UsageError
        If the text is no shape.
    """
    try:
        shape = [int(size) for size in text.lower().split("x")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise UsageError(f"--input {text!r} is no shape: write the sizes of one sample, as 3x224x224")
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0)).to(device)


def first_batch(batches: Iterable[Any], samples: int | None, name: str) -> Any:
    """``samples`` samples from the first batch, repeated if it has fewer; None for the batch as it is.

    Raises
    ------
    UsageError
        If there is no batch.
    """
    for batch in batches:
        return batch if samples is None else resized(batch, samples)
    raise UsageError(f"data {name!r} is empty")


def training_batches(text: str, device: str) -> Iterable[Any]:
    """The batches that ``--train`` names, fit for training.

    Raises
    ------
    UsageError
        If the reference cannot be used, there is no length or no batch, or batches have another form than training
        takes.
    """
    batches = load_data(text, purpose="training", device=device)
    try:
        length(batches, needed=True)
        split(first_batch(batches, None, text))
    except TypeError as error:
        raise UsageError(f"--train {text!r} cannot be trained on: {error}") from error
    return batches


def chosen_methods(
    name: str,
    calibrated: bool,
    multiple_of: int | None = None,
    *,
    share: bool = False,
    sparsity: Sparsity = Sparsity(),  # noqa: B008 (frozen)
    filters: Filters = Filters(),  # noqa: B008 (frozen)
) -> list[Method]:
    """The methods that ``--method`` names.

    Parameters
    ----------
    share
        With those for layers that share a factor: the first or the second, and for ``joint`` both at once too.
    sparsity
        Of low rank plus sparse. A share that is given leaves out low rank alone.
    filters
        Of principal filters, which leave out low rank unless it is asked for.

    Raises
    ------
    UsageError
        For an unknown name, or a method that needs data where there is none.
    """
    if name not in METHODS:
        raise UsageError(f"--method {name!r} is not known; choose from {', '.join(METHODS)}")
    if name in {"activation-svd", FILTERS} and not calibrated:
        raise UsageError(f"--method {name} needs calibration batches: give --data")
    kinds = METHODS[name] if calibrated else (WeightSVD,)
    shares = () if not share else ("left", "right", "both") if name == "joint" else ("left", "right")
    with usage():
        alone: list[Method] = [kind(multiple_of=multiple_of) for kind in kinds]  # type: ignore[call-arg]
        if name == METHOD:
            alone = [*(alone if sparsity.share is None else []), sparsity.method(multiple_of)]
        elif name == FILTERS:
            alone = [filters.method(multiple_of), *(alone if filters.with_low_rank else [])]
        return alone + [JointSVD(part, multiple_of=multiple_of) for part in shares]


def locate(model: nn.Module, skip: Sequence[str] | None, only: Sequence[str] | None) -> Sites:
    """The sites of a model.

    Raises
    ------
    UsageError
        If a pattern matches nothing, or nothing is left to compress.
    """
    with usage():
        sites = find(model, skip=list(skip or ()), only=list(only or ()))
    if not sites.sites:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in sites.skipped[:3])
        raise UsageError(f"there is no layer to compress ({reasons or 'the model has no linear layer or convolution'})")
    return sites


def prepared(
    out: Output,
    model: nn.Module,
    sites: Sites,
    *,
    batches: Iterable[Any] | None,
    example: Any,
    groups: Wanted = False,
    weigh: bool = False,
    latency: Latency | None = None,
) -> Prepared:
    """Calibrate sites, time the network, and say which layers may share factors.

    Parameters
    ----------
    batches
        For calibration; without them the example teaches the input shapes, and without that there are no MACs.
    groups
        Layers that may share factors.
    weigh
        Collect what an error at each layer does to the outputs, as :func:`spectrim.compress` does.
    """
    offer(sites, groups)  # what cannot be carried out is refused before the batches are read
    found = Prepared(sites)
    with out.progress() as report:
        if batches is not None or example is not None:
            found = prepare(
                model, sites, [example] if batches is None else batches, statistics=batches is not None,
                sensitivity=weigh, latency=latency or False, progress=report,
            )  # fmt: skip
    return dataclasses.replace(found, sites=offer(found.sites, groups))


def table_of(out: Output, known: Prepared, methods: Sequence[Method], *, guard: bool = False) -> Candidates:
    """What methods offer for a network that is prepared."""
    with out.progress() as report:
        return tabulate(
            known.sites, methods, latency=known.latency, dense_latency=known.dense_latency, guard=guard, progress=report
        )


def carry_out(model: nn.Module, known: Prepared, table: Candidates, plan: Plan) -> Result:
    """Apply a plan to a model that has been prepared."""
    small = apply(model, known.sites, plan, known.batches)
    skipped = tuple((s.name, s.kind, s.reason) for s in known.sites.skipped)
    return Result(small, plan, Report(plan, skipped, known.sites.samples), table, known.sites)


def skipped_values(sites: Sites) -> list[dict[str, str]]:
    """What is left alone, as JSON values."""
    return [{"name": each.name, "kind": each.kind, "reason": each.reason} for each in sites.skipped]


def print_skipped(out: Output, sites: Sites) -> None:
    """A table of what is left alone, for people."""
    if sites.skipped:
        rows = [tuple(each.values()) for each in skipped_values(sites)]
        out.table(["layer", "kind", "reason"], rows, title="Skipped")
