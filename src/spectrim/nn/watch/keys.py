"""Numbers made from the contents of samples, alike in any batch and order, and numbers drawn by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int8, Int64
from torch import Tensor

# Numbers of a long sample that its key is made from. Two samples that agree in them have their rows drawn alike, which
# does no harm.
_LOOKED_AT = 4096
# Comparisons within a sample, and how near to each other numbers count as equal: rounding hardly ever turns one.
_COMPARED, _NEAR = 128, 1e-5
# Signs and comparisons that are not as most of a sample's are, from which on they are what it is drawn by.
_TELLING = 4
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


def ranked(keys: Int64[Tensor, " n"], bits: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Which samples come first by their keys; those of one key by their bits."""
    by_bits = bits.argsort(stable=True)
    return by_bits[keys[by_bits].argsort(stable=True)]


# Tensors with samples in front, in one piece or one a sample, each with the mask of its positions if it has any.
_Column = Sequence[tuple[Tensor, Tensor | None]]


def keys_of(columns: Iterable[list[Tensor]], mask: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Two numbers ``[size]`` for what each sample holds: by which is drawn, alike in any units, and of all its bits.

    The first is of the bits too where the rest tells next to nothing.

    Parameters
    ----------
    columns
        Tensors with samples in front and positions behind them, in one piece or one a sample.
    """
    there: list[_Column] = [
        [(part, mask if mask is not None and part.shape[1:2] == mask.shape[1:] else None) for part in column]
        for column in columns
    ]
    drawn = [[(_sign(_few(part) if data is None else part), data) for part, data in column] for column in there]
    drawn += [[(_compared(part), None) for part, _ in column] for column in there if column[0][1] is None]
    telling = sum((torch.cat([_telling(*each) for each in column]) for column in drawn), torch.zeros(size))
    bits = _folded(there, size)
    return torch.where(telling < _TELLING, bits, _folded(drawn, size)), bits


def _folded(columns: Sequence[_Column], size: int) -> Int64[Tensor, " size"]:
    keys = torch.zeros(size, dtype=torch.int64)
    for number, column in enumerate(columns):
        keys = mixed(keys + torch.cat([hashed(*each) for each in column]) + odd(number))
    return keys


def _sign(tensor: Tensor) -> Tensor:
    """Signs of numbers with a point, which are the same in any units and precision; others as they are."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return tensor
    return (tensor > 0).view(torch.int8) - (tensor < 0).view(torch.int8)


def _compared(tensor: Tensor) -> Int8[Tensor, "size n"]:
    """A few comparisons of numbers with a point, the same in any units of the rows and columns of a sample.

    Compared are the products of opposite corners of rectangles, which change by the same factor whichever axis has
    units of its own. So numbers of one sign, such as pixels, tell samples apart too.
    """
    if not tensor.is_floating_point() or tensor.dim() < 3:
        return torch.zeros(len(tensor), 0, dtype=torch.int8)
    sides = tensor.flatten(1, -2)
    rows, columns = (side // 2 for side in sides.shape[1:])
    at = torch.arange(rows * columns)[:: max(1, rows * columns // _COMPARED)]
    row, column = at // max(columns, 1), at % max(columns, 1)
    a, b, c, d = (sides[:, row + down, column + across].double() for down in (0, rows) for across in (0, columns))
    one, other = a * d, b * c
    near = _NEAR * (one.abs() + other.abs())
    return (one > other + near).view(torch.int8) - (other > one + near).view(torch.int8)


def _telling(words: Tensor, mask: Tensor | None) -> Float32[Tensor, " size"]:
    """How many of the signs or comparisons of each sample are not what most of them are."""
    if words.dtype != torch.int8:
        return torch.zeros(len(words))
    total = torch.tensor(words[:1].numel()) if mask is None else mask.sum(1) * words[:1, :1].numel()
    flat = words.flatten(1) if mask is None else (words.flatten(2) * mask.to(words.device).unsqueeze(2)).flatten(1)
    # Sums of numbers with a point are quick, and exact as far as it matters.
    signed, there = flat.float().sum(1).cpu(), flat.abs().float().sum(1).cpu()
    return total - torch.stack([(there + signed) / 2, (there - signed) / 2, total - there]).amax(0)


def _few(tensor: Tensor) -> Tensor:
    """Numbers of each row, ``[rows, n]``: all, or a few thousand of a long one."""
    flat = tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)
    return flat[:, :: max(1, flat.shape[1] // _LOOKED_AT)]


def _words(tensor: Tensor) -> Tensor:
    """Bits of each row as 64-bit numbers, ``[rows, words]``, of no more numbers than are looked at."""
    # The bits of quantised numbers cannot be viewed: torch's process would end.
    flat = _few(tensor.int_repr() if tensor.is_quantized else tensor)
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    raw = flat.contiguous().view(torch.uint8)
    short = -raw.shape[1] % 8
    # A copy starts where a 64-bit number may.
    return (F.pad(raw, (0, short)) if short else raw.clone()).view(torch.int64)


def hashed(tensor: Tensor, mask: Tensor | None) -> Int64[Tensor, " size"]:
    """A number for the contents of each sample, on the CPU; what the mask leaves out counts as not there."""
    if not tensor[0].numel():
        return torch.zeros(len(tensor), dtype=torch.int64)
    if mask is None:
        return torch.cat([_summed(_words(part)) for part in _parts(tensor)])
    tokens = torch.cat([_summed(_words(part)) for part in _parts(tensor.flatten(0, 1))]).reshape(mask.shape)
    # The place among the data, so that padding may stand on either side.
    placed = mixed(tokens + odd(mask.cumsum(1)))
    return mixed((placed * mask).sum(1))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(max(1, _CHUNK // max(tensor[0].numel(), 1)))


def _summed(words: Tensor) -> Tensor:
    places = mixed(torch.arange(1, words.shape[1] + 1, device=words.device) * _GOLDEN) | 1
    # Tensor products of whole numbers wrap around.
    return mixed((words * places).sum(1)).cpu()
