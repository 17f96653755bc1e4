"""Packed positions: every set of positions comes back, in as many bytes as said."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrim.linalg.packing import low_bits, pack, packed_bytes, unpack


def flags_of(units: int, kept: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    flags = torch.zeros(units, dtype=torch.bool)
    flags[torch.randperm(units, generator=generator)[:kept]] = True
    return flags


def test_every_subset_of_few_units_comes_back():
    for units in range(1, 11):
        for number in itertools.product([False, True], repeat=units):
            flags = torch.tensor(number)
            packed = pack(flags)
            assert packed.dtype == torch.uint8
            assert packed.numel() == packed_bytes(units, sum(number))
            assert torch.equal(unpack(packed, units, sum(number)), flags)


@given(units=st.integers(1, 3000), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_random_subsets_come_back(units, share, seed):
    kept = round(share * units)
    flags = flags_of(units, kept, seed)
    packed = pack(flags)
    assert packed.numel() == packed_bytes(units, kept)
    assert torch.equal(unpack(packed, units, kept), flags)


@pytest.mark.parametrize("ends", [(0,), (4095,), (0, 4095), (0, 1, 2, 3), (4092, 4093, 4094, 4095)])
def test_positions_at_the_ends_and_side_by_side(ends):
    flags = torch.zeros(4096, dtype=torch.bool)
    flags[list(ends)] = True
    assert low_bits(4096, len(ends)) is not None
    assert torch.equal(unpack(pack(flags), 4096, len(ends)), flags)


def test_a_code_never_takes_more_than_a_bitmap_and_is_close_to_the_entropy():
    for units in (1, 7, 8, 9, 100, 4096, 36_864, 16_777_216):
        for share in (0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0):
            kept = round(share * units)
            size = packed_bytes(units, kept)
            assert size <= math.ceil(units / 8)
            if 0 < kept < units and units > 4000:
                p = kept / units
                entropy = units * (-p * math.log2(p) - (1 - p) * math.log2(1 - p)) / 8
                # A bitmap is as bad as it gets near a half, where the code is none.
                assert entropy <= size + 1
                if p <= 0.1:
                    assert size <= 1.13 * entropy


def test_all_or_none_take_no_bytes():
    for units in (1, 9, 64):
        for kept in (0, units):
            assert packed_bytes(units, kept) == pack(flags_of(units, kept)).numel() == 0
            assert int(unpack(torch.zeros(0, dtype=torch.uint8), units, kept).sum()) == kept


def test_the_first_flag_is_the_lowest_bit_of_the_first_byte():
    flags = torch.tensor([True, False, True, False, False, False, False, False, True, True])
    assert low_bits(10, 4) is None
    assert pack(flags).tolist() == [0b101, 0b11]


@pytest.mark.parametrize(
    ("change", "units", "kept"),
    [
        (lambda p: p[:-1], 1000, 20),
        (lambda p: torch.cat([p, p[:1]]), 1000, 20),
        (lambda p: p.float(), 1000, 20),
        (lambda p: p.reshape(1, -1), 1000, 20),
        (lambda p: p, 1000, 1001),
        (lambda p: p, 1000, -1),
        (lambda p: torch.zeros_like(p), 1000, 20),
        (lambda p: torch.full_like(p, 255), 1000, 20),
        (lambda p: torch.full_like(p, 255), 20, 9),
        (lambda p: torch.zeros_like(p), 20, 9),
    ],
)
def test_what_is_no_code_is_refused(change, units, kept):
    packed = pack(flags_of(units, min(max(kept, 0), units) if kept <= units else 20))
    with pytest.raises(ValueError, match="units"):
        unpack(change(packed), units, kept)


@given(data=st.binary(min_size=0, max_size=40), units=st.integers(1, 300), kept=st.integers(0, 300))
def test_any_bytes_are_positions_or_refused(data, units, kept):
    packed = torch.tensor(list(data), dtype=torch.uint8)
    try:
        flags = unpack(packed, units, kept)
    except ValueError:
        return
    assert flags.shape == (units,)
    assert int(flags.sum()) == kept


@given(units=st.integers(2, 300), seed=st.integers(0, 2**31), share=st.floats(0, 0.3))
def test_any_bytes_of_the_right_length_are_positions_or_refused(units, seed, share):
    kept = max(1, round(share * units))
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(256, (packed_bytes(units, kept),), generator=generator).to(torch.uint8)
    try:
        flags = unpack(packed, units, kept)
    except ValueError:
        return
    assert int(flags.sum()) == kept


def test_a_code_of_a_unit_just_behind_the_last_is_refused() -> None:
    units, kept = 101, 5
    mask = torch.zeros(units, dtype=torch.bool)
    mask[[3, 20, 41, 66, 100]] = True
    code = pack(mask)
    bits = low_bits(units, kept)
    assert bits
    # The lowest bit of the last unit: 100 becomes 101.
    place = (kept - 1) * bits
    code[place // 8] |= 1 << (place % 8)
    with pytest.raises(ValueError, match="does not name 5 different units out of 101"):
        unpack(code, units, kept)
