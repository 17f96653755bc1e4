"""Typical mistakes at the door of the verbs: one sentence that quotes what came and says the cure, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import spectrim as st

MODEL = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
BATCHES = [torch.randn(32, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]
SITES = st.find(MODEL)
HALF = st.Budget(macs=0.5)


class Untouchable(nn.Sequential):
    """A model that must not run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model has run before the arguments were looked at")


def untouched() -> Untouchable:
    return Untouchable(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "find: a name": (lambda: st.find("resnet18"), TypeError, "model is a str"),
    "calibrate: a tensor": (lambda: st.calibrate(untouched(), SITES, BATCHES[0]), st.CalibrationError, "one tensor"),
    "tabulate: a class": (lambda: st.tabulate(SITES, st.WeightSVD), TypeError, "methods has WeightSVD"),
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
