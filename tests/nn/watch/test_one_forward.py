"""Calibration and sensitivity by the same forward passes: what is kept is what passes of their own give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.errors import ForwardError
from spectrim.nn.channels.graph import couple
from spectrim.nn.find import find
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.calibrate import calibrate
from spectrim.nn.watch.sampling import Sampling
from spectrim.nn.watch.sensitivity import calibrated_and_weighed, weighed
from tests.cases import Seen


class Net(nn.Module):
    """Counts its passes, with and without gradients, and fails in one of them."""

    def __init__(self, *, inplace: bool = False, fails: dict[bool, int] | None = None) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace), nn.Linear(8, 5)
        self.inplace, self.seen, self.fails = inplace, Seen({False: 0, True: 0}), fails or {}

    def forward(self, x: Tensor) -> Tensor:
        graded = torch.is_grad_enabled()
        self.seen.entries[graded] += 1
        if self.seen.entries[graded] == self.fails.get(graded, 0):
            raise RuntimeError("not this one")
        y = self.act(self.conv(x))
        if self.inplace:
            y = y.sigmoid().mul_(2)
        return self.head(y.mean((2, 3)))


def batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, 6, 6, generator=draw) for n in (4, 3, 5)]


def together(model: nn.Module, **kw: Any) -> Any:
    return calibrated_and_weighed(model, find(model), batches(), Sampling(), Feed(), progress=lambda *_: None, **kw)


def apart(model: nn.Module, **kw: Any) -> Any:
    return weighed(model, calibrate(model, find(model), batches()), batches(), **kw)


def check_alike(one: Any, two: Any) -> None:
    assert one.notes == two.notes
    assert one.samples == two.samples
    for a, b in zip(one, two, strict=True):
        for name in ("input", "gradient"):
            x, y = getattr(a.statistics, name), getattr(b.statistics, name)
            assert x.count == y.count
            torch.testing.assert_close(x.second_moment, y.second_moment, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("samples", [512, 6])
@pytest.mark.parametrize("inplace", [False, True])
def test_both_are_what_passes_of_their_own_give(inplace, samples):
    torch.manual_seed(0)
    model = Net(inplace=inplace)
    one, two = together(model, samples=samples), apart(model, samples=samples)
    check_alike(one, two)
    assert not any(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_batches_behind_the_first_are_run_once():
    model = Net()
    together(model)
    assert model.seen.entries == {False: 1, True: 3}


@pytest.mark.parametrize("number", [1, 2])
def test_what_fails_with_gradients_only_is_calibrated_without(number):
    torch.manual_seed(0)
    model = Net(fails={True: number})
    found = together(model)
    plain = calibrate(model, find(model), batches())
    for a, b in zip(found, plain, strict=True):
        assert a.statistics.input.count == b.statistics.input.count
    # The one pass that failed is made again, and goes well by then.
    assert ("not this one" in " ".join(found.notes)) == (number == 1)
    assert (found["conv"].statistics.gradient is None) == (number == 1)


def test_what_fails_in_any_case_is_told_as_calibration_tells_it():
    model = Net()
    bad = [*batches(), torch.randn(2, 4, 6, 6)]
    with pytest.raises(ForwardError, match="calibration batch 3"):
        calibrated_and_weighed(model, find(model), bad, Sampling(), Feed(), progress=lambda *_: None)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_tensor_of_two_readers_is_seen_once_where_one_of_them_is_kept_contiguous():
    pytest.importorskip("torch_pruning")

    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1)
            self.short, self.head = nn.Conv2d(6, 6, 1, stride=2), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x).relu()
            return self.head((self.conv(y) + self.short(y)).relu().mean((2, 3)))

    model = Shortcut().eval()
    sites = couple(model, find(model), batches()[0])
    found = calibrated_and_weighed(model, sites, batches(), Sampling(), Feed(), progress=lambda *_: None)
    alone = calibrate(model, sites, batches())
    assert {name: each.max.count for name, each in found.pooled.items()} == {
        name: each.max.count for name, each in alone.pooled.items()
    }
    assert found.pooled["stem:out"].max.count == sum(map(len, batches()))
