"""The arms: what of ours and of others compresses a network, in one table.

An arm takes a :class:`Task` and returns a :class:`Made`. No arm trains a weight; all have the same calibration inputs.
Peers with BatchNorm are made twice, as they are and with its statistics estimated anew, and the held-out data choose.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

import spectrim as st
from benchmarks import torch_pruning_baseline
from benchmarks.headline.network import Network
from benchmarks.headline.peers import layers
from benchmarks.headline.peers.decompositions import CP, Responses, SpatialSVD, Tucker2
from spectrim.methods import Method
from spectrim.nn.watch.norms import reestimate_batchnorm
from spectrim.pipeline import Result

# Batches of calibration inputs that Torch-Pruning's Taylor importance sees at each of its steps.
_TAYLOR = 2


@dataclass(frozen=True)
class Task:
    """A dense network, the data and the budget of a row."""

    network: Network
    dense: nn.Module
    batches: list[Any]
    budget: st.Budget

    @property
    def cost(self) -> layers.Cost:
        """That the budget limits."""
        (cost,) = self.budget.costs
        if cost not in ("macs", "bytes"):
            raise ValueError(f"the peers know budgets of macs and bytes; got {self.budget}")
        return cost

    @functools.cached_property
    def example(self) -> Any:
        return self.network.example(1)

    @functools.cached_property
    def limit(self) -> float:
        """Of the cost, as a number."""
        return self.budget.limits({self.cost: layers.measured(self.dense, self.example, self.cost)})[self.cost]


@dataclass(frozen=True)
class Made:
    """A finished network; the result it came in, of ours; what was chosen on held-out data."""

    model: nn.Module
    result: Result | None = None
    note: str = ""


@dataclass(frozen=True)
class Arm:
    """A way to compress."""

    kind: Literal["auto", "ours", "peer"]  # ``auto``, one method of ``ours`` alone, or a ``peer``
    make: Callable[[Task], Made]  # the network for a task
    only: layers.Cost | None = None  # the cost that it makes sense for; None for any


def ours(methods: Sequence[Method] | Literal["auto"] | None, **options: Any) -> Callable[[Task], Made]:
    """One call of :func:`spectrim.compress`."""

    def make(task: Task) -> Made:
        result = st.compress(task.dense, task.batches, task.budget, methods=methods, **options)
        arms = "; ".join(str(tried) for tried in result.report.arms)
        return Made(result.model, result, arms)

    return make


def normalised(task: Task, model: nn.Module) -> Made:
    """The better of a network as it is and with BatchNorm estimated anew, by the held-out data."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return Made(model)
    anew = copy.deepcopy(model)
    reestimate_batchnorm(anew, task.batches)
    better = task.network.metric.gain(task.network.held_out(anew), task.network.held_out(model)) > 0
    return Made(anew if better else model, note=f"BatchNorm {'estimated anew' if better else 'as it was'}")


def peer(how: Callable[[], layers.Decomposition], ranks: layers.Allocation) -> Callable[[Task], Made]:
    """Thin layers in place of layers."""

    def make(task: Task) -> Made:
        small = layers.decomposed(
            task.dense, task.batches, task.example, task.cost, task.limit, how=how(), ranks=ranks
        )  # fmt: skip
        return normalised(task, small)

    return make


def torch_pruning(importance: Literal["magnitude", "Taylor"]) -> Callable[[Task], Made]:
    """Channels removed by Torch-Pruning over the whole network."""

    def make(task: Task) -> Made:
        def loss(model: nn.Module) -> Any:
            return sum(task.network.loss(model, batch) for batch in task.batches[:_TAYLOR])

        small = torch_pruning_baseline.removed(
            task.dense, task.example, task.network.kept_whole(task.dense), task.limit,
            lambda model: layers.measured(model, task.example, task.cost), importance=importance,
            loss=loss if importance == "Taylor" else None,
        )  # fmt: skip
        return normalised(task, small)

    return make


# In the order in which they are run: auto takes the longest.
ARMS: dict[str, Arm] = {
    "low rank": Arm("ours", ours((st.ActivationSVD(), st.WeightSVD()))),
    "CP chains": Arm("ours", ours((st.ActivationCP(),))),
    "Tucker-2 chains": Arm("ours", ours((st.ActivationTucker2(),))),
    "shared factors": Arm("ours", ours(None, groups=True), only="bytes"),
    "low rank + sparse": Arm("ours", ours((st.LowRankPlusSparse(),)), only="bytes"),
    "filters": Arm("ours", ours((st.PrincipalFilters(),))),
    "Torch-Pruning, magnitude": Arm("peer", torch_pruning("magnitude")),
    "Torch-Pruning, Taylor": Arm("peer", torch_pruning("Taylor")),
    "spatial SVD, uniform": Arm("peer", peer(SpatialSVD, layers.uniform)),
    "Tucker-2, uniform": Arm("peer", peer(Tucker2, layers.uniform)),
    "CP, uniform": Arm("peer", peer(CP, layers.uniform)),
    "activation SVD, Lagrangian (as BALF)": Arm("peer", peer(Responses, layers.lagrangian)),
    "whitened SVD, uniform (as SVD-LLM)": Arm("peer", peer(Responses, layers.uniform)),
    "auto": Arm("auto", ours("auto")),
}
# The peers that decompose linear layers.
MATRICES = ("spatial SVD, uniform", "activation SVD, Lagrangian (as BALF)", "whitened SVD, uniform (as SVD-LLM)")
