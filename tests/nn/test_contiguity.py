"""What reaches strided 1x1 convolutions of few channels, and that training them ends, and right, on any CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.linalg.patterns import Unstructured
from spectrim.nn.contiguity import contiguous_where_needed
from spectrim.nn.find import find
from spectrim.nn.layers import spec_of
from spectrim.nn.shared import Wide
from spectrim.nn.sparse.layers import Masked
from spectrim.nn.watch.calibrate import calibrate
from spectrim.nn.watch.sensitivity import sensitivity
from tests.cases import ENVIRONMENT
from tests.nn import strided_training


class Strides(TorchFunctionMode):
    """Whether inputs and weights of all convolutions have the strides of contiguous order, also of single channels."""

    def __init__(self) -> None:
        super().__init__()
        self.contiguous: list[bool] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "").startswith("conv"):
            for tensor in args[:2]:
                self.contiguous.append(tensor.stride() == torch.empty(tensor.shape).stride())
        return function(*args, **(kwargs or {}))


def wide() -> nn.Module:
    parts = [nn.Conv2d(4, n, 1, stride=2, bias=False) for n in (3, 5)]
    return Wide(parts, spec_of(nn.Conv2d(4, 8, 1, stride=2), ["wide"]), axis=0)


def masked() -> nn.Module:
    layer = nn.Conv2d(4, 8, 1, stride=2)
    return Masked(layer, torch.rand(layer.weight.shape) < 0.5, Unstructured(), spec_of(layer, ["masked"]))


AT_RISK = {
    "stride-2": lambda: nn.Conv2d(4, 8, 1, stride=2, bias=False),
    "stride-1-2": lambda: nn.Conv2d(15, 8, 1, stride=(1, 2)),
    "one-channel": lambda: nn.Conv2d(1, 8, 1, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(20, 4, 1, stride=2, output_padding=1),
    "wide": wide,
    "masked": masked,
}
SAFE = {
    "unstrided": lambda: nn.Conv2d(4, 8, 1),
    "many-channels": lambda: nn.Conv2d(16, 8, 1, stride=2),
    "larger-kernel": lambda: nn.Conv2d(4, 8, 3, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 16, 1, stride=2),
}


def channels_last(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """The model and an input for it, both in channels-last order."""
    channels = next(m.in_channels for m in model.modules() if hasattr(m, "in_channels"))
    x = torch.randn(2, channels, 6, 6).to(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), x  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", AT_RISK)
def test_layers_at_risk_see_contiguous_order_only(kind: str) -> None:
    model, x = channels_last(nn.Sequential(AT_RISK[kind]()))
    before = model(x)
    values, storages = ([f(p) for p in model.parameters()] for f in (torch.clone, lambda p: p.data_ptr()))
    with contiguous_where_needed(model), Strides() as seen:
        torch.testing.assert_close(model(x), before)
    assert seen.contiguous == [True, True]
    assert [p.data_ptr() for p in model.parameters()] == storages
    assert all(map(torch.equal, model.parameters(), values))
    with Strides() as after:
        model(x)
    assert not after.contiguous[0], "inputs outside the context are the caller's"


@pytest.mark.parametrize("kind", SAFE)
def test_other_layers_keep_their_order(kind: str) -> None:
    model, x = channels_last(SAFE[kind]())
    with contiguous_where_needed(model), Strides() as seen:
        model(x)
    assert seen.contiguous == [False, False]


def test_sensitivity_keeps_them_contiguous() -> None:
    model, x = channels_last(nn.Sequential(AT_RISK["stride-2"](), nn.Flatten(), nn.Linear(72, 3)))
    sites = calibrate(model, find(model), [x])
    with Strides() as seen:
        sensitivity(model, sites, [x])
    assert seen.contiguous == [True, True]


@pytest.mark.parametrize("widest", ["AVX2", pytest.param("ALL", marks=pytest.mark.slow)])
def test_training_is_sound_where_plain_backward_passes_are_not(widest: str) -> None:
    """In a process of its own, since plain passes end it: on CPUs with AVX2, and with AVX-512 from 64 x 64 on."""
    environment = ENVIRONMENT | {"ONEDNN_MAX_CPU_ISA": widest}
    if widest == "AVX2":
        environment["ATEN_CPU_CAPABILITY"] = "avx2"
    command = [sys.executable, strided_training.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("library: right\n"), f"{done.stdout}\n{done.stderr[-3000:]}"
    if done.stdout.endswith("torch: right\n"):
        pytest.skip(f"torch {torch.__version__} computes these gradients right by itself on this CPU")
