"""Pages and lines of text, drawn with Pillow: what the text detector and the reader are calibrated on and judged by.

Everything follows from a seed. Words are those of Python's own manual (``pydoc_data.topics``), fonts are Liberation and
DejaVu (Debian: ``fonts-liberation``, ``fonts-dejavu``). Pages have words of several sizes on a paper with a gradient
and noise, in a dark or a light ink; the box of a word is that of its ink.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONTS = Path("/usr/share/fonts/truetype")
FACES = (
    "liberation/LiberationSans-Regular", "liberation/LiberationSans-Bold", "liberation/LiberationSerif-Regular",
    "liberation/LiberationSerif-Italic", "liberation/LiberationMono-Regular", "dejavu/DejaVuSans",
    "dejavu/DejaVuSerif", "dejavu/DejaVuSansMono-Bold",
)  # fmt: skip
Box = tuple[int, int, int, int]
"""Left, top, right, bottom; right and bottom are outside."""


@dataclass(frozen=True)
class Page:
    """An image as ``float32 [3, side, side]`` from 0 to 255, and the boxes of its words."""

    image: Tensor
    boxes: tuple[Box, ...]


@functools.lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """Words of two letters or more, numbers among them, in the order of the text."""
    from pydoc_data.topics import topics

    return tuple(re.findall(r"[A-Za-z]{2,14}[.,;:?!]?|\d{2,6}", " ".join(topics[name] for name in sorted(topics))))


@functools.lru_cache(maxsize=256)
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """A face of :data:`FACES` in pixels."""
    path = FONTS / f"{face}.ttf"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; install Debian's fonts-liberation and fonts-dejavu")
    return ImageFont.truetype(str(path), size)


def pages(count: int, seed: int, side: int = 320) -> list[Page]:
    """So many pages of ``side`` x ``side`` pixels."""
    return [_page(np.random.default_rng([seed, number]), side) for number in range(count)]


def _page(draw: np.random.Generator, side: int) -> Page:
    paper, ink = _inks(draw)
    picture = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(picture)
    boxes: list[Box] = []
    top = int(draw.integers(4, 20))
    while True:
        size = int(draw.integers(12, 34))
        face = font(_one_of(FACES, draw), size)
        if top + 1.3 * size > side:
            break
        left = int(draw.integers(4, 40))
        while True:
            word = _one_of(words(), draw)
            box = tuple(int(edge) for edge in pen.textbbox((left, top), word, font=face))
            if box[2] > side - 4 or box[3] > side - 2:
                break
            pen.text((left, top), word, font=face, fill=255)
            boxes.append(box)  # type: ignore[arg-type]
            left = box[2] + int(size * draw.uniform(0.35, 1.5))
        top += int(size * draw.uniform(1.3, 2.2))
    return Page(_printed(picture, paper, ink, draw), tuple(boxes))


def _one_of(some: Sequence[str], draw: np.random.Generator) -> str:
    return some[int(draw.integers(len(some)))]


def _inks(draw: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Colours of paper and ink, at least 70 of 255 apart."""
    while True:
        paper, ink = draw.uniform(0, 255, 3), draw.uniform(0, 255, 3)
        if abs(paper.mean() - ink.mean()) >= 70:
            return paper, ink


def _printed(
    picture: Image.Image, paper: NDArray[np.float64], ink: NDArray[np.float64], draw: np.random.Generator
) -> Tensor:
    """Ink on a paper with a gradient and noise, ``[colours, height, width]``."""
    covered = np.asarray(picture, np.float64)[..., None] / 255
    height, width = covered.shape[:2]
    slope = draw.uniform(-25, 25, 2)
    shade = np.linspace(-1, 1, height)[:, None] * slope[0] + np.linspace(-1, 1, width) * slope[1]
    image = covered * ink + (1 - covered) * paper + shade[..., None]
    image = (image + draw.normal(0, draw.uniform(0, 10), image.shape)).clip(0, 255)
    return torch.from_numpy(image).permute(2, 0, 1).float()


@dataclass(frozen=True)
class Line:
    """A line of text as ``float32 [1, 64, width]`` from 0 to 255."""

    image: Tensor
    text: str


def lines(count: int, seed: int, width: int = 480) -> list[Line]:
    """So many lines of two to five words, on a paper ``width`` wide."""
    return [_line(np.random.default_rng([seed, number]), width) for number in range(count)]


def _line(draw: np.random.Generator, width: int, height: int = 64) -> Line:
    size = int(draw.integers(32, 44))
    face = font(_one_of(FACES, draw), size)
    text, room = "", width - 12
    for _ in range(int(draw.integers(2, 6))):
        longer = f"{text} {_one_of(words(), draw)}".strip()
        if face.getlength(longer) > room:
            break
        text = longer
    text = text or "the"
    dark, light = draw.uniform(0, 90), draw.uniform(160, 255)
    picture = Image.new("L", (width, height), 0)
    ImageDraw.Draw(picture).text((6, (height - 1.25 * size) / 2), text, font=face, fill=255)
    paper, ink = (light, dark) if draw.random() < 0.8 else (dark, light)
    return Line(_printed(picture, np.full(1, paper), np.full(1, ink), draw), text)
