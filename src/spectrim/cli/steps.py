"""Steps that several commands take, and what they say of groups and of sparse layers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from spectrim.cli.common import Output, usage
from spectrim.cli.methods import JOINT, LOW_RANK, SPARSE, Methods
from spectrim.cli.options import SharingOptions
from spectrim.cli.references import UsageError
from spectrim.cli.subject import Subject
from spectrim.cli.values import read_groups
from spectrim.cost.runtimes import runtime_of
from spectrim.methods import LowRankPlusSparse, Method
from spectrim.methods.joint_layers import compatible
from spectrim.network.groups import group
from spectrim.network.printing import count, reasons
from spectrim.network.sites import Sites
from spectrim.nn.sparse.kernels import ChosenKernel, Kernel, choose_kernels
from spectrim.nn.sparse.packed import masked_layers
from spectrim.nn.watch.nesting import at_hand
from spectrim.pipeline.making import Making
from spectrim.preparation import Prepared, prepare
from spectrim.progress import Progress
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.tables import tabulate


def prepared(
    out: Output, work: Subject, sites: Sites, groups: Wanted = False, *, weigh: bool = False,
    known: Prepared | None = None, progress: Progress | None = None,
) -> Prepared:  # fmt: skip
    """Calibrate sites, time the network, and say which layers may share factors.

    Without calibration batches the example teaches the input shapes, and without that there are no MACs.

    Parameters
    ----------
    weigh
        Collect what an error at each layer does to the outputs, as :func:`spectrim.compress` does.
    known
        As for :func:`spectrim.preparation.prepare`.
    progress
        None for a bar of its own.
    """
    offer(sites, groups)  # what cannot be carried out is refused before the batches are read
    ready, calibrated = Prepared(sites), work.calibration is not None
    # Read once where networks are made: if a loader shuffles, the samples that are held out stay the same.
    batches = [work.example] if work.calibration is None else at_hand(work.calibration, alike=weigh)
    batches = batches if known is None or known.batches is None else known.batches
    with out.progress() if progress is None else contextlib.nullcontext(progress) as report:
        if calibrated or work.example is not None:
            ready = prepare(
                work.dense, sites, batches, statistics=calibrated, sensitivity=weigh and calibrated,
                latency=work.latency or False, sampling=work.sampling, forward=work.feed, progress=report,
                known=known,
            )  # fmt: skip
    return dataclasses.replace(ready, sites=offer(ready.sites, groups))


def table_of(out: Output, known: Prepared, making: Making) -> Candidates:
    """What methods offer for a network that is prepared."""
    with out.progress() as report:
        return tabulate(known.sites, making.methods, **dataclasses.replace(making, progress=report).priced(known))


def skipped_values(sites: Sites) -> list[dict[str, str]]:
    """What is left alone, as JSON values."""
    return [{"name": each.name, "kind": each.kind, "reason": each.reason} for each in sites.skipped]


def print_skipped(out: Output, sites: Sites) -> None:
    """All that is left alone, for people: every reason once, with the names that it is the reason for."""
    left = [(each.name, each.kind, each.reason) for each in sites.skipped]
    for said in reasons(left, "--json", most=len(left), names=len(left)):
        out.prose(said)


NONE_ALIKE = "no layers are alike enough to share factors, as far as their names, shapes and inputs tell"
Wanted = bool | Mapping[str, Sequence[str]]
"""True for the groups that the rules find, False for none, or names of layers by the name of the group."""


def wanted_groups(options: SharingOptions, methods: Methods, limited: Collection[str] = ()) -> Wanted:
    """What ``--share``, ``--groups`` and ``--method`` say together, where budgets limit these costs.

    What sharing saves is parameters and bytes: under other budgets it is hardly ever chosen, and costs time.
    """
    joint = next((name for name in (JOINT, "joint-svd") if name in methods), None)
    if options.share is False and joint is not None:
        raise UsageError(f"--method {joint} does not combine with --no-share: it is for layers that share factors")
    if options.groups is not None:
        return read_groups(options.groups)
    if options.share is None:
        usual = methods.names == (LOW_RANK,) and not {"parameters", "bytes"}.isdisjoint(limited)
        return usual or joint is not None
    return options.share


def offer(sites: Sites, wanted: Wanted) -> Sites:
    """The sites with the groups that are wanted."""
    if wanted is False:
        return sites
    if wanted is True:
        return group(sites)
    left = {skipped.name: skipped.reason for skipped in sites.skipped}
    for name, members in wanted.items():
        for member in members:
            if member not in sites:
                why = f"which is left alone: {left[member]}" if member in left else "which the model does not have"
                raise UsageError(f"--groups: group {name!r} names layer {member!r}, {why}")
    with usage("--groups"):
        found = group(sites, wanted)
    for name, members in found.groups.items():
        if not _alike(sites, members):
            specs = [sites[member].spec for member in members]
            each = ", ".join(f"{s.name!r} ({s.kind}, {s.in_channels} -> {s.out_channels})" for s in specs)
            raise UsageError(
                f"--groups: the layers of group {name!r} cannot share a factor: {each}; expected equal kernels and "
                "equal input or output channels"
            )
    return found


def planned_groups(plan: Plan, sites: Sites) -> Wanted:
    """The groups of a plan, so that the table has them too; False without any."""
    found = {entry.site: entry.members for entry in plan if len(entry.members) > 1 and entry.site not in sites}
    known = {name: members for name, members in found.items() if all(member in sites for member in members)}
    return {name: members for name, members in known.items() if _alike(sites, members)} or False


def _alike(sites: Sites, members: Sequence[str]) -> bool:
    specs = [sites[member].spec for member in members]
    return compatible(specs, "left") or compatible(specs, "right")


def check_patterns(methods: Iterable[Method], sites: Sites) -> None:
    """Refuse patterns of sparse weights that no layer can have."""
    for method in (each for each in methods if isinstance(each, LowRankPlusSparse)):
        for name in method.patterns:
            if not any(method.takes_pattern(name, layer.spec) for layer in sites):
                kinds = dict.fromkeys(f"{s.spec.kind}, {s.spec.in_channels} -> {s.spec.out_channels}" for s in sites)
                raise UsageError(f"--method {SPARSE}: pattern {name!r} fits no layer of the model ({'; '.join(kinds)})")


def fastest(model: nn.Module, example: Any, threads: int | None, runtime: str) -> tuple[ChosenKernel, ...]:
    """Let every layer with a sparse weight run as is fastest here, where the runtime runs the modules themselves
    (:func:`spectrim.nn.sparse.kernels.choose_kernels`)."""
    able = runtime_of(runtime).runs_modules and any(masked_layers(model))
    return choose_kernels(model, example, threads=threads) if able else ()


def kernel_values(chosen: Sequence[ChosenKernel]) -> list[dict[str, Any]]:
    """The kernels as JSON values."""
    return [
        {
            "layer": each.name,
            "kernel": each.kernel.value,
            "milliseconds": {kernel.value: ms for kernel, ms in each.milliseconds.items()},
        }
        for each in chosen
    ]


def kernel_notes(chosen: Sequence[ChosenKernel]) -> list[str]:
    """A sentence on how sparse layers were run, for people; none where there was nothing to choose."""
    if not chosen:
        return []
    packed = [each for each in chosen if each.kernel is not Kernel.DENSE]
    layers = f"{count(len(chosen), 'layer')} with a sparse weight"
    if not packed:
        return [f"Of {layers} none is faster here when its zeros are skipped: latency is that of dense kernels."]
    names = ", ".join(sorted({each.kernel.value.upper() for each in packed}))
    return [f"Of {layers} {len(packed)} skip their zeros ({names}), which was measured to be faster here."]
