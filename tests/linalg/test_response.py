"""Low rank in a layer's responses against brute force: patches one by one, weights multiplied out, dense traces."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg import lowrank, response
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
        self.metric = response.arrange(self.covariance, how.axes, (i, *kernel))

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
        found = lowrank.spectrum(self.matrix, response.slice_metric(self.metric))
        return lowrank.factors(self.matrix, found.basis, found.basis.shape[-1])[0]


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_arrange_puts_every_covariance_where_its_coordinates_say(kernel: tuple[int, ...], how: Unfolding) -> None:
    i, g, n = 2, 2, 30
    patches = torch.randn(g, n, i, *kernel).double()
    flat = patches.flatten(2)
    metric = response.arrange(flat.mT @ flat / n, how.axes, (i, *kernel))
    first, second = how.sizes(kernel)
    assert metric.shape == (g, i * first, second, i * first, second)
    rest = [a for a in range(len(kernel)) if a not in how.axes]
    ps = list(product(range(i), *(range(kernel[a]) for a in how.axes)))
    qs = list(product(*(range(kernel[a]) for a in rest)))

    def column(p: tuple[int, ...], q: tuple[int, ...]) -> Tensor:
        where = dict(zip(how.axes, p[1:], strict=True)) | dict(zip(rest, q, strict=True))
        return patches[(slice(None), slice(None), p[0], *(where[a] for a in range(len(kernel))))]

    for (a, p), (b, q), (c, r), (d, s) in product(*[list(enumerate(ps)), list(enumerate(qs))] * 2):
        torch.testing.assert_close(metric[:, a, b, c, d], (column(p, q) * column(r, s)).mean(1))


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_slice_metric_is_the_second_moment_of_the_slices(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how)
    # Unfolding puts (i, k_S) in the rows: a patch unfolded as a weight of one output holds its slices as columns.
    g, n, _ = layer.patches.shape
    slices = unfold(layer.patches.reshape(g * n, 1, *layer.shape[1:]), how)
    expected = (slices @ slices.mT).reshape(g, n, *[slices.shape[1]] * 2).mean(1) / slices.shape[2]
    torch.testing.assert_close(response.slice_metric(layer.metric), expected)
    assert response.slice_metric(expected) is expected


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_total_energy_is_that_of_the_outputs(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how)
    expected = (layer.patches @ layer.flat(layer.weight).mT).square().sum((1, 2)) / layer.patches.shape[1]
    torch.testing.assert_close(response.total_energy(layer.matrix, layer.metric, layer.o), expected)


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_refit_errors_are_measured_at_every_rank(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how)
    left = layer.start()
    errors = response.refit_errors(layer.matrix, layer.metric, left, layer.o)
    assert len(errors) == left.shape[-1] + 1
    assert float(errors[0]) == pytest.approx(1)
    assert float(errors[-1]) == pytest.approx(0, abs=1e-9)
    for rank in range(1, left.shape[-1] + 1):
        right = response.refit(layer.matrix, layer.metric, left[..., :rank], layer.o)
        assert float(errors[rank]) == pytest.approx(layer.error(left[..., :rank] @ right), abs=1e-8)


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_refit_is_the_least_squares_solution(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how)
    rank = max(1, layer.start().shape[-1] // 2)
    left = layer.start()[..., :rank]
    right = response.refit(layer.matrix, layer.metric, left, layer.o)
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
    small = response.slice_metric(layer.metric)
    slices = layer.metric.shape[2]
    full = torch.einsum("gpt,qs->gpqts", small, torch.eye(slices).double())
    left = layer.start()
    total = response.total_energy(layer.matrix, full, layer.o)
    torch.testing.assert_close(response.total_energy(layer.matrix, small, layer.o), total)
    errors = response.refit_errors(layer.matrix, small, left, layer.o)
    torch.testing.assert_close(errors, response.refit_errors(layer.matrix, full, left, layer.o), atol=1e-9, rtol=1e-7)
    right = response.refit(layer.matrix, small, left[..., :2], layer.o)
    torch.testing.assert_close(right, response.refit(layer.matrix, full, left[..., :2], layer.o), atol=1e-7, rtol=1e-6)
    # In that metric the projection on the leading eigenvectors is optimal: its spectrum has the error already.
    found = lowrank.spectrum(layer.matrix, small)
    torch.testing.assert_close(errors, lowrank.tail_errors(found.energies), atol=1e-8, rtol=1e-6)
    rights = lowrank.factors(layer.matrix, found.basis, left.shape[-1])[1]
    for metric in (small, full):
        kept = response.product_errors(left, rights, metric, layer.o, float(total.sum()))
        torch.testing.assert_close(kept, errors, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(("kernel", "how"), ALL, ids=names)
def test_product_errors_are_measured_at_every_rank(kernel: tuple[int, ...], how: Unfolding) -> None:
    layer = Layer(kernel, how)
    found = lowrank.spectrum(layer.matrix)
    left, right = lowrank.factors(layer.matrix, found.basis, found.basis.shape[-1])
    total = float(response.total_energy(layer.matrix, layer.metric, layer.o).sum())
    errors = response.product_errors(left, right, layer.metric, layer.o, total)
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
    found = lowrank.spectrum(layer.matrix, response.slice_metric(layer.metric))
    torch.testing.assert_close(lowrank.tail_errors(found.energies)[1:], lost, atol=1e-9, rtol=0)
    errors = response.refit_errors(layer.matrix, layer.metric, layer.start(), layer.o)
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
            a, b = response.alternate(layer.matrix, layer.metric, left, layer.o, sweeps=sweeps)
            errors.append(layer.error(a @ b))
        start = response.refit(layer.matrix, layer.metric, left, layer.o)
        assert errors[0] == pytest.approx(layer.error(left @ start), abs=1e-12)
        assert all(after <= before + 1e-10 for before, after in pairwise(errors)), errors
    assert errors[-1] < errors[0]


def test_alternation_comes_close_to_the_best_of_several_starts() -> None:
    (how,) = [u for u in unfoldings((3, 3)) if u.name == "height-first"]
    layer = Layer((3, 3), how, g=1)
    found = []
    for left in [layer.start()[..., :4], *(torch.randn(1, layer.matrix.shape[1], 4).double() for _ in range(2))]:
        a, b = response.alternate(layer.matrix, layer.metric, left, layer.o, sweeps=20)
        found.append(layer.error(a @ b))
    a, b = response.alternate(layer.matrix, layer.metric, layer.start()[..., :4], layer.o, sweeps=4)
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
    errors = response.refit_errors(layer.matrix, layer.metric, left, layer.o)
    assert torch.isfinite(errors).all()
    assert (errors >= 0).all()
    assert (errors <= 1 + 1e-9).all()
    assert (errors.diff() <= 0).all()
    a, b = response.alternate(layer.matrix, layer.metric, left[..., :1], layer.o, sweeps=2)
    assert layer.error(a @ b) <= float(errors[1]) + 1e-6


def test_a_layer_without_weight_or_input_stays_finite() -> None:
    (how,) = [u for u in unfoldings((3, 3)) if u.name == "width-first"]
    layer = Layer((3, 3), how)
    left = layer.start()
    for matrix, metric in (
        (torch.zeros_like(layer.matrix), layer.metric),
        (layer.matrix, torch.zeros_like(layer.metric)),
    ):
        errors = response.refit_errors(matrix, metric, left, layer.o)
        assert errors.tolist() == [0.0] * len(errors)
        a, b = response.alternate(matrix, metric, torch.zeros_like(left), layer.o, sweeps=2)
        assert torch.isfinite(a @ b).all()


def test_not_finite_moments_are_refused() -> None:
    layer = Layer((), unfoldings(())[0])
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        response.refit(layer.matrix, layer.metric * float("nan"), layer.start(), layer.o)


@given(st.integers(0, 6), st.integers(0, 5))
def test_trailing_sums_blocks(size: int, seed: int) -> None:
    pairs = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    expected = torch.stack([pairs[j:, j:].sum() for j in range(size + 1)])
    torch.testing.assert_close(response.trailing(pairs), expected)


def test_normal_equations_of_layers_that_share_their_second_factor_add_up() -> None:
    how = unfoldings((3, 3))[2]
    one, two = Layer((3, 3), how, i=3), Layer((3, 3), how, i=5)
    lefts = [torch.randn(2, layer.matrix.shape[1], 3).double() for layer in (one, two)]
    pairs = list(zip((one, two), lefts, strict=True))
    total, other = (response.normal(x.matrix, x.metric, left, x.o) for x, left in pairs)
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
    layers[1].metric = layers[1].metric.flip(0)
    held = [response.slice_metric(x.metric) if sliced else x.metric for x in layers]
    rights = [torch.randn(2, 3, x.matrix.shape[2]).double() for x in layers]

    def lost(left: Tensor) -> Tensor:
        rows = zip(layers, held, rights, strict=True)
        return sum(
            (response.total_energy(x.matrix - left @ v, a, x.o).sum() for x, a, v in rows), torch.zeros(()).double()
        )

    left = torch.randn(2, layers[0].matrix.shape[1], 3).double()
    args = ([x.matrix for x in layers], held)
    values = [float(lost(left))]
    for steps in (1, 3, 9, 400):
        values.append(float(lost(response.refit_first(*args, left, rights, [4, 6], steps=steps))))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(values))
    best = response.refit_first(*args, left, rights, [4, 6], steps=400).requires_grad_()
    (slope,) = torch.autograd.grad(lost(best), best)
    assert slope.abs().max() < 1e-4 * values[0]
