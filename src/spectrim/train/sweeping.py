"""Several budgets from one calibration and one table: each selected anew, carried out, judged, and trained if asked."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.cost import counted
from spectrim.cost.counted import Cost
from spectrim.cost.latency import Latency
from spectrim.errors import InfeasibleBudgetError, check_function, did_you_mean
from spectrim.methods import Method
from spectrim.network.files import check_folder, remove_abandoned
from spectrim.network.state_values import plain_tensors
from spectrim.network.tensor_files import digest_of_tensors
from spectrim.nn.agreement import Agreement, agreement, metric_of
from spectrim.nn.checkpoint import check_savable, save
from spectrim.nn.find import Which, check_loaded, check_model
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.layout import Mask, Where
from spectrim.nn.watch.nesting import at_hand
from spectrim.nn.watch.samples import contents
from spectrim.nn.watch.sampling import Sampling
from spectrim.pipeline import Result, check_selector, methods_on_offer
from spectrim.pipeline.making import Making
from spectrim.pipeline.shrinking import finished, shrink
from spectrim.preparation import Prepared, check_options, locate, prepare
from spectrim.progress import Progress, reports, told
from spectrim.search.judge import Judge
from spectrim.selection.budget import COSTS, OTHER_NAMES, Budget, BudgetLike, Limit
from spectrim.selection.candidates import Candidates
from spectrim.selection.front import Better, Sweep
from spectrim.selection.plan import Plan
from spectrim.selection.point import Judged, Point, standard_error, unit_of
from spectrim.selection.selectors import Selector, exact
from spectrim.tables import tabulate
from spectrim.train.loop import Evaluate
from spectrim.train.sweep_folder import MODEL, TUNING, SweepFolder
from spectrim.train.sweep_folder import files_of as files_of

log = logging.getLogger(__name__)

FRACTIONS = (0.8, 0.65, 0.5, 0.4, 0.33, 0.25, 0.2)
"""Shares of a cost that are swept where none are given, each about four fifths of the one before."""
Budgets = str | tuple[str, Sequence[float]] | Sequence[BudgetLike]
FineTune = Callable[[nn.Module, Path | None], Any]
_TUNED_WITH = ("a network", "a file for its checkpoint")
_TUNES = (
    "a function of both, as lambda small, file: spectrim.fine_tune(small, train_batches, teacher=model, "
    "checkpoint=file)"
)


@reports
def sweep(
    model: nn.Module,
    calibration: Iterable[Any],
    budgets: Budgets = "macs",
    *,
    methods: Method | Sequence[Method] | None = None,
    skip: Which | Iterable[Which] = (),
    only: Which | Iterable[Which] = (),
    groups: bool | Mapping[str, Sequence[str]] | None = None,
    evaluate: Evaluate | None = None,
    better: Better = "higher",
    fine_tune: FineTune | None = None,
    folder: str | Path | None = None,
    keep_models: bool = False,
    latency: Latency | None = None,
    guard: bool = False,
    costs: Mapping[str, Cost] | None = None,
    selector: Selector = exact,
    rows: int | str | None = "auto",
    positions: int | None = None,
    mask: Mask = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: Where = None,
    progress: Progress | bool | None = None,
) -> Sweep:
    """Compress a trained model to several budgets: what is lost at every size.

    It is calibrated once and there is one table; each budget is selected from it, carried out with reconstruction as by
    :func:`spectrim.compress`, and judged.

    Parameters
    ----------
    model
        Left untouched.
    calibration
        Batches of training inputs, as for :func:`spectrim.compress`; a loader is read once for all budgets, and once
        or twice more for the digest of a folder.
    budgets
        A cost, ``"macs"``, for shares from 80 % to 20 % of it; a cost and its shares, ``("macs", [0.8, 0.5])``; or a
        list of budgets, ``["macs=50%", Budget(parameters=0.3)]``.
    evaluate
        Function of a model, in evaluation mode and without gradients, to the number that networks are judged by. By
        default they are judged by how often the dense network's class comes first on held-out calibration samples, or
        where that is the same for all, or outputs are no classes, by how far they are from its outputs.
    better
        Whether a ``higher`` or a ``lower`` number is good.
    fine_tune
        Trains a network in place: a function of the network and of a file for its checkpoint (None without ``folder``),
        as ``lambda small, file: fine_tune(small, train_batches, teacher=model, checkpoint=file)``. None trains nothing.
    folder
        Where each point is written as soon as it is there: plan and figures. The same call again reads what is there
        and goes on; with ``fine_tune`` or ``keep_models`` it adds them to points that lack them. What is damaged is
        made again, with a note in that run: also a point that was changed, or is from before points held a digest. Of
        the calibration data a digest is kept: with others the folder is refused.
    keep_models
        Write the weights of every network to the folder too.
    methods, skip, only, groups, latency, guard, costs, selector, rows, positions, mask, forward, samples
        As for :func:`spectrim.compress`; with ``latency`` every network is timed beside the dense one.

    Returns
    -------
    Sweep
        Budgets that cannot be met are left out and told in ``unmet``.

    Raises
    ------
    InfeasibleBudgetError
        If no budget can be met.
    CheckpointError
        If the folder holds a sweep of another network, of other calibration data or with other options, or its record
        of them is missing or damaged, was changed or lacks its digest.
    OSError
        If the folder is a file, or nothing can be written there; before any work.
    TypeError, ValueError
        For arguments that cannot be meant, before any work.
    """
    check_model(model)
    check_loaded(model)
    asked = asked_budgets(budgets, costs)
    Judge.of(evaluate, better)
    if fine_tune is not None:
        check_function("fine_tune", fine_tune, _TUNED_WITH, _TUNES)
    place = None if folder is None else check_folder(folder, files_of(asked))
    if keep_models:
        if place is None:
            raise ValueError("keep_models=True writes weights to a folder, and none is given: give folder= too")
        check_savable(model)
    limited = {cost for budget in asked.values() for cost in budget.costs}
    check_selector(selector)
    check_options(groups, latency, guard)
    methods, groups = methods_on_offer(methods, groups, limited)
    channels = any(method.removes_channels for method in methods or ())
    sampling, feed = Sampling(rows, positions), Feed.of(forward, samples, mask)
    batches = at_hand(calibration, alike=False)
    sites = locate(model, batches, skip=skip, only=only, channels=channels, forward=feed)
    timed = latency or guard or "latency" in limited

    def prepared() -> Prepared:
        # Read once: where a loader shuffles, the samples that are held out stay the same for every budget.
        return prepare(
            model, sites, at_hand(batches, alike=True), groups=groups, latency=timed, sampling=sampling, forward=feed,
            progress=told(progress),
        )  # fmt: skip

    clock = (latency or Latency()).facts() if timed else {}
    options = {
        "layers": [site.name for site in sites], "groups": groups, "guard": guard, "costs": sorted(costs or ()),
        "methods": None if methods is None else [method.record() for method in methods], "rows": rows,
        "positions": positions, "selector": getattr(selector, "__name__", str(selector)),
        "runtime": "eager", **({} if latency is None else latency.runs.facts()),
        **{name: clock[name] for name in ("device", "threads", "batch") if timed},
    }  # fmt: skip
    making = Making(methods, True, guard, costs, selector, feed, told(progress))
    run = Sweeping(
        model, prepared, making=making, evaluate=evaluate, better=better, metric=_name(evaluate), fine_tune=fine_tune,
        timed=bool(timed), folder=place, keep_models=keep_models, options=options, calibration=batches,
    )  # fmt: skip
    return run.sweep(asked)


def asked_budgets(budgets: Budgets, costs: Mapping[str, Cost] | None = None) -> dict[str, Budget]:
    """Budgets by what they say in words.

    Raises
    ------
    TypeError, ValueError
        For what cannot be meant; the message quotes it.
    """
    known = [*COSTS, *counted.further(costs)]
    asked: Any = (budgets, FRACTIONS) if isinstance(budgets, str) else budgets
    if isinstance(asked, tuple) and len(asked) == 2 and isinstance(asked[0], str):
        cost, shares = asked
        plain = isinstance(shares, Iterable) and not isinstance(shares, str | Mapping)
        if not plain and "=" not in cost:
            raise TypeError(
                f"the shares of {cost} are {shares!r}: expected a list of numbers, as ({cost!r}, [0.8, 0.5]); one "
                f"budget alone is ['{cost}=50%']"
            )
        asked = [_share(cost, each, known) for each in shares] if plain else asked
    if isinstance(asked, Mapping | Budget) or not isinstance(asked, Iterable):
        raise TypeError(
            f"budgets is {budgets!r}: expected a cost such as 'macs', a cost with shares such as "
            "('macs', [0.8, 0.5]), or a list of budgets"
        )
    limits = [Budget.of(each) for each in asked]
    if not limits:
        raise ValueError("there are no budgets: give a cost such as 'macs', or at least one budget in the list")
    for budget in limits:
        budget.check(known)
    return {str(budget): budget for budget in limits}


def _share(cost: str, share: Any, known: Sequence[str]) -> Budget:
    if cost not in known:
        named = f", or a list such as [{cost!r}]" if "=" in cost else f".{did_you_mean(cost, known, OTHER_NAMES)}"
        raise ValueError(f"there is no cost {cost!r} to sweep over: give one of {', '.join(known)}{named}")
    if not isinstance(share, Real) or isinstance(share, bool) or not 0 < float(share) <= 1:
        raise ValueError(f"the share {share!r} of {cost} cannot be swept: give numbers above 0 and at most 1, as 0.5")
    return Budget(**{cost: Limit(float(share), relative=True)})


@dataclass(kw_only=True)
class Sweeping:
    """A network that is compressed to several budgets, as the parameters of :func:`sweep` say."""

    model: nn.Module = field(kw_only=False)
    prepare: Callable[[], Prepared] = field(kw_only=False)  # called when the first point is not there yet, and once
    making: Making = Making()  # noqa: RUF009 (frozen)
    evaluate: Evaluate | None = None
    better: Better = "higher"
    metric: str = "metric"  # what ``evaluate`` returns is called
    fine_tune: FineTune | None = None
    timed: bool = False  # whether points have measured milliseconds
    folder: Path | None = None
    keep_models: bool = False
    # What else makes the sweep, as JSON values: a folder holds points of one sweep.
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Iterable[Any] = ()  # batches that a folder is of
    # Called with a point as soon as it is there, and with the sweep as far as it has come.
    done: Callable[[Point, Sweep], None] = lambda point, sweep: None

    def sweep(self, asked: Mapping[str, Budget]) -> Sweep:
        """A point for every budget that can be met, read or made."""
        notes = self._claim(asked)
        dense = None if self.evaluate is None else self._evaluated(self.model)
        if self.evaluate is not None and dense is None:
            raise ValueError("evaluate returned no finite number for the dense network")
        if dense is not None and self._kept is not None:
            self._kept.record({"the metric of the dense network": dense, "better": self.better})
        points, unmet = [], {}
        infeasible: InfeasibleBudgetError | None = None
        networks = Sweep(
            (), next(iter(asked.values())).costs[0], dense, self.better, {}, self.metric, self.result, notes,
            unit_of(dense), standard_error(dense),
        )  # fmt: skip
        for number, (words, budget) in enumerate(asked.items()):
            self.making.progress("sweep", number, len(asked))
            try:
                points.append(self._point(words, budget))
            except InfeasibleBudgetError as error:
                infeasible, unmet[words] = error, str(error)
            fresh = len(points) > len(networks)
            networks = dataclasses.replace(networks, points=tuple(points), unmet=dict(unmet))
            if self.folder is not None:
                networks.write_summary(self.folder)
            if fresh:
                self.done(points[-1], networks)
        self.making.progress("sweep", len(asked), len(asked))
        if not points and infeasible is not None:
            raise infeasible
        return networks

    @functools.cached_property
    def prepared(self) -> Prepared:
        return self.prepare()

    @functools.cached_property
    def table(self) -> Candidates:
        """What is on offer, for all budgets."""
        return tabulate(self.prepared.sites, self.making.methods, **self.making.priced(self.prepared))

    def result(self, plan: Plan) -> Result:
        """A plan carried out again."""
        return finished(self.model, self.prepared, plan, self.table, self.making)

    def _point(self, words: str, budget: Budget) -> Point:
        """The point of a budget: read as far as it is there, else made and written."""
        kept, small = self._kept, None
        point, note = (None, "") if kept is None else kept.read(words)
        if point is None or not self._is_whole(point):
            point, small = self._made(words, budget)
            self._keep(point)
        place = None if kept is None else kept.place(point)
        damage = kept.damage(point) if kept is not None and self.keep_models else None
        if damage is not None or (self.fine_tune is not None and point.tuned is None):
            small = self.result(point.plan).model if small is None else small
            if self.fine_tune is not None:
                point = self._tuned(point, small)
            elif point.tuned is not None:
                point = point.noted(f"{MODEL} is the network before fine-tuning, which was done without it")
            if place is not None and (self.keep_models or (place / MODEL).exists()):
                save(small, point.plan, place / MODEL)  # weights of an earlier run are those of the point again
            self._keep(point)
        if place is not None:
            (place / TUNING).unlink(missing_ok=True)
            remove_abandoned(place)
        return point.noted(note).noted(damage or "")  # not kept: what is there now is sound

    @property
    def _kept(self) -> SweepFolder | None:
        return None if self.folder is None else SweepFolder(self.folder)

    def _keep(self, point: Point) -> None:
        if self._kept is not None:
            self._kept.keep(point)

    def _claim(self, asked: Iterable[str]) -> tuple[str, ...]:
        """Make the folder that of this sweep; notes on what cannot be seen."""
        if self._kept is None:
            return ()

        def read() -> str:
            return contents(self.model, self.calibration, self.making.forward)

        return self._kept.claim(asked, self.options, digest_of_tensors(plain_tensors(self.model.state_dict())), read)

    def _is_whole(self, point: Point) -> bool:
        """Whether a point that was read has all that is asked for, training left out."""
        return not (self.timed and not point.milliseconds) and (
            self.evaluate is None or point.carried_out.metric is not None
        )

    def _made(self, words: str, budget: Budget) -> tuple[Point, nn.Module]:
        began = time.monotonic()
        result = shrink(self.model, self.prepared, budget, self.making, self.table)
        report = result.report
        milliseconds = {name: timing.p50 for name, timing in report.measured.items()}
        judged = self._judged(result.model, report.agreement)
        point = Point(words, result.plan, judged, None, milliseconds, time.monotonic() - began, report.notes)
        return point, result.model

    def _tuned(self, point: Point, small: nn.Module) -> Point:
        """The point after its network was trained, in place."""
        assert self.fine_tune is not None
        began, kept = time.monotonic(), self._kept
        self.fine_tune(small, None if kept is None else kept.place(point) / TUNING)
        known = self.prepared
        agreed = None
        if known.batches is not None:
            agreed = agreement(self.model, small, known.batches, forward=self.making.forward)
        return point.trained(self._judged(small, agreed), time.monotonic() - began)

    def _judged(self, small: nn.Module, agreed: Agreement | None) -> Judged:
        value = None if self.evaluate is None else self._evaluated(small)
        metric, spread = (None, None) if value is None else (float(value), standard_error(value))
        if agreed is None:
            return Judged(metric, standard_error=spread)
        return Judged(metric, agreed.top1, agreed.error, agreed.samples, spread)

    def _evaluated(self, model: nn.Module) -> float | None:
        """What ``evaluate`` returns; None for NaN and infinity."""
        assert self.evaluate is not None
        value = metric_of(self.evaluate, model, "the dense network" if model is self.model else "a compressed network")
        return value if math.isfinite(value) else None


def _name(evaluate: Evaluate | None) -> str:
    """What a metric is called: as the function, if that has a name."""
    name = getattr(evaluate, "__name__", "<lambda>")
    return "metric" if "<" in name else name.replace("_", " ")
