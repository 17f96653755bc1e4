"""What a removal leaves of sites: specs, costs, weights and moments, without a model."""

from __future__ import annotations

import copy

import pytest
import torch

import spectrim as st
from spectrim.cost import counted as counted
from spectrim.cost.whole import Network
from spectrim.errors import PlanError
from spectrim.network.coupling import IN, OUT, axes_left
from spectrim.network.narrowing import narrowed
from spectrim.nn.channels.narrow import narrow
from spectrim.nn.flops import WorkCounter
from spectrim.nn.layers import canonical
from spectrim.nn.surgery import parameter_count, size_in_bytes
from spectrim.nn.watch.batches import evaluating
from tests.cases import one_thread
from tests.nn.coupled_nets import made

pytest.importorskip("torch_pruning")

FUNCTIONS = {"parameters": counted.parameters, "bytes": counted.size_bytes, "macs": counted.macs}
# Of the last three, readers without biases get one.
NAMES = [
    "chain",
    "residual",
    "concat",
    "depthwise",
    "grouped",
    "transposed",
    "flatten",
    "attention",
    "embedding",
    "twice",
]


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def calibrated(name: str):
    model, x = made(name, samples=60)
    return model, x, st.calibrate(model, st.couple(model, st.find(model), x), [x], rows=None)


def halves(sites: st.Sites, seed: int = 0) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for c in sites.couplings:
        size = c.channels // c.pools
        runs = [p * size + torch.randperm(size, generator=generator)[: max(1, size // 2)] for p in range(c.pools)]
        kept[c.name] = torch.cat(runs).sort().values.tolist()
    return kept


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", NAMES)
def test_costs_are_those_of_the_narrowed_model(name: str) -> None:
    model, x, sites = calibrated(name)
    for kept in ({}, halves(sites), {sites.couplings[0].name: halves(sites)[sites.couplings[0].name]}):
        small = copy.deepcopy(model)
        narrow(small, axes_left(sites.couplings, kept))
        with WorkCounter() as counter, evaluating(small):
            small(x)
        found = Network(sites, FUNCTIONS).cost(widths={channels: len(left) for channels, left in kept.items()})
        assert found["parameters"] == parameter_count(small)
        assert found["bytes"] == size_in_bytes(small)
        assert found["macs"] == pytest.approx(counter.get_total_flops() / 2 / len(x), rel=1e-9)
        left = narrowed(sites, kept)
        assert Network(left, FUNCTIONS).cost() == pytest.approx(found)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", NAMES)
def test_specs_are_those_of_the_narrowed_layers_and_moments_are_slices(name: str) -> None:
    model, _, sites = calibrated(name)
    kept = halves(sites)
    axes = axes_left(sites.couplings, kept)
    narrow(model, axes)
    left = narrowed(sites, kept)
    assert [site.name for site in left] == [site.name for site in sites]
    for before, site in zip(sites, left, strict=True):
        weight, _ = canonical(model.get_submodule(site.name))
        assert tuple(weight.shape) == site.spec.shape == tuple(site.weight.shape)
        assert site.weight.dtype == before.weight.dtype
        if (site.name, IN) not in axes:
            # Nothing to make up for: what is left of the dense weight.
            assert torch.equal(site.weight, weight)
            assert site.statistics.input is before.statistics.input
            continue
        g, _, i, *_ = before.spec.shape
        taps = before.spec.features // i
        rows = (axes[site.name, IN] % i).reshape(g, -1, 1) * taps + torch.arange(taps)
        for n, index in enumerate(rows.flatten(1)):
            held, old = site.statistics.input, before.statistics.input
            assert torch.equal(held.covariance[n], old.covariance[n][index][:, index])
            assert torch.equal(held.mean[n], old.mean[n][index])
            assert held.count == old.count
    for c in sites.couplings:
        for key in ("max", "mean", "unpooled"):
            held, old = (getattr(pooled[c.name], key) for pooled in (left.pooled, sites.pooled))
            index = torch.tensor(kept[c.name])
            assert torch.equal(held.covariance[0], old.covariance[0][index][:, index])


@pytest.mark.parametrize(
    ("name", "layer"), [("chain", "b"), ("chain", "c"), ("flatten", "c"), ("mlp", "b"), ("mlp", "c")]
)
def test_corrected_weights_and_biases_are_least_squares_on_the_calibration_inputs(name: str, layer: str) -> None:
    model, x, sites = calibrated(name)
    kept = halves(sites)
    axes = axes_left(sites.couplings, kept)
    held = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: held.extend([i[0], o]))
    with torch.no_grad():
        model(x)
    handle.remove()
    given, wanted = held
    if given.dim() == 4:
        given = torch.nn.functional.unfold(given, 3, padding=1).movedim(1, -1).reshape(-1, 9 * given.shape[1])
        wanted = wanted.movedim(1, -1).reshape(len(given), -1)
    spec = sites[layer].spec
    taps = spec.features // spec.in_channels
    entries = (axes[layer, IN].unsqueeze(1) * taps + torch.arange(taps)).flatten()
    outputs = axes.get((layer, OUT), torch.arange(spec.out_channels))
    ones = torch.ones(len(given), 1, dtype=given.dtype)
    solved = torch.linalg.lstsq(torch.cat([given[:, entries], ones], 1), wanted[:, outputs]).solution
    site = narrowed(sites, kept)[layer]
    best = float((torch.cat([given[:, entries], ones], 1) @ solved - wanted[:, outputs]).square().sum())
    found = given[:, entries] @ site.weight.reshape(len(outputs), -1).T + site.biases[0]
    # Not smaller than the best, and larger by no more than the shrinkage of the covariance costs.
    assert (
        best * (1 - 1e-9)
        <= float((found - wanted[:, outputs]).square().sum())
        <= 1.02 * best + 1e-6 * float(wanted.square().sum())
    )
    assert torch.allclose(found.mean(0), wanted[:, outputs].mean(0), atol=1e-6)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", ["chain", "residual", "concat", "grouped", "flatten", "depthwise", "twice"])
def test_narrowing_twice_is_narrowing_once(name: str) -> None:
    _, _, sites = calibrated(name)
    first = halves(sites)
    between = narrowed(sites, first)
    second = halves(between, seed=1)
    twice = narrowed(between, second)
    once = narrowed(sites, {channels: [first[channels][c] for c in left] for channels, left in second.items()})
    assert (twice.other_parameters, twice.other_bytes) == (once.other_parameters, once.other_bytes)
    assert twice.untouched == once.untouched
    for a, b in zip(twice, once, strict=True):
        assert a.spec == b.spec
        assert a.statistics.names == b.statistics.names
        assert a.statistics.input.mean.shape == b.statistics.input.mean.shape
        assert torch.equal(a.statistics.input.covariance, b.statistics.input.covariance)
        # The shrinkage of two smaller covariances is not that of one.
        assert torch.allclose(a.weight, b.weight, rtol=0.05, atol=0.05 * float(b.weight.abs().max()))
    for a, b in zip(twice.couplings, once.couplings, strict=True):
        assert (a.name, a.channels, a.places, a.pools) == (b.name, b.channels, b.places, b.pools)
        for mine, other in zip(a.sides, b.sides, strict=True):
            assert torch.equal(mine.positions, other.positions)
            assert mine.size == other.size


def test_keeping_everything_changes_nothing() -> None:
    _, _, sites = calibrated("residual")
    same = narrowed(sites, {c.name: list(range(c.channels)) for c in sites.couplings})
    for before, after in zip(sites, same, strict=True):
        assert torch.equal(before.weight, after.weight)
        assert before.spec == after.spec
    with pytest.raises(PlanError, match="no coupled channels 'x'"):
        narrowed(sites, {"x": [0]})
