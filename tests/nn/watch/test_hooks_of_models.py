"""Hooks of a model's own change what layers give and are given; objects that it holds keep what passes leave there."""

from __future__ import annotations

import contextvars
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st

BATCHES = [
    torch.randn(64, 32, generator=torch.Generator().manual_seed(n)) * 0.9 ** torch.arange(32.0) for n in range(3)
]


class Written(nn.Module):
    """Between its layers stands what hooks make of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(0.5 * 3 * self.a(x).tanh())


class Hooked(Written):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(_tripled)
        self.b.register_forward_pre_hook(_halved)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def _tripled(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 3 * output.tanh()


def _halved(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (0.5 * inputs[0],)


def test_layers_with_hooks_are_weighed_and_fitted_as_if_the_model_did_what_these_do() -> None:
    torch.manual_seed(0)
    written, hooked = Written().eval(), Hooked().eval()
    hooked.load_state_dict(written.state_dict())
    wanted, found = (st.compress(model, BATCHES, "macs=60%") for model in (written, hooked))
    assert [entry.choice for entry in found.plan] == [entry.choice for entry in wanted.plan]
    assert all(abs(a.error - b.error) < 1e-6 for a, b in zip(found.plan, wanted.plan, strict=True))
    assert torch.allclose(found.model(BATCHES[0]), wanted.model(BATCHES[0]), atol=1e-5)


class Context:
    """What a pass leaves for itself, as a class of somebody's own keeps it."""

    def keep(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.skip = output

    def add(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0] + self.skip.relu(),)


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.begin()

    def begin(self) -> None:
        """Take down what is needed beside the layers."""

    def forward(self, x: Tensor) -> Tensor:
        kept = self.a(x)
        return self.c(self.b(kept.relu()).relu() + kept.relu())


class Chain(Skips):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class OnTheModel(Skips):
    def begin(self) -> None:
        self.context = Context()

    def forward(self, x: Tensor) -> Tensor:
        self.context.skip = self.a(x)
        return self.c(self.b(self.context.skip.relu()).relu() + self.context.skip.relu())


class MadeAnew(OnTheModel):
    def forward(self, x: Tensor) -> Tensor:
        self.context = Context()
        y = super().forward(x)
        del self.context.skip
        return y


class ByMethods(Chain):
    def begin(self) -> None:
        context = Context()
        self.a.register_forward_hook(context.keep)
        self.c.register_forward_pre_hook(context.add)


class ByClosures(Chain):
    def begin(self) -> None:
        context = Context()
        self.a.register_forward_hook(lambda *call: context.keep(*call))
        self.c.register_forward_pre_hook(lambda *call: context.add(*call))


class ForThePass(Chain):
    """Hooks that a pass takes away at its end, as what caches keys and values does, are not there for other passes."""

    def forward(self, x: Tensor) -> Tensor:
        context = Context()
        hooks = self.a.register_forward_hook(context.keep), self.c.register_forward_pre_hook(context.add)
        try:
            return super().forward(x)
        finally:
            for hook in hooks:
                hook.remove()


_RECORDED: contextvars.ContextVar[list[Tensor]] = contextvars.ContextVar("recorded")


def _record(_: nn.Module, __: Any, output: Tensor) -> None:
    _RECORDED.get().append(output)


# As those by which transformers gives the outputs of layers.
_record.__module__ = "transformers.utils"


class SetsUp(Chain):
    """Hooks that its first pass sets up record what layers give: set up twice they would record each layer twice."""

    ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            for layer in (self.a, self.b):
                layer.register_forward_hook(_record)
            self.ready = True
        _RECORDED.set([])
        self.b(self.a(x).relu())
        first, second, *_ = _RECORDED.get()
        return self.c(second.relu() + first.relu())


def _of_sizes() -> list[Tensor]:
    return [batch[: 64 - 8 * number] for number, batch in enumerate(BATCHES)]


@functools.cache
def _of_skips() -> tuple[nn.Module, st.Result]:
    torch.manual_seed(0)
    model = Skips().eval()
    return model, st.compress(model, _of_sizes(), "macs=60%")


@pytest.mark.parametrize("kind", [OnTheModel, MadeAnew, ByMethods, ByClosures, ForThePass, SetsUp])
def test_what_a_pass_leaves_in_an_object_is_its_own(kind: type[Skips]) -> None:
    (wanted, a), model = _of_skips(), kind().eval()
    model.load_state_dict(wanted.state_dict())
    b = st.compress(model, _of_sizes(), "macs=60%")
    assert b.plan.changed
    assert torch.allclose(b.model(BATCHES[0]), a.model(BATCHES[0]), atol=1e-5)
