"""Principal filter analysis against the published oracles, dense references and its own invariants."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.moments import Moments
from spectrim.linalg.principal import (
    RULES,
    correlations,
    divergence,
    energy_width,
    inactive,
    kl_width,
    removal_order,
    size_threshold,
    spectrum,
)

_ROWS = ("1 .7 .2 .3 .9", ".7 1 .1 .2 .6", ".2 .1 1 .8 .3", ".3 .2 .8 1 .3", ".9 .6 .3 .3 1")
CORRELATION = torch.tensor([[float(r) for r in row.split()] for row in _ROWS], dtype=torch.float64)
HALVES = torch.tensor([8, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625])
energies = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
seeds = st.integers(0, 10_000)


def responses(samples: int, units: int, rank: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(samples, rank or units, generator=generator, dtype=torch.float64)
    return latent @ torch.randn(rank or units, units, generator=generator, dtype=torch.float64) + 5


def covariance_of(rows: Tensor) -> Tensor:
    return torch.atleast_2d(torch.cov(rows.T))


# Oracles: apple/dnikit's regression data and selection cases.


def pooled_stub(images: int) -> list[Tensor]:
    """Spatial maxima of random images of three layers, in which units 1 .. 14 repeat unit 0 but for noise."""
    shapes = [(20, 20, 128), (10, 10, 64), (5, 5, 32)]
    pooled: list[list[np.ndarray]] = [[], [], []]
    for image in range(images):
        state = np.random.RandomState(image)
        layers = [state.uniform(-1, 1, shape) for shape in shapes]
        # The generator starts again for each unit, which therefore all get the same noise.
        state.seed(image)
        for layer, kept in zip(layers, pooled, strict=True):
            layer[..., 1:15] = (layer[..., 0] + state.normal(0, 0.01, layer.shape[:2]))[..., None]
            kept.append(layer.max((0, 1)))
    return [torch.from_numpy(np.stack(kept)) for kept in pooled]


@pytest.fixture(scope="module")
def stub() -> list[Tensor]:
    return pooled_stub(200)


STUB = [
    (0, 99, 1.129493867639542, 0.7672121140631339, 82, 0.0037030691584144576),
    (1, 52, 0.8441312319086356, 0.7970293429776533, 45, 0.026573058327728254),
    (2, 20, 1.3327294476569362, 0.6154555670037302, 17, 0.1743278851257953),
]


@pytest.mark.parametrize(("layer", "kl_units", "kl", "gamma", "energy_units", "energy"), STUB)
def test_stub_oracles(
    stub: list[Tensor], layer: int, kl_units: int, kl: float, gamma: float, energy_units: int, energy: float
) -> None:
    found = spectrum(covariance_of(stub[layer][:128]))
    assert divergence(found) == pytest.approx((kl, gamma), abs=1e-9)
    assert kl_width(found) == kl_units
    assert energy_width(found, 0.98) == energy_units
    assert float(found[:energy_units].sum()) == pytest.approx(energy, abs=1e-9)


@pytest.mark.parametrize(
    ("layer", "units", "kl", "gamma"),
    [(1, 50, 0.9482624890154597, 0.7719910682727285), (2, 20, 1.375076807139795, 0.6032367018995977)],
)
def test_stub_oracles_of_100_images(stub: list[Tensor], layer: int, units: int, kl: float, gamma: float) -> None:
    found = spectrum(covariance_of(stub[layer][:100]))
    assert divergence(found) == pytest.approx((kl, gamma), abs=1e-9)
    assert kl_width(found) == units


STUB_REMOVED = [
    ("l1-max", 1, {*range(14), 19, 30, 50}),
    ("l1-max", 2, {*range(14), 26}),
    ("l1-min", 1, {18, 20, 23, 25, 28, 32, 37, 42, 44, 46, 51, 52, 58, 59, 60, 61, 63}),
    ("l1-min", 2, {*range(15, 30)}),
    ("abs-max", 0, {*range(1, 15), 19, 23, 24, 30, 31, 35, 38, 48, 55, 60, 65, 70, 73, 75, 77, 80, 82, 85, 113}),
    ("abs-max", 1, {*range(14), 19, 41, 46}),
    ("abs-max", 2, {*range(1, 15), 27}),
    ("abs-min", 1, {0, 20, 26, 28, 33, 37, 39, 41, 47, 49, 52, 53, 54, 59, 60, 61, 63}),
    ("abs-min", 2, {*range(15, 32)} - {18, 27}),
]


@pytest.mark.parametrize(("rule", "layer", "removed"), STUB_REMOVED)
def test_stub_selections(stub: list[Tensor], rule: str, layer: int, removed: set[int]) -> None:
    covariance = covariance_of(stub[layer])
    keep = energy_width(spectrum(covariance), 0.98)
    assert set(removal_order(correlations(covariance), keep, rule, inactive(covariance))) == removed


def test_spectrum_oracles() -> None:
    ramp = torch.tensor([4.0, 3, 2, 1])
    assert divergence(ramp) == pytest.approx((0.10644013528622301, 0.9232196723355078), abs=1e-9)
    assert kl_width(ramp) == 4
    assert divergence(HALVES) == pytest.approx((0.7188068737809984, 0.6543269626130848), abs=1e-9)
    assert kl_width(HALVES) == 6
    assert [energy_width(HALVES, t) for t in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)] == [1, 2, 3, 4, 5, 7, 8]


@pytest.mark.parametrize(
    ("rule", "alone", "after_inactive"),
    [
        ("l1-max", [0, 3, 4, 1], [2, 4, 0, 1]),
        ("l1-min", [2, 3, 1, 0], [2, 4, 3, 0]),
        ("abs-max", [0, 2, 4, 1], [2, 4, 0, 1]),
        ("abs-min", [1, 0, 4, 2], [2, 4, 3, 0]),
    ],
)
def test_selection_oracles(rule: str, alone: list[int], after_inactive: list[int]) -> None:
    assert removal_order(CORRELATION, 1, rule) == alone
    assert removal_order(CORRELATION.float(), 1, rule) == alone
    assert removal_order(torch.ones(4, 4), 1, rule) == [0, 1, 2]
    assert removal_order(CORRELATION, 1, rule, (2, 4)) == after_inactive
    assert removal_order(CORRELATION, 3, rule, (2, 4)) == [2, 4]


# Widths.


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 1000])
def test_flat_and_single_component(n: int) -> None:
    flat, single = torch.full((n,), 0.1), torch.zeros(n)
    single[n // 2] = 3.0
    assert (kl_width(flat), kl_width(single)) == (n, 1)
    assert (energy_width(flat, 1.0), energy_width(single, 1.0)) == (n, 1)
    assert divergence(flat)[1] == pytest.approx(1, abs=1e-9)


def test_rounding_adds_no_unit() -> None:
    assert kl_width(torch.tensor([1.0, 1, 0, 0])) == 2
    assert kl_width(torch.tensor([1.0] * 4 + [0] * 12)) == 8
    assert [energy_width(torch.full((10,), 0.1), k / 10) for k in range(1, 11)] == list(range(1, 11))


@given(energies, st.floats(0.01, 1), st.floats(0.01, 1))
def test_energy_width_is_the_smallest_that_holds_the_threshold_and_monotone(values: Tensor, a: float, b: float) -> None:
    low, high = sorted((a, b))
    k = energy_width(values, low)
    assert 1 <= k <= energy_width(values, high) <= len(values)
    held = values.sort(descending=True).values.cumsum(0)
    assert held[k - 1] >= (low - 1e-12) * held[-1]
    assert k == 1 or held[k - 2] < (low + 1e-12) * held[-1]


@given(energies, st.sampled_from([1e-200, 1e-3, 1 / 3, 7.0, 1e300]), seeds)
def test_widths_depend_neither_on_scale_nor_on_order(values: Tensor, scale: float, seed: int) -> None:
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]
    width = kl_width(values)
    assert 1 <= width <= len(values)
    assert kl_width(shuffled) == width
    assert divergence(shuffled) == pytest.approx(divergence(values), abs=1e-9)
    # Below 1e-90 the smallest scale would underflow the energies themselves.
    sound = torch.where(values < 1e-90, 0.0, values)
    assert divergence(sound * scale) == pytest.approx(divergence(sound), abs=1e-9)


@given(energies.filter(lambda values: len(values) > 1 and float(values.sum()) > 0))
def test_gamma_is_the_normalised_entropy(values: Tensor) -> None:
    p = values / values.max()
    p = p / p.sum()
    entropy = float(-torch.xlogy(p, p).sum())
    kl, gamma = divergence(values)
    assert gamma == pytest.approx(entropy / math.log(len(values)), abs=1e-9)
    assert kl == pytest.approx(math.log(len(values)) - entropy, abs=1e-9)
    assert 0 <= gamma <= 1


@pytest.mark.parametrize("n", [1, 2, 7])
def test_dead_layer_keeps_one_unit(n: int) -> None:
    dead = torch.zeros(n, n)
    found = spectrum(dead)
    assert energy_width(found, 0.5) == energy_width(found, 1.0) == kl_width(found) == 1
    assert divergence(found) == ((math.log(n), 0.0) if n > 1 else (0.0, 1.0))
    assert inactive(dead) == list(range(n))
    assert not correlations(dead).any()
    for rule in RULES:
        assert removal_order(correlations(dead), 1, rule, inactive(dead)) == list(range(n - 1))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 1.0])
def test_size_threshold_keeps_the_share_of_units(share: float) -> None:
    spectra = [spectrum(covariance_of(responses(300, n, seed=n))) for n in (8, 20, 33)]
    threshold = size_threshold(spectra, share)
    kept = sum(energy_width(s, threshold) for s in spectra)
    # A percentile between two units, and one unit of each layer at least.
    assert abs(kept - share * 61) <= 3
    before = [torch.cat([torch.zeros(1, dtype=torch.float64), s.cumsum(0)[:-1] / s.sum()]) for s in spectra]
    expected = float(np.percentile(torch.cat(before).numpy(), 100 * share))
    assert threshold == pytest.approx(min(max(expected, 1e-8), 1 - 1e-8), abs=1e-12)


def test_size_threshold_is_clipped_and_leaves_dead_layers_out() -> None:
    assert size_threshold([torch.tensor([1.0, 0, 0])], 1.0) == 1 - 1e-8
    assert size_threshold([torch.ones(4)], 1e-12) == 1e-8
    flat = torch.ones(4)
    # 0, 1/4, 1/2, 3/4 and four times 1: the middle lies between 3/4 and 1.
    assert size_threshold([flat, torch.zeros(4)], 0.5) == pytest.approx(0.875, abs=1e-12)


# Covariances.


@given(seeds, st.integers(2, 60), st.integers(1, 12), st.integers(1, 12))
def test_streamed_covariance_gives_the_batch_widths(seed: int, samples: int, units: int, rank: int) -> None:
    rows = responses(samples, units, min(rank, units), seed)
    moments = Moments(1, units)
    for part in rows.split(7):
        moments.update(part.unsqueeze(0))
    batch = covariance_of(rows)
    streamed = moments.covariance[0] * samples / (samples - 1)
    torch.testing.assert_close(streamed, batch, atol=1e-9, rtol=1e-9)
    a, b = spectrum(streamed), spectrum(batch)
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert divergence(a) == pytest.approx(divergence(b), abs=1e-9)
    assert kl_width(a) == kl_width(b)
    assert [energy_width(a, t) for t in (0.5, 0.8, 0.95)] == [energy_width(b, t) for t in (0.5, 0.8, 0.95)]


def test_streamed_widths_of_the_stub_are_the_oracles(stub: list[Tensor]) -> None:
    for layer, kl_units, _, gamma, energy_units, _ in STUB:
        moments = Moments(1, stub[layer].shape[1])
        for part in stub[layer][:128].split(33):
            moments.update(part.unsqueeze(0))
        found = spectrum(moments.covariance[0])
        assert (kl_width(found), energy_width(found, 0.98)) == (kl_units, energy_units)
        assert divergence(found)[1] == pytest.approx(gamma, abs=1e-9)


def test_spectrum_is_that_of_the_centred_responses() -> None:
    rows = responses(50, 6)
    expected = torch.linalg.svdvals(rows - rows.mean(0)).square() / 49
    found = spectrum(covariance_of(rows).float())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found.diff() <= 0).all()


def test_fewer_samples_than_units_ask_for_at_most_their_rank() -> None:
    covariance = covariance_of(responses(5, 40))
    found = spectrum(covariance)
    assert (found >= 0).all()
    assert energy_width(found, 1.0) <= 4
    assert 1 <= kl_width(found) <= 40 * math.log(4) / math.log(40) + 1
    assert len(removal_order(correlations(covariance), 4, "l1-max", inactive(covariance))) == 36


def test_one_live_unit() -> None:
    rows = torch.full((20, 4), 3.0, dtype=torch.float64)
    rows[:, 2] = torch.arange(20)
    covariance = covariance_of(rows)
    found = spectrum(covariance)
    assert inactive(covariance) == [0, 1, 3]
    assert energy_width(found, 1.0) == kl_width(found) == 1
    assert removal_order(correlations(covariance), 1, "l1-max", inactive(covariance)) == [0, 1, 3]
    # More units are wanted than live: the first of the dead go, and the rest stay.
    assert removal_order(correlations(covariance), 3, "abs-max", inactive(covariance)) == [0]


def test_inactive_is_relative_to_the_largest_variance() -> None:
    covariance = torch.diag(torch.tensor([1e-3, 1e-12, 0.0, 2e-11]))
    assert inactive(covariance) == [1, 2]
    assert inactive(covariance, share=1e-6) == [1, 2, 3]
    assert inactive(covariance * 1e-20) == [1, 2]


def test_correlations_are_numpys_with_zeros() -> None:
    rows = responses(30, 6, rank=3)
    rows[:, 4] = 1.5
    found = correlations(covariance_of(rows))
    live = [0, 1, 2, 3, 5]
    expected = np.abs(np.corrcoef(rows[:, live].numpy().T))
    np.fill_diagonal(expected, 0)
    torch.testing.assert_close(found[live][:, live], torch.from_numpy(expected), atol=1e-12, rtol=0)
    assert not found[4].any()
    assert not found[:, 4].any()
    torch.testing.assert_close(correlations(covariance_of(rows) * 1e-200), found, atol=1e-12, rtol=0)


# Removal.


def slow_order(correlation: Tensor, keep: int, rule: str, gone: list[int]) -> list[int]:
    """The rules spelled out with lists, without anything kept between steps."""
    sign = -1 if rule.endswith("min") else 1
    order = list(gone)
    while len(order) < len(correlation) - keep:
        live = [i for i in range(len(correlation)) if i not in order]
        others = {i: sorted((sign * float(correlation[i, j]) for j in live if j != i), reverse=True) for i in live}
        if rule.startswith("l1"):
            keys = {i: (sum(values), values[0]) for i, values in others.items()}
        else:
            keys = {i: (values[0], values[1] if len(values) > 1 else 0.0) for i, values in others.items()}
        first = max(key[0] for key in keys.values())
        tied = [i for i in live if math.isclose(keys[i][0], first, rel_tol=1e-6, abs_tol=1e-8)]
        second = max(keys[i][1] for i in tied)
        order.append(next(i for i in tied if math.isclose(keys[i][1], second, rel_tol=1e-6, abs_tol=1e-8)))
    return order


@given(st.sampled_from(RULES), seeds, st.integers(1, 14), st.booleans(), st.data())
def test_order_is_that_of_the_rules_spelled_out(
    rule: str, seed: int, n: int, coarse: bool, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Quarters make ties of every kind.
    drawn = torch.rand(n, n, generator=generator, dtype=torch.float64)
    drawn = (drawn * 4).floor() / 4 if coarse else drawn
    correlation = drawn.triu(1) + drawn.triu(1).T
    keep = data.draw(st.integers(1, n))
    gone = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n - keep))
    found = removal_order(correlation, keep, rule, gone)
    assert len(found) == len(set(found)) == n - keep
    assert found == slow_order(correlation, keep, rule, gone)


@given(st.sampled_from(RULES), seeds, st.integers(1, 10), st.data())
def test_exactly_keep_units_remain_whatever_is_inactive(rule: str, seed: int, n: int, data: st.DataObject) -> None:
    correlation = correlations(covariance_of(responses(20, n, seed=seed)))
    keep = data.draw(st.integers(1, n))
    dead = data.draw(st.lists(st.integers(0, n - 1), unique=True))
    found = removal_order(correlation, keep, rule, dead)
    assert len(found) == len(set(found)) == n - keep
    assert found[: len(dead)] == dead[: n - keep]


@pytest.mark.parametrize("rule", RULES)
def test_order_does_not_depend_on_the_last_bit(rule: str) -> None:
    correlation = correlations(covariance_of(responses(200, 30, rank=8)))
    skewed = correlation.triu() + correlation.tril() * (1 + 4e-16)
    assert not torch.equal(skewed, skewed.T)
    assert removal_order(skewed, 3, rule) == removal_order(correlation, 3, rule) == slow_order(correlation, 3, rule, [])


def test_what_inactive_units_hold_is_not_read() -> None:
    spoiled = CORRELATION.clone()
    spoiled[[2, 4]] = torch.nan
    spoiled[:, [2, 4]] = torch.nan
    before = spoiled.clone()
    assert removal_order(spoiled, 1, "l1-max", [2, 4]) == [2, 4, 0, 1]
    torch.testing.assert_close(spoiled, before, equal_nan=True, rtol=0, atol=0)


def test_duplicates_go_first() -> None:
    rows = responses(100, 6)
    rows[:, 4] = -2 * rows[:, 1]
    assert removal_order(correlations(covariance_of(rows)), 5, "abs-max")[0] in (1, 4)


# Bad input.


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.0001, math.nan])
def test_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(ValueError, match=rf"threshold is {threshold}, expected"):
        energy_width(HALVES, threshold)
    with pytest.raises(ValueError, match=rf"share is {threshold}, expected"):
        size_threshold([HALVES], threshold)


NEEDS_ENERGIES: list[Callable[[Tensor], object]] = [
    lambda values: energy_width(values, 0.9),
    divergence,
    kl_width,
    lambda values: size_threshold([HALVES, values], 0.5),
]


@pytest.mark.parametrize("function", NEEDS_ENERGIES)
def test_bad_energies(function: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"energies\[1\] is nan, expected finite"):
        function(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match=r"energies\[0\] is inf"):
        function(torch.tensor([math.inf, 1.0]))
    with pytest.raises(ValueError, match=r"energies hold -2\.0, expected numbers >= 0"):
        function(torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize("function", [spectrum, correlations, inactive])
def test_bad_covariance(function: Callable[[Tensor], object]) -> None:
    spoiled = torch.eye(3)
    spoiled[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"covariance\[1, 2\] is nan"):
        function(spoiled)


def test_no_spectra() -> None:
    with pytest.raises(ValueError, match="no spectra"):
        size_threshold([], 0.5)


def test_bad_removal() -> None:
    with pytest.raises(ValueError, match="rule 'l2-max' is unknown, expected one of l1-max, abs-max, l1-min, abs-min"):
        removal_order(CORRELATION, 2, "l2-max")
    for keep in (0, 6):
        with pytest.raises(ValueError, match=rf"keep is {keep}, expected 1 \.\. 5"):
            removal_order(CORRELATION, keep, "l1-max")
    for units in ([5], [-1], [1, 1]):
        with pytest.raises(ValueError, match="inactive units .* expected different indices in 0 .. 4"):
            removal_order(CORRELATION, 2, "l1-max", units)
    spoiled = CORRELATION.clone()
    spoiled[0, 3] = math.nan
    with pytest.raises(ValueError, match=r"correlation\[0, 3\] is nan"):
        removal_order(spoiled, 2, "l1-max", [2])
