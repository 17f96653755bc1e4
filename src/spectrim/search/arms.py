"""Sets of methods that compete: each makes a whole network, and the one that loses least by the judge is taken."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from spectrim.errors import SpectrimError
from spectrim.methods import ActivationCP, ActivationSVD, LowRankPlusSparse, Method, PrincipalFilters, WeightSVD
from spectrim.network.layer import LayerSpec
from spectrim.progress import Progress, silent

R = TypeVar("R")
log = logging.getLogger(__name__)
# What a sparse part or a shared factor saves, and hardly any time.
STORED = frozenset({"parameters", "bytes"})


@dataclass(frozen=True)
class Arm:
    """One set of methods.

    Attributes
    ----------
    name
        For people.
    methods
        On offer; None for what :func:`spectrim.tabulate` offers by itself.
    groups
        Whether layers may share factors.
    """

    name: str
    methods: tuple[Method, ...] | None = None
    groups: bool = False

    @property
    def removes_channels(self) -> bool:
        """Whether channels are removed, too."""
        return any(method.removes_channels for method in self.methods or ())


@dataclass(frozen=True)
class Tried:
    """What became of an arm.

    Attributes
    ----------
    name
        The arm's.
    loss
        What the finished network lost by the judge, smaller is better; infinite if there is none.
    seconds
        That it took.
    note
        Why there is no network; empty if there is one.
    """

    name: str
    loss: float
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.note}" if self.note else f"{self.name}: {self.loss:.4g} in {self.seconds:.1f} s"


def usual(limited: Iterable[str], layers: Iterable[LayerSpec] = ()) -> list[Arm]:
    """The arms that fit the costs that are limited and the layers there are, the most promising first."""
    low_rank = (ActivationSVD(), WeightSVD())
    kernels = any(math.prod(spec.kernel) > 1 for spec in layers)
    chains = [Arm("low rank, chains", (*low_rank, ActivationCP()))] if kernels else []
    filters = Arm("filters, then low rank", (PrincipalFilters(), *low_rank))
    if STORED.isdisjoint(limited):
        return [Arm("low rank", low_rank), *chains, filters]
    return [
        Arm("low rank, shared factors", groups=True),
        *chains,
        Arm("low rank + sparse", (*low_rank, LowRankPlusSparse())),
        filters,
        Arm("filters, then all", (PrincipalFilters(), *low_rank, LowRankPlusSparse())),
    ]


def best(
    arms: Sequence[Arm],
    made: Callable[[Arm], R],
    loss: Callable[[R], float],
    *,
    seconds: float | None = None,
    progress: Progress = silent,
) -> tuple[R, tuple[Tried, ...]]:
    """The network of the arm that loses least, so never more than any single arm.

    Parameters
    ----------
    made
        The finished network of an arm. A :class:`SpectrimError` refuses the arm.
    loss
        Of a finished network.
    seconds
        After which no further arm is begun; the first that can be carried out always is.

    Raises
    ------
    SpectrimError
        Of the first arm, if all are refused.
    """
    began, limit = time.monotonic(), math.inf if seconds is None else float(seconds)
    tried: list[Tried] = []
    winner: tuple[float, R] | None = None
    first: SpectrimError | None = None
    for number, arm in enumerate(arms):
        start = time.monotonic()
        if winner is not None and start - began >= limit:
            tried.append(Tried(arm.name, math.inf, 0.0, f"not tried, as {seconds:g} s were over"))
            continue
        progress(f"arm {arm.name}", number, len(arms))
        try:
            network = made(arm)
            lost = loss(network)
        except SpectrimError as error:
            first = first or error
            tried.append(Tried(arm.name, math.inf, time.monotonic() - start, f"refused, {error}"))
        else:
            tried.append(Tried(arm.name, lost, time.monotonic() - start))
            if winner is None or lost < winner[0]:
                winner = lost, network
        log.info("arm %s", tried[-1])
    if winner is None:
        assert first is not None
        raise first
    return winner[1], tuple(tried)
