"""What a layer computes for one sample, however a model goes through the samples of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.errors import CalibrationError
from spectrim.nn.find import find
from spectrim.nn.watch.calibrate import calibrate

PER_IMAGE = 3 * 8 * 9 * 64  # channels, taps and positions of an 8x8 image


class Images(nn.Module):
    """One image after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, images: Any) -> Any:
        return [self.layer(image[None]) for image in images]


class Unbatched(Images):
    def forward(self, images: Any) -> Any:
        return [self.layer(image) for image in images]


class Crops(Images):
    def forward(self, images: Any) -> Any:
        return [self.layer(image.repeat(10, 1, 1, 1)) for image in images]


class Frames(Images):
    def forward(self, clips: Tensor) -> Tensor:
        return torch.stack([self.layer(clips[:, frame]) for frame in range(clips.shape[1])])


class Stacked(Images):
    def forward(self, images: Any) -> Tensor:
        return self.layer(torch.stack(images) if isinstance(images, list | tuple) else images)


class Levels(Images):
    def forward(self, images: Any) -> Any:
        return [self.layer(level) for image in images for level in (image[None], image[None, :, ::2, ::2])]


def listed(*heights: int) -> list[Tensor]:
    return [torch.randn(3, height, 8) for height in heights]


@pytest.mark.parametrize(
    ("kind", "batch", "images"),
    [
        (Images, listed(8, 8, 8, 8), 1),
        (Images, listed(4, 8, 12, 8), 1),
        (Images, listed(8), 1),
        (Images, torch.randn(8, 3, 8, 8), 1),
        (Unbatched, listed(8, 8, 8), 1),
        (Crops, listed(8, 8, 8, 8), 10),
        (Frames, torch.randn(4, 5, 3, 8, 8), 5),
        (Stacked, listed(8, 8, 8, 8), 1),
        (Stacked, torch.randn(4, 3, 8, 8), 1),
        (Levels, listed(8, 8, 8), 1.25),
    ],
)
def test_the_work_is_that_of_a_sample(kind: type[Images], batch: Any, images: float) -> None:
    model = kind()
    sites = calibrate(model, find(model), [batch], statistics=False)
    assert st.macs([site.spec for site in sites]) == images * PER_IMAGE
    assert sites.other_macs == 0


@pytest.mark.parametrize("length", [7, 8])
def test_so_is_that_of_a_linear_layer(length: int) -> None:
    class Tokens(nn.Sequential):
        def forward(self, texts: Any) -> Any:
            return [super(Tokens, self).forward(text[None]) for text in texts]

    model = Tokens(nn.Linear(6, 5))
    (site,) = calibrate(model, find(model), [torch.randn(4, length, 6)], statistics=False)
    assert site.spec.inputs == ((length,),)


class Deep(Images):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1))  # type: ignore[assignment]


class DeepStacked(Deep):
    forward = Stacked.forward  # type: ignore[assignment]


@pytest.mark.table(every=2)
@pytest.mark.parametrize("kind", [DeepStacked, Deep])
def test_lists_and_tensors_are_compressed_alike(kind: type[Deep]) -> None:
    torch.manual_seed(0)
    model = kind()
    alike = []
    for batch in (listed(8, 8, 8, 8), torch.stack(listed(8, 8, 8, 8))):
        result = st.compress(model, [batch] * 3, st.Budget(macs=0.5))
        assert not any("were not checked" in note for note in result.report.notes)
        alike.append((result.plan.dense_costs["macs"], result.plan.costs["macs"]))
    assert alike[0][0] == alike[1][0] == (3 * 16 + 16 * 24) * 9 * 64
    assert max(planned for _, planned in alike) <= alike[0][0] / 2


def test_a_single_image_without_an_axis_for_samples_is_told_before_any_work() -> None:
    model = DeepStacked()
    with pytest.raises(CalibrationError, match=r"one sample of shape \(3, 8, 8\).*unsqueeze"):
        st.compress(model, listed(8, 8, 8), st.Budget(macs=0.5))


class Words(nn.Module):
    """Rare words go through a layer of their own, and half of an expert's samples to another."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.AdaptiveLogSoftmaxWithLoss(16, 90, [10, 40], div_value=2.0)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return self.head(x.flatten(0, 1), words.flatten()).output.reshape(words.shape)


def test_layers_that_some_rows_reach_are_counted_in_parts_of_rows() -> None:
    torch.manual_seed(0)
    model, x, words = Words().eval(), torch.randn(8, 5, 16), torch.zeros(8, 5, dtype=torch.long)
    words[0, :3], words[1:3, 0] = 20, 60
    sites = calibrate(model, find(model), [(x, words)])
    rows = {site.name: site.spec.rows for site in sites}
    assert rows == {
        "head.head": 5, "head.tail.0.0": 3 / 8, "head.tail.0.1": 3 / 8, "head.tail.1.0": 2 / 8, "head.tail.1.1": 2 / 8,
    }  # fmt: skip
    by_hand = 5 * 16 * 12 + 3 / 8 * (16 * 8 + 8 * 30) + 2 / 8 * (16 * 4 + 4 * 50)
    assert st.tabulate(sites).dense["macs"] == by_hand
    times = st.tabulate(sites, latency=st.Latency(rounds=1)).dense["latency"]
    assert times > 0
