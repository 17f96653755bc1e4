"""L-BFGS with a line search, over several tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Objective = Callable[[Sequence[Tensor]], tuple[float, Sequence[Tensor]]]
"""An error and its gradients, of some tensors."""
# Pairs of steps that L-BFGS remembers.
_MEMORY = 20
# So many steps that lower the error by less than this share of it are the last, if nothing else is asked for.
_STEPS, FALLS = 10, 1e-3


def descend(
    objective: Objective, start: Sequence[Tensor], evaluations: int, *, falls: float = FALLS, memory: int = _MEMORY
) -> list[Tensor]:
    """Where L-BFGS comes to with so many evaluations; with more it goes further on the same way, which only falls.

    It knows its last ``memory`` steps, and ends sooner where the last ones hardly lowered the error. Steps are halved
    or interpolated until the error falls as far as the slope promises (Nocedal, Wright 2006, 3.5).
    ``torch.optim`` has it too, and loads the compiler for it.
    """
    sizes = [each.numel() for each in start]

    def at(point: Tensor) -> tuple[float, Tensor]:
        parts = point.split(sizes)
        error, slopes = objective([part.reshape(each.shape) for part, each in zip(parts, start, strict=True)])
        return error, torch.cat([slope.flatten() for slope in slopes])

    point, pairs = torch.cat([each.flatten() for each in start]), []
    left = evaluations - 1
    error, gradient = at(point) if left > 0 else (0.0, torch.zeros_like(point))
    errors = [error]
    while left > 0 and float(gradient.abs().max()) > 1e-12 and not _stalled(errors, falls):
        way = _direction(gradient, pairs)
        slope, step = float(way @ gradient), 1.0 if pairs else min(1.0, 1 / float(gradient.abs().sum()))
        while left > 0:
            left -= 1
            ahead, other = at(point + step * way)
            if ahead <= error + 1e-4 * step * slope:
                break
            # The minimum of the parabola through what is known, within bounds.
            bent = ahead - error - step * slope
            step *= min(0.5, max(0.1, -0.5 * step * slope / bent)) if bent > 0 else 0.1
        else:
            break
        moved, change = step * way, other - gradient
        if float(moved @ change) > 1e-12 * float(change @ change):
            pairs = [*pairs[1 - memory :], (moved, change)]
        point, gradient, error = point + moved, other, ahead
        errors.append(error)
    return [part.reshape(each.shape) for part, each in zip(point.split(sizes), start, strict=True)]


def _stalled(errors: Sequence[float], falls: float) -> bool:
    return len(errors) > _STEPS and errors[-1] > (1 - falls) * errors[-1 - _STEPS]


def _direction(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Minus the gradient times the inverse curvature that the last steps tell (Byrd, Nocedal, Schnabel 1994, 2.3)."""
    if not pairs:
        return -gradient
    steps, changes = (torch.stack(each) for each in zip(*pairs, strict=True))
    met = steps @ changes.mT
    size = met[-1, -1] / (changes[-1] @ changes[-1])
    triangle = met.triu()
    first = torch.linalg.solve_triangular(triangle, (steps @ gradient).unsqueeze(1), upper=True).squeeze(1)
    rest = met.diagonal() * first + size * (changes @ (changes.mT @ first) - changes @ gradient)
    second = torch.linalg.solve_triangular(triangle.mT, rest.unsqueeze(1), upper=False).squeeze(1)
    return size * (changes.mT @ first - gradient) - steps.mT @ second
