"""Options of built-in data: what may stand after the question mark of a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
}
AUGMENTATIONS = ("none", "crop", "crop-flip")
SCALED, EDGE = 256, 224
_SEEDS = 2**40  # times the million that epochs take it stays one that torch takes


@dataclass(frozen=True)
class DataOptions:
    """Options of all built-in data."""

    split: str = "test"  # ``train`` or ``test``, where the data have both
    batch: int = 128  # samples a batch
    limit: int = 0  # use this many samples, drawn at random with ``seed``; 0 for all
    shuffle: bool = False  # another order each epoch
    seed: int = 0  # of the order, the draw and the augmentation
    # ``none`` (pixels 0..1, other numbers as they are), ``half`` (to -1..1), ``imagenet``, ``cifar10``,
    # ``fashion-mnist``, or numbers as ``mean,mean,mean/std,std,std``: one a channel of images, one a column of a table.
    normalise: str = "none"

    def __post_init__(self) -> None:
        _ = self.normalisation
        if self.split not in ("train", "test"):
            raise ValueError(f"split={self.split} must be train or test")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch} must be at least 1")
        if self.limit < 0:
            raise ValueError(f"limit={self.limit} must be a number of samples, or 0 for all")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed={self.seed} must lie between 0 and {_SEEDS - 1}")

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means and standard deviations, by channel or one for all."""
        if self.normalise in NORMALISATIONS:
            return NORMALISATIONS[self.normalise]
        mean, _, std = self.normalise.partition("/")
        try:
            numbers = tuple(float(v) for v in mean.split(",")), tuple(float(v) for v in std.split(","))
        except ValueError:
            numbers = (), ()
        whole = all(math.isfinite(each) for each in (*numbers[0], *numbers[1]))
        if not numbers[0] or len(numbers[0]) != len(numbers[1]) or not whole or min(numbers[1]) <= 0:
            raise ValueError(
                f"normalise={self.normalise} must be {', '.join(NORMALISATIONS)} or numbers as 0.5,0.5,0.5/0.2,0.2,0.2"
            )
        return numbers


@dataclass(frozen=True)
class ImageOptions(DataOptions):
    """Options of images."""

    augment: str = "none"  # ``none``, ``crop`` or ``crop-flip``; see :class:`spectrim.cli.batches.Batches`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augment={self.augment} must be none, crop or crop-flip")


@dataclass(frozen=True)
class FolderOptions(ImageOptions):
    """Options of folders of image files."""

    # Pixels that the shorter side is scaled to; 0 to leave images as large as they are, which all must be then. None
    # for 256, and for 0 where all images are of one size below 224.
    resize: int | None = None
    crop: int | None = None  # pixels of the square that is cut out of the middle: 224, or ``resize`` where that is less

    def __post_init__(self) -> None:
        super().__post_init__()
        resize = self.scaled
        if resize < 0:
            raise ValueError(f"resize={resize} must be 0 or more pixels")
        if self.crop is not None and not (self.crop > 0 and (resize == 0 or self.crop <= resize)):
            raise ValueError(f"crop={self.crop} must lie between 1 and resize={resize}")

    @property
    def scaled(self) -> int:
        """Pixels of the shorter side of images that are not left as they are; 0 if all are."""
        return SCALED if self.resize is None else self.resize

    @property
    def square(self) -> int:
        """Pixels of the square that is cut out; 0 for none."""
        return self.crop or min(self.scaled, EDGE)

    def leaves(self, sizes: Iterable[tuple[int, int]]) -> bool:
        """Whether images of these widths and heights stay as they are by default: one size, below the usual square."""
        if self.resize is not None:
            return self.resize == 0
        first = None
        for size in sizes:
            first = first or size
            if size != first or max(size) >= EDGE or min(size) < (self.crop or 0):
                return False
        return first is not None


@dataclass(frozen=True)
class ArrayOptions(ImageOptions):
    """Options of arrays of numpy."""

    # Names of the arrays; ``labels=none`` for data without.
    inputs: str = ""
    labels: str = ""


@dataclass(frozen=True)
class TableOptions(DataOptions):
    """Options of tables."""

    labels: str = ""  # the column that holds labels, ``none`` for data without
