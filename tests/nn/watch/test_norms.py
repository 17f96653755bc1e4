"""BatchNorm statistics are those of the data, however it is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from spectrim.nn.watch.norms import reestimate_batchnorm
from tests.nn.layers import close


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.ReLU(), nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5)
    )


def images() -> torch.Tensor:
    # Samples differ in mean and scale, as those that a small batch holds do.
    torch.manual_seed(1)
    return torch.randn(12, 3, 7, 7) * torch.linspace(0.3, 3, 12)[:, None, None, None] + torch.randn(12, 3, 1, 1)


def test_statistics_are_those_of_all_samples_layer_after_layer():
    model = net().train()
    model[1].eval()
    with torch.no_grad():
        model[1].running_mean.fill_(7.0)
        model[1].weight.fill_(2.0)
    modes = [m.training for m in model.modules()]
    weights = {k: v.clone() for k, v in model.named_parameters()}
    x = images()
    assert reestimate_batchnorm(model, x.split(4)) == 2
    assert [m.training for m in model.modules()] == modes
    assert (model[1].momentum, model[4].momentum) == (0.3, 0.1)
    assert int(model[1].num_batches_tracked) == 3
    assert all(torch.equal(v, weights[k]) for k, v in model.named_parameters())
    now = x
    for place in (1, 4):
        before = model[:place].eval() if place == 1 else model[2:place].eval()
        response = before(now).detach()
        rows = response.movedim(1, -1).flatten(0, -2)
        assert close(model[place].running_mean, rows.mean(0), 1e-5)
        assert close(model[place].running_var, rows.var(0), 1e-5)
        # A norm further down sees what this one gives from now on.
        now = model[place].eval()(response)


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("memory", [4 << 30, 1])
def test_the_cut_into_batches_changes_nothing_but_rounding(size, memory):
    x, whole, cut = images(), net(), net()
    reestimate_batchnorm(whole, [x])
    reestimate_batchnorm(cut, x.split(size), memory=memory)
    # What goes in waves sees the statistics of the waves so far: the first norm is the same however it goes.
    places = (1, 4) if memory > 1 or size == 12 else (1,)
    for place in places:
        assert close(cut[place].running_mean, whole[place].running_mean, 1e-5)
        assert close(cut[place].running_var, whole[place].running_var, 1e-5)


def test_a_model_that_loops_over_its_images_counts_all_of_them():
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.inner(image) for image in x.split(1)])

    x, whole, cut = images(), net(), Each()
    reestimate_batchnorm(whole, [x])
    reestimate_batchnorm(cut, x.split(4))
    for place in (1, 4):
        assert close(cut.inner[place].running_mean, whole[place].running_mean, 1e-5)
        assert close(cut.inner[place].running_var, whole[place].running_var, 1e-5)


def test_a_sum_of_far_off_values_keeps_its_variance():
    model: Any = nn.Sequential(nn.BatchNorm1d(2)).double()
    x = torch.randn(64, 2, dtype=torch.float64) + 1e7
    reestimate_batchnorm(model, x.split(3))
    assert close(model[0].running_var, x.var(0), 1e-6)


class Looped(nn.Module):
    """A norm that is called again, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        first = self.norm(self.layer(x))
        return self.last(self.norm(self.layer(first)))


def test_a_norm_that_is_called_twice_gets_what_both_calls_saw():
    torch.manual_seed(0)
    model: Any = Looped()
    x = torch.randn(32, 4)
    with torch.no_grad():
        first = model.layer(x)
        second = model.layer(model.norm.eval()(first))
    assert reestimate_batchnorm(model, x.split(8)) == 2
    rows = torch.cat([first, second])
    assert close(model.norm.running_mean, rows.mean(0), 1e-5)
    assert close(model.norm.running_var, rows.var(0), 1e-5)
    with torch.no_grad():
        model.eval()
        behind = model.norm(model.layer(model.norm(model.layer(x))))
    # The one behind sees what both calls give by the new statistics.
    assert close(model.last.running_mean, behind.mean(0), 1e-5)
    assert close(model.last.running_var, behind.var(0), 1e-5)


class Routed(nn.Module):
    """Batches take one way or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.low(x) if x.mean() < 0 else self.high(x)


def test_batches_may_take_different_ways():
    model: Any = Routed()
    x = torch.randn(8, 3)
    assert reestimate_batchnorm(model, [x - 5, x + 5, x - 6]) == 2
    assert close(model.low.running_mean, torch.cat([x - 5, x - 6]).mean(0), 1e-5)
    assert close(model.high.running_mean, (x + 5).mean(0), 1e-5)


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.free = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False)
        self.stateless = nn.BatchNorm1d(3, track_running_stats=False)
        for buffer in self.unused.buffers():
            buffer.fill_(11)

    def forward(self, x):
        return self.stateless(self.free(self.used(x)))


def test_norms_that_are_not_reached_keep_their_statistics():
    model: Any = Partly()
    before = copy.deepcopy(model.unused.state_dict())
    assert reestimate_batchnorm(model, [torch.randn(8, 3) + 2]) == 2
    assert all(torch.equal(v, before[k]) for k, v in model.unused.state_dict().items())
    assert close(model.used.running_mean, torch.full((3,), 2.0), 0.6)
    before = copy.deepcopy(model.state_dict())
    assert reestimate_batchnorm(model, []) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_statistics_and_modes_are_restored_after_an_error():
    model: Any = Partly().train()
    before = copy.deepcopy(model.state_dict())

    def batches():
        yield torch.randn(8, 3)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, batches(), memory=1)
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, [torch.randn(8, 3), torch.randn(8, 4)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert model.used.momentum == 0.1


def test_without_norms_the_batches_are_not_read():
    def batches():
        raise AssertionError("read")
        yield

    assert reestimate_batchnorm(nn.Sequential(nn.Linear(2, 2)), batches()) == 0
