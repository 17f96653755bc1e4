"""Models that draw random numbers: a copy draws the same, and nobody else notices."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as st
from spectrim.nn.agreement import agreement
from spectrim.nn.watch.batches import Feed
from spectrim.train import Distillation
from spectrim.train.objective import Objective

MASKS = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(n)) for n in range(4)])
BATCHES = [
    torch.randn(64, 32, generator=torch.Generator().manual_seed(n)) * 0.9 ** torch.arange(32.0) for n in range(4)
]


class Hides(nn.Module):
    """Goes by some entries of each batch, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        x = x[:, torch.randperm(32) if order is None else order]
        x = F.relu(self.a(x))
        return self.c(F.relu(self.b(x * (torch.rand(64) < 0.9 if order is None else 1.0))))


class Python(Hides):
    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        return super().forward(x if random.random() < 0.5 else x.flip(1), MASKS[0])


def error(model: nn.Module, small: nn.Module) -> float:
    """Of the outputs, without anything drawn."""
    x, order = torch.cat(BATCHES), MASKS[0]
    with torch.no_grad():
        return float((model(x, order) - small(x, order)).norm() / model(x, order).norm())


@pytest.mark.parametrize(
    "methods",
    [None, [st.PrincipalFilters(), st.ActivationSVD()], [st.LowRankPlusSparse(densities=(0.0, 0.2), ranks=3, turns=4)]],
)
def test_layers_are_fitted_to_what_the_model_gives_for_the_same_numbers(methods: Any) -> None:
    model = Hides().eval()

    def told(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(*batch)

    batches = list(zip(BATCHES, MASKS, strict=True))
    budget = "bytes=70%" if methods and len(methods) == 1 else "macs=60%"
    drawn = st.compress(model, BATCHES, budget, methods=methods)
    given = st.compress(model, batches, budget, methods=methods, forward=told)
    # Few orders were seen, and this is one of those that the other network was fitted to.
    assert error(model, drawn.model) < 2 * error(model, given.model) + 0.02
    agreed = drawn.report.agreement
    assert agreed is not None
    assert agreed.error < 2 * error(model, drawn.model) + 0.02


class Numpy(Hides):
    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.from_numpy(np.random.permutation(32)))  # noqa: NPY002 (as people write it)


@pytest.mark.parametrize("kind", [Hides, Python, Numpy])
def test_a_copy_draws_the_same_and_batches_draw_differently(kind: type[Hides]) -> None:
    model = kind().eval()
    same = agreement(model, copy.deepcopy(model), BATCHES)
    assert same is not None
    assert same.error == 0
    feed, one = Feed(), BATCHES[0]
    assert torch.equal(feed(model, one), feed(model, one))
    other = one.clone()
    other[0, 0] += 1
    if kind is Hides:
        assert not torch.allclose(feed(model, one)[1:], feed(model, other)[1:])


class Holder:
    """Something of somebody's own that draws."""

    def __init__(self) -> None:
        self.rng = np.random.RandomState(1)


class OwnTorch(Hides):
    def __init__(self) -> None:
        super().__init__()
        self.rng = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        x = F.relu(self.a(x[:, torch.randperm(32, generator=self.rng) if order is None else order]))
        return self.c(F.relu(self.b(x * (torch.rand(64, generator=self.rng) < 0.9 if order is None else 1.0))))


class OwnPython(Hides):
    drawing = {"rng": [random.Random(2)]}  # noqa: RUF012 (as people write it)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        return super().forward(x if self.drawing["rng"][0].random() < 0.5 else x.flip(1), MASKS[0])


class OwnNumpy(Hides):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.from_numpy(self.holder.rng.permutation(32)))


RNG = np.random.default_rng(4)


class Newer(Hides):
    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.from_numpy(RNG.permutation(32)))


@pytest.mark.parametrize(("kind", "of_process"), [(OwnTorch, Hides), (OwnPython, Python), (OwnNumpy, Numpy)])
def test_generators_of_a_models_own_draw_as_those_of_the_process(kind: type[Hides], of_process: type[Hides]) -> None:
    model = kind().eval()
    before = copy.deepcopy(model)
    own, others = (st.compress(each, BATCHES, "macs=60%") for each in (model, of_process().eval()))
    assert own.plan == others.plan
    assert all(torch.equal(a, b) for a, b in zip(own.model.parameters(), others.model.parameters(), strict=True))
    # Afterwards the model goes on as if it had not been run.
    assert torch.equal(model(BATCHES[0]), before(BATCHES[0])) or kind is OwnPython


def test_a_generator_that_a_function_names_begins_each_pass_anew_and_goes_on_afterwards() -> None:
    model, state = Newer().eval(), copy.deepcopy(RNG.bit_generator.state)
    result = st.compress(model, BATCHES, "macs=60%")
    assert RNG.bit_generator.state == state
    assert result.report.agreement is not None
    feed = Feed()
    assert torch.equal(feed(model, BATCHES[0]), feed(model, BATCHES[0]))


TICKS = itertools.count()


class Ticks(Hides):
    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        return super().forward(x, MASKS[0]) + next(TICKS) % 3


class Counts(Hides):
    """Counts its passes in a list, which a copy takes along: both answer alike, and not the same again."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = [0]

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        self.passes[0] += 1
        return super().forward(x, MASKS[0]) + self.passes[0] % 2


@pytest.mark.parametrize(("kind", "methods"), [(Ticks, None), (Counts, None), (Counts, [st.PrincipalFilters()])])
def test_a_model_that_never_repeats_itself_is_told_of(kind: type[Hides], methods: Any) -> None:
    result = st.compress(kind().eval(), BATCHES, "macs=60%", methods=methods)
    assert any("other outputs each time that it runs" in note for note in result.report.notes)


@pytest.mark.parametrize("methods", [None, "auto"])
def test_what_others_draw_goes_on_as_if_no_model_had_run(methods: Any) -> None:
    model = Hides().eval()
    drawn = []
    for run in (False, True):
        torch.manual_seed(3)
        if run:
            st.compress(model, BATCHES, "macs=60%", methods=methods)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_teacher_draws_what_its_student_does() -> None:
    model = Hides().eval()
    apart = Objective(None, copy.deepcopy(model), Distillation(), "float32")(model, BATCHES[0], None)
    assert float(apart.detach()) == pytest.approx(0, abs=1e-6)
