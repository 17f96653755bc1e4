"""Keys of samples: of all their bits, and of what no unit changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from spectrim.network.layer import LayerSpec
from spectrim.nn.watch.layout import Layout
from spectrim.nn.watch.reconstruct import Split
from spectrim.nn.watch.samples import Samples, spread
from spectrim.nn.watch.sampling import Extent, choose

SCALES = 10.0 ** torch.linspace(-6, 6, 64)
CONV = LayerSpec(("conv",), 3, 5, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_units_and_precision_change_no_key_of_vectors(dtype: torch.dtype) -> None:
    x = normal(200, 64)
    one, two = Samples.of(x), Samples.of((x * SCALES).to(dtype))
    assert len(one.keys.unique()) == 200
    assert torch.equal(two.keys, one.keys)
    assert not torch.equal(two.bits, one.bits)


# Of rows and of columns: of channels in front, and of features behind.
UNITS = [3.0, 1e-3, 2.0**20, SCALES[None, :40], SCALES[:24, None], SCALES[:24, None] * SCALES.flip(0)[None, :40]]


@pytest.mark.parametrize("units", UNITS, ids=["3", "1/1000", "2^20", "columns", "rows", "both"])
@pytest.mark.parametrize("change", [Tensor.clone, Tensor.abs, lambda x: x.abs() * SCALES[:24, None].log().sign()])
def test_units_of_rows_and_columns_change_no_key_even_of_numbers_of_one_sign(
    change: Callable[[Tensor], Tensor], units: Tensor | float
) -> None:
    x = change(normal(200, 24, 40))
    one, two = Samples.of(x), Samples.of(x * units)
    assert len(one.keys.unique()) == 200
    assert torch.equal(two.keys, one.keys)


def test_vectors_of_tokens_have_such_keys_too_and_padding_has_no_part_in_them() -> None:
    x = normal(20, 7, 64)
    mask = torch.arange(7).expand(20, -1) < torch.arange(20).remainder(6).add(2).unsqueeze(1)
    one = Samples.of({"x": x, "mask": mask}, Layout(mask="mask")).keys
    two = Samples.of({"x": (x * SCALES).masked_fill(~mask.unsqueeze(2), 5.0), "mask": mask}, Layout(mask="mask")).keys
    longer = torch.nn.functional.pad(x, (0, 0, 0, 40), value=2.0), torch.nn.functional.pad(mask, (0, 40))
    assert torch.equal(two, one)
    assert torch.equal(Samples.of(dict(zip(("x", "mask"), longer, strict=True)), Layout(mask="mask")).keys, one)
    assert len(one.unique()) == 20


@pytest.mark.parametrize(
    ("change", "bits"),
    [
        (lambda x: x[..., 0].abs(), True),  # positive numbers that are one by one
        (lambda x: x.abs()[:, :, None] * torch.ones(5), True),  # rows and columns of one number each
        (lambda x: (1e3 * x.abs()).long(), True),  # whole numbers
        (lambda x: x, False),
        (lambda x: x.relu(), False),  # zeros tell as signs do
        (lambda x: x[:1] + 1e-9 * x, False),  # samples next to each other
    ],
)
def test_bits_are_looked_at_where_nothing_else_tells(change: Callable[[Tensor], Tensor], bits: bool) -> None:
    x = change(normal(200, 64).double())
    samples = Samples.of(x)
    assert torch.equal(samples.keys, samples.bits) is bits
    assert len(samples.bits.unique()) == 200


def images(n: int = 48) -> Tensor:
    """Pixels of eight bits."""
    return normal(n, 3, 12, 12).mul(60).add(128).clamp(0, 255).round()


@pytest.mark.parametrize("change", [lambda x: x, lambda x: (x - 128) / 60, lambda x: x[:1] + 0.1 * x])
def test_what_is_drawn_of_samples_is_the_same_in_any_units_batches_and_order(
    change: Callable[[Tensor], Tensor],
) -> None:
    """Positions of each, which are held out, and which are looked at, of a list and of what is read once."""
    x = change(images().double()).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))

    def drawn(x: Tensor, batches: Iterable[Tensor]) -> tuple[list[list[int]], list[bool], list[int]]:
        parts = list(batches)
        run = Extent(iter(parts))
        run.samples = len(x)
        places = [
            choose(CONV, tuple(part.shape), 5, run.see(part)).index.reshape(len(part), -1) % 144 for part in parts
        ]
        held = torch.cat(Split.of(parts).held)
        looked_at = torch.cat(spread(iter(parts), 10, Layout()))
        which = [int((x == each).flatten(1).all(1).nonzero()) for each in looked_at]
        return torch.cat(places).tolist(), held.tolist(), sorted(which)

    one = drawn(x, x.split(4))
    assert len({tuple(each) for each in one[0]}) > 40
    assert sum(one[1]) == 6
    channels = torch.tensor([1e-3, 3.0, 7e4]).reshape(3, 1, 1)
    for units, size in ((1 / 255, 1), (1000.0, 4), (2.0**-9, len(x)), (channels, 4)):
        assert drawn(x * units, (x * units).split(size)) == one
    places, held, looked_at = drawn(x, x[order].split(5))
    assert places == [one[0][n] for n in order]
    assert held == [one[1][n] for n in order]
    assert looked_at == one[2]
