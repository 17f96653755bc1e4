"""Hooks of a model's own change what layers give and are given; what layers compute themselves is what is fitted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st

BATCHES = [
    torch.randn(64, 32, generator=torch.Generator().manual_seed(n)) * 0.9 ** torch.arange(32.0) for n in range(6)
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
