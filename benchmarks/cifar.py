"""CIFAR-10 for the benchmarks: the given networks, augmented batches, and a cache of teacher outputs.

The order of an epoch is a function of (seed, epoch); the crop and flip of image ``i`` of (epoch, ``i``) alone. So the
teacher's outputs of an epoch are one array that serves every student and every seed. The last 5,000 training images
are held out for choices; the test images are looked at once, for the final figure.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])
HELD_OUT = 5_000


class Block(nn.Module):
    """Two 3 x 3 convolutions with an option-A shortcut (subsampling and zero channels, no parameters)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016 with ``6 n + 2`` layers."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(i if j == 0 else o, o, s if j == 0 else 1) for j in range(n))) for i, o, s in widths
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def network(name: str, weights: Path) -> ResNet:
    """``resnet20`` or ``resnet56`` with the given weights, in evaluation mode."""
    model = ResNet({"resnet20": 3, "resnet56": 9}[name])
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    if unexpected or any(not key.endswith("num_batches_tracked") for key in missing):
        raise ValueError(f"{weights} does not fit {name}: missing {missing}, unexpected {unexpected}")
    return model.eval()


def folded(model: ResNet) -> ResNet:
    """An inference copy of a dense network with BatchNorm folded into the convolutions."""
    model = copy.deepcopy(model).eval()
    for owner in [model, *(m for m in model.modules() if isinstance(m, Block))]:
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(owner, conv):
                setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
                setattr(owner, norm, nn.Identity())
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Images:
    """uint8 images ``[n, 3, 32, 32]`` and labels ``[n]``."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, part: slice) -> Images:
        return Images(self.images[part], self.labels[part])

    def __len__(self) -> int:
        return len(self.labels)


def load(directory: Path) -> tuple[Images, Images, Images]:
    """Training images without the held-out ones, held-out training images, test images."""

    def read(names: list[str]) -> Images:
        raw = np.concatenate([np.fromfile(directory / f"{n}.bin", np.uint8).reshape(-1, 3073) for n in names])
        pixels = torch.from_numpy(raw[:, 1:].reshape(-1, 3, 32, 32).copy())
        return Images(pixels, torch.from_numpy(raw[:, 0].astype(np.int64)))

    train, test = read([f"data_batch_{i}" for i in range(1, 6)]), read(["test_batch"])
    return train[:-HELD_OUT], train[-HELD_OUT:], test


def normalise(images: Tensor) -> Tensor:
    """uint8 ``[n, 3, h, w]`` to the float32 the networks were trained on, channels last."""
    out = images.to(torch.float32, memory_format=torch.channels_last)
    return out.mul_((1 / (255 * STD)).view(1, 3, 1, 1)).add_((-MEAN / STD).view(1, 3, 1, 1))


class Batches:
    """Augmented training batches (4 pixels of padding, random crop, flip).

    With ``views``, there are so many different views of every image, and teacher outputs to compute; the order of the
    batches is another one in each epoch all the same.
    """

    def __init__(
        self, data: Images, *, batch_size: int, seed: int, teacher: TeacherCache | None = None, views: int | None = None
    ) -> None:
        padded = F.pad(data.images, (4, 4, 4, 4)).permute(0, 2, 3, 1).contiguous()
        self._pool = torch.stack([padded, padded.flip(2)], 1).flatten(0, 1)
        s = self._pool.stride()
        # Every crop of every image as a strided view; nothing is copied but what a batch takes.
        self._windows = self._pool.as_strided((len(self._pool), 9, 9, 32, 96), (s[0], s[1], s[2], s[1], 1))
        self.data, self.batch_size, self.seed, self.teacher, self.views = data, batch_size, seed, teacher, views
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def view(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Flip, row and column of every image in an epoch."""
        draw = torch.Generator().manual_seed(1_000_003 + epoch)
        n = len(self.data)
        flip, row, column = (torch.randint(high, (n,), generator=draw) for high in (2, 9, 9))
        return flip, row, column

    def inputs(self, index: Tensor, view: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        flip, row, column = (v[index] for v in view)
        crops = self._windows[2 * index + flip, row, column].view(-1, 32, 32, 3)
        return normalise(crops.permute(0, 3, 1, 2))

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        seen = self.epoch % self.views if self.views else self.epoch
        view = self.view(seen)
        draw = torch.Generator().manual_seed(7_919 * self.seed + 104_729 + self.epoch)
        order = torch.randperm(len(self.data), generator=draw)
        outputs = self.teacher.outputs(self, seen) if self.teacher else None
        for index in order.split(self.batch_size)[: len(self)]:
            labels = self.data.labels[index]
            yield self.inputs(index, view), labels if outputs is None else (labels, outputs[index])


class TeacherCache:
    """Teacher outputs of every (epoch, image), computed when first needed and kept as float16."""

    def __init__(self, teacher: nn.Module, directory: Path) -> None:
        quick = folded(teacher) if isinstance(teacher, ResNet) else copy.deepcopy(teacher).eval()
        self._teacher = quick.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @torch.inference_mode()
    def outputs(self, batches: Batches, epoch: int) -> Tensor:
        path = self._directory / f"epoch{epoch:04d}.npy"
        if not path.exists():
            view = batches.view(epoch)
            parts: list[Tensor] = []
            with torch.autocast("cpu", torch.bfloat16):
                for index in torch.arange(len(batches.data)).split(500):
                    parts.append(self._teacher(batches.inputs(index, view)).half())
            scratch = path.with_suffix(".part.npy")
            np.save(scratch, torch.cat(parts).numpy())
            os.replace(scratch, path)
        return torch.from_numpy(np.load(path)).float()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Images) -> float:
    """Top-1 accuracy in percent, float32; the model's mode is restored."""
    training = model.training
    model.eval()
    pairs = zip(data.images.split(500), data.labels.split(500), strict=True)
    right = sum(int((model(normalise(x)).argmax(1) == y).sum()) for x, y in pairs)
    model.train(training)
    return 100 * right / len(data)
