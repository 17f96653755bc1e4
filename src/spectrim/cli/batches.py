"""Batches from memory or from files: the iterable that every data reference becomes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectrim.cli.data_options import EDGE, NORMALISATIONS, SCALED
from spectrim.cli.references import UsageError
from spectrim.network.file_kinds import no_file

_PIXELS = 2**26
"""No image is scaled to more: a few are decoded at once."""


class Source(ABC):
    """Samples that can be fetched by index."""

    classes: int
    names: tuple[str, ...]  # of the classes, where the data have words for them

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
    """Samples and labels that are held as tensors."""

    # ``[n, ...]``: images as uint8 (0..255), other numbers as they are; whole numbers stay so, as tokens.
    images: Tensor
    labels: Tensor | None  # ``[n]``, int64; None without
    # What was done to them, in words.
    preparation: str = ""  # type: ignore[assignment]  (a property of the base)
    names: tuple[str, ...] = ()

    @property
    def classes(self) -> int:  # type: ignore[override]
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        images = self.images[indices]
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif images.is_floating_point():
            images = images.float()
        return images, None if self.labels is None else self.labels[indices]


@dataclass(frozen=True, eq=False)
class ImageFiles(Source):
    """Image files, opened when they are asked for: shorter side to ``resize``, then the middle ``crop`` square.

    Without labels for loose files, which have no classes. 0 for ``resize`` or ``crop`` leaves that out.
    """

    paths: Sequence[Path]
    labels: Tensor | None
    names: tuple[str, ...]
    resize: int
    crop: int

    @property
    def classes(self) -> int:  # type: ignore[override]
        return len(self.names)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def preparation(self) -> str:
        width, height = self.size_of(self.paths[0])
        done = f"scaled to a shorter side of {self.resize}" if self.resize else "left as they are"
        cut = f", middle {self.crop} x {self.crop}" if self.crop else ""
        why = ""
        if self.resize > min(width, height):
            why = f", which enlarges them: ?resize={min(width, height)} leaves them as they are"
        elif not self.resize and max(width, height) < EDGE:
            why = f" (?resize={SCALED} enlarges them)"
        return f"images of {width} x {height} pixels, {done}{cut}{why}"

    @classmethod
    def size_of(cls, path: Path) -> tuple[int, int]:
        """Width and height of an image, which is not decoded."""
        with cls._opened(path) as file:
            return file.size

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        with ThreadPoolExecutor(4) as pool:  # Pillow decodes outside the interpreter lock
            images = list(pool.map(self._open, (self.paths[i] for i in indices.tolist())))
        if len({tuple(image.shape) for image in images}) > 1:
            sizes = sorted({f"{image.shape[2]} x {image.shape[1]}" for image in images})
            raise UsageError(f"data: images are of several sizes ({', '.join(sizes[:3])}): write ?resize=PIXELS")
        return torch.stack(images).float() / 255, None if self.labels is None else self.labels[indices]

    @staticmethod
    def _opened(path: Path) -> Any:
        """An image that is not decoded yet."""
        from PIL import Image, UnidentifiedImageError

        if kind := no_file(path):  # a pipe would be waited for
            raise UsageError(f"data: {str(path)!r} is {kind}, not an image; remove it")
        try:
            return Image.open(path)
        except Exception as error:  # each format has its own errors
            why = "" if isinstance(error, UnidentifiedImageError | FileNotFoundError) else f" ({error})"
            raise UsageError(f"data: {str(path)!r} cannot be read as an image{why}; remove it or mend it") from error

    def _open(self, path: Path) -> Tensor:
        from PIL import Image

        with self._opened(path) as file:
            width, height = self._scaled(path, file.size)
            try:
                image = _of_bytes(file, path).convert("RGB")
            except UsageError:
                raise
            except Exception as error:  # each format has its own errors
                raise UsageError(f"data: {str(path)!r} is damaged ({error}); remove it or mend it") from error
        if self.resize:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop:
            left, top = (image.width - self.crop) // 2, (image.height - self.crop) // 2
            image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = np.asarray(image)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def _scaled(self, path: Path, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height that an image is scaled to."""
        scale = self.resize / min(size) if self.resize else 1.0
        width, height = (max(self.crop, round(side * scale)) for side in size)
        if width * height > _PIXELS:
            raise UsageError(
                f"data: {str(path)!r} of {size[0]} x {size[1]} pixels would become {width} x {height}; write a smaller "
                "?resize=, or remove it"
            )
        return width, height


def _of_bytes(image: Any, path: Path) -> Any:
    """An image with 8 bits a channel; of 16 bits Pillow itself would make all above 255 white."""
    from PIL import Image

    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if not deep and image.mode in ("I", "F"):
        raise UsageError(
            f"data: {str(path)!r} holds numbers of 32 bits, of which nothing says what is white: save it with 8 or 16 "
            "bits a channel"
        )
    return Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8)) if deep else image


@dataclass(eq=False)
class Batches:
    """Batches ``(images, labels)`` of a source, or images alone; may be iterated any number of times.

    The order and the augmentation of an epoch depend on ``seed`` and the epoch alone, so that a run that is killed
    and resumed sees the same batches.
    """

    source: Source  # where the samples come from
    batch_size: int = 128  # samples a batch; the last one may be smaller
    shuffle: bool = False  # another order each epoch
    seed: int = 0  # of the order and of the augmentation
    # One number a channel, subtracted from and divided out of the images.
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    # ``none``, ``crop`` (random crops after a zero padding of one eighth) or ``crop-flip`` (and horizontal flips).
    augment: str = "none"
    device: str = "cpu"  # where the batches go
    epoch: int = 0
    chosen: Tensor | None = None  # numbers of the samples that there are; None for all of the source

    def set_epoch(self, epoch: int) -> None:
        """Choose which order comes next."""
        self.epoch = epoch

    @property
    def samples(self) -> int:
        return len(self.source) if self.chosen is None else len(self.chosen)

    @property
    def classes(self) -> int:
        return self.source.classes

    @property
    def names(self) -> tuple[str, ...]:
        """Words for the classes, where the data have some and not numbers."""
        return self.source.names

    @property
    def preparation(self) -> str:
        """What is done to the images, in words; augmentation is not told."""
        numbers = "/".join(",".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        known = next((name for name, pair in NORMALISATIONS.items() if pair == (self.mean, self.std)), numbers)
        normalised = "not normalised" if self._plain else f"normalised by {known} (?normalise=none leaves that out)"
        return ", ".join(filter(None, (self.source.preparation, normalised)))

    @property
    def _plain(self) -> bool:
        return not any(self.mean) and all(value == 1 for value in self.std)

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        n = self.samples
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        order = order if self.chosen is None else self.chosen[order]
        for indices in order.split(self.batch_size):
            images, labels = self.source.fetch(indices)
            if not self._plain:
                images = (images - _by_channel(self.mean, images)) / _by_channel(self.std, images)
            if self.augment != "none":
                images = _crop(images, generator, flip=self.augment == "crop-flip")
            yield images.to(self.device) if labels is None else (images.to(self.device), labels.to(self.device))

    def take(self, samples: int) -> Batches:
        """The first ``samples`` in an order drawn from the seed: a fair, repeatable part of the whole."""
        if not 0 < samples < self.samples:
            return self
        generator = torch.Generator().manual_seed(self.seed)
        taken = torch.randperm(self.samples, generator=generator)[:samples].sort().values
        return dataclasses.replace(self, chosen=taken if self.chosen is None else self.chosen[taken])


def _by_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    """Numbers along the channels of samples."""
    if len(values) not in (1, images.shape[1]):
        raise UsageError(
            f"data: normalise has {len(values)} means, and samples have {images.shape[1]} channels; give one for each, "
            "or normalise=none"
        )
    return torch.tensor(values).view(-1, *[1] * (images.dim() - 2))


def _crop(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    if images.dim() != 4:
        raise UsageError(
            f"data: augment is for images, and samples are of shape {tuple(images.shape[1:])}: write augment=none"
        )
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
