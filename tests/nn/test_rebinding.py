"""Copies of models whose functions were made with their modules."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as st
from benchmarks.situation_table import Two
from spectrim.nn.copying import copy_model

BATCHES = [torch.randn(size, 32, generator=torch.Generator().manual_seed(size)) for size in (64, 48, 56)]


class Closes(Two):
    def begin(self) -> None:
        self.run = lambda x: self.b(F.relu(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Defaults(Closes):
    def begin(self) -> None:
        last = functools.partial(self.b)

        def run(x: Tensor, a: nn.Module = self.a, *, b: Any = last) -> Tensor:
            return b(F.relu(a(x)))

        self.run = run


class NamesItself(Closes):
    def begin(self) -> None:
        def run(x: Tensor, steps: int = 1) -> Tensor:
            return run(F.relu(self.a(x)), 0) if steps else self.b(x)

        self.run = run


class Wraps(Two):
    def begin(self) -> None:
        plain = self.forward

        @functools.wraps(plain)
        def doubled(x: Tensor) -> Tensor:
            return 2 * plain(x)

        self.forward = doubled

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@pytest.mark.parametrize("kind", [Closes, Defaults, NamesItself, Wraps])
def test_functions_made_with_modules_call_those_of_the_copy(kind: type[Two]) -> None:
    model = kind().eval()
    copied = copy_model(model)
    assert torch.equal(copied(BATCHES[0]), model(BATCHES[0]))
    for parameter in copied.parameters():
        nn.init.zeros_(parameter)
    assert not copied(BATCHES[0]).any()
    assert model(BATCHES[0]).any()
    result = st.compress(model, BATCHES, "macs=60%")
    assert result.plan.changed
    assert not torch.equal(result.model(BATCHES[0]), model(BATCHES[0]))


class Features(Two):
    """Hooks leave something on the model that other hooks take."""

    def begin(self) -> None:
        self.kept: dict[str, Tensor] = {}

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            self.kept["a"] = output

        def add(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (inputs[0] + self.kept["a"],)

        self.a.register_forward_hook(keep)
        self.b.register_forward_pre_hook(add)


class Unhooked(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(F.relu(y) + y)


def test_what_hooks_keep_on_a_model_is_the_copys_own_in_each_pass() -> None:
    hooked, plain = Features().eval(), Unhooked().eval()
    plain.load_state_dict(hooked.state_dict())
    small, wanted = (st.compress(model, BATCHES, "macs=60%") for model in (hooked, plain))
    hooked.kept.clear()
    assert torch.allclose(small.model(BATCHES[0]), wanted.model(BATCHES[0]), atol=1e-5)
    assert not hooked.kept


def test_variables_that_hold_no_module_stay_one_for_a_model_and_its_copy() -> None:
    class Counts(Two):
        def begin(self) -> None:
            calls: list[int] = []
            self.calls = lambda: calls
            self.run = lambda x: (calls.append(1), self.a(x))[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.run(x))

    model = Counts().eval()
    copied: Any = copy_model(model)
    assert copied.calls is model.calls
    copied(BATCHES[0])
    assert model.calls() == [1]


def test_scripted_parts_of_a_copy_have_weights_of_their_own() -> None:
    class Scripted(Two):
        def begin(self) -> None:
            self.c: Any = torch.jit.trace(nn.Linear(64, 64), torch.zeros(1, 64))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.c(self.a(x))))

    small = st.compress(Scripted().eval(), BATCHES, "macs=80%").model
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in small.parameters())
    assert st.compress(small, BATCHES, "macs=90%").plan.changed


def test_functions_of_namespaces_without_a_name_are_copied() -> None:
    layer = nn.Linear(4, 4)
    space: dict[str, Any] = {"layer": layer}
    exec("def forward(self, x):\n    return layer(x)", space)
    model: Any = nn.Module()
    model.layer = layer
    model.forward = types.MethodType(space["forward"], model)
    copied = copy_model(model)
    assert copied.forward.__func__.__globals__["layer"] is copied.layer is not layer
