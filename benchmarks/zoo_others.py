"""Further small networks in plain PyTorch for the model zoo: other shapes of data, other ends, shared weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo_nets import head, unit


class Mixer(nn.Module):
    """MLP-mixer: linear layers over positions and over channels in turns, LayerNorm before each."""

    def __init__(self, width: int = 24, tokens: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)

        def mlp(size: int, inner: int) -> nn.Module:
            return nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))

        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks))
        self.mlps = nn.ModuleList(mlp(*(width, 48) if n % 2 else (tokens, 32)) for n in range(2 * blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for index, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            x = x + (mlp(norm(x)) if index % 2 else mlp(norm(x).transpose(1, 2)).transpose(1, 2))
        return self.head(x.mean(1))


class Wave(nn.Module):
    """WaveNet: dilated 1-D convolutions, tanh times sigmoid, a residual and a sum of skips."""

    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 1)
        self.filters, self.gates = (
            nn.ModuleList(nn.Conv1d(width, width, 3, padding=2**n, dilation=2**n) for n in range(layers))
            for _ in range(2)
        )
        self.outs, self.skips = (nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers)) for _ in range(2))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, 24, 1), nn.ReLU(), nn.Conv1d(24, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        total = torch.zeros(())
        for kernel, gate, out, skip in zip(self.filters, self.gates, self.outs, self.skips, strict=True):
            y = torch.tanh(kernel(x)) * torch.sigmoid(gate(x))
            total = total + skip(y)
            x = x + out(y)
        return self.head(total)


def volume_net() -> nn.Module:
    """3-D convolutions."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 16, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def le_net() -> nn.Module:
    """Channels of the last map are blocks of inputs of the first linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class Gated(nn.Module):
    """One half of the channels times the sigmoid of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.glu(self.second(self.norm(F.glu(self.first(x), dim=1))), dim=1))


def slopes_net() -> nn.Module:
    """One PReLU slope a channel, and one for all."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16), nn.Conv2d(16, 24, 3, padding=1), nn.PReLU(), head(24)
    )


class Style(nn.Module):
    """Style transfer: instance norm, reflected padding, a residual, upsampling."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, padding_mode="reflect")
            return nn.Sequential(conv, nn.InstanceNorm2d(outputs, affine=True))

        self.down = nn.Sequential(block(3, width), nn.ReLU(), block(width, 2 * width, 2), nn.ReLU())
        self.middle = nn.Sequential(block(2 * width, 2 * width), nn.ReLU(), block(2 * width, 2 * width))
        self.up, self.out = block(2 * width, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        x = F.interpolate(x + self.middle(x), scale_factor=2.0)
        return torch.tanh(self.out(F.relu(self.up(x))))


def auto_encoder() -> nn.Module:
    """Strided convolutions down, transposed convolutions up, one of them grouped."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1),
    )  # fmt: skip


class Recurrent(nn.Module):
    """An LSTM over the columns of convolutional features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(unit(3, 8), nn.MaxPool2d(2), unit(8, 16), nn.AdaptiveAvgPool2d((1, 8)))
        self.lstm = nn.LSTM(16, 12, batch_first=True, bidirectional=True)
        self.hidden, self.head = nn.Linear(24, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).squeeze(2).transpose(1, 2)
        return self.head(F.relu(self.hidden(self.lstm(x)[0][:, -1])))


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.inner = nn.Linear(64, 32), nn.Linear(32, 16)
        self.outer = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.outer(F.relu(self.inner(F.relu(self.encode(x))))))
        return F.linear(x, self.encode.weight.t())


class Twice(nn.Module):
    """One block that is run twice, and a layer whose parameter another layer has too."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.block, self.head = unit(3, width), unit(width, width), head(width)
        self.inner, self.again = nn.Conv2d(width, 24, 1), nn.Conv2d(width, 24, 1)
        self.again.weight = self.inner.weight
        self.out = nn.Conv2d(24, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(self.block(x))
        return self.head(self.out(F.relu(self.inner(x)) + F.relu(self.again(x))))


class Attention(nn.Module):
    """Plain attention blocks after a convolutional stem, with a class token."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, width, 8, 8))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, heads, 48, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1))[:, 0])


class PixelShuffle(nn.Module):
    """Super-resolution: channels of the last convolution become pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.up, self.out = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.pixel_shuffle(self.up(self.body(x)), 2))


class Heads(nn.Module):
    """Two outputs in a dictionary, one of them a map that other layers read too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = unit(3, 16), unit(16, 24)
        self.map, self.classes = nn.Conv2d(24, 4, 1), head(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.map(self.second(self.first(x)))
        return {"map": found, "logits": self.classes(torch.tanh(found))}
