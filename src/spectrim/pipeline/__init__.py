"""The one call: from a trained model, calibration batches and a budget to a smaller, faster model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

from torch import nn

from spectrim.cost import counted
from spectrim.cost.counted import Cost
from spectrim.cost.latency import Latency
from spectrim.errors import called_as, check_function
from spectrim.methods import Method, on_offer
from spectrim.network.sites import Sites
from spectrim.nn.agreement import check_comparable
from spectrim.nn.agreement import output_error as output_error
from spectrim.nn.checkpoint import check_savable
from spectrim.nn.find import Which, check_loaded, check_model
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.layout import Mask, Where
from spectrim.nn.watch.nesting import at_hand, begun
from spectrim.nn.watch.sampling import Sampling
from spectrim.pipeline.goal import Goal
from spectrim.pipeline.making import Making
from spectrim.pipeline.report import Report as Report
from spectrim.pipeline.report import Result as Result
from spectrim.pipeline.report import reported as reported
from spectrim.pipeline.sets import Sets, reached
from spectrim.preparation import Prepared, check_options, coupled, locate, prepare
from spectrim.preparation import one_batch as one_batch  # its former place, until version 0.3
from spectrim.progress import Progress, reports, told
from spectrim.search.judge import Evaluate, Judge
from spectrim.search.tolerance import Tolerance
from spectrim.selection.budget import COSTS, Budget, BudgetLike, check_costs
from spectrim.selection.front import Better
from spectrim.selection.selectors import Selector, exact


@reports
@called_as(
    "Write compress(model, batches, 'macs=50%') with batches of inputs like those of training; without any, "
    "find(model), tabulate(sites, WeightSVD()), select(table, 'parameters=50%') and apply(model, sites, plan) do with "
    "the weights alone"
)
def compress(
    model: nn.Module,
    calibration: Iterable[Any],
    budget: BudgetLike | None = None,
    *,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    evaluate: Evaluate | None = None,
    better: Better = "higher",
    cost: str = "macs",
    methods: Method | Sequence[Method] | Literal["auto"] | None = None,
    seconds: float | None = None,
    skip: Which | Iterable[Which] = (),
    only: Which | Iterable[Which] = (),
    groups: bool | Mapping[str, Sequence[str]] | None = None,
    sensitivity: bool = True,
    reconstruct: bool = True,
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
) -> Result:
    """Compress a trained model to a budget, or to a tolerance: find, calibrate, tabulate, select, apply.

    Parameters
    ----------
    model
        Left untouched.
    calibration
        Batches of training inputs, a thousand samples or more; labels are not used. An iterator is read into a list.
    budget
        For the whole network; also as text, ``"macs=50%"``. With a tolerance it may be left out, and the smallest
        network is looked for.
    max_drop
        A tolerance: how much worse the number that ``evaluate`` returns may be than the dense network's.
    min_agreement
        A tolerance without labels: the share of held-out calibration samples whose class is to be the dense network's,
        as 0.99, or 1 - relative error for outputs that are no scores of classes.
    evaluate
        Function of a model alone, in evaluation mode and without gradients, to the number that it is judged by: it
        holds the data itself, which the model should not have been calibrated on.
    better
        Whether a ``higher`` or a ``lower`` number is good.
    cost
        What the smallest network has least of, where there is a tolerance and no budget.
    methods
        What may be chosen at each site; as for :func:`spectrim.tabulate` by default, and where these cannot meet the
        budget, or their smallest network holds a tolerance, as with ``"auto"``. With one that removes channels, these
        are found first (:func:`spectrim.couple`), the plan is made in steps
        (:func:`spectrim.search.stepwise.select_in_steps`), and of plans that mix methods the one is taken whose
        outputs are closest to the dense network's. ``"auto"`` lets sets of them compete (:mod:`spectrim.search.arms`):
        each is planned from one calibration, those make a whole network that their tables do not call hopeless, and the
        one that lost least on held-out samples, or by ``evaluate``, is returned; of those that differ by less than the
        standard error the one with fewest layers, or fewest milliseconds where they are measured. With a tolerance the
        first set is searched in full, and the others for what is smaller than it reached.
    seconds
        Where sets of methods compete: nothing further is planned or carried out after so long. What is being planned
        after half of it is given up between two layers, but for the first plan, which is always carried out.
    skip, only
        Layers to leave alone or keep to; see :func:`spectrim.find`.
    groups
        Sites that may share factors: True finds them (:func:`spectrim.group`), a mapping names them. None finds them if
        the budget limits parameters or bytes, which is what sharing saves, and no methods are given.
    sensitivity
        Weigh errors by the gradients that reach each layer (one backward pass over 512 samples, spread over the run).
    reconstruct
        Fit each layer to the dense responses for the inputs that its compressed predecessors deliver.
    latency
        How time is measured. Made for the model's device and dtype if the budget limits latency or ``guard`` is set,
        and for one sample a batch, however many calibration has: ``Latency(batch=32)`` is for those that you run.
        Where it is given or made, the kernels of sparse layers are chosen for it (:func:`spectrim.choose_kernels`).
        If its memory format is ``channels_last``, both models are measured in it and the result is returned in it.
    guard
        Choose no option that is measured slower than dense, and measure the finished model: layers that lose time in it
        are dense again within the budget, and a network that is slower all the same is refused.
    costs
        Further costs of your own, functions of layers by name, which the budget may limit.
    selector
        How choices are made; exact by default.
    rows, positions, mask
        How many input patches the statistics rest on and layers are fitted at, and which tokens are data; see
        :func:`spectrim.calibrate`.
    forward, samples
        How the model is run on a batch, and where a batch's samples are; see :func:`spectrim.calibrate`. By default
        both are seen from the first batch and the model's ``forward``, and the report tells what is not plain.

    Returns
    -------
    Result

    Raises
    ------
    InfeasibleBudgetError
        If the budget cannot be met; carries the lowest reachable cost.
    SlowerError
        If the network was measured slower than dense, twice, with ``guard`` or where it misses a latency budget.
    ToleranceError
        If the budget can be met, but not within the tolerance; says which budget can, and carries its ``result``.
    TypeError, ValueError
        For arguments that cannot be meant, and groups beside a method that removes channels; before any work.

    Notes
    -----
    With a latency budget the plan is made from measured layer times, built, measured end to end beside the dense
    network and corrected, up to eight times, until it is within 3 % of the budget.

    With a tolerance and no budget about ten networks are selected from one table, carried out and judged, by other sets
    of methods too where the smallest of the default's holds, and the smallest that held is returned. That it held
    is measured on the samples that it was chosen by: on others the drop differs by chance, the more the fewer samples
    there are. Where none holds, the dense network is returned.
    """
    check_model(model)
    check_loaded(model)
    check_savable(model)
    judge = Judge.of(evaluate, better)
    tolerance = Tolerance.of(max_drop, min_agreement, judge)
    stated = _stated(budget, tolerance, cost)
    known = [*COSTS, *counted.further(costs)]
    stated.check(known) if budget is not None else check_costs("cost= names", [cost], known)
    competing = isinstance(methods, str) and methods == "auto"
    sets = Sets.of(auto=competing, said=methods is not None or groups is not None)
    _check_search(selector, seconds, groups, sets)
    check_options(groups, latency, guard)
    several, shared = (None, False) if competing else methods_on_offer(methods, groups, stated.costs)
    sampling = Sampling(rows, positions)
    feed = Feed.of(forward, samples, mask)
    batches = at_hand(calibration, alike=reconstruct)
    channels = any(method.removes_channels for method in several or ())
    if channels and len(several or ()) > 1:
        check_comparable(model, begun(batches)[0], feed)
    making = Making(several, reconstruct, guard, costs, selector, feed, told(progress))
    goal = Goal(None if budget is None else stated, tolerance, judge.knowing(model, max_drop), cost, seconds)

    def prepared(*, competing: bool, known: Prepared | None = None) -> Prepared:
        sites = locate(model, batches, skip=skip, only=only, channels=channels, forward=feed)
        if competing:
            sites = coupled(model, sites, begun(batches)[0], forward=feed)
        return prepare(
            model, sites, batches, sensitivity=sensitivity, groups=False if competing else shared, forward=feed,
            latency=latency or guard or stated.latency is not None, sampling=sampling, progress=making.progress,
            known=known,
        )  # fmt: skip

    return reached(model, goal, making, sets, prepared)


def _stated(budget: BudgetLike | None, tolerance: Tolerance | None, cost: str) -> Budget:
    """The budget, which with a tolerance may be left out; without one there is no cost to have least of."""
    if tolerance is None and cost != "macs":
        raise ValueError(
            f"cost={cost!r} is what the smallest network within a tolerance has least of, and there is none: write "
            f"the budget as '{cost}=50%', or give max_drop or min_agreement"
        )
    if budget is None and tolerance is None:
        raise TypeError(
            "how small is not said: give a budget, as compress(model, batches, 'macs=50%'), or a tolerance, as "
            "max_drop=0.5 with evaluate=, or min_agreement=0.99"
        )
    return Budget.of({cost: 1.0} if budget is None else budget)


def check_selector(selector: object) -> None:
    """Raise TypeError for what makes no choices."""
    wanted = "a function of a table and a budget, such as those of spectrim.selection.selectors"
    check_function("selector", selector, ("a table", "a budget"), wanted)


def _check_search(selector: object, seconds: object, groups: object, sets: Sets) -> None:
    """Raise TypeError or ValueError for what is no selector, and no limit on the time of a search."""
    check_selector(selector)
    if seconds is not None and not (isinstance(seconds, Real) and float(seconds) >= 0):
        raise ValueError(f"seconds is {seconds!r}: expected a number of at least 0")
    if seconds is not None and sets is Sets.NAMED:
        raise ValueError(
            f"seconds={seconds!r} limits how long sets of methods compete: give methods='auto' too, or leave methods "
            "and groups out"
        )
    if sets is Sets.ALL and groups is not None:
        raise ValueError(
            f"methods='auto' decides by itself where layers share factors, and takes no groups={groups!r:.80}: leave "
            "out one of them"
        )


def methods_on_offer(
    methods: Any, groups: bool | Mapping[str, Sequence[str]] | None, limited: Iterable[str]
) -> tuple[list[Method] | None, bool | Mapping[str, Sequence[str]]]:
    """The methods of one set, and which layers may share factors, where these costs are limited."""
    if groups is None:
        groups = methods is None and not {"parameters", "bytes"}.isdisjoint(limited)
    several = None if methods is None else on_offer(methods, groups=bool(groups))
    if groups and any(method.removes_channels for method in several or ()):
        raise ValueError(
            "layers that share factors would lose different channels: remove channels without groups, or share factors "
            "in the network that is left"
        )
    return several, groups


def find_some(model: nn.Module, skip: Which | Iterable[Which], only: Which | Iterable[Which]) -> Sites:
    """The former name of :func:`spectrim.preparation.locate`, until version 0.3."""
    return locate(model, (), skip=skip, only=only)
