"""Learned ranks: weights and ranks of all layers together, by the learning-compression (LC) algorithm.

The problem is ``min L(W) + lambda C(r)`` with ``rank(W_k) <= r_k`` at every site (Idelbayev and Carreira-Perpinan, CVPR
2020). A low-rank copy ``Delta_k`` of every weight and multipliers ``Lambda_k`` split it into two easy steps that
alternate while ``mu`` grows::

    L step:  min over W of         L(W) + mu/2 sum_k ||W_k - Delta_k - Lambda_k / mu||^2     (ordinary training)
    C step:  min over Delta, r of  sum_k mu/2 ||W_k - Lambda_k / mu - Delta_k||^2 + lambda C(r)

The second is a choice of one option a site in a table: ``select`` at a fixed multiplier, on the curves of the present
weights. With a budget in place of ``lambda``, the multiplier is the dual of the budget at every C step.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim.application import Applied, carry_out
from spectrim.cost.counted import Cost
from spectrim.cost.latency import Latency
from spectrim.errors import MissingMomentsError, PlanError, called_as
from spectrim.methods import ActivationSVD, Method, WeightSVD, as_methods
from spectrim.network.sites import Layer, Site, Sites, Statistics
from spectrim.nn.agreement import metric_of
from spectrim.nn.copying import copy_model
from spectrim.nn.find import misfit
from spectrim.nn.layers import canonical
from spectrim.nn.standing import laid_out
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.chance import draws_kept
from spectrim.nn.watch.layout import Mask, Where
from spectrim.nn.watch.sampling import Sampling
from spectrim.preparation import one_batch, prepare
from spectrim.search.measured import Trials, meet_latency
from spectrim.selection.budget import Budget, BudgetLike
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.trajectory import Record, Trajectory
from spectrim.tables import tabulate
from spectrim.train import c_step
from spectrim.train.c_step import ZERO, CStep
from spectrim.train.learned_state import RunState
from spectrim.train.schedule import Schedule

log = logging.getLogger(__name__)

# How much of a latency budget may stay unused.
_CLOSE = 0.01


class LearnedRanks:
    """The penalty, the C step and the state of one run.

    Hand it to any training loop: add ``penalty()`` to the loss of every batch and call ``c_step()`` now and then,
    ``schedule.steps - 1`` times in all (the first C step is taken on construction). Or hand it to
    :class:`~spectrim.train.Loop` as ``penalty`` and its ``after_step`` as ``after_step``, which takes C steps every
    ``every`` batches and keeps its state in checkpoints. :func:`~spectrim.train.learn_ranks` does all of it.

    Parameters
    ----------
    model
        The dense network. It is trained in place, and stays dense: :meth:`finish` returns the factored one.
    sites
        From :func:`spectrim.find`, or :func:`spectrim.calibrate` for costs in MACs and errors in output energy.
    budget
        What the compressed network may cost. It holds after every C step.
    multiplier
        ``lambda`` in place of a budget: the loss that one unit of ``cost`` is worth, so one parameter or one MAC (the
        paper gives it for a million of them). Ranks may then start from 0 and grow with ``mu``.
    cost
        Which cost ``multiplier`` is for.
    schedule
        ``mu`` at every C step.
    methods
        What may be chosen at each site. By default truncated SVDs of the weight in all its unfoldings, or low rank of
        responses where ``energy`` is theirs. With :class:`~spectrim.methods.LowRankPlusSparse` among them copies may be
        sums of a low-rank and a sparse weight; a C step then takes as long as a table of that method does.
    start
        Methods of the first C step alone. By default truncated SVDs by weight and by data if the sites are calibrated
        and a budget is given, so that the first low-rank copy is a good network; else ``methods``.
    energy
        ``"weight"`` measures errors in weight energy, as the paper does. ``"output"`` measures them in the energy of
        the layer's responses at calibration, weighed by sensitivity where the sites hold it.
    normalize
        Measure weight energy as a share of the layer's, as the paper does but for its smallest network. The penalty of
        the L step is not normalised, here or there, so the two steps do not descend one common objective.
    augmented
        Use multipliers ``Lambda``; without them the penalty is quadratic. None uses them with ``multiplier``, as the
        paper does, and not with a budget: in runs of a few epochs they run ahead of the weights.
    dense
        Offer to leave a layer dense. Without it every rank up to the full one is on offer, in the unfolding of the
        paper, and layers whose rank does not pay are left dense by :meth:`finish`.
    every
        Batches between two C steps, for :meth:`after_step`; on average, if it is not a whole number.
    evaluate
        Function of the nested network (:meth:`nested`), in evaluation mode, to a number, recorded at every C step.
    latency, dense_latency, costs
        As for :func:`spectrim.tabulate`.

    Attributes
    ----------
    sites
        As given.
    step
        C steps done.
    plan
        Of the last C step.
    trajectory
        Ranks after every C step.
    candidates, fitted
        Table and sites that :meth:`finish` chose from and factorised; before, those of the first C step.
    whole_file
        Set it to have :meth:`finish` meet a limit on bytes by the file that is written, as :func:`learn_ranks` does; by
        default it is one on the numbers, as in the C steps.

    Raises
    ------
    InfeasibleBudgetError
        If the budget cannot be met.
    ValueError
        For a budget and a multiplier at once, or neither, or options that do not fit together.

    Notes
    -----
    A C step costs one eigendecomposition of the smaller Gram matrix, in float64, for every unfolding of every layer
    whose weight has moved, and one more for what is chosen.

    Examples
    --------
    >>> ranks = LearnedRanks(model, calibrate(model, find(model), batches), Budget(macs=0.5))  # doctest: +SKIP
    >>> for inputs, labels in training:  # doctest: +SKIP
    ...     (cross_entropy(model(inputs), labels) + ranks.penalty()).backward()
    ...     optimizer.step(); optimizer.zero_grad()
    >>> ranks.c_step()  # doctest: +SKIP
    >>> small, plan = ranks.finish(batches)  # doctest: +SKIP
    """

    @called_as(
        "Write LearnedRanks(model, sites, 'macs=50%'), with the sites of calibrate", model=nn.Module, sites=Sites
    )
    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        budget: BudgetLike | None = None,
        *,
        multiplier: float | None = None,
        cost: str = "macs",
        schedule: Schedule | None = None,
        methods: Method | Sequence[Method] | None = None,
        start: Sequence[Method] | None = None,
        energy: str = "weight",
        normalize: bool = True,
        augmented: bool | None = None,
        dense: bool = True,
        every: float | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        latency: Latency | None = None,
        dense_latency: float | None = None,
        costs: Mapping[str, Cost] | None = None,
    ) -> None:
        budget = None if budget is None else Budget.of(budget)
        # Layers that have a weight in common have no choice apart, and stay.
        sites = self.sites = sites.untied()
        self.model, self.budget, self.schedule = model, budget, schedule or Schedule()
        self.energy, self.normalize, self.dense = energy, normalize, dense
        self.augmented = budget is None if augmented is None else augmented
        self.every, self.evaluate, self._latency = every, evaluate, latency
        self._check(multiplier)
        if why := misfit(model, sites):
            raise ValueError(why)
        self.methods = (
            as_methods(methods)
            if methods is not None
            else c_step.rank_methods(paper=not dense, groups=bool(sites.groups), by_data=energy == "output")
        )
        self._layers = {spec.name: model.get_submodule(spec.name) for spec in (site.spec for site in sites)}
        self._targets: dict[str, Tensor] = {}
        self._multipliers: dict[str, Tensor] = {}
        self._batches = 0
        self.step = 0
        options: dict[str, Any] = {"latency": latency, "dense_latency": dense_latency, "costs": costs}
        now = self._present(lambda name, weight: weight)
        self.fitted = sites
        self.whole_file = False
        self.applied: Applied | None = None
        try:
            self._c_step = CStep(now, self.methods, budget, multiplier, cost, normalize, dense, options)
        except MissingMomentsError as error:
            raise ValueError(
                "energy='weight' keeps calibration from the methods, and one of "
                f"{', '.join(method.name for method in self.methods)} needs it: give energy='output', or other methods"
            ) from error
        self.candidates = c_step.without_zero(self.table)
        self.trajectory = Trajectory(
            sites=tuple(site.name for site in sites),
            full=tuple(c_step.full(site.spec) for site in sites),
            dense_costs=dict(self.table.dense),
            budget={} if budget is None else budget.limits(self.table.dense),
        )
        if start is None:
            warm = budget is not None and all(site.statistics for site in sites)
            start = [ActivationSVD(), WeightSVD()] if warm else self.methods
        begin = time.perf_counter()
        # Seen now, and not after an epoch: the methods of all C steps but the first must meet the budget as well.
        plan = self._c_step.choose(now, self.mu)
        if list(start) == self.methods:
            self.plan = self._take(plan, now, self.methods, begin)
        else:
            self.plan = self._take(
                self._c_step.choose(sites, self.mu, tabulate(sites, start, **options)), sites, start, begin
            )

    def _check(self, multiplier: float | None) -> None:
        """Raise ValueError for options that do not fit together, PlanError where there is nothing to learn."""
        if pairs := [site.name for site in self.sites if site.present]:
            raise ValueError(
                f"layers stand for {pairs[0]!r} already, whose weight is their product and cannot be trained: "
                "find(model, parts=True) has them as sites, merge(model) makes one layer of them again"
            )
        if (self.budget is None) == (multiplier is None):
            raise ValueError("give either a budget or multiplier=, the loss that one unit of the cost is worth")
        if self.energy not in ("weight", "output"):
            raise ValueError(f"energy={self.energy!r} must be 'weight' or 'output'")
        if self.energy == "output" and not self.normalize:
            raise ValueError("normalize=False is for weight energy; output energy is a share of the layer's always")
        if self.energy == "output" and not all(site.statistics for site in self.sites):
            raise ValueError("energy='output' needs sites from calibrate(model, sites, batches), with statistics")
        if self.budget is not None and not self.dense:
            raise ValueError("dense=False is for a multiplier given by hand; under a budget a layer may stay dense")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every!r} must be at least 1")
        if not len(self.sites):
            raise PlanError(f"{type(self.model).__name__} has no layer to compress")

    # The two calls of a training loop.

    def penalty(self) -> Tensor:
        """``mu/2 sum_k ||W_k - Delta_k - Lambda_k / mu||^2`` over the sites that are not left dense."""
        terms = []
        for name, target in self._targets.items():
            weight: Any = self._layers[name].weight
            terms.append((weight - target.to(weight.device)).square().sum())
        return self.mu / 2 * torch.stack(terms).sum() if terms else torch.zeros(())

    def c_step(self) -> Plan:
        """Choose ranks and low-rank copies for the present weights; then ``mu`` grows.

        Raises
        ------
        RuntimeError
            If the schedule is over.
        FloatingPointError
            If a weight is not finite; the message names the layer.
        """
        if self.step >= self.schedule.steps:
            raise RuntimeError(f"all {self.schedule.steps} C steps of the schedule are done; call finish()")
        begin, mu = time.perf_counter(), self.mu
        multipliers = self._multipliers
        sites = self._present(lambda name, w: w - multipliers[name] / mu if name in multipliers else w.clone())
        self._c_step.renew(sites)
        plan = self._take(self._c_step.choose(sites, mu), sites, self.methods, begin)
        record = self.trajectory.records[-1]
        log.info("C step %d: %r, distance %.3g", self.step, plan, record.distance)
        return plan

    # For the loop of this library.

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty, as :class:`~spectrim.train.Loop` calls it."""
        if model is not self.model:
            raise ValueError("the penalty belongs to another model than the one that is trained")
        return self.penalty()

    def after_step(self, model: nn.Module) -> None:
        """Count a batch, and take a C step after ``every`` of them until the schedule is over."""
        if self.every is None:
            raise ValueError("after_step needs every=, the batches between two C steps")
        due = self._due()
        self._batches += 1
        if self._due() > due and self.step < self.schedule.steps:
            self.c_step()

    @property
    def table(self) -> Candidates:
        """The table of the last C step, in the errors of its weights."""
        return self._c_step.table

    @property
    def mu(self) -> float:
        """Strength of the penalty now."""
        return self.schedule.mu(self.step)

    def nested(self) -> nn.Module:
        """A copy of the model with its weights replaced by their low-rank copies, still in dense layers."""
        copied = copy_model(self.model)
        with torch.no_grad():
            for name, target in self._targets.items():
                multiplier = self._multipliers.get(name)
                low = target if multiplier is None else target - laid_out(multiplier, self.sites[name].spec) / self.mu
                weight: Any = copied.get_submodule(name).weight
                weight.copy_(low)
        return copied

    def finish(
        self,
        batches: Iterable[Any] | None = None,
        *,
        plan: Plan | None = None,
        reconstruct: bool = True,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        samples: Where = None,
        rows: int | str | None = "auto",
        positions: int | None = None,
        mask: Mask = None,
    ) -> tuple[nn.Module, Plan]:
        """The factored network that the present weights lead to, and its plan.

        Under a budget, the choice is made once more, exactly, on the present weights. With a multiplier, the ranks are
        those of the last C step; a layer of which nothing is left gets the least on offer, and one whose choice does
        not pay stays dense.

        Parameters
        ----------
        batches
            Calibration batches, read several times: factors are fitted to the responses of the present network, and a
            latency budget is checked by measuring. Without them every layer is factorised on its own.
        plan
            To be carried out in place of a choice made here, as the one that an earlier call returned.
        reconstruct, forward, samples, rows, positions, mask
            As for :func:`spectrim.apply`.

        Returns
        -------
        model, plan
            A new model of plain layers; the trained one is left as it is. ``applied`` holds what was learned on the
            way, such as how far layers miss, and :func:`spectrim.nn.agreement.agreement` how far outputs agree.
        """
        sampling, forward = Sampling(rows, positions), Feed.of(forward, samples, mask)
        sites = self._present(lambda name, weight: weight.clone())
        if batches is not None:
            weighed = any(site.statistics.gradient is not None for site in self.sites)
            fitted = prepare(self.model, sites, batches, sensitivity=weighed, sampling=sampling, forward=forward).sites
            sites = fitted if self.energy == "output" else sites
        else:
            fitted = sites
        self.candidates, chosen = self._c_step.last(sites, self.mu, self.plan, self.model if self.whole_file else None)
        if plan is None:
            plan = chosen
            if self._latency is not None and self.budget is not None and batches is not None:
                example = one_batch(self.model, batches, self._latency.batch, forward)
                trials = Trials(self.model, sites, example, self._latency, self.methods)
                plan, _ = meet_latency(trials, self.candidates, plan, self.budget, close=_CLOSE)
        self.fitted = fitted
        self.applied = carry_out(
            self.model, fitted, plan, batches, methods=self.methods, reconstruct=reconstruct, forward=forward,
            sampling=sampling,
        )  # fmt: skip
        return self.applied.model, plan

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors; with the weights of the model it continues the run bit for bit."""
        copies = {"target": self._targets, "multiplier": self._multipliers}
        return RunState(self.step, self._batches, self.plan, self.trajectory, copies).tensors(self._run())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` returned.

        Raises
        ------
        CheckpointError
            If it belongs to a run with other sites, options or another budget; the message says what differs.
        """
        # In the order of the sites: the penalty adds up in that order, and rounds accordingly.
        weights = {site.name: cast(Tensor, self._layers[site.name].weight) for site in self.sites}
        found = RunState.read(state, self._run(), weights, self.schedule.steps)
        # What was measured once holds for the whole run, or the same budget would mean another number of milliseconds.
        self._c_step.take_over(found.trajectory.dense_costs)
        self.step, self._batches, self.plan, self.trajectory = found.step, found.batches, found.plan, found.trajectory
        self._targets, self._multipliers = found.copies["target"], found.copies["multiplier"]

    def _measured(self) -> float | None:
        """What ``evaluate`` says of the nested network, if that is a number. The generators are left as they are."""
        if self.evaluate is None:
            return None
        with draws_kept():
            metric = metric_of(self.evaluate, self.nested(), "the network of the ranks so far")
        return metric if math.isfinite(metric) else None

    def _run(self) -> dict[str, Any]:
        """What makes it this run, as JSON values."""
        counted = {name: value for name, value in self.trajectory.dense_costs.items() if name != "latency"}
        return {
            "sites": list(self.trajectory.sites),
            "groups": {name: list(members) for name, members in self.sites.groups.items()} or None,
            "dense_costs": counted,
            "budget": None if self.budget is None else self.budget.record(),
            "multiplier": self._c_step.multiplier,
            "cost": self._c_step.cost,
            "schedule": dataclasses.asdict(self.schedule),
            "methods": [method.record() for method in self.methods],
            "energy": self.energy,
            "normalize": self.normalize,
            "augmented": self.augmented,
            "dense": self.dense,
            "every": self.every,
        }

    # The C step in parts.

    def _due(self) -> int:
        """C steps that the batches so far ask for; the margin is for the rounding of a quotient."""
        return int(self._batches / (self.every or 1) + 1e-9)

    def _present(self, change: Callable[[str, Tensor], Tensor]) -> Sites:
        """The sites with the present weights, changed by a function of site name and weight."""
        layers = []
        for site in self.sites:
            weight, bias = canonical(self._layers[site.name])
            statistics = site.statistics if self.energy == "output" else Statistics()
            layers.append(Layer(site.spec, change(site.name, weight), bias, statistics))
        return dataclasses.replace(self.sites, sites=tuple(layers))

    @torch.no_grad()
    def _take(self, plan: Plan, sites: Sites, methods: Sequence[Method], begin: float) -> Plan:
        """Make the low-rank copies of a plan, update the multipliers, and write the record."""
        mu, following = self.mu, self.schedule.mu(self.step + 1)
        missed, targets, multipliers = 0.0, {}, {}
        for part, low in _copies(plan, sites, methods):
            weight = self._weight(part.name)
            missed += float((weight - low).double().square().sum())
            target = low
            if self.augmented:
                after = self._multipliers[part.name] if part.name in self._multipliers else 0 * weight
                # Before any training there is no L step whose optimality the multipliers could express.
                after = after - mu * (weight - low) if self.step else after
                multipliers[part.name] = after
                target = low + after / following
            targets[part.name] = laid_out(target, part.spec)
        # In the order of the sites, groups or not: the penalty adds up in that order, and rounds accordingly.
        names = [site.name for site in self.sites]
        self._targets = {name: targets[name] for name in names if name in targets}
        self._multipliers = {name: multipliers[name] for name in names if name in multipliers}
        total = sum(sum(float(self._weight(n).double().square().sum()) for n in entry.sites) for entry in plan)
        self.plan = plan
        self.step += 1
        self._write(plan, mu, (missed / total) ** 0.5 if total else 0.0, time.perf_counter() - begin)
        return plan

    def _write(self, plan: Plan, mu: float, distance: float, seconds: float) -> None:
        """Add the record of a C step to the trajectory."""
        chosen = {name: entry.choice for entry in plan for name in entry.sites}
        where = {name: f" in {entry.site}" if entry.members else "" for entry in plan for name in entry.sites}
        each = zip([chosen[name] for name in self.trajectory.sites], self.trajectory.full, strict=True)
        record = Record(
            mu=mu,
            multipliers=dict(plan.multipliers),
            ranks=tuple(c_step.rank(choice, full) for choice, full in each),
            choices=tuple(f"{chosen[name]}{where[name]}" for name in self.trajectory.sites),
            costs=dict(plan.costs),
            distance=distance,
            metric=self._measured(),
            seconds=seconds,
        )
        self.trajectory = dataclasses.replace(self.trajectory, records=(*self.trajectory.records, record))

    def _weight(self, name: str) -> Tensor:
        """The present weight of a layer, ``[g, o, i, *k]``."""
        return canonical(self._layers[name])[0]


def _copies(plan: Plan, sites: Sites, methods: Sequence[Method]) -> Iterator[tuple[Layer, Tensor]]:
    """The low-rank copies that a plan makes of layers; of those left dense, which nothing pulls at, none."""
    makers = {method.name: method for method in methods}
    for entry in plan:
        parts = [sites[name] for name in entry.sites]
        site: Site = sites.together(entry.site, entry.members) if entry.members else parts[0]
        if entry.choice == ZERO:
            yield from zip(parts, map(torch.zeros_like, site.weights), strict=True)
        elif not entry.choice.is_dense:
            yield from zip(parts, makers[entry.choice.method].factorize(site, entry.choice).dense(), strict=True)
