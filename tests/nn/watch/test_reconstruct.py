from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch
from torch import nn

from spectrim.errors import CalibrationError
from spectrim.linalg.moments import Moments
from spectrim.nn.find import find
from spectrim.nn.layers import canonical
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.calibrate import calibrate
from spectrim.nn.watch.lockstep import lockstep
from spectrim.nn.watch.patches import patches_at
from spectrim.nn.watch.reconstruct import HELD_OUT, Joint, Split
from spectrim.nn.watch.sampling import Sampling
from tests.nn.layers import close


class Chain(nn.Module):
    def __init__(self, target, inplace=False, calls=1):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.target, self.act, self.calls = target, nn.ReLU(inplace=inplace), calls

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for _ in range(self.calls):
            x = self.act(self.target(x))
        return x


TARGETS = {
    "conv": lambda: nn.Conv2d(4, 5, 3, padding=1),
    "no bias": lambda: nn.Conv2d(4, 4, 1, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 2, stride=2),
}


def pair(name, **options):
    """A network, a copy whose first layer has been changed, and calibration batches."""
    dense = Chain(TARGETS[name](), **options).double()
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        changed.first.weight += 0.1 * torch.randn_like(changed.first.weight)
    return dense, changed, [torch.randn(30, 3, 8, 8, dtype=torch.float64) for _ in range(3)]


def asymmetric_site(dense, compressed, site, batches, *, rows="auto", held_out=HELD_OUT, forward=None, seed=0, **joint):
    """A layer as it should be factorised once the layers before it have been, as ``apply`` makes it for one alone."""
    feed = Feed.of(forward)
    for batch in batches[:1]:
        feed.decide(dense, batch)
    split = Split.of(batches, Sampling(rows), held_out=held_out, layout=feed.layout)
    moments = Joint.of(site, **joint)
    # All of its calls: a model that loops over its images calls it once an image.
    with lockstep(dense, compressed, {site.name: sys.maxsize}, batches, forward=feed) as hub:
        moments.add(hub.reach(site.name), split, seed)
    return moments.layer(site)


def regression(dense, changed, batches, site):
    """Least squares with an intercept on all positions, one matrix at a time."""
    x, y = [], []
    for batch in batches:
        weight, bias = canonical(dense.target)
        for model, rows in ((changed, x), (dense, y)):
            inputs = torch.tanh(model.first(batch)).detach()
            rows.append(patches_at(site.spec, inputs, None).flatten(2))
        shift = 0 if bias is None else bias.reshape(weight.shape[0], 1, -1)
        y[-1] = torch.einsum("gof,gnf->gno", weight.flatten(2), y[-1]) + shift
    x, y = torch.cat(x, 1), torch.cat(y, 1)
    ones = torch.ones(*x.shape[:2], 1, dtype=x.dtype)
    solution = torch.linalg.lstsq(torch.cat([x, ones], 2), y).solution
    return solution[:, :-1].transpose(1, 2), solution[:, -1], x


@pytest.mark.table
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_the_weight_is_that_of_least_squares(name, inplace):
    dense, changed, batches = pair(name, inplace=inplace)
    site = calibrate(dense, find(dense), batches)["target"]
    new = asymmetric_site(dense, changed, site, batches, rows=None, held_out=0)
    weight, bias, x = regression(dense, changed, batches, site)
    old = site.weight.flatten(2)
    # A small ridge towards the dense weight keeps it from being the same to the last digit.
    assert close(new.weight.flatten(2) - old, weight - old, 0.02)
    assert close(new.biases[0], bias.reshape(-1), 0.02)
    assert close(new.statistics.input.covariance, torch.stack([torch.cov(g.t(), correction=0) for g in x]), 1e-8)
    assert new.weight.shape == site.weight.shape
    response = torch.einsum("gof,gnf->gno", new.weight.flatten(2), x) + new.biases[0].reshape(x.shape[0], 1, -1)
    best = torch.einsum("gof,gnf->gno", weight, x) + bias.unsqueeze(1)
    assert close(response, best, 5e-3)


@pytest.mark.table
@pytest.mark.parametrize("rows", [None, "auto", 50])
@pytest.mark.parametrize("name", TARGETS)
def test_without_changes_before_it_a_site_stays_what_it_is(name, rows):
    dense, _, batches = pair(name)
    site = calibrate(dense, find(dense), batches, rows=None)["target"]
    new = asymmetric_site(dense, copy.deepcopy(dense), site, batches, rows=rows, held_out=0)
    assert close(new.weight, site.weight, 1e-8)
    wanted = site.biases[0] if site.biases[0] is not None else torch.zeros_like(new.biases[0])
    assert torch.allclose(new.biases[0], wanted, atol=1e-8)
    assert dataclasses.replace(new.spec) == site.spec
    if rows is None:
        assert close(new.statistics.input.covariance, site.statistics.input.covariance)


def test_a_layer_called_twice_and_overwritten_in_place():
    sites = []
    for inplace in (False, True):
        torch.manual_seed(3)
        dense, changed, batches = pair("no bias", inplace=inplace, calls=2)
        site = calibrate(dense, find(dense), batches)["target"]
        assert len(site.spec.inputs) == 2
        sites.append(asymmetric_site(dense, changed, site, batches, rows=None, held_out=0))
    assert sites[0].statistics.input.count == 3 * 30 * 64 * 2
    assert torch.equal(sites[0].weight, sites[1].weight)


def test_other_moments_are_kept_and_models_left_as_found():
    dense, changed, batches = pair("conv")
    site = calibrate(dense, find(dense), batches)["target"]
    gradient = Moments(*site.spec.shape[:2])
    gradient.update(torch.randn(gradient.mean.shape[0], 50, gradient.mean.shape[1]))
    site = dataclasses.replace(site, statistics=dataclasses.replace(site.statistics, gradient=gradient))
    dense.train()
    changed.eval()
    calls = []
    new = asymmetric_site(dense, changed, site, batches, forward=lambda m, b: calls.append(1) or m(b))
    assert new.statistics.gradient is site.statistics.gradient
    assert len(calls) == 2 * len(batches)
    assert (dense.training, changed.training) == (True, False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (dense, changed) for m in net.modules())


def test_half_precision():
    dense, changed, batches = pair("conv")
    site = calibrate(dense, find(dense), batches)["target"]
    wanted = asymmetric_site(dense, changed, site, batches, rows=None)
    low = [m.to(torch.bfloat16) for m in (dense, changed)]
    site = calibrate(low[0], find(low[0]), batches)["target"]
    new = asymmetric_site(low[0], low[1], site, batches, rows=None)
    assert close(new.weight, wanted.weight, 0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_inputs_are_errors_and_without_rows_a_site_stays(bad):
    dense, changed, batches = pair("conv")
    site = calibrate(dense, find(dense), batches)["target"]
    assert asymmetric_site(dense, changed, site, []) is site
    batches[1][:] = bad
    with pytest.raises(CalibrationError, match="'target'"):
        asymmetric_site(dense, changed, site, batches)


@pytest.mark.parametrize("name", ["conv", "no bias", "grouped"])
def test_a_sketch_with_room_gives_the_same_site(name):
    dense, changed, batches = pair(name)
    sites = calibrate(dense, find(dense), batches)
    few = [batch[:2] for batch in batches]
    full = asymmetric_site(dense, changed, sites["target"], few, rows=300, held_out=0)
    sketched = asymmetric_site(dense, changed, sites["target"], few, rows=300, held_out=0, sketch=True)
    assert sketched.statistics.sketch is not None
    torch.testing.assert_close(sketched.weight.double(), full.weight.double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sketched.biases[0].double(), full.biases[0].double(), rtol=1e-3, atol=1e-4)
    held, wanted = sketched.statistics.sketch, full.statistics.input
    torch.testing.assert_close(held.covariance, wanted.covariance, rtol=1e-3, atol=1e-4)


def test_patches_that_calibration_took_in_slices_stay_in_slices(monkeypatch):
    monkeypatch.setattr("spectrim.nn.watch.watchers.FULL_PATCH", 8)
    dense, changed, batches = pair("conv")
    site = calibrate(dense, find(dense), batches)["target"]
    assert site.statistics.input is None
    fitted = asymmetric_site(dense, changed, site, batches, rows=None, held_out=0)
    assert fitted.statistics is site.statistics
    monkeypatch.undo()
    site = calibrate(dense, find(dense), batches)["target"]
    full = asymmetric_site(dense, changed, site, batches, rows=None, held_out=0)
    torch.testing.assert_close(fitted.weight, full.weight, rtol=1e-6, atol=1e-8)


def test_a_sketch_that_has_overflown_still_lowers_the_error(monkeypatch):
    monkeypatch.setattr("spectrim.nn.watch.reconstruct.SKETCH", 24)
    dense, changed, batches = pair("conv")
    sites = calibrate(dense, find(dense), batches)
    site = asymmetric_site(dense, changed, sites["target"], batches, rows=None, held_out=0, sketch=True)
    held = site.statistics.sketch
    assert held.count == 90 * 64
    assert held.rows.shape[1] <= 48
    fitted = copy.deepcopy(changed)
    with torch.no_grad():
        wanted = dense.target(torch.tanh(dense.first(batches[0])))
        before = (changed.target(torch.tanh(changed.first(batches[0]))) - wanted).square().sum()
        fitted.target.weight.copy_(site.weight.reshape(fitted.target.weight.shape))
        fitted.target.bias.copy_(site.biases[0])
        after = (fitted.target(torch.tanh(fitted.first(batches[0]))) - wanted).square().sum()
    assert after < before


@pytest.mark.parametrize(("different", "copies"), [(6, 4), (2, 12), (40, 1), (1, 24)])
def test_of_equal_samples_all_are_held_out_or_none(different, copies):
    x = torch.randn(different, 5, generator=torch.Generator().manual_seed(0)).repeat(copies, 1)
    split = Split.of(x.split(7), Sampling())
    held = torch.cat(split.held)
    assert split.total == different
    assert not {tuple(row.tolist()) for row in x[held]} & {tuple(row.tolist()) for row in x[~held]}
    assert int(held.sum()) == copies * {6: 2, 2: 0, 40: 5, 1: 0}[different]
