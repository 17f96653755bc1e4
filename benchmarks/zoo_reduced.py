"""Reduced architectures that strangers bring, as code of our own, and thinner forms of networks of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar, nets, vgg, zoo_transformers
from benchmarks.zoo_nets import Inception, head, unit

Made = tuple[nn.Module, Any]


class Bottleneck(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = unit(width, width), unit(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class C2f(nn.Module):
    """Half of the channels go through blocks, and all that came by is joined."""

    def __init__(self, inputs: int, outputs: int, blocks: int = 1) -> None:
        super().__init__()
        self.inner = outputs // 2
        self.cv1, self.cv2 = unit(inputs, outputs, 1), unit((2 + blocks) * self.inner, outputs, 1)
        self.m = nn.ModuleList(Bottleneck(self.inner) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.m)
        return self.cv2(torch.cat(parts, 1))


class Join(nn.Module):
    """Maps side by side."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat(maps, 1)


class Detect(nn.Module):
    """Boxes as distributions over distances, and classes, of every cell of two maps."""

    def __init__(self, widths: tuple[int, int], classes: int = 4, bins: int = 4) -> None:
        super().__init__()
        self.bins, self.outputs = bins, classes + 4 * bins
        self.cv2 = nn.ModuleList(nn.Sequential(unit(w, 16), nn.Conv2d(16, 4 * bins, 1)) for w in widths)
        self.cv3 = nn.ModuleList(nn.Sequential(unit(w, 16), nn.Conv2d(16, classes, 1)) for w in widths)
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        for i in range(len(maps)):
            maps[i] = torch.cat([self.cv2[i](maps[i]), self.cv3[i](maps[i])], 1)
        flat = torch.cat([each.view(each.shape[0], self.outputs, -1) for each in maps], 2)
        boxes, scores = flat.split((4 * self.bins, self.outputs - 4 * self.bins), 1)
        n, _, cells = boxes.shape
        boxes = self.dfl(boxes.view(n, 4, self.bins, cells).transpose(1, 2).softmax(1)).view(n, 4, cells)
        return torch.cat([boxes, scores.sigmoid()], 1), maps


class Yolo(nn.Module):
    """A list of layers, each with the numbers of those that it reads (f) and its own (i)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[tuple[int | list[int], nn.Module]] = [
            (-1, unit(3, 8, 3, 2)), (-1, C2f(8, 16)), (-1, unit(16, 24, 3, 2)), (-1, C2f(24, 24)),
            (-1, nn.Upsample(scale_factor=2)), ([-1, 1], Join()), (-1, C2f(40, 16)), (-1, unit(16, 16, 3, 2)),
            ([-1, 3], Join()), (-1, C2f(40, 24)), ([6, 9], Detect((16, 24))),
        ]  # fmt: skip
        self.model = nn.Sequential(*(layer for _, layer in layers))
        for number, (source, layer) in enumerate(layers):
            layer.i, layer.f = number, source  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        kept: list[Any] = []
        for layer in self.model:
            source: Any = layer.f
            if source != -1:
                x = [x if j == -1 else kept[j] for j in source]  # type: ignore[assignment]
            x = layer(x)
            kept.append(x)
        return x


class HighResolution(nn.Module):
    """HRNet: two resolutions side by side, exchanged by strided convolutions and by upsampling."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.down = unit(3, width, 3, 2), unit(width, 2 * width, 3, 2)
        self.high = nn.ModuleList(Bottleneck(width) for _ in range(2))
        self.low = nn.ModuleList(Bottleneck(2 * width) for _ in range(2))
        self.up = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in range(2))
        self.across = nn.ModuleList(nn.Conv2d(width, 2 * width, 3, 2, 1) for _ in range(2))
        self.out = nn.Conv2d(3 * width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x)
        low = self.down(high)
        for i in range(2):
            high, low = self.high[i](high), self.low[i](low)
            upwards = F.interpolate(self.up[i](low), scale_factor=2.0)
            high, low = F.relu(high + upwards), F.relu(low + self.across[i](high))
        return self.out(torch.cat([high, F.interpolate(low, scale_factor=2.0, mode="bilinear")], 1))


class TextReader(nn.Module):
    """CRNN: columns of a convolutional map through two bidirectional LSTMs."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            unit(1, 12),
            nn.MaxPool2d(2),
            unit(12, 24),
            nn.MaxPool2d((2, 1)),
            unit(24, 32),
            nn.AdaptiveAvgPool2d((1, None)),
        )
        self.lstm = nn.LSTM(32, 24, 2, bidirectional=True)
        self.out = nn.Linear(48, 20)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.convs(x).squeeze(2).permute(2, 0, 1)
        return self.out(self.lstm(columns)[0]).permute(1, 0, 2).log_softmax(-1)


class Demucs(nn.Module):
    """Strided 1-D convolutions with gated linear units down, an LSTM, transposed ones up, with what came by added."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        sizes = ((1, width), (width, 2 * width))
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv1d(i, o, 8, 4, 2), nn.ReLU(), nn.Conv1d(o, 2 * o, 1), nn.GLU(1)) for i, o in sizes
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(o, 2 * o, 1),
                nn.GLU(1),
                nn.ConvTranspose1d(o, i, 8, 4, 2),
                nn.ReLU() if i > 1 else nn.Identity(),
            )
            for i, o in reversed(sizes)
        )
        self.lstm, self.linear = nn.LSTM(2 * width, 2 * width, bidirectional=True), nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.encoder:
            x = layer(x)
            skips.append(x)
        x = self.linear(self.lstm(x.permute(2, 0, 1))[0]).permute(1, 2, 0)
        for layer in self.decoder:
            x = layer(x + skips.pop())
        return x


class Volume(nn.Module):
    """A residual block of 3-D convolutions, split in space and time as in R(2+1)D."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.space = nn.Conv3d(inputs, outputs, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.time = nn.Conv3d(outputs, outputs, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm3d(outputs) for _ in range(2))
        self.shortcut = nn.Conv3d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.time(F.relu(self.norms[0](self.space(x)))))
        return F.relu(y + self.shortcut(x))


def volume_resnet() -> nn.Module:
    ends = (nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 10))
    return nn.Sequential(Volume(3, 12, 1), Volume(12, 24, 2), Volume(24, 32, 2), *ends)


class Transform(nn.Module):
    """T-Net: a matrix for every cloud, from the largest answers of its points."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.points = nn.Sequential(
            nn.Conv1d(size, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.ReLU()
        )
        self.whole = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, size * size))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.whole(self.points(x).max(2)[0]).view(-1, self.size, self.size)
        return matrix + torch.eye(self.size, dtype=x.dtype)


class PointNet(nn.Module):
    """Every point by itself, its coordinates and features transformed, the largest answers of all classified."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Transform(3), Transform(16)
        self.lift = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.points = nn.Sequential(nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1))
        self.head = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(torch.bmm(self.first(x), x))
        x = torch.bmm(self.second(x), x)
        return self.head(self.points(x).max(2)[0])


class Causal(nn.Module):
    """A residual block of dilated convolutions that sees the past alone: padded on both sides, cut on one."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.cut = 2 * dilation
        self.first = nn.Conv1d(inputs, outputs, 3, padding=self.cut, dilation=dilation)
        self.second = nn.Conv1d(outputs, outputs, 3, padding=self.cut, dilation=dilation)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x)[:, :, : -self.cut].contiguous())
        return F.relu(F.relu(self.second(y)[:, :, : -self.cut]) + self.shortcut(x))


class Temporal(nn.Module):
    """TCN: the last moment of a stack of causal blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Causal(4, 16, 1), Causal(16, 24, 2), Causal(24, 24, 4))
        self.out = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(x)[:, :, -1])


def generator() -> nn.Module:
    """DCGAN's: transposed convolutions from a vector to an image."""
    return nn.Sequential(
        nn.ConvTranspose2d(24, 32, 4, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
        nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def discriminator() -> nn.Module:
    """DCGAN's, its norms spectral in the first layer."""
    first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 16, 4, 2, 1))
    return nn.Sequential(
        first, nn.LeakyReLU(0.2, True), nn.Conv2d(16, 24, 4, 2, 1, bias=False), nn.BatchNorm2d(24),
        nn.LeakyReLU(0.2, True), nn.Conv2d(24, 32, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(32, 1, 2), nn.Flatten(),
    )  # fmt: skip


def thin_alexnet() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in (
        (3, 8, 11, 4),
        (8, 24, 5, 1),
        (24, 48, 3, 1),
        (48, 32, 3, 1),
        (32, 32, 3, 1),
    ):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.ReLU(True)]
        layers += [nn.MaxPool2d(3, 2)] if outputs in (8, 24) else []
    ends = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(True), nn.Linear(64, 10))
    return nn.Sequential(*layers, *ends)


def thin_vgg() -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (8, 8, 0, 16, 16, 0, 24, 24, 24, 0, 32, 32, 32, 0, 32, 32, 32):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(True)] if outputs else [nn.MaxPool2d(2)]
        inputs = outputs or inputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def _images(make: Callable[[], nn.Module], side: int = 32) -> Callable[[], Made]:
    return lambda: (make(), torch.randn(2, 3, side, side))


OWN: dict[str, Callable[[], Made]] = {
    "yolo": _images(Yolo),
    "hrnet": _images(HighResolution),
    "crnn": lambda: (TextReader(), torch.randn(2, 1, 16, 40)),
    "demucs": lambda: (Demucs(), torch.randn(2, 1, 256)),
    "resnet-3d": lambda: (volume_resnet(), torch.randn(2, 3, 4, 12, 12)),
    "pointnet": lambda: (PointNet(), torch.randn(4, 3, 32)),
    "tcn": lambda: (Temporal(), torch.randn(2, 4, 32)),
    "gan-generator": lambda: (generator(), torch.randn(2, 24, 1, 1)),
    "gan-discriminator": _images(discriminator, 16),
}

# In place of networks of the zoo of the same name, which take minutes.
THIN: dict[str, Callable[[], Made]] = {
    "alexnet": _images(thin_alexnet, 64),
    "vgg16": _images(thin_vgg),
    "vgg16-batchnorm": _images(lambda: vgg.VGG16(2)),
    "googlenet": _images(
        lambda: nn.Sequential(unit(3, 16, 7, 2), Inception(16), nn.MaxPool2d(2), Inception(32), head(32))
    ),
    "resnet18": _images(lambda: nets.network("resnet18", 32, width=4), 16),
    "resnet50": _images(lambda: nets.network("resnet50", 32, width=4), 16),
    "resnet20-option-a": _images(lambda: cifar.ResNet(1), 16),
}


_LOOK = {**zoo_transformers._VIT, "image_size": 32}
_READ = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def _pairs(config: str, model: str, **options: Any) -> Callable[[], Made]:
    """A model of images and texts."""
    return lambda: (
        zoo_transformers._built(config, model, options),
        {"input_ids": torch.randint(3, 60, (2, 12)), "pixel_values": torch.randn(2, 3, 32, 32)},
    )


def _whisper() -> Made:
    options = {
        "vocab_size": 64, "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "d_model": 32, "use_cache": False,
        "max_source_positions": 32, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1,
    }  # fmt: skip
    batch = {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": torch.randint(3, 60, (2, 6))}
    return zoo_transformers._built("WhisperConfig", "WhisperForConditionalGeneration", options), batch


def _detr() -> Made:
    import transformers

    inner: dict[str, Any] = {
        "embedding_size": 16, "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic",
        "out_features": ["stage4"],
    }  # fmt: skip
    options: dict[str, Any] = {
        "use_timm_backbone": False, "backbone": None, "backbone_config": transformers.ResNetConfig(**inner),
        "use_pretrained_backbone": False, "num_queries": 6, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "d_model": 32, "num_labels": 4,
    }  # fmt: skip
    config = transformers.DetrConfig(**options)
    return transformers.DetrForObjectDetection(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def _encodec() -> Made:
    options = {
        "num_filters": 8,
        "hidden_size": 16,
        "codebook_size": 16,
        "codebook_dim": 16,
        "upsampling_ratios": [4, 2],
    }
    options |= {"num_lstm_layers": 1, "target_bandwidths": [24.0]}  # type: ignore[dict-item]
    return zoo_transformers._built("EncodecConfig", "EncodecModel", options), {"input_values": torch.randn(2, 1, 160)}


TRANSFORMERS: dict[str, Callable[[], Made]] = {
    "hf-clip": _pairs(
        "CLIPConfig", "CLIPModel", text_config={**_READ, "vocab_size": 64, "max_position_embeddings": 16},
        vision_config=_LOOK, projection_dim=16,
    ),
    "hf-siglip": _pairs(
        "SiglipConfig", "SiglipModel", text_config={**_READ, "vocab_size": 64, "max_position_embeddings": 16},
        vision_config=_LOOK,
    ),
    "hf-whisper": _whisper,
    "hf-detr": _detr,
    "hf-encodec": _encodec,
    "hf-videomae": lambda: (
        zoo_transformers._built(
            "VideoMAEConfig", "VideoMAEForVideoClassification", {**_LOOK, "num_frames": 4, "tubelet_size": 2}
        ),
        {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
    ),
    "hf-timesformer": lambda: (
        zoo_transformers._built("TimesformerConfig", "TimesformerForVideoClassification", {**_LOOK, "num_frames": 2}),
        {"pixel_values": torch.randn(2, 2, 3, 32, 32)},
    ),
}  # fmt: skip

NETWORKS: dict[str, Callable[[], Made]] = {**OWN, **THIN, **TRANSFORMERS}
