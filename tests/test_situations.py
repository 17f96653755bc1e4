"""Networks as strangers write them: what the table of situations (benchmarks/situations.py) found, and its quickest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import spectrim as st

BATCHES = [torch.randn(48, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Inference(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().forward(x)


class ScriptedPart(Two):
    def __init__(self) -> None:
        super().__init__()
        self.c: Any = torch.jit.script(nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.c(x))


@pytest.mark.parametrize("kind", [Inference, ScriptedPart])
def test_inference_mode_of_the_models_own_and_scripted_parts_are_no_obstacle(kind: type[Two]) -> None:
    torch.manual_seed(0)
    model = kind()
    result = st.compress(model, BATCHES, st.Budget(parameters=0.7))
    assert result.plan.ratio("parameters") > 1.4
    with torch.no_grad():
        wanted, given = model.eval()(BATCHES[0]), result.model.eval()(BATCHES[0])
    assert 0 < float((wanted - given).norm() / wanted.norm()) < 0.9


def test_a_spectral_norm_in_training_is_not_moved_by_looking_at_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 64))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = st.compress(model, BATCHES, st.Budget(macs=0.8))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(
        torch.equal(t, before[name]) for name, t in result.model.state_dict().items() if name in before and "0." in name
    )
    assert model.training
    assert model[0].parametrizations.weight.training
