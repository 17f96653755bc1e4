"""Batches from memory or from files: the iterable that every data reference becomes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Source(ABC):
    """Samples that can be fetched by index."""

    classes: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images ``[n, c, h, w]``, float32 in 0..1 before normalisation, and labels ``[n]`` if there are any."""

    @property
    def preparation(self) -> str:
        """What is done to the images before they are numbers, in words."""
        return ""


@dataclass(frozen=True, eq=False)
class InMemory(Source):
    """Images and labels that are held as tensors.

    Attributes
    ----------
    images
        ``[n, c, h, w]``, uint8 (0..255) or float (as it is).
    labels
        ``[n]``, int64.
    """

    images: Tensor
    labels: Tensor

    @property
    def classes(self) -> int:  # type: ignore[override]
        return int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = self.images[indices]
        return images.float() / 255 if images.dtype == torch.uint8 else images.float(), self.labels[indices]


@dataclass(frozen=True, eq=False)
class ImageFiles(Source):
    """Image files, opened when they are asked for: shorter side to ``resize``, then the middle ``crop`` square.

    Without labels for loose files, which have no classes.
    """

    paths: Sequence[Path]
    labels: Tensor | None
    classes: int
    resize: int
    crop: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def preparation(self) -> str:
        return f"shorter side {self.resize}, middle {self.crop}"

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        with ThreadPoolExecutor(4) as pool:  # Pillow decodes outside the interpreter lock
            images = list(pool.map(self._open, (self.paths[i] for i in indices.tolist())))
        return torch.stack(images).float() / 255, None if self.labels is None else self.labels[indices]

    def _open(self, path: Path) -> Tensor:
        from PIL import Image

        with Image.open(path) as file:
            image = file.convert("RGB")
        scale = self.resize / min(image.size)
        width, height = (max(self.crop, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        pixels = np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@dataclass(eq=False)
class Batches:
    """Batches ``(images, labels)`` of a source, or images alone; may be iterated any number of times.

    The order and the augmentation of an epoch depend on ``seed`` and the epoch alone, so that a run that is killed
    and resumed sees the same batches.

    Attributes
    ----------
    source
        Where the samples come from.
    batch_size
        Samples a batch; the last one may be smaller.
    shuffle
        Another order each epoch.
    seed
        Of the order and of the augmentation.
    mean, std
        One number a channel, subtracted from and divided out of the images.
    augment
        ``none``, ``crop`` (random crops after a zero padding of one eighth) or ``crop-flip`` (and horizontal flips).
    device
        Where the batches go.
    """

    source: Source
    batch_size: int = 128
    shuffle: bool = False
    seed: int = 0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: str = "none"
    device: str = "cpu"
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose which order comes next."""
        self.epoch = epoch

    @property
    def samples(self) -> int:
        return len(self.source)

    @property
    def classes(self) -> int:
        return self.source.classes

    @property
    def preparation(self) -> str:
        """What is done to the images, in words; augmentation is not told."""
        numbers = "/".join(",".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        plain = not any(self.mean) and all(value == 1 for value in self.std)
        normalised = "not normalised" if plain else f"normalised by {numbers}"
        return ", ".join(filter(None, (self.source.preparation, normalised)))

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        n = len(self.source)
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        mean, std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        for indices in order.split(self.batch_size):
            images, labels = self.source.fetch(indices)
            images = (images - mean) / std
            if self.augment != "none":
                images = _crop(images, generator, flip=self.augment == "crop-flip")
            yield images.to(self.device) if labels is None else (images.to(self.device), labels.to(self.device))

    def take(self, samples: int, seed: int | None = None) -> Batches:
        """The first ``samples`` in an order drawn from the seed: a fair, repeatable part of the whole."""
        n = len(self.source)
        if samples <= 0 or samples >= n:
            return self
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        chosen = torch.randperm(n, generator=generator)[:samples].sort().values
        return dataclasses.replace(self, source=_Part(self.source, chosen))


@dataclass(frozen=True, eq=False)
class _Part(Source):
    whole: Source
    chosen: Tensor

    @property
    def preparation(self) -> str:
        return self.whole.preparation

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self.whole.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.whole.fetch(self.chosen[indices])


def _crop(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    n, _, height, width = images.shape
    by = max(1, height // 8)
    padded = torch.nn.functional.pad(images, (by, by, by, by))
    top, left = (torch.randint(0, 2 * by + 1, (n, 1), generator=generator) for _ in range(2))
    columns = left + torch.arange(width)
    if flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    rows = top + torch.arange(height)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
