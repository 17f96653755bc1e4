"""A metric by its eigenvectors, for what many steps ask of it: ridge solutions for one penalty after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.linalg import symmetric


@dataclass(frozen=True, eq=False)
class Eigen:
    """``V diag(values) V^T + rest (I - V V^T)``, of whole patches or of every slice of them alike.

    Attributes
    ----------
    values
        ``[g, m]``.
    vectors
        ``[g, p, m]``, orthonormal columns.
    rest
        ``[g]``: the eigenvalue of all directions beside them.
    cut, joined
        Rows over patches ``[g, o, n]`` to rows over what the vectors are of, ``[g, o, q, p]``, and back.
    """

    values: Float[Tensor, "g m"]
    vectors: Float[Tensor, "g p m"]
    rest: Float[Tensor, " g"]
    cut: Callable[[Tensor], Tensor] = lambda rows: rows.unsqueeze(2)
    joined: Callable[[Tensor], Tensor] = lambda opened: opened.squeeze(2)

    def ridge(self, rows: Float[Tensor, "g o n"], penalty: float, outputs: Float[Tensor, "g _"]) -> Tensor:
        """``argmin over Y of tr[G (rows - Y) C (rows - Y)^T] + penalty ||Y||^2`` for a diagonal ``G``.

        ``outputs`` is the diagonal. Cost: two products with the eigenvectors.
        """
        strength = outputs.unsqueeze(2)
        values, rest = strength * self.values.unsqueeze(1), strength * self.rest.reshape(-1, 1, 1)
        along, beside = values / (values + penalty), rest / (rest + penalty)
        opened = self.cut(rows)
        g, o, q, p = opened.shape
        whole = self.vectors.shape[2] == p
        gain = along if whole else along - beside
        seen = (opened.reshape(g, o * q, p) @ self.vectors).reshape(g, o, q, -1) * gain.unsqueeze(2)
        step = (seen.reshape(g, o * q, -1) @ self.vectors.mT).reshape(opened.shape)
        return self.joined(step if whole else step.addcmul_(opened, beside.unsqueeze(2)))


def of_moment(moment: Float[Tensor, "g p p"]) -> tuple[Tensor, Tensor, Tensor]:
    """Values, vectors and rest of a moment: all of its eigenvectors."""
    values, vectors = symmetric.eigh(moment)
    return values.clamp_min(0), vectors, values.new_zeros(values.shape[0])


def of_rows(rows: Float[Tensor, "g m n"], level: Float[Tensor, "g n"]) -> tuple[Tensor, Tensor, Tensor]:
    """Those of ``B^T B`` and a level, whose mean stands for it."""
    gram = rows.double() @ rows.double().mT
    squares, left = symmetric.eigh((gram + gram.mT) / 2)
    least = 1e-10 * squares[:, -1:].clamp_min(1e-300)
    vectors = rows.mT @ (left * squares.clamp_min(least).rsqrt().unsqueeze(1)).to(rows.dtype)
    vectors = torch.where((squares > least).unsqueeze(1), vectors, torch.zeros_like(vectors))
    rest = level.mean(1)
    return squares.clamp_min(0).to(rows.dtype) + rest.unsqueeze(1), vectors, rest
