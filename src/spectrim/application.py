"""The verb apply: a plan carried out on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.errors import PlanError
from spectrim.methods import Method, as_methods, from_record
from spectrim.network.choices import DENSE, ChannelsChoice
from spectrim.network.coupling import IN
from spectrim.network.factors import Factors, LowRank, SharedBasis
from spectrim.network.sites import Site, Sites
from spectrim.nn.build import build, skeleton
from spectrim.nn.channels.removal import Removal
from spectrim.nn.modules import Factored
from spectrim.nn.surgery import reestimate_batchnorm, replace_module
from spectrim.nn.watch.batches import checked_batches
from spectrim.nn.watch.calibrate import in_full
from spectrim.nn.watch.reconstruct import asymmetric_site, refit_second
from spectrim.progress import Progress, reports
from spectrim.selection.plan import Entry, Plan


@reports
def apply(
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    methods: Method | Sequence[Method] | None = None,
    reconstruct: bool = True,
    batchnorm: bool | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Carry out a plan on a copy of the model.

    Parameters
    ----------
    model
        The dense model that the sites were found in; it is left untouched.
    sites
        From :func:`spectrim.calibrate` for methods that use activations; with couplings (:func:`spectrim.couple`) for
        plans that remove channels.
    plan
        From :func:`spectrim.select`, or read from a file.
    batches
        Calibration batches, read several times. Needed for reconstruction and for BatchNorm.
    methods
        The methods the plan names, for methods of your own that a plan file cannot make again.
    reconstruct
        Factorise the layers in order of execution, each for the inputs that its already compressed predecessors
        deliver and the responses of the dense model (two partial forward passes over the batches a site). Without it
        every layer is factorised on its own.
    batchnorm
        Re-estimate BatchNorm statistics on the batches. By default where there was no reconstruction: factors fitted
        on their own shift the statistics, reconstructed ones have been fitted to them.
    forward
        Runs a model on a batch in another way.

    Returns
    -------
    nn.Module
        A new model of plain layers. The same plan, weights and batches give the same bits.

    Raises
    ------
    PlanError
        If the plan names a site the model does not have, or batches that can be read once only are given.
    """
    if batches is not None and iter(checked_batches(batches)) is batches:
        raise PlanError("batches are read several times; pass a list or a DataLoader, not an iterator")
    makers = _makers(plan, methods)
    _check(plan, sites)
    removed = {e.site: e.choice.kept for e in plan if isinstance(e.choice, ChannelsChoice)}
    removal = Removal.of(model, sites, removed)
    small, sites = removal.model, removal.sites
    layers = [entry for entry in plan if entry.site not in _channels(sites)]
    for entry in layers:
        if not entry.choice.is_dense:
            skeleton(entry.choice, [sites[name].spec for name in entry.sites])
    follow = batches is not None and reconstruct
    wanted = {name: entry for entry in layers for name in entry.sites}
    # A plan may name the channels alone; the layers that lose some are left dense then.
    wanted |= {
        site.name: Entry(site.name, site.spec.kind, DENSE, 0.0, {}, {})
        for site in sites
        if site.name in removal.changed and site.name not in wanted
    }
    shared: dict[str, _Shared] = {}
    todo = _steps(sites, {name: entry.choice.is_dense for name, entry in wanted.items()}, removal, refit=follow)
    for done, site in enumerate(todo):
        entry = wanted[site.name]
        choice = entry.choice
        whole = site.statistics.input is not None
        if entry.members and not choice.is_dense and entry.site not in shared:
            group = sites.together(entry.site, entry.members)
            shared[entry.site] = _Shared.made(group, makers[choice.method].factorize(group, choice))
        unheld = not whole and not choice.is_dense and not entry.members and makers[choice.method].reads_sketches
        narrowed = site.name in removal.changed and not entry.members
        if batches is not None and follow and (whole or unheld or narrowed):
            site = asymmetric_site(
                model,
                small,
                site,
                batches,
                outputs=removal.outputs(site.name),
                sketch=(unheld or narrowed) and not in_full(site.spec),
                forward=forward,
            )
        # A choice that was counted without a bias gets none, or the model would cost more than its plan.
        spare = None
        group = site if entry.site not in shared else shared[entry.site].site
        fitted = follow and (whole or unheld or narrowed)
        unbiased = not choice.is_dense and not any(s.bias for s in makers[choice.method].layers(group, choice))
        if unbiased and (fitted or narrowed):
            spare = site.bias
            site = dataclasses.replace(site, bias=None)
        if fitted and entry.site in shared:
            shared[entry.site].refit(makers[choice.method], site, entry.members.index(site.name))
        if choice.is_dense:
            removal.write(site)
        else:
            if entry.site in shared:
                factors = shared[entry.site].factors
                module = shared[entry.site].modules[entry.members.index(site.name)]
            else:
                factors = makers[choice.method].factorize(site, choice)
                (module,) = build(factors, site.layers, site.biases)
            replace_module(small, site.spec.names, module)
            if narrowed:
                removal.settle(site.name, spare)
            if batches is not None and follow and not (whole or unheld or narrowed) and _owns_second(factors):
                assert isinstance(module, Factored)
                refit_second(model, small, site, module, batches, forward=forward)
        progress("apply", done + 1, len(todo))
    if batches is not None and (batchnorm if batchnorm is not None else not follow):
        reestimate_batchnorm(small, batches, forward=forward)
    return small


@dataclass
class _Shared:
    """A group that is being carried out: its modules are made together, and fitted when the turn of each comes."""

    site: Site
    factors: Factors
    modules: tuple[nn.Module, ...]

    @classmethod
    def made(cls, site: Site, factors: Factors) -> _Shared:
        return cls(site, factors, build(factors, site.layers, site.biases))

    def refit(self, method: Method, part: Site, number: int) -> None:
        """Fit what one layer has of its own to its inputs and targets; the shared parameters stay the same objects."""
        self.factors = method.refit(part, self.factors, number)
        biases = list(self.site.biases)
        biases[number] = part.bias
        fresh = build(self.factors, self.site.layers, biases)[number]
        self.modules[number].load_state_dict(fresh.state_dict())


def _owns_second(factors: Factors) -> bool:
    """Whether the second layer of a pair is the layer's own and may be fitted to it alone."""
    return isinstance(factors, LowRank) or (isinstance(factors, SharedBasis) and not factors.ranks[1])


def _steps(sites: Sites, dense: Mapping[str, bool], removal: Removal, *, refit: bool) -> list[Site]:
    """Sites to change, in order. With reconstruction also dense layers that have a bias to correct the mean with.

    Only those after the first changed layer: before it, nothing has moved.
    """
    steps: list[Site] = []
    moved = False
    for site in sites:
        if site.name not in dense:
            continue
        biased = site.spec.bias or (removal.changed and removal.corrects(site.name))
        correctable = refit and biased and site.statistics.input is not None
        reads = (site.name, IN) in removal.axes
        if not dense[site.name] or (refit and reads) or (moved and correctable):
            steps.append(site)
        moved |= not dense[site.name] or reads
    return steps


def _channels(sites: Sites) -> set[str]:
    return {coupling.name for coupling in sites.couplings}


def _check(plan: Plan, sites: Sites) -> None:
    """Raise PlanError unless the plan is for these sites."""
    names = [name for entry in plan for name in entry.sites]
    missing = [e.site for e in plan if isinstance(e.choice, ChannelsChoice) and e.site not in _channels(sites)]
    if missing:
        raise PlanError(
            f"the plan removes channels {missing[0]!r}, which the sites do not have"
            + ("" if sites.couplings else "; find them with couple(model, sites, example) first")
        )
    known = {site.name for site in sites} | _channels(sites)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PlanError(f"the plan names sites that the model does not have: {', '.join(map(repr, unknown))}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(f"the plan names sites more than once: {', '.join(map(repr, twice))}")


def _makers(plan: Plan, methods: Method | Sequence[Method] | None) -> dict[str, Method]:
    makers = {method.name: method for method in as_methods(methods or ())}
    for entry in plan:
        choice, name = entry.choice, entry.choice.method
        if choice.is_dense:
            continue
        if name not in makers and name not in plan.methods:
            raise PlanError(f"site {entry.site!r} uses method {name!r}, which the plan does not describe")
        if name not in makers:
            makers[name] = from_record(plan.methods[name])
        if not isinstance(choice, makers[name].offers):
            kinds = f"{makers[name].offers.kind!r} choices, not {choice.kind!r} ones"
            raise PlanError(f"site {entry.site!r}: method {name} carries out {kinds}")
    return makers
