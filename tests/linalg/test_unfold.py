"""Unfoldings, and the pairs of convolutions that stand for them, against torch's convolutions."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.unfold import (
    Unfolding,
    first_weight,
    fold,
    second_weight,
    slice_rows,
    unfold,
    unfolding,
    unfoldings,
    unfoldings_named,
)
from spectrim.network.factors import LowRank
from spectrim.network.layer import LayerSpec

KERNELS = [(), (1,), (3,), (1, 1), (3, 3), (1, 5), (2, 3), (1, 1, 1), (3, 1, 2), (2, 3, 4)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fold_inverts_unfold(kernel: tuple[int, ...]) -> None:
    g, o, i = 2, 5, 3
    weight = normal(g, o, i, *kernel)
    for how in unfoldings(kernel):
        matrix = unfold(weight, how)
        first, second = how.sizes(kernel)
        assert matrix.shape == (g, i * first, o * second)
        assert first * second == math.prod(kernel)
        assert torch.equal(fold(matrix, how, (o, i, *kernel)), weight)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_fold_inverts_unfold_for_any_shape(kernel: list[int], g: int, o: int, i: int, data: st.DataObject) -> None:
    how = data.draw(st.sampled_from(unfoldings(kernel)))
    weight = normal(g, o, i, *kernel)
    assert torch.equal(fold(unfold(weight, how), how, (o, i, *kernel)), weight)
    matrix = normal(*unfold(weight, how).shape, seed=1)
    assert torch.equal(unfold(fold(matrix, how, (o, i, *kernel)), how), matrix)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_slices_meet_the_rows_of_the_unfolded_weight(kernel: tuple[int, ...]) -> None:
    g, n, o, i = 2, 4, 5, 3
    patches, weight = normal(g, n, i, *kernel, seed=1), normal(g, o, i, *kernel)
    wanted = torch.einsum("gnx,gox->gno", patches.flatten(2), weight.flatten(2))
    for how in unfoldings(kernel):
        first, second = how.sizes(kernel)
        rows = slice_rows(patches, how).reshape(g, n, second, i * first)
        matrix = unfold(weight, how).reshape(g, i * first, o, second)
        torch.testing.assert_close(torch.einsum("gnqp,gpoq->gno", rows, matrix), wanted)


def test_unfold_places_every_entry_where_its_name_says() -> None:
    weight = normal(1, 2, 3, 4, 5)
    matrix = unfold(weight, unfolding((4, 5), "width-first"))
    for o, i, h, w in product(range(2), range(3), range(4), range(5)):
        assert matrix[0, i * 5 + w, o * 4 + h] == weight[0, o, i, h, w]


@pytest.mark.parametrize(
    ("kernel", "names"),
    [
        ((), ["channel"]),
        ((1, 1), ["channel"]),
        ((5,), ["channel", "input"]),
        ((1, 3), ["channel", "input"]),
        ((3, 3), ["channel", "input", "height-first", "width-first"]),
        ((3, 1, 3), ["channel", "input", "depth-first", "width-first"]),
        (
            (2, 2, 2),
            [
                *("channel", "input", "depth-first", "height-first", "width-first"),
                *("depth+height-first", "depth+width-first", "height+width-first"),
            ],
        ),
    ],
)
def test_the_unfoldings_of_a_kernel(kernel: tuple[int, ...], names: list[str]) -> None:
    found = unfoldings(kernel)
    assert [how.name for how in found] == names
    assert all(unfolding(kernel, how.name) == how for how in found)
    # Two unfoldings are the same if they share the axes of more than one position out in the same way.
    assert len({how.kernels(kernel) for how in found}) == len(found)


def test_an_unfolding_that_a_kernel_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"kernel of shape \(3,\) has no unfolding 'width-first'.*'channel', 'input'"):
        unfolding((3,), "width-first")


@pytest.mark.parametrize(
    ("kernel", "names"),
    [
        ((1, 3), {"width-first": "channel", "height-first": "input", "channel": "channel", "input": "input"}),
        ((3, 1), {"width-first": "input", "height-first": "channel"}),
        ((1, 1), {"width-first": "channel", "height-first": "channel", "input": "channel"}),
        (
            (3, 1, 3),
            {"depth+height-first": "depth-first", "height+width-first": "width-first", "height-first": "input"},
        ),
    ],
)
def test_names_that_differ_in_axes_of_size_one_are_of_one_unfolding(
    kernel: tuple[int, ...], names: dict[str, str]
) -> None:
    weight = torch.randn(1, 2, 3, *kernel)
    for name, same in names.items():
        how = unfolding(kernel, name)
        assert how == next(candidate for candidate in unfoldings(kernel) if candidate.name == same)
        assert how in unfoldings_named(kernel, [name])
        # The named split itself, axis by axis, is the same matrix.
        asked = next(candidate for candidate in unfoldings((2,) * len(kernel)) if candidate.name == name)
        assert torch.equal(unfold(weight, asked), unfold(weight, how))


def run(spec: LayerSpec, weight: Tensor, x: Tensor) -> Tensor:
    """The layer that a spec describes, with a canonical weight ``[g, o, i, *k]``, by torch's own functions."""
    g, o, i, *kernel = weight.shape
    assert weight.shape == spec.shape
    if spec.is_linear:
        return F.linear(x, weight[0])
    n = len(kernel)
    if spec.transposed:
        op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
        stored = weight.transpose(1, 2).reshape(g * i, o, *kernel)
        assert not isinstance(spec.padding, str)
        return op(x, stored, None, spec.stride, spec.padding, spec.output_padding, groups=g, dilation=spec.dilation)
    conv = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[n - 1](
        spec.in_channels,
        spec.out_channels,
        spec.kernel,  # type: ignore[arg-type]
        spec.stride,  # type: ignore[arg-type]
        spec.padding,  # type: ignore[arg-type]
        spec.dilation,  # type: ignore[arg-type]
        groups=g,
        bias=False,
        padding_mode=spec.padding_mode,  # type: ignore[arg-type]
        dtype=torch.float64,
    )
    with torch.no_grad():
        conv.weight.copy_(weight.reshape(g * o, i, *kernel))
        return conv(x)


def layer(kernel: tuple[int, ...], **kwargs) -> LayerSpec:
    n = len(kernel)
    defaults = {"stride": (1,) * n, "padding": (0,) * n, "dilation": (1,) * n, "output_padding": (0,) * n}
    return LayerSpec(("layer",), 4, 6, kernel, bias=False, dtype=torch.float64, **{**defaults, **kwargs})


LAYERS = {
    "1d": layer((3,), stride=(2,), padding=(1,), dilation=(2,)),
    "1d same": layer((4,), padding="same", dilation=(2,)),
    "1x1 strided padded": layer((1, 1), stride=(2, 3), padding=(1, 2)),
    "2d": layer((3, 3), padding=(1, 1)),
    "2d strided": layer((3, 3), stride=(2, 2), padding=(1, 1)),
    "2d all different": layer((3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 3)),
    "2d axis of one": layer((1, 5), stride=(2, 1), padding=(1, 2)),
    "2d same": layer((3, 4), padding="same", dilation=(2, 1)),
    "2d groups": layer((3, 3), stride=(2, 1), padding=(1, 0), groups=2),
    "2d reflect": layer((3, 5), padding=(2, 1), stride=(1, 2), padding_mode="reflect"),
    "2d reflect axis of one": layer((1, 3), padding=(2, 1), padding_mode="reflect"),
    "2d circular": layer((3, 3), padding=(1, 2), padding_mode="circular", groups=2),
    "2d replicate same": layer((3, 4), padding="same", padding_mode="replicate"),
    "3d": layer((2, 3, 3), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(2, 1, 1)),
    "3d axis of one": layer((3, 1, 3), stride=(2, 2, 2), padding=(1, 1, 1), groups=2),
    "transposed 1d": layer((4,), stride=(2,), padding=(1,), output_padding=(1,), transposed=True),
    "transposed 2d": layer(
        (4, 3), stride=(2, 3), padding=(1, 2), output_padding=(1, 2), dilation=(1, 2), transposed=True
    ),
    "transposed 2d groups": layer((2, 3), stride=(2, 2), output_padding=(1, 0), groups=2, transposed=True),
    "transposed 2d dilated": layer((3, 3), dilation=(3, 1), output_padding=(2, 0), transposed=True),
    "transposed 3d": layer((2, 3, 2), stride=(2, 1, 2), padding=(0, 1, 1), output_padding=(1, 0, 1), transposed=True),
    "transposed axis of one": layer((1, 3), stride=(2, 2), output_padding=(1, 1), transposed=True),
}
SIZES = {1: (11,), 2: (9, 10), 3: (6, 7, 8)}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_a_pair_of_layers_computes_what_its_product_does(name: str) -> None:
    spec = LAYERS[name]
    size = SIZES[len(spec.kernel)]
    spec = spec.at((size,))
    g, o, i, *kernel = spec.shape
    x = normal(2, spec.in_channels, *size, seed=3)
    for how in unfoldings(kernel):
        rows, columns = i * how.sizes(kernel)[0], o * how.sizes(kernel)[1]
        for rank in (1, min(rows, columns)):
            left, right = normal(g, rows, rank, seed=4), normal(g, rank, columns, seed=5)
            product_weight = fold(left @ right, how, spec.shape[1:])
            (dense,) = LowRank(left, right, None, how, spec.shape[1:]).dense()
            assert torch.equal(dense, product_weight)
            want = run(spec, product_weight, x)
            assert want.shape[2:] == spec.output_shape(size), "output_shape"
            first, second = spec.factor(how, rank)
            hidden = run(first, first_weight(left, how, spec.shape[1:]), x)
            got = run(second, second_weight(right, how, spec.shape[1:]), hidden)
            assert second.inputs == (tuple(hidden.shape[2:]),)
            assert first.inputs == spec.inputs
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 3), st.booleans())
def test_a_pair_of_layers_for_any_geometry(data: st.DataObject, n: int, transposed: bool) -> None:
    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))

    kernel, stride, dilation = draw(1, 3), draw(1, 3), draw(1, 2)
    padding = tuple(min(p, d * (k - 1) // 2 + 1) for p, d, k in zip(draw(0, 2), dilation, kernel, strict=True))
    extra = tuple(max(s, d) - 1 if transposed else 0 for s, d in zip(stride, dilation, strict=True))
    groups = data.draw(st.sampled_from([1, 2]))
    spec = layer(kernel, stride=stride, padding=padding, dilation=dilation, output_padding=extra,
                 groups=groups, transposed=transposed)  # fmt: skip
    how = data.draw(st.sampled_from(unfoldings(kernel)))
    size = (8, 7, 6)[:n]
    weight = normal(*spec.shape)
    x = normal(1, 4, *size, seed=1)
    u, s, vh = torch.linalg.svd(unfold(weight, how), full_matrices=False)
    want = run(spec, weight, x)
    assert want.shape[2:] == spec.output_shape(size)
    first, second = spec.factor(how, s.shape[-1])
    hidden = run(first, first_weight(u * s[:, None], how, spec.shape[1:]), x)
    torch.testing.assert_close(run(second, second_weight(vh, how, spec.shape[1:]), hidden), want)


def test_a_linear_pair() -> None:
    spec = LayerSpec(("fc",), 7, 5, dtype=torch.float64, inputs=((3,),))
    how = Unfolding("channel", ())
    left, right = normal(1, 7, 2), normal(1, 2, 5, seed=1)
    first, second = spec.factor(how, 2)
    x = normal(4, 3, 7, seed=2)
    got = run(second, second_weight(right, how, (5, 7)), run(first, first_weight(left, how, (5, 7)), x))
    torch.testing.assert_close(got, run(spec, fold(left @ right, how, (5, 7)), x))
    assert (first.bias, second.bias) == (False, True)
    assert second.inputs == first.inputs == ((3,),)
    assert spec.factor(how, 2, bias=False)[1].bias is False


def test_ranks_and_biases_of_a_grouped_pair() -> None:
    spec = LAYERS["2d groups"]
    first, second = spec.factor(unfolding((3, 3), "height-first"), 3, bias=True)
    assert (first.out_channels, second.in_channels) == (6, 6)
    assert (first.kernel, second.kernel) == ((3, 1), (1, 3))
    assert (first.stride, second.stride) == ((2, 1), (1, 1))
    assert (first.padding, second.padding) == ((1, 0), (0, 0))
    assert (first.bias, second.bias) == (False, True)
