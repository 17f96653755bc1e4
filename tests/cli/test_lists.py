"""Lists of images on the command line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.cli.preprocessing import Inputs
from spectrim.cli.subject import first_batch
from spectrim.report import measure


class Looped(nn.Conv2d):
    def forward(self, images: Any) -> Any:  # type: ignore[override]
        return [super(Looped, self).forward(image[None]) for image in images]


class Stacked(nn.Conv2d):
    def forward(self, images: Any) -> Tensor:  # type: ignore[override]
        return super().forward(torch.stack(images) if isinstance(images, list) else images)


@pytest.mark.parametrize("kind", [Looped, Stacked])
@pytest.mark.parametrize("samples", [1, 3, 6])
def test_the_example_is_a_list_of_so_many_images(kind: type[nn.Conv2d], samples: int) -> None:
    model, batches = kind(3, 4, 1), [[torch.randn(3, 8, 8) for _ in range(4)]]
    example = first_batch(batches, samples, "images", model)
    assert [tuple(image.shape) for image in example] == [(3, 8, 8)] * samples
    found = measure(model, example, repeats=0)
    assert found.batch == samples
    assert {line.metric: line.value for line in found.lines}["MACs"] == 3 * 4 * 64
    told = Inputs.of(batches, model)
    assert told is not None
    assert told.shape == (3, 8, 8)
