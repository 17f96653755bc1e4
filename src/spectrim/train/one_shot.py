"""What a budget gives without training, beside a network of learned ranks: of the two the better one is fine-tuned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectrim.application import Applied, carry_out
from spectrim.cost.counted import Cost
from spectrim.methods import Method
from spectrim.network.sites import Sites
from spectrim.nn.agreement import metric_of
from spectrim.nn.watch.batches import Feed
from spectrim.preparation import Prepared
from spectrim.search.file_size import selected
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan
from spectrim.selection.selectors import exact
from spectrim.tables import tabulate
from spectrim.train import batches as batching
from spectrim.train.objective import Objective

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A factored network before it is fine-tuned."""

    applied: Applied
    plan: Plan
    table: Candidates  # that the plan was chosen from
    sites: Sites  # that were factorised


def one_shot(
    net: nn.Module,
    known: Prepared,
    budget: Budget,
    methods: Method | Sequence[Method] | None,
    costs: Mapping[str, Cost] | None,
    feed: Feed,
) -> Candidate:
    """What :func:`spectrim.compress` makes of the present weights within the budget."""
    sites = known.sites.untied()
    timing = {"latency": known.latency, "dense_latency": known.dense_latency}
    table = tabulate(sites, methods, costs=costs, **timing)
    plan = selected(net, sites, table, budget, exact)
    applied = carry_out(net, sites, plan, known.batches, methods=methods, forward=feed, sampling=known.sampling)
    return Candidate(applied, plan, table, sites)


def loss_of(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    size: Callable[[Any], int],
    evaluate: Callable[[nn.Module], Any] | None,
) -> float:
    """What is lost with a network as it runs: the negative metric if there is one, else the mean loss of training.

    Parameters
    ----------
    objective
        The loss of a batch.
    size
        Samples of a batch.
    """
    if evaluate is not None:
        return -metric_of(evaluate, model, "a compressed network")
    device = next(model.parameters()).device

    def mean(net: nn.Module) -> float:
        losses, sizes = [], []
        with torch.no_grad(), objective.ready(device):
            for batch in batches:
                inputs, targets = batching.split(batching.place(batch, device, channels_last=False))
                losses.append(float(objective(net, inputs, targets)))
                sizes.append(size(batch))
        return sum(map(float.__mul__, losses, map(float, sizes))) / sum(sizes)

    return metric_of(mean, model, "a compressed network")


def better(
    learned: Candidate, other: Candidate | None, lost: Callable[[nn.Module], float]
) -> tuple[Candidate, tuple[str, ...]]:
    """The network that loses less, the learned one of equals, and what is said of it."""
    if other is None:
        return learned, ()
    try:
        ours, theirs = lost(learned.applied.model), lost(other.applied.model)
    except Exception as error:  # of outputs without a loss outside of training, of batches without targets
        log.info("what was learned is not compared with what compress makes: %s", error)
        return learned, ()
    log.info("learned ranks lose %.6g, the plan without training %.6g", ours, theirs)
    if not theirs < ours:
        return learned, ()
    return other, (
        f"learning has not paid: the network that compress makes without it lost less, {theirs:.6g} against {ours:.6g} "
        "(the mean loss of training, or the negative metric), and was taken. More epochs of learning, or another rate, "
        "may change that",
    )
