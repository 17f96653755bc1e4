"""Low rank in a layer's responses against brute force: patches one by one, weights multiplied out, dense traces."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg import lowrank, response
from spectrim.linalg.metric import Full, Slices
from spectrim.linalg.unfold import Unfolding, fold, unfold, unfoldings

KERNELS = [(), (3,), (2, 3), (3, 1), (2, 1, 2)]
ALL = [(kernel, how) for kernel in KERNELS for how in unfoldings(kernel)]
ALL += [((2, 2, 2), how) for how in unfoldings((2, 2, 2)) if how.name in ("height-first", "depth+width-first")]
SPLIT = [(kernel, how) for kernel, how in ALL if how.name != "channel"]
names = [f"{'x'.join(map(str, kernel)) or 'linear'}-{how.name}" for kernel, how in ALL]
split_names = [f"{'x'.join(map(str, kernel))}-{how.name}" for kernel, how in SPLIT]


class Layer:
    """A random weight, correlated patches, and everything measured from their dense covariance."""

    def __init__(
        self,
        kernel: tuple[int, ...],
        how: Unfolding,
        *,
        g: int = 2,
        o: int = 4,
        i: int = 3,
        n: int = 200,
        centred: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.how, self.shape, self.o = how, (o, i, *kernel), o
        features = i * math.prod(kernel)
        self.weight = torch.randn(g, *self.shape, generator=generator).double()
        mixing = torch.randn(g, features, features, generator=generator).double() / math.sqrt(features)
        self.patches = torch.randn(g, n, features, generator=generator).double() @ mixing
        if centred:
            self.patches -= self.patches.mean(1, keepdim=True)
        self.covariance = self.patches.mT @ self.patches / n
        self.matrix = unfold(self.weight, how)
        self.metric: Full | Slices = Full(self.covariance, (i, *kernel), how)

    def flat(self, weight: Tensor) -> Tensor:
        return weight.reshape(*weight.shape[:2], -1)

    def energy(self, matrix: Tensor, covariance: Tensor | None = None) -> Tensor:
        """``tr(W C W^T)`` a group of an unfolded matrix."""
        weight = self.flat(fold(matrix, self.how, self.shape))
        held = self.covariance if covariance is None else covariance
        return torch.einsum("god,gde,goe->g", weight, held, weight)

    def error(self, matrix: Tensor) -> float:
        """Share of the output energy lost with ``matrix`` in place of the layer's, from the patches themselves."""
        weight = self.flat(fold(self.matrix - matrix, self.how, self.shape))
        lost = (self.patches @ weight.mT).square().sum()
        return float(lost / (self.patches @ self.flat(self.weight).mT).square().sum())

    def start(self) -> Tensor:
        found = lowrank.spectrum(self.matrix, self.metric.average)
        return lowrank.factors(self.matrix, found.basis, found.basis.shape[-1])[0]


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_total_energy_is_that_of_the_outputs(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how)
    expected = (layer.patches @ layer.flat(layer.weight).mT).square().sum((1, 2)) / layer.patches.shape[1]
    torch.testing.assert_close(response.total_energy(layer.matrix, layer.metric), expected)


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_refit_errors_are_measured_at_every_rank(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how)
    left = layer.start()
    errors = response.refit_errors(layer.matrix, layer.metric, left)
    assert len(errors) == left.shape[-1] + 1
    assert float(errors[0]) == pytest.approx(1)
    assert float(errors[-1]) == pytest.approx(0, abs=1e-9)
    for rank in range(1, left.shape[-1] + 1):
        right = response.refit(layer.matrix, layer.metric, left[..., :rank])
        assert float(errors[rank]) == pytest.approx(layer.error(left[..., :rank] @ right), abs=1e-8)


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_refit_is_the_least_squares_solution(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how)
    rank = max(1, layer.start().shape[-1] // 2)
    left = layer.start()[..., :rank]
    right = response.refit(layer.matrix, layer.metric, left)
    best = layer.error(left @ right)
    gradient = torch.zeros_like(right).requires_grad_()
    lost = layer.energy(layer.matrix - left @ (right + gradient)).sum()
    (slope,) = torch.autograd.grad(lost, gradient)
    assert slope.abs().max() < 1e-7 * layer.energy(layer.matrix).sum()
    for scale in (1e-3, 1e-1):
        for _ in range(5):
            assert layer.error(left @ (right + scale * torch.randn_like(right))) > best


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_a_slice_metric_stands_for_equal_uncorrelated_slices(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how)
    small = Slices(layer.metric.average, layer.metric.patch, how)
    full = Full(
        small.times(torch.eye(layer.covariance.shape[1]).double().expand_as(layer.covariance)), small.patch, how
    )
    torch.testing.assert_close(full.average, small.moment)
    left = layer.start()
    total = response.total_energy(layer.matrix, full)
    torch.testing.assert_close(response.total_energy(layer.matrix, small), total)
    errors = response.refit_errors(layer.matrix, small, left)
    torch.testing.assert_close(errors, response.refit_errors(layer.matrix, full, left), atol=1e-9, rtol=1e-7)
    right = response.refit(layer.matrix, small, left[..., :2])
    torch.testing.assert_close(right, response.refit(layer.matrix, full, left[..., :2]), atol=1e-7, rtol=1e-6)
    # In that metric the projection on the leading eigenvectors is optimal: its spectrum has the error already.
    found = lowrank.spectrum(layer.matrix, small.moment)
    torch.testing.assert_close(errors, lowrank.tail_errors(found.energies), atol=1e-8, rtol=1e-6)
    rights = lowrank.factors(layer.matrix, found.basis, left.shape[-1])[1]
    for metric in (small, full):
        kept = response.product_errors(left, rights, metric, float(total.sum()))
        torch.testing.assert_close(kept, errors, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_product_errors_are_measured_at_every_rank(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how)
    found = lowrank.spectrum(layer.matrix)
    left, right = lowrank.factors(layer.matrix, found.basis, found.basis.shape[-1])
    total = float(response.total_energy(layer.matrix, layer.metric).sum())
    errors = response.product_errors(left, right, layer.metric, total)
    for rank in range(left.shape[-1] + 1):
        kept = left[..., :rank] @ right[:, :rank]
        assert float(errors[rank]) == pytest.approx(layer.error(kept), abs=1e-10)


def test_the_channel_unfolding_is_principal_component_analysis_of_the_outputs() -> None:
    from sklearn.decomposition import PCA

    how = unfoldings((3, 3))[0]
    layer = Layer((3, 3), how, g=1, o=6, centred=True)
    outputs = (layer.patches @ layer.flat(layer.weight).mT)[0]
    reference = PCA().fit(outputs.numpy())
    lost = 1 - torch.from_numpy(reference.explained_variance_ratio_).double().cumsum(0)
    found = lowrank.spectrum(layer.matrix, layer.metric.average)
    torch.testing.assert_close(lowrank.tail_errors(found.energies)[1:], lost, atol=1e-9, rtol=0)
    errors = response.refit_errors(layer.matrix, layer.metric, layer.start())
    torch.testing.assert_close(errors[1:], lost, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("kernel", "how"), SPLIT, ids=split_names)
def test_alternation_never_raises_the_error(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how, n=60)
    full = layer.start()
    rank = max(1, full.shape[-1] // 2)
    # From the start the methods use, and from a bad one.
    for left in (full[..., :rank], torch.randn_like(full[..., :rank])):
        errors = []
        for sweeps in (0, 1, 3):
            a = response.alternate(layer.matrix, layer.metric, left, sweeps=sweeps)
            b = response.refit(layer.matrix, layer.metric, a)
            errors.append(layer.error(a @ b))
        start = response.refit(layer.matrix, layer.metric, left)
        assert errors[0] == pytest.approx(layer.error(left @ start), abs=1e-12)
        assert all(after <= before + 1e-10 for before, after in pairwise(errors)), errors
    assert errors[-1] < errors[0]


def test_alternation_comes_close_to_the_best_of_several_starts() -> None:
    (how,) = [u for u in unfoldings((3, 3)) if u.name == "height-first"]
    layer = Layer((3, 3), how, g=1)
    found = []
    for left in [layer.start()[..., :4], *(torch.randn(1, layer.matrix.shape[1], 4).double() for _ in range(2))]:
        a = response.alternate(layer.matrix, layer.metric, left, sweeps=20)
        b = response.refit(layer.matrix, layer.metric, a)
        found.append(layer.error(a @ b))
    a = response.alternate(layer.matrix, layer.metric, layer.start()[..., :4], sweeps=4)
    b = response.refit(layer.matrix, layer.metric, a)
    assert layer.error(a @ b) < 1.1 * min(found)


@settings(max_examples=15)
@given(
    st.sampled_from(ALL),
    st.integers(1, 2),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 40),
)
def test_few_patches_and_any_shape_stay_finite(
    case: tuple[tuple[int, ...], Unfolding], g: int, o: int, i: int, n: int
) -> None:
    layer = Layer(*case, g=g, o=o, i=i, n=n)
    left = layer.start()
    errors = response.refit_errors(layer.matrix, layer.metric, left)
    assert torch.isfinite(errors).all()
    assert (errors >= 0).all()
    assert (errors <= 1 + 1e-9).all()
    assert (errors.diff() <= 0).all()
    a = response.alternate(layer.matrix, layer.metric, left[..., :1], sweeps=2)
    b = response.refit(layer.matrix, layer.metric, a)
    assert layer.error(a @ b) <= float(errors[1]) + 1e-6


def test_a_layer_without_weight_or_input_stays_finite() -> None:
    (how,) = [u for u in unfoldings((3, 3)) if u.name == "width-first"]
    layer = Layer((3, 3), how)
    left = layer.start()
    for matrix, metric in (
        (torch.zeros_like(layer.matrix), layer.metric),
        (layer.matrix, Full(torch.zeros_like(layer.covariance), layer.metric.patch, how)),
    ):
        errors = response.refit_errors(matrix, metric, left)
        assert errors.tolist() == [0.0] * len(errors)
        a = response.alternate(matrix, metric, torch.zeros_like(left), sweeps=2)
        b = response.refit(matrix, metric, a)
        assert torch.isfinite(a @ b).all()


def test_not_finite_moments_are_refused() -> None:
    layer = Layer((), unfoldings(())[0])
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        response.refit(layer.matrix, Full(layer.covariance * float("nan")), layer.start())


@given(st.integers(0, 6), st.integers(0, 5))
def test_trailing_sums_blocks(size: int, seed: int) -> None:
    pairs = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    expected = torch.stack([pairs[j:, j:].sum() for j in range(size + 1)])
    torch.testing.assert_close(response.trailing(pairs), expected)


@pytest.mark.parametrize("alike", [(), (1,), (0, 1)])
def test_normal_equations_of_layers_that_share_their_second_factor_add_up(alike: tuple[int, ...]) -> None:
    how = unfoldings((3, 3))[2]
    one, two = Layer((3, 3), how, i=3), Layer((3, 3), how, i=5)
    for layer in ((one, two)[number] for number in alike):
        # All slices of a patch alike, which the normal equations tell once.
        layer.metric = Slices(layer.metric.average, layer.metric.patch, how)
        layer.covariance = layer.metric.times(torch.eye(layer.covariance.shape[1]).double().expand(2, -1, -1))
    lefts = [torch.randn(2, layer.matrix.shape[1], 3).double() for layer in (one, two)]
    pairs = list(zip((one, two), lefts, strict=True))
    total, other = (response.normal(x.matrix, x.metric, left) for x, left in pairs)
    total = total + other
    right = total.solve()

    def lost(right: Tensor) -> Tensor:
        return sum((x.energy(x.matrix - left @ right).sum() for x, left in pairs), torch.zeros(()).double())

    torch.testing.assert_close(total.errors()[-1], lost(right), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(total.errors()[0], total.energy)
    torch.testing.assert_close(total.energy, lost(torch.zeros_like(right)))
    for _ in range(10):
        assert lost(right + 0.01 * torch.randn_like(right)) > lost(right)


@pytest.mark.parametrize("sliced", [False, True])
def test_the_first_factor_of_several_layers_is_lowered_towards_its_least_squares_solution(sliced: bool) -> None:
    how = unfoldings((3, 3))[2]
    layers = [Layer((3, 3), how, o=4), Layer((3, 3), how, o=6)]
    layers[1].metric = dataclasses.replace(layers[1].metric, moment=layers[1].covariance.flip(0))
    held = [Slices(x.metric.average, x.metric.patch, how) if sliced else x.metric for x in layers]
    rights = [torch.randn(2, 3, x.matrix.shape[2]).double() for x in layers]

    def lost(left: Tensor) -> Tensor:
        rows = zip(layers, held, rights, strict=True)
        return sum((response.total_energy(x.matrix - left @ v, a).sum() for x, a, v in rows), torch.zeros(()).double())

    left = torch.randn(2, layers[0].matrix.shape[1], 3).double()
    args = ([x.matrix for x in layers], held)
    values = [float(lost(left))]
    for steps in (1, 3, 9, 400):
        values.append(float(lost(response.refit_first(*args, left, rights, steps=steps))))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(values))
    best = response.refit_first(*args, left, rights, steps=400).requires_grad_()
    (slope,) = torch.autograd.grad(lost(best), best)
    assert slope.abs().max() < 1e-4 * values[0]


def test_nested_errors_never_rise_and_end_at_nothing_lost() -> None:
    # Nine patches of eighteen numbers: directions of hardly any energy, whose rounding would show.
    layer = Layer((2, 3), next(how for how in unfoldings((2, 3)) if how.name == "height-first"), n=9)
    left = torch.linalg.qr(torch.randn(2, layer.matrix.shape[1], layer.matrix.shape[1], dtype=torch.float64))[0]
    errors = response.refit_errors(layer.matrix, layer.metric, left)
    assert all(after <= before for before, after in pairwise(errors.tolist()))
    assert errors[0] == 1
    assert 0 <= errors[-1] < 1e-9


@pytest.mark.parametrize("kernel", [(3,), (2, 3)])
def test_an_output_weight_mixes_the_outputs_of_every_slice(kernel: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 4, 3, *kernel, generator=draw, dtype=torch.float64)
    root = torch.randn(2, 4, 4, generator=draw, dtype=torch.float64).triu() + 2 * torch.eye(4, dtype=torch.float64)
    for how in unfoldings(kernel):
        matrix = unfold(weight, how)
        mixed = response.mix(matrix, root)
        torch.testing.assert_close(mixed, unfold(torch.einsum("goi...,gto->gti...", weight, root), how))
        torch.testing.assert_close(response.unmix(mixed, root), matrix)
        assert torch.equal(response.mix(matrix, None), matrix)
        assert torch.equal(response.unmix(matrix, None), matrix)
