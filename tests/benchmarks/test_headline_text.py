"""Drawn pages and lines, and how well what was found or read is scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.headline import pages, reading, text_networks

FONTS = pytest.mark.skipif(not (pages.FONTS / "dejavu").exists(), reason="needs Debian's fonts")


@FONTS
def test_pages_follow_from_their_seed_and_have_their_words_where_the_boxes_are() -> None:
    once, again, other = pages.pages(1, 5, 160)[0], pages.pages(2, 5, 160)[0], pages.pages(1, 6, 160)[0]
    assert torch.equal(once.image, again.image)
    assert once.boxes == again.boxes != other.boxes
    outside = torch.ones(160, 160, dtype=torch.bool)
    for left, top, right, bottom in once.boxes:
        assert 0 <= left < right <= 160
        assert 0 <= top < bottom <= 160
        outside[top:bottom, left:right] = False
        assert once.image[:, top:bottom, left:right].std() > 15
    # What is left is paper: a gradient and noise.
    assert once.image[0][outside].std() < 30


@FONTS
def test_lines_follow_from_their_seed() -> None:
    one, two = pages.lines(2, 5)
    assert one.image.shape == (1, 64, 480)
    assert (one.text, two.text) == tuple(line.text for line in pages.lines(2, 5))
    assert one.text != two.text


def test_words_are_components_that_links_hold_together() -> None:
    maps = torch.zeros(2, 40, 60)
    for column in (4, 14, 40):
        maps[0, 10:20, column : column + 6] = 0.9
    maps[1, 12:18, 10:14] = 0.8
    maps[0, 30:36, 4:10] = 0.5  # never sure
    maps[0, 30:32, 40:42] = 0.9  # too small
    found = sorted(reading.words_on(maps))
    drawn = [(8, 20, 40, 40), (80, 20, 92, 40)]
    assert len(found) == 2
    for box, true in zip(found, drawn, strict=True):
        widened = {true[0] - box[0], true[1] - box[1], box[2] - true[2], box[3] - true[3]}
        assert len(widened) == 1
        assert widened <= {0, 2, 4, 6}


def test_a_box_is_matched_once_and_by_half() -> None:
    drawn = [(0, 0, 10, 10), (20, 0, 30, 10)]
    assert reading.matched([(0, 0, 10, 10), (0, 0, 9, 10)], drawn) == 1
    assert reading.matched([(20, 0, 30, 10), (0, 0, 10, 5)], drawn) == 2
    assert reading.matched([(0, 0, 10, 4)], drawn) == 0
    assert reading.matched([], drawn) == reading.matched(drawn, []) == 0


@pytest.mark.parametrize(
    ("said", "text", "count"), [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0), ("ab", "ba", 2)]
)
def test_edits_are_levenshtein(said: str, text: str, count: int) -> None:
    assert reading.edits(said, text) == reading.edits(text, said) == count


def test_repeats_go_and_blanks_part_them() -> None:
    classes = torch.tensor([0, 45, 45, 0, 45, 46, 46, 0])
    assert reading.text_of(torch.nn.functional.one_hot(classes, 97).float()) == "AAB"
    assert len(reading.CHARACTERS) == 96


def test_leaving_out_a_row_gives_the_standard_error_of_a_mean() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 1))
    found = reading.jackknife(rows.tolist(), lambda sums: float(sums[0] / 30), n=30)
    spread = (
        rows.std(ddof=1) / np.sqrt(30) * 29 / 30
    )  # the sum over 30 rows is divided by 30 even where one is left out
    assert found.standard_error == pytest.approx(spread)
    assert found.value == pytest.approx(rows.mean())


def test_the_networks_have_the_weights_that_are_known() -> None:
    with torch.device("meta"):
        detector, reader = text_networks.Craft(), text_networks.Reader()
    assert sum(p.numel() for p in detector.parameters()) == 20_770_466
    assert sum(p.numel() for p in reader.parameters()) == 3_781_345
