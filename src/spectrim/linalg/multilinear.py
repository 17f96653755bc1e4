"""A convolution's weight as a product of more than two factors: Tucker-2 and canonical polyadic (CP), in a metric.

    Tucker-2   W'[o, i, k] = sum_qp  outer[o, q] core[q, p, k] inner[i, p]
    CP         W'[o, i, k] = sum_r   outer[o, r] inner[i, r] kernel[k, r]

``kernel`` is one factor over all positions of the kernel, or a product of one for each axis. Both are of the form
``W' = outer columns^T`` with columns over patches ``(i, *k)``, and both minimise ``tr[(W - W') C (W - W')^T]`` with the
second moment ``C`` of the patches (a :class:`~spectrim.linalg.metric.Metric`; without data the identity).

The factors behind ``columns`` are solved for exactly whenever the others are known, for CP by least squares, for
Tucker-2 by the principal components of what least squares would answer. So the error is a function of the other factors
alone, whose gradient needs no derivative of the solution (variable projection: Golub, Pereyra 1973). L-BFGS lowers it
from a start that is made of singular vectors. On ResNet-20 this comes to lower errors than alternating least squares in
the same time.

Weights are those of one group, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import descent, lowrank, response, symmetric
from spectrim.linalg.metric import Full, SlicedMetric, cholesky

# Steps that a descent to a CP knows of: with 20 an evaluation takes up to a quarter longer, and comes no lower.
_MEMORY = 8


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that is to be approximated in a metric.

    Attributes
    ----------
    weight
        ``[o, i, *k]``; its outputs may be weighed.
    metric
        Over patches ``(i, *k)``, of one group, unfolded so that the input channels are seen alone (``input``).
    """

    weight: Float[Tensor, "o i *k"]
    metric: SlicedMetric

    @cached_property
    def cross(self) -> Float[Tensor, "n o"]:
        """``C W^T``."""
        return self.seen(self.weight.flatten(1).mT)

    @cached_property
    def energy(self) -> float:
        """``tr(W C W^T)``."""
        return float((self.weight.flatten(1).mT * self.cross).sum())

    @property
    def reach(self) -> int:
        """Numbers of a patch that one of them is multiplied with for ``C columns``."""
        return self.weight.shape[1] if self.metric.separates else self.weight[0].numel()

    @cached_property
    def matrix(self) -> Float[Tensor, "1 i c"]:
        """The weight with its input channels as rows."""
        return self.metric.unfold(self.weight.flatten(1).unsqueeze(0))

    @cached_property
    def wanted(self) -> Float[Tensor, "1 i q o"]:
        """What the metric sees of :attr:`matrix`."""
        return self.metric.seen(self.matrix)

    def left_over(self, gained: Tensor) -> Tensor:
        """Share of the energy that is lost where so much is kept; none of nothing."""
        return (1 - gained / self.energy).clamp(0, 1) if self.energy > 0 else torch.zeros_like(gained)

    def seen(self, columns: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
        """``C columns``."""
        return self.metric.times(columns.mT.unsqueeze(0))[0].mT

    def lost(self, weight: Float[Tensor, "o i *k"]) -> float:
        """Share of the energy that another weight in its place loses."""
        missing = (self.weight - weight).flatten(1).unsqueeze(0)
        return float(self.metric.energy(missing)) / self.energy if self.energy > 0 else 0.0

    def outer(self, columns: Float[Tensor, "n r"]) -> Float[Tensor, "o r"]:
        """The best weight ``outer`` of given columns; zero for what never responds."""
        gram = columns.mT @ self.seen(columns)
        equations = response.Normal(
            Full(gram.unsqueeze(0)), (columns.mT @ self.cross).unsqueeze(0), gram.new_zeros(()), 1
        )
        return equations.solve()[0].mT


# --- CP -------------------------------------------------------------------------------------------------------------


def columns_of(modes: Sequence[Float[Tensor, "_ r"]]) -> Float[Tensor, "n r"]:
    """The columns that factors over the input channels and over parts of the kernel stand for."""
    product = modes[0]
    for mode in modes[1:]:
        product = (product.unsqueeze(1) * mode).flatten(0, 1)
    return product


def _towards(columns: Float[Tensor, "n r"], modes: Sequence[Tensor], number: int) -> Float[Tensor, "_ r"]:
    """Gradient by one mode from that by the columns."""
    opened = columns.reshape(*(len(mode) for mode in modes), columns.shape[1])
    for axis in reversed(range(len(modes))):
        if axis != number:
            shape = [-1 if a == axis else 1 for a in range(opened.dim() - 1)]
            opened = (opened * modes[axis].reshape(*shape, modes[axis].shape[1])).sum(axis)
    return opened


def _by_parts(weight: Float[Tensor, "o i *k"], parts: Sequence[Sequence[int]]) -> Float[Tensor, "o i *parts"]:
    """A weight whose kernel axes are those of the parts, which are runs of axes that belong together."""
    sizes = [math.prod(weight.shape[2 + axis] for axis in part) for part in parts]
    return weight.reshape(*weight.shape[:2], *sizes)


def polyadic_start(target: Target, parts: Sequence[Sequence[int]], rank: int) -> list[Float[Tensor, "_ r"]]:
    """Modes of a CP: the input channels', and one of every part of the kernel.

    In the singular vectors of its own axes a kernel has few positions that hold much. At each of them the weight is a
    matrix, and its singular vectors give components; the strongest of all positions are taken. Those of more components
    begin with those of fewer, and with all of them, ``min(o, i)`` a position, the product is the weight.
    """
    units = _by_parts(target.metric.diagonal()[0].reshape(1, *target.weight.shape[1:]).sqrt(), parts)
    whole = _by_parts(target.weight, parts)
    weighed, bases = whole * units, []
    for axis in range(2, whole.dim()):
        rows = weighed.movedim(axis, 0).flatten(1)
        basis = lowrank.principal((rows @ rows.mT).unsqueeze(0)).basis[0]
        bases.append(basis)
        whole = (whole.movedim(axis, -1) @ basis).movedim(-1, axis)
    channels = units.flatten(2).square().mean(2)[0].sqrt()
    channels = torch.where(channels > 0, channels, torch.ones_like(channels))
    positions = whole.flatten(2).permute(2, 1, 0) * channels.unsqueeze(1)
    spectrum = lowrank.spectrum(positions)
    count = spectrum.energies.shape[1]
    order = spectrum.energies.flatten().argsort(descending=True, stable=True)[:rank]
    position, component = order // count, order % count
    inner = (positions @ spectrum.basis)[position, :, component] / channels
    # Positions number the last axis fastest.
    modes, rest = [], position
    for basis in reversed(bases):
        modes.append(basis[:, rest % len(basis)])
        rest = rest // len(basis)
    return normalised([inner.mT, *reversed(modes)])


def normalised(modes: Sequence[Tensor]) -> list[Tensor]:
    """Modes with columns of unit length; those without any are left."""
    return [mode / torch.where((size := mode.norm(dim=0)) > 0, size, torch.ones_like(size)) for mode in modes]


def polyadic_error(
    target: Target, modes: Sequence[Tensor], ridge: float = 0.0
) -> tuple[float, list[Tensor], Float[Tensor, "o r"]]:
    """Share of the energy that a CP with these modes loses, its gradients by them, and the outer factor.

    With a ridge the energies of all components, times it, count as lost too: ``sum_r |outer_r|^2 c_r^T C c_r`` for
    columns ``c_r``. Cost ``O(n^2 r)`` in a metric of whole patches of ``n`` numbers.
    """
    columns = columns_of(modes)
    seen = target.seen(columns)
    factor = cholesky(_raised(columns.mT @ seen, ridge).unsqueeze(0))[0]
    half = torch.linalg.solve_triangular(factor, columns.mT @ target.cross, upper=False)
    outer = torch.linalg.solve_triangular(factor.mT, half, upper=True).mT
    whole = max(target.energy, 1e-300)
    slope = (seen @ _raised(outer.mT @ outer, ridge) - target.cross @ outer) * (2 / whole)
    error = float(target.left_over(half.square().sum()))
    return error, [_towards(slope, modes, number) for number in range(len(modes))], outer


def _raised(gram: Float[Tensor, "r r"], ridge: float) -> Float[Tensor, "r r"]:
    """A matrix with a share of its diagonal added to it."""
    return gram + torch.diag(ridge * gram.diagonal())


def polyadic_work(target: Target, rank: int) -> float:
    """Multiplications of one :func:`polyadic_error`."""
    o, n = target.weight.shape[0], target.weight[0].numel()
    return float(n * rank) * (target.reach + 2 * o + 2 * rank)


# Ridge of the first descent and its evaluations; that of the second, in shares of what the first has lost.
_RIDGE, _FIRST, _SHARE = 1e-1, 20, 4e-3
# The second descent ends where ten steps lower the error by less than this share of it.
_SETTLED = 1e-6


def polyadic(
    target: Target, modes: Sequence[Float[Tensor, "_ r"]], evaluations: int
) -> tuple[list[Float[Tensor, "_ r"]], float]:
    """Modes that lose less than given ones, and the share of the energy that is lost.

    The least error of a CP need not be attained: large components may cancel ever more closely (de Silva and Lim 2008),
    and where descent ends in such a valley is told by rounding. With a little ridge there is a minimum, which is
    reached; a larger one first leads to better minima.
    """
    start, error = list(modes), polyadic_error(target, modes)[0]
    if evaluations <= 0 or error <= 1e-12:
        return start, error
    first = min(_FIRST, evaluations // 2)
    found = _descended(target, start, _RIDGE, first, descent.FALLS)
    ridge = _SHARE * polyadic_error(target, found)[0]
    found = _descended(target, found, ridge, evaluations - first, _SETTLED)
    left = polyadic_error(target, found)[0]
    # Where next to nothing is lost the ridge may lose more.
    return (found, left) if left < error else (start, error)


def _descended(target: Target, modes: list[Tensor], ridge: float, evaluations: int, falls: float) -> list[Tensor]:
    """Where descent with one ridge comes to."""
    # Components in the size of what they answer: their curvatures differ by it.
    columns, outer = columns_of(modes), polyadic_error(target, modes, ridge)[2]
    answers = outer.norm(dim=0) * (columns * target.seen(columns)).sum(0).clamp_min(0).sqrt()
    units = answers / answers.mean().clamp_min(1e-300)
    units = units.clamp_min(1e-3)

    def objective(points: Sequence[Tensor]) -> tuple[float, Sequence[Tensor]]:
        lost, gradients, _ = polyadic_error(target, [point / units for point in points], ridge)
        return lost, [gradient / units for gradient in gradients]

    start = [mode * units for mode in modes]
    found = descent.descend(objective, start, evaluations, falls=falls, memory=_MEMORY)
    return normalised([point / units for point in found])


# --- Tucker-2 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """What could be answered from some combinations of the input channels, for every number of them.

    Attributes
    ----------
    factor
        Cholesky factor of what is seen through them, over ``(p, k)``; over ``p`` alone where all ``k`` are alike.
    half
        ``[(p, k), o]``: its inverse times the moment between what is seen and what is wanted.
    positions
        Of the kernel.
    """

    factor: Float[Tensor, "m m"]
    half: Float[Tensor, "n o"]
    positions: int

    @classmethod
    def of(cls, target: Target, inner: Float[Tensor, "i p"]) -> Answers:
        left = inner.unsqueeze(0)
        equations = response.normal(target.matrix, target.metric, left, energy=False, seen=target.wanted)
        factor, half = equations.half()
        return cls(factor[0], half[0], equations.slices)

    def gained(self, inputs: int) -> Float[Tensor, " o"]:
        """Energy of each principal component of the answers from the first so many combinations, descending."""
        half = self.half[: inputs * self.positions]
        gram = half.mT @ half if len(half) > half.shape[1] else half @ half.mT
        return symmetric.eigvalsh(gram).flip(-1).clamp_min(0)

    def fitted(self, outputs: int) -> tuple[Float[Tensor, "q n"], Float[Tensor, "o q"], Tensor]:
        """Core, orthonormal outer factor and energy gained by so many components of the answers from all of them."""
        basis = lowrank.principal((self.half.mT @ self.half).unsqueeze(0)).basis[0][:, :outputs]
        projected = self.half @ basis
        core = response.solved(self.factor.mT, projected, upper=True)
        return core.mT, basis, projected.square().sum()


def tucker_start(target: Target, most: int) -> Float[Tensor, "i p"]:
    """Combinations of the input channels, the leading ones of the weight in the average slice; nested."""
    spectrum = lowrank.spectrum(target.matrix, target.metric.average, most)
    left, _ = lowrank.factors(target.matrix, spectrum.basis, most)
    return normalised([left[0]])[0]


def tucker_errors(
    target: Target, inner: Float[Tensor, "i p"], inputs: Sequence[int]
) -> list[Float[Tensor, " outputs"]]:
    """Share of the energy lost with each of these numbers of combinations, for every number of components ``0 .. o``.

    One factorisation serves all: the errors fall with either number.
    """
    answers, outputs, errors = Answers.of(target, inner), target.weight.shape[0], []
    for number in inputs:
        gained = answers.gained(number).cumsum(0)
        # Fewer combinations than outputs have no further components.
        gained = torch.cat([gained.new_zeros(1), gained, gained[-1:].expand(max(0, outputs - len(gained)))])
        errors.append(target.left_over(gained))
    return errors


def tucker_work(target: Target, inputs: int) -> float:
    """Multiplications of one step of :func:`tucker`, or of :func:`tucker_errors`."""
    o, n = target.weight.shape[0], target.weight[0].numel()
    width = inputs * n // target.weight.shape[1]
    return 2 * inputs * n * target.reach + width * (inputs * n + width * width / 3 + width * o + o * o)


def tucker(
    target: Target, inner: Float[Tensor, "i p"], outputs: int, evaluations: int
) -> tuple[Float[Tensor, "i p"], Float[Tensor, "q p *k"]]:
    """Inner factor that loses less than the given one with so many outputs, and the core that belongs to it."""

    wanted = target.metric.first_seen(target.wanted)

    def objective(points: Sequence[Tensor]) -> tuple[float, Sequence[Tensor]]:
        (left,) = points
        answers, left = Answers.of(target, left), left.unsqueeze(0)
        core, basis, gained = answers.fitted(outputs)
        right = _second(core, basis, answers.positions)
        away = target.metric.first_operator(right)(left) - wanted(right)
        return float(target.left_over(gained)), [away[0] * (2 / whole)]

    whole = max(target.energy, 1e-300)
    if evaluations > 0:
        (inner,) = normalised(descent.descend(objective, [inner], evaluations))
    core, _, _ = Answers.of(target, inner).fitted(outputs)
    return inner, core.reshape(outputs, inner.shape[1], *target.weight.shape[2:])


def _second(core: Float[Tensor, "q n"], basis: Float[Tensor, "o q"], positions: int) -> Float[Tensor, "1 p c"]:
    """Core and outer factor as the second factor of a pair whose first has a kernel of one, ``[1, p, (o, k)]``."""
    product = (basis @ core).reshape(len(basis), -1, positions)
    return product.transpose(0, 1).flatten(1).unsqueeze(0)
