"""Sums behind layers are found in a forward pass, and layers fitted for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as st
from spectrim.network.choices import DENSE
from spectrim.nn.proof import Proof
from spectrim.nn.watch.junctions import Junction, Tap, junctions
from tests.nn.layers import close


class Net(nn.Module):
    """Layers ``a``, ``b``, ``c`` with a norm, run as a function says."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
        self.norm, self.act, self.drop, self.same = nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Identity()
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def padded(n: Any, x: Tensor) -> Tensor:
    x = n.act(n.a(x))
    return F.pad(x[:, :2], (0, 0, 0, 0, 1, 1)) + n.b(x)


def written(n: Any, x: Tensor) -> Tensor:
    x = n.act(n.a(x))
    y = F.relu(n.b(x), inplace=True)
    y = n.c(y)
    return F.relu(y.add_(x), inplace=True)


def projected(n: Any, x: Tensor) -> Tensor:
    y = n.norm(n.b(n.a(x)))
    y += n.c(x)
    return y


# By the layer: the norm, and the module that shows the other side, after it or before.
FOUND = {
    "plain": (lambda n, x: n.b(n.act(n.a(x))) + x, {"b": (None, "", False)}),
    "norm": (lambda n, x: n.act(n.norm(n.b(x)) + n.a(x)), {"a": (None, "norm", True)}),
    "behind a norm": (lambda n, x: n.a(x) + n.norm(n.b(x)), {"b": ("norm", "a", True)}),
    "dropout and identity": (lambda n, x: n.same(n.drop(n.b(n.a(x)))) + x, {"b": (None, "", False)}),
    "a part": (padded, {"b": (None, "act", True)}),
    "in place": (written, {"c": (None, "act", True)}),
    "projected": (projected, {"c": (None, "norm", True)}),
    "torch.add": (lambda n, x: torch.add(n.b(n.a(x)), x), {"b": (None, "", False)}),
}
NOTHING = {
    "no sum": lambda n, x: n.b(n.a(x)),
    "read twice": lambda n, x: (y := n.b(n.a(x))) + x + y.mean(),
    "side by side": lambda n, x: torch.cat([n.a(x), x], 1),
    "scaled": lambda n, x: torch.add(x, n.b(n.a(x)), alpha=2),
    "called twice": lambda n, x: n.b(n.b(x)) + x,
    "a number": lambda n, x: n.b(n.a(x)) + 1.0,
    "in between": lambda n, x: n.act(n.b(x)) + x,
    "known too late": lambda n, x: n.a(x) + torch.tanh(n.act(n.same(x)) * 2),
    "broadcast": lambda n, x: n.b(n.a(x)) + x.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("case", FOUND)
def test_sums_are_found(case):
    forward, expected = FOUND[case]
    found = junctions(Net(forward), ["a", "b", "c"], torch.randn(2, 4, 6, 6))
    assert {name: (j.norm, j.other.module, j.other.after) for name, j in found.items()} == expected


@pytest.mark.parametrize("case", NOTHING)
def test_what_is_no_such_sum_is_left_alone(case):
    assert junctions(Net(NOTHING[case]), ["a", "b", "c"], torch.randn(2, 4, 6, 6)) == {}


def test_a_pass_that_cannot_be_watched_has_none_and_harms_nothing():
    def fails(n: Any, x: Tensor) -> Tensor:
        raise RuntimeError("no")

    assert junctions(Net(fails), ["a"], torch.randn(2, 4, 6, 6), forward=lambda m, x: m(x)) == {}


def rows(tensor: Tensor) -> Tensor:
    """All places of a tensor with channels second, ``[1, n, channels]``."""
    return tensor.movedim(1, -1).reshape(1, -1, tensor.shape[1])


@pytest.mark.parametrize("normed", [False, True])
def test_a_layer_that_answers_its_target_gives_the_dense_sum(normed):
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 2)
    model = nn.ModuleDict({"norm": norm})
    one = Junction("layer", "norm" if normed else None, Tap("there", after=True, leaf=0))
    answers = [torch.randn(n, 3, 5, 5) for n in (2, 3)]
    there = [torch.randn_like(y) for y in answers]
    here = [s + 0.05 * torch.randn_like(s) for s in there]
    behind = norm if normed else nn.Identity()
    targets = one.targets(model, answers, there, here)
    for answer, target, s, missing in zip(answers, targets, there, here, strict=True):
        made = target.at(rows).reshape(len(answer), 25, 3).mT.reshape(answer.shape)
        assert close(behind(made) + missing, behind(answer) + s, 1e-5)


def test_a_nearly_silent_channel_makes_up_for_no_more_than_it_says():
    norm = nn.BatchNorm2d(2).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 1e-6]))
    one = Junction("layer", "norm", Tap("there", after=True, leaf=0))
    answer, gap = torch.randn(4, 2, 3, 3), 0.1 * torch.randn(4, 2, 3, 3)
    (target,) = one.targets(nn.ModuleDict({"norm": norm}), [answer], [gap], [torch.zeros_like(gap)])
    made = (target.at(rows) - rows(answer))[0]
    assert close(made[:, 0], rows(gap)[0, :, 0], 1e-4)
    assert float(made[:, 1].norm()) <= float(answer[:, 1].norm()) * 1.001


@pytest.mark.parametrize("shown", [(None, torch.ones(1, 2, 3)), (torch.ones(1, 3, 3), torch.ones(1, 2, 3))])
def test_sides_that_cannot_be_compared_ask_for_nothing(shown):
    one = Junction("layer", None, Tap("there", after=True, leaf=0))
    answer = torch.randn(1, 2, 3)
    (target,) = one.targets(nn.Identity(), [answer], [shown[0]], [shown[1]])
    assert torch.equal(target.at(rows), rows(answer))


class Residual(nn.Module):
    """A shortcut through one layer, and another layer that sees the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def test_a_dense_layer_makes_up_for_what_its_shortcut_misses(monkeypatch):
    torch.manual_seed(3)
    model, batches = Residual(), [torch.randn(64, 12) for _ in range(4)]
    sites = st.calibrate(model, st.find(model), batches)
    plan = st.select(st.tabulate(sites, st.WeightSVD(multiple_of=1)), st.Budget(parameters=0.5))
    entries = tuple(e if e.site == "first" else dataclasses.replace(e, choice=DENSE) for e in plan)
    plan = dataclasses.replace(plan, entries=entries)
    test = torch.randn(256, 12)

    def lost() -> float:
        small = st.apply(model, sites, plan, batches)
        assert not torch.equal(small.first(test), model.first(test))
        with torch.no_grad():
            return float((small(test) - model(test)).norm() / model(test).norm())

    summed = lost()
    monkeypatch.setattr(Proof, "check_copy", lambda proof: ({}, ()))
    alone = lost()
    assert alone > 0.05
    # What is left is the shrinkage of few samples.
    assert summed < 0.25 * alone
