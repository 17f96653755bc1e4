"""Which channels to do without: column subsets of what layers read, chosen by what the layers' responses lose.

A layer answers ``y = W x``, and ``x`` consists of channels, each one or several entries (the taps of a kernel). Without
the channels in ``R`` the best that can be done with the others ``S`` is least squares on the moments ``C`` of ``x``,

    W' = W C[:, S] C[S, S]^{-1},    lost = tr(B (C - C[:, S] C[S, S]^{-1} C[S, :])),    B = W^T G W,

with ``G`` the weight of the outputs. Channels go one after the other, each time those that add least to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spectrim.linalg.lowrank import standard as standard


@dataclass(eq=False)
class Reader:
    """What one layer loses when it no longer sees some of the channels.

    Attributes
    ----------
    covariance
        ``[d, d]`` of what the layer sees, positive definite.
    gram
        ``[d, d]``, ``W^T G W``.
    channels
        ``[b]``: the channels that it sees.
    entries
        ``[b, f]``: the entries of each.
    """

    covariance: Float[Tensor, "d d"]
    gram: Float[Tensor, "d d"]
    channels: Int64[Tensor, " b"]
    entries: Int64[Tensor, "b f"]

    @property
    def energy(self) -> float:
        """What it would lose without any input."""
        return float((self.gram * self.covariance).sum())


def elimination(
    readers: Sequence[Reader],
    channels: int,
    *,
    pools: int = 1,
    order: Sequence[int] | None = None,
    at_a_time: int = 1,
    until: int | None = None,
) -> tuple[list[int], Float[Tensor, " n"]]:
    """The order in which channels go, and what is lost once so many are gone.

    With ``P`` the inverse of ``C[S, S]``, doing without a further channel ``J`` costs exactly
    ``tr(P_JJ^{-1} (P C B C P)_JJ)``. Both matrices follow from their predecessors by updates of the rank of ``J``, so
    the loss of every number of channels comes from one pass.

    Parameters
    ----------
    readers
        Layers whose losses add up.
    channels
        How many there are.
    pools
        Equal runs of channels that lose one each in turn.
    order
        Channels in the order in which they shall go, to know what that loses; by default the one that adds least goes
        next.
    at_a_time
        Channels that go together, by what each would lose alone. More is faster and a little worse.
    until
        Stop once so many channels are left; 1 by default, or one in each pool.

    Returns
    -------
    order, lost
        The channels that went, and ``[len(order) + 1]`` losses, of which the first is 0.

    Notes
    -----
    ``O(d^2 f)`` a channel. With ``at_a_time`` above 1 the losses in between are interpolated.
    """
    states = [_Selection(reader) for reader in readers]
    last = -(-max(until or 1, 1) // pools) * pools
    left = torch.ones(channels, dtype=torch.bool)
    gone: list[int] = []
    lost = [0.0]
    step = max(1, at_a_time // pools) * pools
    while channels - len(gone) > last:
        count = min(step, channels - len(gone) - last)
        if order is not None:
            picked = list(order[len(gone) : len(gone) + count])
        else:
            scores = torch.zeros(channels, dtype=torch.float64)
            for state in states:
                state.score(scores)
            scores[~left] = math.inf
            picked = _least(scores, count, pools)
        added = sum(state.remove(picked) for state in states)
        left[picked] = False
        gone += picked
        lost += [lost[-1] + max(added, 0.0) * (n + 1) / len(picked) for n in range(len(picked))]
    return gone, torch.tensor(lost, dtype=torch.float64)


def _least(scores: Tensor, count: int, pools: int) -> list[int]:
    """The channels of least score; the same number in every pool."""
    runs = scores.reshape(pools, -1)
    places = torch.topk(runs, max(1, count // pools), dim=1, largest=False, sorted=True).indices
    numbers = places + torch.arange(pools).unsqueeze(1) * runs.shape[1]
    return numbers.t().flatten().tolist()


class _Selection:
    """``P`` and ``Q = P C B C P`` of one reader, over the entries that are left."""

    def __init__(self, reader: Reader) -> None:
        covariance = reader.covariance.double()
        factor, info = torch.linalg.cholesky_ex(covariance)
        if int(info):
            raise ValueError("the covariance of what a layer sees is not positive definite; shrink it first")
        self.inverse = torch.cholesky_inverse(factor)
        # With nothing removed, P C is the identity and Q the Gram matrix itself.
        self.losses = reader.gram.double().clone()
        self.place = {int(channel): n for n, channel in enumerate(reader.channels)}
        self.channels = reader.channels
        self.entries = reader.entries.clone()
        self.alive = torch.ones(len(reader.channels), dtype=torch.bool)

    def score(self, scores: Tensor) -> None:
        """Add what each channel would cost."""
        alive = self.alive.nonzero().flatten()
        entries = self.entries[alive]
        f = entries.shape[1]
        if f == 1:
            diagonal = entries.flatten()
            cost = self.losses[diagonal, diagonal] / self.inverse[diagonal, diagonal]
        else:
            rows, columns = entries.unsqueeze(2), entries.unsqueeze(1)
            solved = torch.linalg.solve(self.inverse[rows, columns], self.losses[rows, columns])
            cost = solved.diagonal(dim1=-2, dim2=-1).sum(-1)
        scores[self.channels[alive]] += cost.cpu()

    def remove(self, channels: Sequence[int]) -> float:
        """Do without channels; what that adds to the loss."""
        places = [self.place[c] for c in channels if c in self.place]
        if not places:
            return 0.0
        gone = self.entries[places].flatten()
        p, q = self.inverse[:, gone], self.losses[:, gone]
        block = torch.linalg.cholesky(p[gone])
        # K = P_:J P_JJ^{-1}
        k = torch.cholesky_solve(p.t(), block).t()
        added = float(torch.cholesky_solve(q[gone], block).diagonal().sum())
        middle = k @ q[gone]
        self.inverse -= k @ p.t()
        change = (q - middle / 2) @ k.t()
        self.losses -= change
        self.losses -= change.t()
        self.alive[places] = False
        self._close_up(gone)
        return added

    def _close_up(self, gone: Tensor) -> None:
        """Leave out rows and columns that are empty, now and then."""
        size = self.inverse.shape[0]
        self.gone = torch.cat([getattr(self, "gone", gone[:0]), gone])
        if len(self.gone) * 8 < size:
            return
        stay = torch.ones(size, dtype=torch.bool)
        stay[self.gone] = False
        kept = stay.nonzero().flatten()
        self.inverse, self.losses = self.inverse[kept][:, kept], self.losses[kept][:, kept]
        number = stay.cumsum(0) - 1
        self.entries = torch.where(self.alive.unsqueeze(1), number[self.entries.clamp(max=size - 1)], 0)
        self.gone = gone[:0]


def restored(
    covariance: Float[Tensor, "*g d d"], weight: Float[Tensor, "*g o d"], kept: Int64[Tensor, "*g s"]
) -> Float[Tensor, "*g o s"]:
    """Weights for the entries that are left which come closest to the responses, ``W C[:, S] C[S, S]^{-1}``.

    Parameters
    ----------
    covariance
        Positive semidefinite. An entry that never changes keeps its weight.
    kept
        The entries that are left, as many in every group.
    """
    c, size = standard(covariance.double())
    size = torch.where(size > 0, size, torch.ones_like(size))
    w = weight.double() * size.unsqueeze(-2)
    rows = kept.unsqueeze(-1).expand(*kept.shape, c.shape[-1])
    seen = torch.take_along_dim(c, rows, dim=-2)
    inner = torch.take_along_dim(seen, kept.unsqueeze(-2).expand(*seen.shape[:-1], kept.shape[-1]), dim=-1)
    return torch.linalg.solve(inner, seen @ w.mT).mT / torch.take_along_dim(size, kept, dim=-1).unsqueeze(-2)
