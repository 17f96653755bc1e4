"""Plans that remove channels: costs do not add up there, so the table is made anew in a few steps toward the budget.

A layer costs what its inputs times its outputs cost, and removals cut both; what a low-rank pair costs depends on the
channels beside it. A table holds what each option costs *while all others stay as they are*. So a plan is made by
successive linear programs: each step goes a part of the way under a table of the costs around the last plan. What the
network really costs is counted from the layers as they would be, and the last step meets the budget in that count.
Errors are those of the dense network throughout, and nothing that a step removed is lost to the next one.

The other methods' choices are made once more at the end, for the layers that remain after the removals of each step,
from no removals on and as long as that gains; the plan that loses least is taken. What the removals lose and what is
lost in the layers they leave do not quite add up, so a trial (:class:`Judging`) may measure it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from spectrim.cost.counted import Cost, known
from spectrim.cost.latency import Latency
from spectrim.cost.whole import Costs, Network, Picks
from spectrim.errors import InfeasibleBudgetError, PlanError
from spectrim.linalg.bisection import last_number
from spectrim.methods import Method
from spectrim.network.choices import DENSE, ChannelsChoice, Choice
from spectrim.network.coupling import Coupling
from spectrim.network.printing import count
from spectrim.network.sites import Sites
from spectrim.progress import Progress, reports, silent, told
from spectrim.search import entries
from spectrim.search.remaining import Asking, Remaining, asked_once
from spectrim.selection.budget import Budget, BudgetLike
from spectrim.selection.candidates import Candidates, Option, Row
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import Selector, exact, select
from spectrim.tables import tabulate

log = logging.getLogger(__name__)

# Halvings of the interval in which the limit for the last table lies.
_HALVINGS = 12
# Tables on the way to the budget. One is enough where no layer loses channels on both sides and nothing else competes.
_STEPS = 4
# Further tables around the plan that should meet the budget, where nothing else competes.
_MORE = 6
# Plans with more removals that are made after one that no later one has beaten.
_PATIENCE = 2
_SLACK = 1e-9


class TooMuchLostError(PlanError):
    """No plan can be expected to lose as little as was asked for; carries the ``loss`` that its table predicts."""

    def __init__(self, loss: float, most: float) -> None:
        super().__init__(f"the table predicts a loss of {loss:.4g}, and no more than {most:.4g} is asked for")
        self.loss = loss


class OutOfTimeError(PlanError):
    """The time to look for a plan is over."""


@dataclass(frozen=True)
class Judging:
    """How plans that mix methods are compared.

    Attributes
    ----------
    judge
        How bad a plan is; by default what it predicts that it loses.
    most
        Loss above which a plan is not worth finishing.
    over
        Whether the time to look for a better plan is over.
    needed
        Whether a plan must be found however long that takes.
    """

    judge: Callable[[Plan], float] = attrgetter("loss")
    most: float = math.inf
    over: Callable[[], bool] = lambda: False
    needed: bool = True

    def ending(self, progress: Progress = silent) -> Progress:
        """Progress that raises OutOfTimeError where more is to do and no time is left, unless a plan is needed."""

        def tell(what: str, done: int, total: int | None) -> None:
            progress(what, done, total)
            if done != total and not self.needed and self.over():
                raise OutOfTimeError("the time to look for a plan is over")

        return tell


BY_TABLE = Judging()


@reports
def select_in_steps(
    sites: Sites,
    methods: Sequence[Method],
    budget: BudgetLike,
    *,
    selector: Selector = exact,
    latency: Latency | None = None,
    dense_latency: float | None = None,
    costs: Mapping[str, Cost] | None = None,
    guard: bool = False,
    table: Candidates | None = None,
    asking: Asking | None = None,
    trial: Judging = BY_TABLE,
    progress: Progress | bool | None = None,
) -> tuple[Plan, Candidates]:
    """Choose channels to remove, and what to do with the layers that remain.

    Parameters
    ----------
    sites
        Coupled (:func:`spectrim.couple`) and calibrated.
    methods
        At least one that removes channels; others compete with it in every step.
    budget
        For the whole network.
    latency, dense_latency, costs, guard
        As for :func:`spectrim.tabulate`.
    table
        What an earlier call returned for the same sites and methods, to choose under another budget.
    asking
        How methods are asked, by what is left of axes that lost channels; once for each layer by default.
    trial
        How plans are compared where several methods are mixed; by default by what they predict that they lose.

    Returns
    -------
    plan, table
        A plan for the dense network, and the table around the dense network. The plan's ``facts`` hold the number of
        steps.

    Raises
    ------
    InfeasibleBudgetError
        If the budget cannot be met; carries the lowest cost reached.
    OutOfTimeError
        If the trial's time is over before there is a plan, and none is needed.
    TooMuchLostError
        If mixed choices under the budget lose more by the table than the trial lets ``most``.
    """
    others = [method for method in methods if not method.removes_channels]
    if sites.groups:
        raise ValueError(
            f"layers that share factors ({next(iter(sites.groups))!r}) would lose different channels: remove channels "
            "without groups, or share factors in the network that is left"
        )
    asking = functools.partial(asked_once, {}) if asking is None else asking
    if table is None:
        table = tabulate(
            sites, methods, latency=latency, dense_latency=dense_latency, costs=costs, guard=guard,
            curve=asking({}), progress=trial.ending(told(progress)),
        )  # fmt: skip
    network = Network(sites, known(sites, costs), methods, latency, dense_latency)
    dense = network.cost()
    stated = Budget.of(budget).limits(dense)
    limits = _binding(stated, dense)
    steps = _STEPS if others or _shares_layers(sites.couplings) else 1
    check_reachable(table, network, limits)
    trail = _walked(table, network, limits, selector, steps, 0 if others else _MORE)
    picks, taken = trail[-1], len(trail) - 1
    if others and (lost := _lost(table, picks)) > trial.most:
        raise TooMuchLostError(lost, trial.most)

    def within() -> Picks:
        fits = _fits(network.cost(picks), limits)
        return picks if fits else _within(_around(table, network, picks), limits, selector, network)

    remaining = Remaining(table, others, network, guard, asking)

    def finished(picks: Picks, progress: Progress = silent) -> Plan:
        left = remaining.after(_removals(picks), progress) if others else None
        try:
            return _finished(picks, table, left, network, limits, selector)
        except InfeasibleBudgetError as error:
            # What is left after the removals is no dense network.
            raise error.of(dense[error.cost]) from None

    if others:
        plan = _best(trail, finished, trial) or finished(within(), trial.ending())
    else:
        plan = finished(_spent(table, within(), limits, network))
    name = getattr(selector, "__name__", str(selector))
    plan = dataclasses.replace(
        plan,
        selector=f"{name}, {count(taken, 'step')}",
        facts={**plan.facts, "steps": taken},
        dense_costs=dense,
        budget=stated,
        bound=None,
    )
    return plan, table


def _binding(stated: Costs, dense: Costs) -> Costs:
    """The limits without those on what the dense network costs nothing of, which is within any."""
    limits = {cost: limit for cost, limit in stated.items() if dense[cost]}
    if not limits:
        raise ValueError(f"the dense network has no {' and no '.join(stated)} that a budget could limit")
    return limits


def _walked(
    table: Candidates, network: Network, limits: Mapping[str, float], selector: Selector, steps: int, more: int
) -> list[Picks]:
    """What is picked from one table to the next: in equal ratios from the dense network to the budget in so many
    ``steps``, then up to so many ``more`` around the plan until it stays."""
    dense = network.cost()
    trail: list[Picks] = [{}]
    for step in range(1, steps + more + 1):
        share = min(step / steps, 1.0)
        goals = {c: min(dense[c], dense[c] * (limits[c] / dense[c]) ** share) for c in limits}
        before, picks = trail[-1], _chosen(_around(table, network, trail[-1]), goals, selector)
        trail.append(picks)
        if step >= steps and (picks == before or (steps == 1 and _fits(network.cost(picks), limits))):
            break
    return trail


def _around(table: Candidates, network: Network, picks: Picks) -> Candidates:
    """The table with the costs of every option while all others stay as they were picked."""

    def around(row: Row, option: Option) -> Option:
        return dataclasses.replace(option, costs=network.estimate(row.site, {**picks, row.site: option.choice}))

    rows = tuple(dataclasses.replace(row, options=tuple(around(row, o) for o in row.options)) for row in table.rows)
    return dataclasses.replace(table, rows=rows, fixed=network.fixed((row.site for row in rows), picks))


def _chosen(table: Candidates, goals: Costs, selector: Selector) -> Picks:
    """The choices of a plan under the table; the cheapest if none meets the goals."""
    try:
        plan = select(table, Budget.absolute(goals), selector)
        return {entry.site: entry.choice for entry in plan if not entry.choice.is_dense}
    except InfeasibleBudgetError:
        log.debug("no selection within the goals of this step: the cheapest choices are taken")
        # Around a plan the table knows of smaller steps only.
        return _cheapest(table, *goals)


def _within(table: Candidates, goals: Costs, selector: Selector, network: Network) -> Picks:
    """The choices that use most of the goals, counted as the network really is."""

    @functools.cache
    def at(share: float) -> Picks:
        return _chosen(table, {c: goals[c] * share for c in goals}, selector)

    share = last_number(lambda share: _fits(network.cost(at(share)), goals), 0.0, 1.0, _HALVINGS)
    return at(share) if share else _cheapest(table, *goals)


def _cheapest(table: Candidates, *names: str) -> Picks:
    """The option of every row that costs least, of several costs in the geometric mean."""

    def price(option: Option) -> float:
        return sum(math.log(max(option.costs[name], 1e-9)) for name in names)

    least = (min(row.options, key=price) for row in table.rows)
    return {row.site: o.choice for row, o in zip(table.rows, least, strict=True) if not o.choice.is_dense}


def check_reachable(table: Candidates, network: Network, limits: Costs) -> None:
    """Raise InfeasibleBudgetError if not even the smallest network meets the budget."""
    dense = network.cost()
    for cost, limit in limits.items():
        picks, lowest = _cheapest(table, cost), dense[cost]
        for _ in range(_MORE):
            # What is cheapest at a layer depends on the channels that it is left with.
            amount = network.cost(picks)[cost]
            if amount <= limit * (1 + _SLACK):
                break
            lowest = min(lowest, amount)
            before, picks = picks, _cheapest(_around(table, network, picks), cost)
            if picks == before:
                raise InfeasibleBudgetError(cost, limit, lowest, dense[cost], skipped=table.left_alone(cost))
        else:
            raise InfeasibleBudgetError(cost, limit, lowest, dense[cost], skipped=table.left_alone(cost))


def _spent(table: Candidates, picks: Picks, limits: Costs, network: Network) -> Picks:
    """Give channels back as long as the budget allows, those first that gain most for what they cost."""
    rows = [row for row in table.rows if row.site in picks]
    over: set[tuple[str, Choice]] = set()

    def better(row: Row, total: Costs) -> Iterator[tuple[float, str, Choice]]:
        option = next(o for o in row.options if o.choice == picks[row.site])
        now = network.estimate(row.site, picks)
        for other in row.options:
            gain = row.loss(option) - row.loss(other)
            then = network.estimate(row.site, {**picks, row.site: other.choice})
            change = {c: then[c] - now[c] for c in limits}
            refused = (row.site, other.choice) in over
            if gain > 0 and not refused and all(total[c] + change[c] <= limits[c] * (1 + _SLACK) for c in limits):
                price = sum(change[c] / limits[c] for c in limits)
                yield gain / max(price, 1e-12), row.site, other.choice

    while True:
        total = network.cost(picks)
        widening = max((pair for row in rows for pair in better(row, total)), key=lambda pair: pair[0], default=None)
        if widening is None:
            return picks
        wider = {**picks, widening[1]: widening[2]}
        # Changes of times are estimates.
        if _fits(network.cost(wider), limits):
            picks = wider
        else:
            over.add((widening[1], widening[2]))


def _best(trail: Sequence[Picks], finished: Callable[[Picks, Progress], Plan], trial: Judging) -> Plan | None:
    """The best plan that removes what a step on the way removed and meets the budget by the other methods, if any does.

    From nothing on, until more removals have gained nothing twice, or no time is left.
    """
    best: tuple[float, Plan] | None = None
    worse = 0
    for picks in {frozenset(_removals(picks).items()): picks for picks in trail}.values():
        if best is not None and trial.over():
            break
        try:
            plan = finished(picks, trial.ending())
        except InfeasibleBudgetError:
            continue
        except OutOfTimeError:
            if best is None:
                raise
            break
        trial = dataclasses.replace(trial, needed=False)  # there is a plan
        lost = trial.judge(plan)
        log.info("%s fewer channels: %.4g lost", count(len(_removals(picks)), "group"), lost)
        if best is None or lost < best[0]:
            best, worse = (lost, plan), 0
        elif (worse := worse + 1) == _PATIENCE:
            break
    return best and best[1]


def _lost(table: Candidates, picks: Picks) -> float:
    """What the picks lose by the table."""
    rows = [(row, option) for row in table.rows for option in row.options if option.choice == picks.get(row.site)]
    return sum(row.loss(option) for row, option in rows)


def _removals(picks: Picks) -> dict[str, ChannelsChoice]:
    return {name: choice for name, choice in picks.items() if isinstance(choice, ChannelsChoice)}


def _finished(
    picks: Picks,
    table: Candidates,
    left: Candidates | None,
    network: Network,
    limits: Costs,
    selector: Selector,
) -> Plan:
    """The plan of the layers that remain, from a table of what is ``left`` if there is one, and of the removals."""
    removals = _removals(picks)
    if left is not None:
        plan = select(left, Budget.absolute(limits), selector)
        of_layers = [dataclasses.replace(e, dense_costs=network.row(e.site)) for e in plan]
    else:
        plan = Plan((), network.cost(picks), {}, limits, facts=table.facts)
        of_layers = entries.layers(network, {name: len(choice.kept) for name, choice in removals.items()})
    of_channels, losses = [], [plan.loss]
    for coupling in network.sites.couplings:
        choice, error = removals.get(coupling.name, DENSE), 0.0
        # Channels that are too few for any method to remove some are no row of the table.
        if not choice.is_dense:
            row = table[coupling.name]
            option = next(option for option in row.options if option.choice == choice)
            error = float(option.error)
            losses.append(row.loss(option))
        of_channels.append(entries.channels(network, coupling, choice, error))
    used = {choice.method for choice in removals.values()}
    methods = {name: record for name, record in table.methods.items() if name in used}
    return dataclasses.replace(
        plan,
        entries=(*of_layers, *of_channels),
        unit=table.unit,
        loss=sum(losses),
        methods={**plan.methods, **methods},
    )


def _fits(costs: Mapping[str, float], goals: Mapping[str, float]) -> bool:
    return all(costs[c] <= goals[c] * (1 + _SLACK) for c in goals)


def _shares_layers(couplings: Sequence[Coupling]) -> bool:
    """Whether a layer loses channels of two kinds, or on both sides."""
    touched = [axis for c in couplings for axis in {(side.name, side.axis) for side in c.sides}]
    return len(touched) != len({name for name, _ in touched})
