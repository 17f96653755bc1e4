"""The networks that find and read text, written from their descriptions and the shapes of their weights."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Craft(nn.Module):
    """CRAFT (Baek et al. 2019), trunk, decoder and head.

    Pages ``[n, 3, h, w]`` to maps ``[n, 2, h / 2, w / 2]`` of characters and links.
    """

    def __init__(self) -> None:
        super().__init__()
        widths, layers, before = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512), [], 3
        for width in widths:
            if width:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            else:
                layers += [nn.MaxPool2d(2)]
            before = width or before
        cuts = ((0, 13), (13, 20), (20, 30), (30, 39))
        parts = [OrderedDict((str(i), layers[i]) for i in range(*cut)) for cut in cuts]
        wide = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        trunk = [*map(nn.Sequential, parts), nn.Sequential(nn.MaxPool2d(3, 1, 1), wide, nn.Conv2d(1024, 1024, 1))]
        self.basenet = nn.ModuleDict({f"slice{number}": part for number, part in enumerate(trunk, 1)})
        self.upconv1, self.upconv2 = _upward(1536, 512, 256), _upward(768, 256, 128)
        self.upconv3, self.upconv4 = _upward(384, 128, 64), _upward(192, 64, 32)
        sizes = ((32, 32, 3), (32, 32, 3), (32, 16, 3), (16, 16, 1), (16, 2, 1))
        head = [layer for a, b, k in sizes for layer in (nn.Conv2d(a, b, k, padding=k // 2), nn.ReLU())]
        self.conv_cls = nn.Sequential(*head[:-1])

    def forward(self, x: Tensor) -> Tensor:
        taps = []
        for number in range(1, 5):
            x = self.basenet[f"slice{number}"](x)
            taps.append(x)
        x = self.upconv1["conv"](torch.cat([self.basenet["slice5"](x), taps[3]], 1))
        for up, tap in zip((self.upconv2, self.upconv3, self.upconv4), taps[2::-1], strict=True):
            x = up["conv"](torch.cat([F.interpolate(x, tap.shape[2:], mode="bilinear"), tap], 1))
        return self.conv_cls(x)


def _upward(before: int, between: int, after: int) -> nn.ModuleDict:
    first, second = nn.Conv2d(before, between, 1), nn.Conv2d(between, after, 3, padding=1)
    layers = [first, nn.BatchNorm2d(between), nn.ReLU(), second, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.ModuleDict({"conv": nn.Sequential(*layers)})


class Recurrent(nn.Module):
    """A bidirectional LSTM and a linear layer on both directions' states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, width, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class Reader(nn.Module):
    """CRNN (Shi, Bai and Yao 2017): convolutions, two bidirectional LSTMs and a classifier.

    Lines ``[n, 1, 64, w]`` to scores ``[n, w / 4 - 1, 97]`` of characters; class 0 is the blank.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for width, pool, norm in (
            (32, 2, False), (64, 2, False), (128, 0, False), (128, (2, 1), False), (256, 0, True), (256, (2, 1), True),
        ):  # fmt: skip
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=not norm)]
            layers += [nn.BatchNorm2d(width)] if norm else []
            layers += [nn.ReLU(), *([nn.MaxPool2d(pool)] if pool else [])]
            before = width
        self.FeatureExtraction = nn.ModuleDict({"ConvNet": nn.Sequential(*layers, nn.Conv2d(256, 256, 2), nn.ReLU())})
        self.SequenceModeling = nn.Sequential(Recurrent(256), Recurrent(256))
        self.Prediction = nn.Linear(256, 97)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.FeatureExtraction["ConvNet"](x).mean(2).transpose(1, 2)
        return self.Prediction(self.SequenceModeling(columns))


def loaded(network: nn.Module, file: Path) -> nn.Module:
    """The network with the weights of a file of torch, in evaluation mode."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return network.eval()
