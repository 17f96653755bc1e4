"""Typical mistakes at the door of the verbs: one sentence that quotes what came and says the cure, before any work."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st
from spectrim.network.choices import Choice, LowRankChoice
from spectrim.train import budget_path

MODEL = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
BATCHES = [torch.randn(32, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]
SITES = st.find(MODEL)
HALF = st.Budget(macs=0.5)


class NoDataclass(Choice, kind="no-dataclass"):
    pass


class Untouchable(nn.Sequential):
    """A model that must not run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model has run before the arguments were looked at")


def untouched() -> Untouchable:
    return Untouchable(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def compress(**changed: Any) -> Any:
    return st.compress(**{"model": untouched(), "calibration": BATCHES, "budget": HALF} | changed)


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a number as budget": (lambda: compress(budget=0.5), TypeError, r"budget is 0\.5.*macs=0\.5"),
    "a list of budgets": (lambda: compress(budget=[HALF]), TypeError, r"budget is \[.*macs"),
    "an unreadable budget": (lambda: compress(budget="half"), ValueError, r"'half'.*COST=VALUE"),
    "a cost that is not there": (lambda: compress(budget="joules=50%"), ValueError, r"limits joules.*costs=\{name"),
    "a cost that is no function": (
        lambda: compress(costs={"joules": 3}),
        TypeError,
        r"costs has 'joules': 3; expected",
    ),
    "a list of costs": (
        lambda: compress(costs=[st.macs]),
        TypeError,
        r"costs is \[<function macs.*functions of layers by",
    ),
    "a method's name": (lambda: compress(methods=["svd"]), TypeError, r"methods has 'svd': expected objects"),
    "a method's class": (lambda: compress(methods=[st.WeightSVD]), TypeError, r"methods has WeightSVD:.*WeightSVD\(\)"),
    "a bare class": (lambda: compress(methods=st.WeightSVD), TypeError, r"methods has WeightSVD: expected objects"),
    "two of one name": (
        lambda: compress(methods=[st.WeightSVD(), st.WeightSVD(multiple_of=2)]),
        ValueError,
        "two methods are called 'WeightSVD'",
    ),
    "a module to skip": (lambda: compress(skip=[MODEL[0]]), TypeError, r"choose layers by Linear\(in.*a name pattern"),
    "no method": (lambda: compress(methods=[]), ValueError, "methods is empty, so nothing is on offer: give a method"),
    "a method for groups without groups": (
        lambda: compress(methods=[st.JointSVD()]),
        ValueError,
        "JointSVD-right can be chosen for groups of layers only, and there are none: give groups=True",
    ),
    "milliseconds as latency": (lambda: compress(latency=3), TypeError, r"latency is 3: expected Latency.*Budget\(lat"),
    "a name as groups": (lambda: compress(groups="x"), TypeError, "groups is 'x': expected True to find them, False"),
    "a word as guard": (lambda: compress(guard="yes"), TypeError, "guard is 'yes': expected True, .* or False"),
    "learn_ranks: a number as latency": (
        lambda: st.learn_ranks(untouched(), BATCHES, HALF, latency=3),
        TypeError,
        "latency is 3",
    ),
    "tabulate: no method": (lambda: st.tabulate(SITES, []), ValueError, "methods is empty"),
    "a rank of 0": (lambda: LowRankChoice("channel", 0), st.PlanError, "rank of a 'low_rank' choice is 0: .*>= 1"),
    "a choice that is no dataclass": (lambda: NoDataclass(), TypeError, "NoDataclass has to be a frozen dataclass"),
    "a number to keep to": (lambda: compress(only=3), TypeError, r"choose layers by 3: expected a name pattern"),
    "a word as progress": (lambda: compress(progress="yes"), TypeError, r"progress is 'yes': expected True"),
    "a bare tensor": (lambda: compress(calibration=BATCHES[0]), st.CalibrationError, r"one tensor of shape \(32, 32\)"),
    "a dataset": (
        lambda: compress(calibration=TensorDataset(BATCHES[0])),
        st.CalibrationError,
        r"TensorDataset, which gives single samples: pass DataLoader\(dataset",
    ),
    "a single batch as a dict": (lambda: compress(calibration={"x": BATCHES[0]}), st.CalibrationError, "are a dict"),
    "a path": (lambda: compress(calibration="images/"), st.CalibrationError, "are a str: expected a list of batches"),
    "nothing": (
        lambda: compress(calibration=None),
        st.CalibrationError,
        "are None: expected a list of batches .* WeightSVD",
    ),
    "a name as model": (lambda: compress(model="resnet18"), TypeError, r"model is a str: expected a torch.nn.Module"),
    "a selector's name": (lambda: compress(selector="exact"), TypeError, r"selector is 'exact'.*spectrim.selection"),
    "find: a name": (lambda: st.find("resnet18"), TypeError, "model is a str"),
    "calibrate: a tensor": (lambda: st.calibrate(untouched(), SITES, BATCHES[0]), st.CalibrationError, "one tensor"),
    "tabulate: a class": (lambda: st.tabulate(SITES, st.WeightSVD), TypeError, "methods has WeightSVD"),
    "learn_ranks: a cost that is not there": (
        lambda: st.learn_ranks(untouched(), BATCHES, "joules=50%"),
        ValueError,
        "limits joules, which the table does",
    ),
    "budget_path: a number": (lambda: budget_path(untouched(), BATCHES, [HALF, 0.5]), TypeError, r"budget is 0\.5"),
    "select: a number": (lambda: st.select(st.tabulate(SITES), 0.5), TypeError, r"budget is 0\.5"),
    "apply: a dataset": (
        lambda: st.apply(
            untouched(), SITES, st.select(st.tabulate(SITES), st.Budget(parameters=0.5)), TensorDataset(BATCHES[0])
        ),
        st.CalibrationError,
        "TensorDataset",
    ),
    "sensitivity: a tensor": (
        lambda: st.sensitivity(untouched(), SITES, BATCHES[0]),
        st.CalibrationError,
        "one tensor",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_before_any_work(mistake: str) -> None:
    call, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "changed",
    [
        {"budget": "macs=50%"},
        {"budget": "macs=0.5, parameters=90%"},
        {"budget": {"macs": 0.5}},
        {"methods": st.WeightSVD()},
        {"methods": (st.WeightSVD(),)},
        {"skip": "0", "budget": "macs=90%"},
        {"skip": ["0"], "budget": "macs=90%"},
        {"only": nn.Linear},
        {"calibration": DataLoader(TensorDataset(torch.cat(BATCHES)), batch_size=32)},
        {"calibration": iter(BATCHES)},
        {"progress": False},
    ],
    ids=lambda changed: " ".join(changed),
)
def test_what_can_be_meant_is_taken(changed: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "calibration": BATCHES, "budget": HALF} | changed
    result = st.compress(**arguments, sensitivity=False)
    assert result.plan.costs["macs"] <= result.plan.budget["macs"] < result.plan.dense_costs["macs"]


def test_results_can_be_pickled_and_copied() -> None:
    result = st.compress(MODEL, BATCHES, "parameters=60%", groups={"both": ["0", "2"]}, methods=[st.WeightSVD()])
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert again.plan == result.plan
        assert again.sites.groups == result.sites.groups
        layer, other = again.sites["0"], result.sites["0"]
        assert torch.equal(layer.statistics.input.covariance, other.statistics.input.covariance)
        with pytest.raises(TypeError, match="does not support item assignment"):
            again.sites.groups["new"] = ("0",)
