"""The verb tabulate: what every choice at every site would lose and cost."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from spectrim.cost import counted
from spectrim.cost.latency import Latency
from spectrim.cost.whole import Network
from spectrim.errors import called_as
from spectrim.methods import (
    ActivationSVD,
    ActivationTucker2,
    Curve,
    JointSVD,
    Method,
    TiedSVD,
    WeightSVD,
    on_offer,
)
from spectrim.methods.statistics import error_unit, shared
from spectrim.network.choices import DENSE, Choice
from spectrim.network.sites import Channels, Group, Site, Sites, Tied
from spectrim.progress import Progress, reports, told
from spectrim.selection.candidates import Candidates, Option, Row, TableRows

log = logging.getLogger(__name__)

Asked = Callable[[Method, Site], Curve]
"""How a method is asked what it offers at a site."""


def own_curve(method: Method, site: Site) -> Curve:
    """What a method offers there, as it tells itself."""
    return method.curve(site)


# What is not known is written with as many digits as it may have: a file tells of it.
_UNKNOWN = 1.2345678901234567e-10


def unfitted_curve(method: Method, site: Site) -> Curve:
    """What costs least of a method, as if it lost next to nothing: nothing is fitted. Of channels what goes is real."""
    choices = None if method.removes_channels else method.leanest(site)
    if choices is None:
        return method.curve(site)
    return Curve(tuple(choices), (_UNKNOWN,) * len(choices), error_unit(site.parts[0]))


@reports
@called_as("Write tabulate(sites, methods), with the sites of find or calibrate", sites=Sites)
def tabulate(
    sites: Sites,
    methods: Method | Sequence[Method] | None = None,
    *,
    latency: Latency | None = None,
    dense_latency: float | None = None,
    costs: Mapping[str, counted.Cost] | None = None,
    guard: bool = False,
    dear: bool = False,
    curve: Asked = own_curve,
    progress: Progress | bool | None = None,
) -> Candidates:
    """What every method would lose and cost at every site, as one table.

    Parameters
    ----------
    sites
        From :func:`spectrim.calibrate`, or from :func:`spectrim.find` for data-free methods without MACs.
    methods
        By default ``ActivationSVD()`` and ``ActivationTucker2()`` after calibration, ``WeightSVD()`` before; where an
        embedding and a head have one weight also ``TiedSVD()``; with groups (:func:`spectrim.group`) also ``JointSVD``
        with a left- and a right-shared factor.
    latency
        Measures milliseconds as a further cost.
    dense_latency
        Milliseconds of the whole dense network, measured; what the sites do not explain counts as fixed. Without it
        the fixed part is that of the untouched layers alone.
    costs
        Further costs of your own by name: functions of layers that run one after the other.
    guard
        Drop options that are measured no faster than dense. Needs ``latency``.
    dear
        Keep options that save nothing in any cost.
    curve
        How a method is asked for a site; :meth:`Method.curve` by default.
    progress
        True for a bar, or a function called with what is being done, how much of it is done, and how much there is.

    Returns
    -------
    Candidates
        The dense option first in every row; options that save nothing in any cost are left out. Groups come after the
        sites, coupled channels last. The row of coupled channels costs what all layers that hold them cost together
        while nothing else changes; ``fixed`` is lower by as much, since those layers have rows of their own.

    Raises
    ------
    CalibrationError
        If a layer's weight or bias holds NaN or Inf.
    ValueError
        If methods report errors in different units, two different ones have the same name, or ``guard`` is asked for
        without ``latency``.
    """
    if guard and latency is None:
        raise ValueError("guard=True needs latency=Latency(...): it drops options that are measured slower than dense")
    sites.check_finite()
    chosen = default_methods(sites) if methods is None else on_offer(methods, groups=bool(sites.groups))
    chosen = [method for method in chosen if sites.tied or method.takes is not Tied]
    network = Network(sites, counted.known(sites, costs), chosen, latency, dense_latency)
    facts = latency.facts() if latency is not None else {}
    rows_of = list(_offers(sites, chosen, facts, curve, told(progress)))
    unit = _unit(curve for _, curves in rows_of for _, curve in curves)
    offered = [[pair for _, curve in curves for pair in _worth(network, site, curve, dear)] for site, curves in rows_of]
    network.prepare(
        ((site.name, choice) for (site, _), pairs in zip(rows_of, offered, strict=True) for choice, _ in pairs),
        functools.partial(told(progress), "measure"),
    )
    log.info("%d choices at %d sites", sum(map(len, offered)), len(rows_of))
    rows = [_row(network, site, pairs, curves, guard) for (site, curves), pairs in zip(rows_of, offered, strict=True)]
    return Candidates(
        TableRows(rows),
        network.fixed(row.site for row in rows),
        unit,
        methods={method.name: method.record() for method in chosen},
        facts=facts,
        skipped=network.left_alone(),
    )


def leanest(
    sites: Sites, methods: Sequence[Method], costs: Mapping[str, counted.Cost], facts: Mapping[str, Any]
) -> Candidates | None:
    """The choices of :func:`tabulate` that cost least, without what they lose: nothing is fitted.

    None where a method does not know its own.

    Parameters
    ----------
    costs
        Counted ones, which grow with ranks, densities and channels.
    facts
        Of the machine that the choices are for.
    """
    network = Network(sites, costs, methods)
    rows: list[Row] = []
    with counted.made_for(facts):
        for site in _every(sites, methods):
            offered: list[Choice] = []
            for method in methods:
                choices = method.leanest(site) if isinstance(site, method.takes) else ()
                if choices is None:
                    return None
                offered += choices
            pairs = list(_worth(network, site, Curve(tuple(offered), (0.0,) * len(offered), ""), dear=False))
            if offered or not isinstance(site, Group | Channels):
                rows.append(_row(network, site, pairs, [], guard=False))
    return Candidates(TableRows(rows), network.fixed(row.site for row in rows), "", skipped=network.left_alone())


def _every(sites: Sites, methods: Sequence[Method]) -> list[Site]:
    """What has a row in a table, in the order of the rows, where it can be made."""
    coupled = sites.coupled() if any(method.removes_channels for method in methods) else ()
    return [*sites, *sites.tied, *sites.joint(), *coupled]


def _offers(
    sites: Sites, methods: Sequence[Method], facts: Mapping[str, Any], curve: Asked, tell: Progress
) -> Iterator[tuple[Site, list[tuple[Method, Curve]]]]:
    """The rows of a table: sites, groups and coupled channels with what is on offer there."""
    every = _every(sites, methods)
    for done, site in enumerate(every):
        curves = _curves(site, methods, facts, curve)
        # A group that no method can join is nothing to choose.
        if not isinstance(site, Group | Channels) or any(curve.choices for _, curve in curves):
            yield site, curves
        tell("tabulate", done + 1, len(every))


def _curves(
    site: Site, methods: Sequence[Method], facts: Mapping[str, Any], curve: Asked = own_curve
) -> list[tuple[Method, Curve]]:
    """What the methods that are for such a site offer there, for a machine of these facts."""
    with counted.made_for(facts), shared():
        return [(method, curve(method, site)) for method in methods if isinstance(site, method.takes)]


def _unit(curves: Iterable[Curve]) -> str:
    """The unit of all errors. Raises ValueError if there are several."""
    units = {curve.unit for curve in curves if curve.choices}
    if len(units) > 1:
        raise ValueError(
            f"methods report errors in different units ({', '.join(sorted(units))}); calibrate all sites, or use "
            "data-free methods only"
        )
    return next(iter(units), "")


def default_methods(sites: Sites) -> list[Method]:
    """Low rank: by data where every site holds moments, else by weights; joint ones with groups."""
    methods = low_rank(all(site.statistics for site in sites.layers))
    methods = [method for method in methods if sites.tied or method.takes is not Tied]
    return [*methods, JointSVD("left"), JointSVD("right")] if sites.groups else methods


def low_rank(calibrated: bool, *, multiple_of: int | None = None) -> list[Method]:
    """Low rank as it is on offer by default, for layers alone and for those of one weight."""
    tied = TiedSVD(multiple_of=multiple_of)
    if not calibrated:
        return [WeightSVD(multiple_of=multiple_of), tied]
    # By the data, low rank of the weight is never better at the same ranks than low rank of the responses.
    return [ActivationSVD(multiple_of=multiple_of), ActivationTucker2(multiple_of=multiple_of), tied]


def parted(table: Candidates, name: str) -> Candidates:
    """What one method offers of a table, and the dense options."""
    removes = any(row.of_channels and any(o.choice.method == name for o in row.options) for row in table.rows)
    rows: list[Row] = []
    fixed = dict(table.fixed)
    for row in table.rows:
        options = tuple(o for o in row.options if o.choice.is_dense or o.choice.method == name)
        if row.of_channels and not removes:
            # What the layers that hold channels cost is no longer counted twice.
            fixed = {cost: value + row.dense.costs[cost] for cost, value in fixed.items()}
        elif len(options) > 1 or not row.members:
            spectra = {key: values for key, values in row.spectra.items() if key.startswith(f"{name}/")}
            rows.append(dataclasses.replace(row, options=options, spectra=spectra))
    methods = {key: record for key, record in table.methods.items() if key == name}
    return dataclasses.replace(table, rows=TableRows(rows), fixed=fixed, methods=methods)


def merged(tables: Sequence[Candidates]) -> Candidates:
    """One table of what several tables of the same sites offer, each of other methods, at most one of channels.

    Raises
    ------
    ValueError
        If they report errors in different units.
    """
    units = {table.unit for table in tables if table.unit}
    if len(units) > 1:
        raise ValueError(f"tables report errors in different units ({', '.join(sorted(units))})")
    rows: dict[str, list[Row]] = {}
    for row in (row for table in tables for row in table.rows):
        rows.setdefault(row.site, []).append(row)
    whole = next((table for table in tables if any(row.of_channels for row in table.rows)), tables[0])
    # Groups come after the sites, coupled channels last.
    of_groups = [name for name, several in rows.items() if several[0].members]
    of_channels = [name for name, several in rows.items() if several[0].of_channels]
    singles = [name for name in rows if name not in {*of_groups, *of_channels}]
    return dataclasses.replace(
        whole,
        rows=TableRows(_together(rows[name]) for name in (*singles, *of_groups, *of_channels)),
        unit=units.pop() if units else "",
        methods={name: record for table in tables for name, record in table.methods.items()},
    )


def _together(rows: Sequence[Row]) -> Row:
    """One row of rows of one site; losses are counted as in the first that offers anything."""
    first = next((row for row in rows if len(row.options) > 1), rows[0])
    options = (first.dense, *(option for row in rows for option in row.options[1:]))
    spectra = {name: values for row in rows for name, values in row.spectra.items()}
    return dataclasses.replace(first, options=options, spectra=spectra)


def retabulate(candidates: Candidates, sites: Sites, methods: Sequence[Method]) -> Candidates:
    """The same table for other weights: errors are computed again, costs are taken over.

    Parameters
    ----------
    candidates
        From :func:`tabulate`, with the same methods. Options that no method offers keep their errors.
    sites
        Those of the table, or some of them, with their present weights and moments; other rows stay as they are, and
        those of groups whose sites are not all there.
    """
    rows = list(candidates.rows)
    places = {row.site: number for number, row in enumerate(rows)}
    for site in [*sites, *(group for group in sites.joint() if group.name in places)]:
        row = rows[places[site.name]]
        curves = _curves(site, methods, candidates.facts)
        errors = iter([pair for _, curve in curves for pair in zip(curve.choices, curve.errors, strict=True)])
        options = [row.dense]
        for option in row.options[1:]:
            if option.choice.method:
                # The table holds a part of what the curves offer, in the same order.
                error = next((error for choice, error in errors if choice == option.choice), None)
                if error is None:
                    words = f"{option.choice.method}'s {str(option.choice)!r}"
                    raise ValueError(f"site {site.name!r}: the methods do not offer {words}, which the table has")
                option = Option(option.choice, error, option.costs)
            options.append(option)
        rows[places[site.name]] = dataclasses.replace(row, options=tuple(options), **_told_by(curves))
    return dataclasses.replace(candidates, rows=tuple(rows))


def _worth(network: Network, site: Site, curve: Curve, dear: bool) -> Iterator[tuple[Choice, float]]:
    """The choices of a curve that save something in a cost that is counted, or all ``dear`` ones, with their errors."""
    dense = network.counted(site.name)
    for choice, error in zip(curve.choices, curve.errors, strict=True):
        values = network.counted(site.name, {site.name: choice})
        if dear or any(values[name] < dense[name] for name in values):
            yield choice, error


def _row(
    network: Network,
    site: Site,
    offered: Sequence[tuple[Choice, float]],
    curves: list[tuple[Method, Curve]],
    guard: bool,
) -> Row:
    dense = Option(DENSE, 0.0, network.row(site.name))
    options = [Option(choice, error, network.row(site.name, {site.name: choice})) for choice, error in offered]
    if guard:
        options = [option for option in options if option.costs["latency"] < dense.costs["latency"]]
    return Row(
        site.name, site.kind, (dense, *options), **_told_by(curves), members=site.members,
        of_channels=isinstance(site, Channels),
    )  # fmt: skip


def _told_by(curves: Sequence[tuple[Method, Curve]]) -> dict[str, Any]:
    """What methods say of a row as a whole: spectra, what losing all of the site adds to the loss, what is missing."""
    spectra = {f"{method.name}/{name}": s for method, curve in curves for name, s in curve.spectra.items()}
    missing = "; ".join(curve.missing for _, curve in curves if curve.missing)
    scale = next((curve.scale for _, curve in curves if curve.choices), 1.0)
    return {"spectra": spectra, "scale": scale, "missing": missing}
