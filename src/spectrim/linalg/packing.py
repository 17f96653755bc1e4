"""Positions of kept units in few bytes: a bitmap, or the Elias-Fano code of their sorted numbers.

Of ``n`` units, ``k`` are kept. A bitmap takes ``n`` bits. The Elias-Fano code cuts every position into ``b`` low bits,
stored as they are, and a high part, of which the differences from one position to the next are stored in unary:
``k b`` and ``k + (n - 1) // 2^b + 1`` bits. Of all ways to code differences it is one of the shortest, and its length
follows from ``n`` and ``k`` alone, so that a plan knows the bytes of a file before there are any values.

Source: Elias 1974; Fano 1971; Vigna, Quasi-succinct indices, 2013.
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_bits(units: int, kept: int) -> int | None:
    """Low bits of the shortest Elias-Fano code, or None where a bitmap is no longer."""
    if not kept:
        return None
    bits = min(range(units.bit_length() + 1), key=lambda b: _code_bits(units, kept, b))
    return bits if -(-_code_bits(units, kept, bits) // 8) < -(-units // 8) else None


def packed_bytes(units: int, kept: int) -> int:
    """Bytes that :func:`pack` takes for ``kept`` of ``units`` flags; none where all or none are kept."""
    if kept in (0, units):
        return 0
    bits = low_bits(units, kept)
    return -(-units // 8) if bits is None else -(-_code_bits(units, kept, bits) // 8)


def _code_bits(units: int, kept: int, bits: int) -> int:
    return kept * bits + kept + ((units - 1) >> bits) + 1


def pack(flags: Tensor) -> Tensor:
    """Flags ``[n]`` as bytes, ``uint8``."""
    units = flags.numel()
    where = flags.nonzero().squeeze(1)
    kept = where.numel()
    if kept in (0, units):
        return torch.zeros(0, dtype=torch.uint8)
    bits = low_bits(units, kept)
    if bits is None:
        return _to_bytes(flags)
    low = (where.unsqueeze(1) >> torch.arange(bits, device=where.device)) & 1
    high = torch.zeros(kept + ((units - 1) >> bits) + 1, dtype=torch.bool, device=where.device)
    high[(where >> bits) + torch.arange(kept, device=where.device)] = True
    return _to_bytes(torch.cat([low.bool().reshape(-1), high]))


def unpack(packed: Tensor, units: int, kept: int) -> Tensor:
    """Inverse of :func:`pack`.

    Raises
    ------
    ValueError
        If the bytes are not the code of ``kept`` of ``units`` flags.
    """
    if not 0 <= kept <= units or packed.dtype != torch.uint8 or packed.shape != (packed_bytes(units, kept),):
        raise ValueError(
            f"{packed.numel()} bytes of {packed.dtype} cannot say which {kept} of {units} units are kept; expected "
            f"{packed_bytes(units, min(max(kept, 0), units))} of uint8"
        )
    if kept in (0, units):
        return torch.full((units,), bool(kept), device=packed.device)
    bits = low_bits(units, kept)
    if bits is None:
        flags = _to_bits(packed)[:units]
    else:
        opened = _to_bits(packed)
        low, high = opened[: kept * bits].reshape(kept, bits), opened[kept * bits :]
        ones = high[: kept + ((units - 1) >> bits) + 1].nonzero().squeeze(1)
        flags = torch.zeros(units, dtype=torch.bool, device=packed.device)
        if ones.numel() == kept:
            steps = torch.arange(kept, device=packed.device)
            where = ((ones - steps) << bits) + (low.long() << torch.arange(bits, device=packed.device)).sum(1)
            if int(where.max()) < units:
                flags[where] = True
    if int(flags.sum()) != kept:
        raise ValueError(f"the code does not name {kept} different units out of {units}")
    return flags


def _to_bytes(flags: Tensor) -> Tensor:
    """Eight flags a byte, the first in the lowest bit; the last byte is filled up with zeros."""
    room = -flags.numel() % 8
    padded = torch.cat([flags, flags.new_zeros(room)]).to(torch.uint8).reshape(-1, 8)
    return (padded << _places(flags)).sum(1, dtype=torch.uint8)


def _to_bits(packed: Tensor) -> Tensor:
    return ((packed.unsqueeze(1) >> _places(packed)) & 1).bool().reshape(-1)


def _places(like: Tensor) -> Tensor:
    # Bytes all along: eight-byte numbers would take as much memory as a large layer eight times over.
    return torch.arange(8, dtype=torch.uint8, device=like.device)
