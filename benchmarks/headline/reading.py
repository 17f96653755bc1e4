"""From maps to words, from classes to text, and how well both agree with what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from benchmarks.headline.network import Figure
from benchmarks.headline.pages import Box

CHARACTERS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"  # classes 1, 2, ... of the reader; 0 is the blank
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)


def words_on(maps: Tensor, text: float = 0.7, low: float = 0.4, link: float = 0.4) -> list[Box]:
    """Boxes of the words of one page, in its pixels, by scores ``[2, height / 2, width / 2]`` of characters and links.

    A word is a connected component of places that are a character's or a link's (above ``low``, ``link``), has a
    character that is sure (above ``text``), and is as wide as its characters, widened again by what the maps are
    narrower than the ink.
    """
    characters, links = maps.float().numpy()
    labelled: Any = ndimage.label((characters > low) | (links > link))
    parts = labelled[0]
    found: list[Box] = []
    for number, place in enumerate(ndimage.find_objects(parts), 1):
        inside = (parts[place] == number) & (characters[place] > low)
        if inside.sum() < 10 or characters[place][inside].max() < text:
            continue
        down, right = place[0].start, place[1].start
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        # A score falls off around the middle of a character: what lies above ``low`` is narrower than the character by
        # a share of its area to its outline, and the description widens by twice this length.
        wider = int(np.sqrt(inside.sum() * min(height, width) / (height * width)) * 2) // 2
        bottom, end = down + rows[-1] + 1 + wider, right + columns[-1] + 1 + wider
        found.append((2 * (right + columns[0] - wider), 2 * (down + rows[0] - wider), 2 * end, 2 * bottom))
    return found


def text_of(scores: Tensor) -> str:
    """The best class of every place, without repeats and blanks, for the scores ``[places, classes]`` of one line."""
    best = scores.argmax(-1).tolist()
    kept = (now for before, now in zip([0, *best], best, strict=False) if now not in (0, before))
    return "".join(CHARACTERS[number - 1] for number in kept)


def matched(found: Sequence[Box], drawn: Sequence[Box], least: float = 0.5) -> int:
    """How many drawn boxes a found one of its own overlaps by ``least`` (intersection over union), best pairs first."""
    if not found or not drawn:
        return 0
    a, b = np.asarray(found, float)[:, None], np.asarray(drawn, float)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = sides.clip(0).prod(-1)
    overlap = both / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both)
    count = 0
    while overlap.max() >= least:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row], overlap[:, column] = -1, -1
        count += 1
    return count


def edits(said: str, text: str) -> int:
    """Fewest insertions, deletions and exchanges of characters between both (Levenshtein 1966)."""
    row = list(range(len(text) + 1))
    for i, a in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(text, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def jackknife(rows: Sequence[Sequence[float]], value: Callable[[NDArray[np.float64]], float], n: int) -> Figure:
    """``value`` of the sums of all rows, and its standard error by leaving out a row at a time (Tukey 1958)."""
    table = np.asarray(rows, float)
    left = np.array([value(table.sum(0) - row) for row in table])
    error = np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())
    return Figure(value(table.sum(0)), n, float(error))
