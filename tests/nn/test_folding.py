"""Biases folded into weights, against least squares on the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.nn.folding import fold_biases


def net(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU(), nn.Conv1d(5, 4, 3, bias=bias, padding=1))


@pytest.fixture
def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(64, 5, 6) + 1 for _ in range(4)]


def test_a_constant_input_takes_the_bias_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    rows = torch.randn(200, 4)
    rows[:, 2] = 5.0
    want = model(rows)
    assert fold_biases(model, ["0"], [rows]) == ()
    assert model[0].bias is None
    torch.testing.assert_close(model(rows), want, rtol=1e-4, atol=1e-4)


def test_linear_layers_and_convolutions_by_least_squares(batches: list[Tensor]) -> None:
    model = net(True)
    weight, bias = model[2].weight.detach().clone(), model[2].bias.detach().clone()
    with torch.no_grad():
        seen = torch.cat([model[:2](batch) for batch in batches])
    patches = nn.functional.pad(seen, (1, 1)).unfold(2, 3, 1).transpose(1, 2).flatten(2).flatten(0, 1).double()
    row = torch.linalg.lstsq(patches, torch.ones(len(patches), 1, dtype=torch.float64)).solution.squeeze(1)
    assert fold_biases(model, ["2"], batches) == ()
    want = weight + (bias[:, None] * row).reshape(weight.shape)
    assert model[0].bias is not None
    torch.testing.assert_close(model[2].weight.double(), want.double(), rtol=1e-2, atol=5e-3)


def test_merging_with_batches_fits_the_architecture(batches: list[Tensor]) -> None:
    dense = net(False)
    sites = st.calibrate(dense, st.find(dense), batches)
    plan = st.select(st.tabulate(sites, [st.ActivationSVD()]), st.Budget(macs=0.8))
    small = st.apply(dense, sites, plan)
    assert st.merge(small).state_dict().keys() > dense.state_dict().keys()
    folded = st.merge(small, batches)
    assert folded.state_dict().keys() == dense.state_dict().keys()
    with torch.no_grad():
        want, got, near = (model(batches[0]) for model in (dense, folded, small))
    assert (got - want).norm() < 1.1 * (near - want).norm()


def test_biases_that_layers_had_stay(batches: list[Tensor]) -> None:
    dense = net(True)
    sites = st.calibrate(dense, st.find(dense), batches)
    plan = st.select(st.tabulate(sites, [st.ActivationSVD()]), st.Budget(macs=0.8))
    small = st.apply(dense, sites, plan)
    first, second = st.merge(small).state_dict(), st.merge(small, batches).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
