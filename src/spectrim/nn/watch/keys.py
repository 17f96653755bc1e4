"""Numbers made from the contents of samples, alike in any batch and order, and numbers drawn by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of a long sample that its key is made from. Two samples that agree in them have their rows drawn alike, which
# does no harm.
_LOOKED_AT = 4096
# Numbers that are hashed at a time.
_CHUNK = 1 << 20
_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number


def shifted(x: Tensor, bits: int) -> Tensor:
    """The bits of a number moved down, without its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mixed(x: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of the number (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shifted(x, 31)


def odd(number: Any) -> Any:
    """A multiple of the golden ratio, in which close numbers are far apart; in Python within 64 bits, with sign."""
    if isinstance(number, Tensor):
        return number * _GOLDEN
    return ((number + 1) * _GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)


def in_unit_interval(x: Tensor) -> Tensor:
    return shifted(x, 11).double() * 2.0**-53


def _words(tensor: Tensor, signs: bool) -> Tensor:
    """Bits of each row as 64-bit numbers, ``[rows, words]``: all, or those of a few thousand numbers of a long row.

    Of numbers with a point their signs alone, if so asked: they are the same in any unit and precision.
    """
    # The bits of quantised numbers cannot be viewed: torch's process would end.
    flat = (tensor.int_repr() if tensor.is_quantized else tensor).reshape(len(tensor), -1)
    flat = flat[:, :: max(1, flat.shape[1] // _LOOKED_AT)]
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    if signs and flat.is_floating_point():
        flat = (flat > 0).to(torch.int8) - (flat < 0).to(torch.int8)
    raw = flat.contiguous().view(torch.uint8)
    short = -raw.shape[1] % 8
    # A copy starts where a 64-bit number may.
    return (F.pad(raw, (0, short)) if short else raw.clone()).view(torch.int64)


def hashed(tensor: Tensor, mask: Tensor | None, *, signs: bool = False) -> Tensor:
    """A number for the contents of each sample, on the CPU; what the mask leaves out counts as not there.

    With ``signs`` these alone are looked at, where numbers have a point.
    """
    if not tensor[0].numel():
        return torch.zeros(len(tensor), dtype=torch.int64)
    if mask is None or tensor.dim() < 2 or tensor.shape[1] != mask.shape[1]:
        return torch.cat([_summed(_words(part, signs)) for part in _parts(tensor)])
    tokens = torch.cat([_summed(_words(part, signs)) for part in _parts(tensor.flatten(0, 1))]).reshape(mask.shape)
    # The place among the data, so that padding may stand on either side.
    placed = mixed(tokens + odd(mask.cumsum(1)))
    return mixed((placed * mask).sum(1))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(max(1, _CHUNK // max(tensor[0].numel(), 1)))


def _summed(words: Tensor) -> Tensor:
    places = mixed(torch.arange(1, words.shape[1] + 1, device=words.device) * _GOLDEN) | 1
    # Tensor products of whole numbers wrap around.
    return mixed((words * places).sum(1)).cpu()
