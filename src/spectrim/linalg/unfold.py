"""Weight <-> matrix: the ways a kernel can be split into two smaller convolutions.

A convolution weight ``W[o, i, k1, ..., kn]`` is factored into a first convolution ``i -> r`` and a second ``r -> o``.
The kernel axes are shared out between them: the first takes the axes in ``S``, the second the others. Writing the
weight as the matrix ``M[(i, k_S), (o, k_rest)]`` makes every such pair one rank-``r`` matrix product. The four
familiar decompositions of a k x k kernel are four choices of ``S``:

| name | ``S`` | layers | also known as |
|---|---|---|---|
| ``channel`` | all axes | k x k, then 1 x 1 | scheme 1, output side |
| ``input`` | none | 1 x 1, then k x k | input side |
| ``height-first`` | height | k x 1, then 1 x k | Tai et al., Chen et al. |
| ``width-first`` | width | 1 x k, then k x 1 | scheme 2, Jaderberg et al. |

Linear layers and 1 x 1 kernels have one unfolding only, ``channel``. Weights carry a leading axis of groups, so that a
grouped convolution is a batch of matrices.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

_AXIS_NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@dataclass(frozen=True)
class Unfolding:
    """One way to share the kernel axes out between two factors.

    Attributes
    ----------
    name
        ``channel``, ``input``, or the axes of the first factor, as in ``height-first``.
    axes
        Indices of the kernel axes that the first factor keeps, ascending.
    """

    name: str
    axes: tuple[int, ...]

    def sizes(self, kernel: Sequence[int]) -> tuple[int, int]:
        """Kernel positions covered by the first and by the second factor."""
        first = math.prod(kernel[a] for a in self.axes)
        return first, math.prod(kernel) // first

    def kernels(self, kernel: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Kernels of the first and of the second convolution, with ones on the axes the other one has."""
        first = tuple(k if a in self.axes else 1 for a, k in enumerate(kernel))
        second = tuple(1 if a in self.axes else k for a, k in enumerate(kernel))
        return first, second


def unfoldings(kernel: Sequence[int]) -> tuple[Unfolding, ...]:
    """All different unfoldings of a kernel, ``channel`` first.

    Axes of size one belong to no factor in particular; two splits that differ only there are the same.
    """
    return _unfoldings(tuple(kernel))


@functools.cache
def _unfoldings(kernel: tuple[int, ...]) -> tuple[Unfolding, ...]:
    n = len(kernel)
    wide = [a for a in range(n) if kernel[a] > 1]
    unfoldings = [Unfolding("channel", tuple(range(n)))]
    if not wide:
        return tuple(unfoldings)
    unfoldings.append(Unfolding("input", ()))
    for size in range(1, len(wide)):
        for subset in itertools.combinations(wide, size):
            unfoldings.append(Unfolding("+".join(_AXIS_NAMES[n][a] for a in subset) + "-first", subset))
    return tuple(unfoldings)


def unfolding(kernel: Sequence[int], name: str) -> Unfolding:
    """The unfolding called ``name``.

    Names that differ only in axes of size one are names of one unfolding: ``width-first`` of a 1 x 3 kernel is its
    ``channel``, ``height-first`` its ``input``.

    Raises
    ------
    ValueError
        If the kernel has no unfolding of that name.
    """
    wide = {a for a, size in enumerate(kernel) if size > 1}
    asked = next((how for how in unfoldings((2,) * len(kernel)) if how.name == name), None)
    for candidate in unfoldings(kernel):
        if candidate.name == name or (asked is not None and wide & {*candidate.axes} == wide & {*asked.axes}):
            return candidate
    raise ValueError(
        f"a kernel of shape {tuple(kernel)} has no unfolding {name!r}; "
        f"it has {', '.join(repr(u.name) for u in unfoldings(kernel))}"
    )


def unfoldings_named(kernel: Sequence[int], names: Collection[str] | None) -> tuple[Unfolding, ...]:
    """The different unfoldings of a kernel that have one of the names; all of them for None."""
    if names is None:
        return unfoldings(kernel)
    known = {how.name for how in unfoldings((2,) * len(kernel))}
    asked = {unfolding(kernel, name) for name in names if name in known}
    return tuple(how for how in unfoldings(kernel) if how in asked)


def unfold(weight: Float[Tensor, "g o i *k"], how: Unfolding) -> Float[Tensor, "g rows columns"]:
    """``W[g, o, i, *k]`` to ``M[g, (i, k_S), (o, k_rest)]``."""
    g, o, i, *kernel = weight.shape
    rest = [a for a in range(len(kernel)) if a not in how.axes]
    order = [0, 2, *(3 + a for a in how.axes), 1, *(3 + a for a in rest)]
    rows, columns = how.sizes(kernel)
    return weight.permute(order).reshape(g, i * rows, o * columns)


def fold(matrix: Float[Tensor, "g rows columns"], how: Unfolding, shape: Sequence[int]) -> Float[Tensor, "g o i *k"]:
    """Inverse of :func:`unfold`; ``shape`` is ``(o, i, *k)``."""
    g = matrix.shape[0]
    o, i, *kernel = shape
    rest = [a for a in range(len(kernel)) if a not in how.axes]
    opened = matrix.reshape(g, i, *(kernel[a] for a in how.axes), o, *(kernel[a] for a in rest))
    placed = [0, 2, *(3 + a for a in how.axes), 1, *(3 + a for a in rest)]
    inverse = [placed.index(d) for d in range(len(placed))]
    return opened.permute(inverse).contiguous()


def first_weight(left: Float[Tensor, "g rows r"], how: Unfolding, shape: Sequence[int]) -> Float[Tensor, "g r i *k"]:
    """Weight of the first convolution, ``[g, r, i, *k_S]``, from the left factor ``[g, (i, k_S), r]``."""
    g, _, rank = left.shape
    _, i, *kernel = shape
    return left.transpose(1, 2).reshape(g, rank, i, *how.kernels(kernel)[0]).contiguous()


def second_weight(
    right: Float[Tensor, "g r columns"], how: Unfolding, shape: Sequence[int]
) -> Float[Tensor, "g o r *k"]:
    """Weight of the second convolution, ``[g, o, r, *k_rest]``, from the right factor ``[g, r, (o, k_rest)]``."""
    g, rank, _ = right.shape
    o, _, *kernel = shape
    return right.reshape(g, rank, o, *how.kernels(kernel)[1]).transpose(1, 2).contiguous()


def slice_rows(patches: Float[Tensor, "g n i *k"], how: Unfolding) -> Float[Tensor, "g rows p"]:
    """Input patches as rows of the first factor's view, ``[g, (n, k_rest), (i, k_S)]``."""
    g, n, i, *kernel = patches.shape
    rest = [a for a in range(len(kernel)) if a not in how.axes]
    moved = patches.permute(0, 1, *(3 + a for a in rest), 2, *(3 + a for a in how.axes))
    first, second = how.sizes(kernel)
    return moved.reshape(g, n * second, i * first)
