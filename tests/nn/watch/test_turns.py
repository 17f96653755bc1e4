"""Models that try a layer and go on another way, that hand layers round, or whose batches change their names."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as st

G = torch.Generator().manual_seed(0)
SCALES = torch.logspace(0, -1.5, 32)
BATCHES = [torch.randn(32, 32, generator=G) * SCALES for _ in range(2)]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x


class Trying(Plain):
    """Calls each layer with what it cannot take first."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            try:
                x = F.gelu(layer(x[:, :5]))
            except RuntimeError:
                x = F.gelu(layer(x))
        return x


class Queued(Plain):
    """Takes the next layer out of a queue, and puts it back behind the others."""

    def __init__(self, kind: Callable[..., Any] = collections.deque, turns: int = 4) -> None:
        super().__init__()
        self.queue, self.turns = kind(self.layers), turns

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.turns):
            layer = self.queue[0]
            del self.queue[0]
            self.queue.append(layer)
            x = F.gelu(layer(x))
        return x


class Keyed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.steps = dict(enumerate(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        for number in range(4):
            layer = self.steps.pop(number)
            x = F.gelu(layer(x))
            self.steps[number] = layer
        return x


METHODS: dict[str, Any] = {"default": None, "filters": st.PrincipalFilters()}


@functools.cache
def compressed(methods: Any) -> st.Result:
    return st.compress(Plain().eval(), BATCHES, st.Budget(macs=0.7), methods=methods)


@pytest.mark.table
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("make", [Trying, Queued, lambda: Queued(list), Keyed], ids=["trying", "deque", "list", "dict"])
def test_what_goes_another_way_about_it_is_compressed_as_the_same_network(make: Any, methods: Any) -> None:
    want, model = compressed(methods), make().eval()
    got = st.compress(model, BATCHES, st.Budget(macs=0.7), methods=methods)
    assert got.plan.diff(want.plan) == ()
    assert want.plan.changed >= 3
    for mine, theirs in zip(got.model.state_dict().values(), want.model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(got.model(BATCHES[0]), want.model(BATCHES[0]))
    assert [*getattr(model, "queue", model.layers)] == [*model.layers]


class TriesImages(nn.Module):
    """Hands images to a convolution flattened, as to a linear layer, and then as they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        try:
            x = self.b(x.flatten(1))
        except RuntimeError:
            x = self.b(x)
        return self.c(F.relu(x).mean((2, 3)))


def test_channels_in_front_of_a_layer_that_is_tried_first_are_removed() -> None:
    images = [torch.randn(64, 3, 8, 8, generator=G)]
    result = st.compress(TriesImages().eval(), images, st.Budget(macs=0.7), methods=st.PrincipalFilters())
    assert any(entry.of_channels and not entry.choice.is_dense for entry in result.plan)
    assert result.model(images[0]).shape == (64, 10)


class Rolling(Plain):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            layer = self.layers.pop(0)
            self.layers.append(layer)
            x = F.gelu(layer(x))
        return x


class Emptied(Queued):
    def forward(self, x: Tensor) -> Tensor:
        return self.queue.pop()(x)


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Rolling, r"puts another module in the place of 'layers\.0'.*: choose between modules by calling"),
        (
            lambda: Queued(turns=3),
            "takes modules out of 'queue' and leaves it in another order.*: go through it",
        ),
        (Emptied, "takes modules out of 'queue'"),
    ],
    ids=["rolling", "queue", "emptied"],
)
def test_layers_that_move_from_pass_to_pass_are_refused_and_put_back(make: Any, says: str, methods: Any) -> None:
    model = make().eval()
    names = dict(model.named_modules())
    with pytest.raises(st.CalibrationError, match=says):
        st.compress(model, BATCHES, st.Budget(macs=0.7), methods=methods, skip="layers.0")
    assert dict(model.named_modules()) == names
    assert [*getattr(model, "queue", model.layers)] == [*model.layers]


class Named(Plain):
    def forward(self, x: Tensor | None = None, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x if other is None else other
        assert x is not None
        return super().forward(x if mask is None else x * mask)


def test_names_that_change_between_batches_are_told_in_a_sentence() -> None:
    model, (x, y) = Named().eval(), BATCHES
    with pytest.raises(st.CalibrationError, match="is a mapping of 'other', and the first one was a mapping of 'x'"):
        st.compress(model, [{"x": x}, {"other": y}], st.Budget(macs=0.7))
    with pytest.raises(st.CalibrationError, match=r"'x', 'mask'.*the first one was a mapping of 'x': give batches"):
        st.compress(model, [{"x": x}, {"x": y, "mask": torch.ones(32, 1)}], st.Budget(macs=0.7))
    # What is not passed may differ, and what is not needed may be left out.
    st.calibrate(model, st.find(model), [{"x": x, "mask": torch.ones(32, 1)}, {"x": y, "labels": y}], mask=None)
