"""Ranks from one SVD rate, as the paper of joint decomposition sets them, instead of from a table.

A rate of 0.04 gives every layer, decomposed alone, a rank of 4 % of its width. Where layers share a factor, the rank is
the one at which their factors have as many parameters as the pairs of the separate layers would have
(Chen et al. 2021, section IV, and the released code).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spectrim.cost import counted
from spectrim.cost.whole import Network
from spectrim.errors import MissingMomentsError
from spectrim.linalg import response
from spectrim.linalg.unfold import Unfolding, unfold, unfolding
from spectrim.methods import JointSVD, Method, WeightSVD, statistics
from spectrim.methods.base import WEIGHT_ENERGY, full_rank
from spectrim.methods.joint_layers import compatible
from spectrim.network.choices import DENSE, LowRankChoice, SharedChoice
from spectrim.network.groups import group
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Group, Site, Sites
from spectrim.selection.candidates import Candidates, Option, Row, TableRows
from spectrim.selection.plan import Plan, make_plan

# Rounds after which the error of "both" is taken; the fit that is carried out has more.
_SWEEPS = 2
# What is shared by a scheme, and on which side the layers of a group must agree.
_SCHEMES: dict[str, tuple[str, str] | None] = {
    "svd": None,
    "rjsvd-1": ("right", "right"),
    "rjsvd-2": ("right", "both"),
    "ljsvd": ("left", "left"),
    "bi-jsvd": ("both", "both"),
}


@dataclass(frozen=True, eq=False)
class Assignment:
    """The choice that a rate leads to at one site, or at the site of several layers.

    Attributes
    ----------
    layers
        What the choice turns the layers into, for costs.
    """

    site: Site
    method: Method
    choice: LowRankChoice | SharedChoice

    @property
    def layers(self) -> Sequence[LayerSpec]:
        return self.method.layers(self.site, self.choice)


def at_rate(
    sites: Sites,
    rate: float,
    scheme: str = "rjsvd-1",
    *,
    proportion: float = 0.5,
    unfolding: str = "height-first",
) -> Plan:
    """The paper's plan: every site decomposed, at ranks that follow from one rate.

    Parameters
    ----------
    sites
        The sites to decompose, such as ``spectrim.network.groups.residual(spectrim.find(model))``; those of the paper
        have not been calibrated. Groups are those of ``sites.groups``, of nested ones the largest that fits the scheme;
        without any, the repeated modules that :func:`spectrim.group` finds by their names and channels.
    rate
        Rank of a layer alone as a share of its output channels, or of the fewer channels for a 1 x 1 kernel or linear
        layer; above 0, at most 1. The paper has 0.04 and 0.08 for CIFAR.
    scheme
        ``"svd"``: every layer alone. ``"rjsvd-1"``: the second factor is shared, also by layers of another input depth.
        ``"rjsvd-2"``: without these. ``"ljsvd"``: the first factor is shared. ``"bi-jsvd"``: a part of the rank each.
        Layers that cannot join are decomposed alone.
    proportion
        Left-shared share of the rank for ``"bi-jsvd"``.
    unfolding
        Of kernels larger than 1 x 1; the paper's is ``"height-first"``.

    Returns
    -------
    Plan
        For :func:`spectrim.apply`, with the error of every entry and the costs of the whole network. The error of
        ``"bi-jsvd"`` is that after two rounds of its alternation; what is carried out loses no more.

    Raises
    ------
    ValueError
        For an unknown scheme, a rate or proportion out of range, or an unfolding that a kernel does not have.
    MissingMomentsError
        If a group is calibrated, but its layers do not hold what the shared factor is fitted to.
    """
    assigned = choices_at_rate(sites, rate, scheme, proportion=proportion, unfolding=unfolding)
    joined = {a.site.name: a.site.members for a in assigned if a.site.members}
    methods = {a.method.name: a.method for a in assigned}
    network = Network(dataclasses.replace(sites, groups=joined), counted.known(sites), tuple(methods.values()))
    picked = {a.site.name: a.choice for a in assigned}
    options = {a.site.name: Option(a.choice, _error(a), network.row(a.site.name, picked)) for a in assigned}

    def row(name: str, members: tuple[str, ...] = ()) -> Row:
        kind = sites[members[0] if members else name].spec.kind
        dense = Option(DENSE, 0.0, network.row(name))
        offered = (dense, options[name]) if name in options else (dense,)
        return Row(name, f"{len(members)} x {kind}" if members else kind, offered, members=members)

    rows = [*(row(site.name) for site in sites), *(row(*group) for group in joined.items())]
    units = {statistics.error_unit(site) if site.calibrated else WEIGHT_ENERGY for site in sites}
    if len(units) > 1:
        raise ValueError("some of the sites are calibrated and some are not, so that their errors have different units")
    table = Candidates(
        TableRows(rows),
        network.fixed(row.site for row in rows),
        units.pop() if units else WEIGHT_ENERGY,
        methods={name: method.record() for name, method in methods.items()},
    )
    picks = {n: 1 for n, row in enumerate(rows) if row.site in options}
    return make_plan(table, picks, budget={}, selector="at_rate")


def choices_at_rate(
    sites: Sites,
    rate: float,
    scheme: str = "rjsvd-1",
    *,
    proportion: float = 0.5,
    unfolding: str = "height-first",
) -> tuple[Assignment, ...]:
    """The choices of :func:`at_rate` without their errors: nothing is decomposed.

    The parameters and exceptions are those of :func:`at_rate`. Costs are functions of ``assignment.layers``.
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; expected one of {', '.join(map(repr, _SCHEMES))}")
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate!r}; expected a share of the full width, above 0 and at most 1")
    if not 0 <= proportion <= 1:
        raise ValueError(f"proportion is {proportion!r}; expected a share from 0 to 1")
    names = [unfolding, *(["channel"] if any(math.prod(site.spec.kernel) == 1 for site in sites) else [])]
    unfoldings = tuple(dict.fromkeys(names))
    single = WeightSVD(unfoldings=unfoldings, multiple_of=1)
    asked = _SCHEMES[scheme]
    assignments: list[Assignment] = []
    covered: set[str] = set()
    if asked is not None:
        share, agree = asked
        joint = JointSVD(share, proportion=proportion, unfoldings=unfoldings, multiple_of=1)
        for site in _groups(sites, agree):
            covered.update(spec.name for spec in site.layers)
            assignments.append(Assignment(site, joint, _joint_choice(joint, site, rate, unfolding)))
    for site in sites:
        if site.name not in covered:
            how = _split(site.spec, unfolding)
            rank = min(_whole(rate * _width(site.spec)), full_rank(site.spec, how))
            choice = single.choice(site, how, max(1, rank), bias=site.spec.bias or site.calibrated)
            assignments.append(Assignment(site, single, choice))
    return tuple(assignments)


def _groups(sites: Sites, agree: str) -> Iterator[Group]:
    """The groups whose layers agree, the largest first, none in two of them."""
    known = sites
    if not sites.groups:
        # By names and channels alone, as the paper does: in some networks the first layer of a stage still sees the
        # resolution of the stage before, and would be left out for it.
        unseen = tuple(dataclasses.replace(layer, spec=layer.spec.at(())) for layer in sites)
        grouped = group(dataclasses.replace(sites, sites=unseen), rules=("repeated",), nested=False)
        known = dataclasses.replace(sites, groups=grouped.groups)
    taken: set[str] = set()
    for site in sorted(known.joint(), key=lambda site: -len(site.layers)):
        names = {spec.name for spec in site.layers}
        if not names & taken and compatible(site.layers, agree):
            taken |= names
            yield site


def _joint_choice(joint: JointSVD, site: Group, rate: float, name: str) -> SharedChoice:
    """The ranks at which shared factors have the parameters of separate ones."""
    how = _split(site.layers[0], name)
    biased = site.calibrated or any(spec.bias for spec in site.layers)
    first, second = how.sizes(site.layers[0].kernel)
    rows = [spec.shape[2] * first for spec in site.layers]
    columns = [spec.shape[1] * second for spec in site.layers]
    widths = [_width(spec) for spec in site.layers]
    separate = sum(width * (a + b) for width, a, b in zip(widths, rows, columns, strict=True))

    def rank(shared: int, separate_sizes: list[int], part: float = 1.0) -> int:
        return _whole(rate * part * separate / (shared + sum(separate_sizes)))

    full = joint.full_rank(site, how)
    if joint.share != "both":
        shared = rank(columns[0], rows) if joint.share == "right" else rank(rows[0], columns)
        return joint.choice(site, how, min(max(1, shared), full), bias=biased)
    left = min(rank(rows[0], columns, joint.proportion), full)
    right = min(rank(columns[0], rows, 1 - joint.proportion), full)
    if not left + right:
        left, right = (1, 0) if joint.proportion > 0.5 else (0, 1)
    return joint.choice(site, how, left + right, left_rank=left, bias=biased)


def _split(spec: LayerSpec, name: str) -> Unfolding:
    return unfolding(spec.kernel, "channel" if math.prod(spec.kernel) == 1 else name)


def _width(spec: LayerSpec) -> int:
    """What the rate is a share of."""
    _, outputs, inputs, *_ = spec.shape
    return min(inputs, outputs) if math.prod(spec.kernel) == 1 else outputs


def _whole(value: float) -> int:
    """Rounded down, but not from just below a whole number that rounding errors have missed."""
    return int(value * (1 + 1e-12))


def _error(assigned: Assignment) -> float:
    """Share of the energy that the choice loses, layers counting as in the table."""
    site, method, choice = assigned.site, assigned.method, assigned.choice
    if not site.members:
        every = dataclasses.replace(method, multiple_of=choice.rank, to_full_rank=True)
        curve = every.curve(site)
        for offered, error in zip(curve.choices, curve.errors, strict=True):
            if offered.cut == choice.cut:
                return error
        raise MissingMomentsError(f"site {site.name!r}: calibration kept nothing to measure {str(choice)!r} by")
    lost = whole = 0.0
    few = dataclasses.replace(method, sweeps=_SWEEPS)
    for part, made in zip(site.parts, few.factorize(site, choice).dense(), strict=True):
        how = unfolding(part.spec.kernel, choice.unfolding)
        weight = statistics.output_weight(part)
        before = response.mix(unfold(part.weight, how), weight)
        missing = before - response.mix(unfold(made, how), weight)
        seen = statistics.Patches.of(part, how)
        if seen is None:
            total, gone = float(before.square().sum()), float(missing.square().sum())
        else:
            total = float(response.total_energy(before, seen.metric).sum())
            gone = float(response.total_energy(missing, seen.metric).sum())
        scale = statistics.scale(part, total)
        whole += scale
        lost += scale * gone / max(total, 1e-300)
    return lost / max(whole, 1e-300)
