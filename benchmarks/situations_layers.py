"""Situations of kinds 5, 7, 8, 9 and 11: layers and weights that are not plain, and what a layer was besides."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.situation_table import (
    EITHER,
    REFUSED,
    Two,
    TwoConvolutions,
    images,
    sequences,
    situation,
    tokens,
    vectors,
)

COUNTED = "compressed: the work of every operation is counted"
ALONE = "compressed: what no site holds is left alone and told"


def _after(layer: nn.Module, width: int) -> nn.Module:
    return Recurrent(layer, width)


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.a, self.layer, self.b = nn.Linear(32, 32), layer, nn.Linear(width, 10)
        self.c = nn.Linear(32, 128)
        self.d = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(F.relu(self.c(F.relu(self.a(x)))))
        return self.b(self.layer(x)[0][:, -1])


def _lstm_counted(dense: nn.Module, result: Any) -> str | None:
    # 4 gates of 16 units, each of 32 inputs and 16 states, at 10 times; the linear layers, the last one at one time.
    right = 10 * (4 * 16 * (32 + 16) + 32 * 32 + 32 * 128 + 128 * 32) + 16 * 10
    counted = result.plan.dense_costs["macs"]
    return None if counted == right else f"{counted} MACs are counted, {right} are right"


situation(5, COUNTED, sequences, name="LSTM", counted=False, fault=_lstm_counted)(
    lambda: _after(nn.LSTM(32, 16, batch_first=True), 16)
)
situation(5, COUNTED, sequences, name="GRU in both directions", counted=False)(
    lambda: _after(nn.GRU(32, 16, batch_first=True, bidirectional=True), 32)
)


@situation(5, COUNTED, counted=False)
class Bilinear(Two):
    def begin(self) -> None:
        self.c = nn.Bilinear(32, 32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(super().forward(x), x)


@situation(5, COUNTED, counted=False)
class Distances(Two):
    def begin(self) -> None:
        self.centres = nn.Parameter(torch.randn(5, 32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(super().forward(x), self.centres)


@situation(5, COUNTED, sequences, counted=False)
class ScaledDotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.more = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.more(self.out(y))


@situation(5, COUNTED, sequences, counted=False)
class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@situation(5, COUNTED, sequences)
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.a, self.b = nn.Parameter(torch.randn(4, 32, 8) / 6), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,hdk->bthk", self.b(F.relu(self.a(x))), self.heads).flatten(2)


def _trained(model: nn.Module) -> list[str]:
    return sorted({name.split(".")[0] for name, each in model.named_parameters() if each.requires_grad})


@situation(
    7, "compressed: what was frozen stays frozen",
    fault=lambda dense, result: None if _trained(dense) == _trained(result.model) else "another part is trained",
)  # fmt: skip
def frozen() -> nn.Module:
    model = Two()
    model.a.requires_grad_(False)
    return model


def _last(model: nn.Module) -> list[bool]:
    wide = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return [p.is_contiguous(memory_format=torch.channels_last) for p in wide]


@situation(
    7, "compressed: weights keep their order in memory",
    lambda: [x.contiguous(memory_format=torch.channels_last) for x in images()],
    fault=lambda dense, result: None if all(_last(result.model)) else "weights are no longer channels last",
)  # fmt: skip
def channels_last() -> nn.Module:
    return TwoConvolutions().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _modes(dense: nn.Module, result: Any) -> str | None:
    kept = dict(dense.named_modules())
    other = [
        name for name, module in result.model.named_modules() if name in kept and module.training != kept[name].training
    ]
    return f"modes of {other[:3]} changed" if other else None


@situation(7, "compressed: every module keeps its mode", images, fault=_modes)
class PartlyInTraining(TwoConvolutions):
    def begin(self) -> None:
        self.norm, self.drop = nn.BatchNorm2d(24).eval(), nn.Dropout(0.2)

    def train(self, mode: bool = True) -> PartlyInTraining:
        super().train(mode)
        self.norm.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.drop(F.relu(self.norm(self.a(x))))))


situation(7, "compressed", lambda: [x.double() for x in vectors()], name="float64", rounding=1e-8)(
    lambda: Two().double()
)
situation(7, "compressed", lambda: [x.bfloat16() for x in vectors()], name="bfloat16", rounding=0.05)(
    lambda: Two().bfloat16()
)
situation(7, "compressed", lambda: [x.half() for x in vectors()], name="float16", rounding=0.01)(lambda: Two().half())
situation(
    8, "refused: complex weights", lambda: [x.to(torch.cfloat) for x in vectors()], name="complex", outcome=EITHER
)(lambda: nn.Sequential(nn.Linear(32, 64, dtype=torch.cfloat), nn.Linear(64, 32, dtype=torch.cfloat)))
situation(8, ALONE, name="weight norm")(
    lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 96), nn.Linear(96, 8)
    )
)
situation(
    8, "refused: layer 0 was skipped, why, and how to change that", name="weight norm in the way of a budget",
    outcome=REFUSED, budget=0.3,
)(
    lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(32, 256)), nn.ReLU(), nn.Linear(256, 8))
)  # fmt: skip
situation(8, ALONE, name="spectral norm")(
    lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 96), nn.Linear(96, 8)
    )
)


class FrozenNorm(nn.Module):
    """BatchNorm as buffers, as detectors have it."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[None, :, None, None] + (self.bias - self.running_mean * scale)[None, :, None, None]


@situation(8, "compressed, channels through the norm or the reason", images)
class FrozenBatchNorm(TwoConvolutions):
    def begin(self) -> None:
        self.norm = FrozenNorm(24)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.norm(self.a(x)))))


@situation(8, ALONE, images)
class FunctionalConvolution(TwoConvolutions):
    def begin(self) -> None:
        self.kernel = nn.Parameter(torch.randn(24, 24, 3, 3) / 12)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(F.conv2d(F.relu(self.a(x)), self.kernel, padding=1))))


class Conv1D(nn.Module):
    """GPT-2's linear layer, its weight the other way round."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 6), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


situation(8, ALONE, name="Conv1D of GPT-2")(
    lambda: nn.Sequential(Conv1D(32, 32), nn.GELU(), nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32))
)


@situation(8, ALONE)
class ListOfParameters(Two):
    def begin(self) -> None:
        self.stack = nn.ParameterList(torch.randn(32, 32) / 6 for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.stack:
            x = torch.tanh(x @ weight)
        return super().forward(x)


@situation(8, "compressed: an embedding and the head that is tied to it are one site", tokens, budget=0.9)
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(40, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.out = nn.Linear(32, 40, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(F.relu(self.a(self.words(x)))))
