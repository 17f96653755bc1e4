"""Keys of samples: of all their bits, or of their signs."""

from __future__ import annotations

import pytest
import torch

from spectrim.nn.watch.keys import hashed
from spectrim.nn.watch.sampling import Extent

SCALES = 10.0 ** torch.linspace(-6, 6, 64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_units_and_precision_change_no_key_of_signs(dtype):
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    keys = hashed(x, None, signs=True)
    assert len(keys.unique()) == 200
    assert torch.equal(hashed((x * SCALES).to(dtype), None, signs=True), keys)
    assert torch.equal(hashed(x.reshape(200, 4, 4, 4) * 3, None, signs=True), keys)
    assert not torch.equal(hashed(x * SCALES, None), hashed(x, None))


def test_vectors_of_tokens_have_such_keys_too_and_padding_has_no_part_in_them():
    x = torch.randn(20, 7, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7).expand(20, -1) < torch.arange(20).remainder(6).add(2).unsqueeze(1)
    keys = hashed(x, mask, signs=True)
    assert torch.equal(hashed((x * SCALES).masked_fill(~mask.unsqueeze(2), 5.0), mask, signs=True), keys)
    assert len(keys.unique()) == 20


@pytest.mark.parametrize(
    ("change", "signs"),
    [
        (lambda x: x, True),
        (lambda x: x.relu(), True),  # zeros tell as signs do
        (lambda x: x.abs() + 1, False),
        (lambda x: x.abs() * torch.tensor([1.0, -1.0]).repeat(32), False),  # each number has one sign in all samples
        (lambda x: x[:1] + 1e-6 * x, False),  # samples next to each other
        (lambda x: (1e3 * x.abs()).long(), True),  # whole numbers are looked at as they are
    ],
)
def test_signs_make_keys_where_they_tell_all_samples_apart(change, signs):
    x = change(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)))
    for size in (200, 64, 1):
        run = Extent(list(x.split(size)))
        assert run.signs is signs
        assert len(torch.cat([run.see(batch).unitless for batch in x.split(size)]).unique()) == 200


def test_of_what_is_read_once_all_bits_are_looked_at():
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    assert not Extent(iter([x])).signs
