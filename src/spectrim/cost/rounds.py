"""Rounds in which several things take turns at being timed, and which of the times count.

Load changes: taking turns, a busy moment hits all alike. A thread that loses its core stops the others at the next
barrier, and 1 ms becomes 20 ms: times during which the system took a core away are set aside while enough others are
left.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch

ALONE = threading.RLock()
"""Held while switches of the process, or modes and hooks of a model, are other than a user left them. What runs in
another thread waits meanwhile, so that each finds them as they were and puts them back."""

FEWEST = 3
"""Rounds that are taken in any case, and undisturbed times that are enough."""

# Rounds that a comparison rests on at least, how unlikely it is to err, and the share of a time that weights take more
# or less by where they lie in memory: two copies of a network differ by that.
_ENOUGH, _SURE, _PLACEMENT = 12, 0.01, 0.03
# Of an interval whose ends are further apart than this factor nobody can say that there is no difference.
_WIDE = 2.0


@dataclass(frozen=True)
class Timing:
    """Times of one thing, in milliseconds.

    Attributes
    ----------
    samples
        One a round, in the order taken. Those at the same index of two things were taken next to each other.
    preempted
        How often the system took a core away during each sample; zeros where it does not say.
    """

    samples: tuple[float, ...]
    preempted: tuple[int, ...] = ()

    @property
    def p50(self) -> float:
        """Median."""
        return statistics.median(self.samples)

    @property
    def p90(self) -> float:
        """The smallest sample that nine in ten do not exceed."""
        return sorted(self.samples)[-(-9 * len(self.samples) // 10) - 1]

    @property
    def quiet(self) -> float:
        """Median of the samples that were preempted least (at least five): what an idle machine would show."""
        return statistics.median(self.undisturbed(5))

    def undisturbed(self, fewest: int = FEWEST) -> list[float]:
        """The samples that were preempted least, at least ``fewest`` of them, all that are equally good included."""
        if len(self.samples) <= fewest or not self.preempted:
            return list(self.samples)
        bar = sorted(self.preempted)[fewest - 1]
        return [sample for sample, count in zip(self.samples, self.preempted, strict=True) if count <= bar]


@dataclass(frozen=True)
class Speed:
    """How many times faster one thing is than another that was timed beside it, round by round.

    Attributes
    ----------
    ratio
        Median over the rounds of the first time over the second.
    low, high
        Between which the median lies in 99 of 100 cases, whatever the distribution of times (by order statistics).
    equal
        Whether the two are known to take the same time.
    """

    ratio: float
    low: float
    high: float
    equal: bool = False

    @classmethod
    def of(cls, first: Timing, second: Timing) -> Speed:
        """Of rounds that both had undisturbed, while there are enough of them."""
        rounds = list(zip(first.samples, second.samples, strict=True))
        none = (0,) * len(rounds)
        counts = [a + b for a, b in zip(first.preempted or none, second.preempted or none, strict=True)]
        bar = sorted(counts)[min(len(counts), _ENOUGH) - 1]
        ratios = sorted(a / max(b, 1e-12) for (a, b), count in zip(rounds, counts, strict=True) if count <= bar)
        last = len(ratios) - 1
        cut = _outside(len(ratios))
        return cls(statistics.median(ratios), ratios[cut], ratios[last - cut])

    @classmethod
    def of_equals(cls, first: Timing, second: Timing) -> Speed:
        """Of things that are known to take the same time, whatever the machine was busy with meanwhile."""
        speed = cls.of(first, second)
        return cls(speed.ratio, min(speed.low, 1.0), max(speed.high, 1.0), equal=True)

    @property
    def differs(self) -> bool:
        """Whether the two take different times: surely, and by more than where weights lie in memory makes."""
        return not self.low <= 1 <= self.high and abs(self.ratio - 1) > _PLACEMENT

    @property
    def words(self) -> str:
        """The ratio, that there is no difference, or that rounds differ too much to tell."""
        return self.words_of(self.ratio)

    def words_of(self, ratio: float) -> str:
        """The same of a ratio of two quantiles, which a busy machine moves far from what runs side by side show."""
        if self.differs:
            near = self.low / _WIDE <= ratio <= self.high * _WIDE
            return f"{ratio:.2f}x" if near else "too noisy to tell"
        return "no difference" if self.equal or self.high <= _WIDE * self.low else "too noisy to tell"

    def __str__(self) -> str:
        return f"{self.words} ({self.low:.2f}x to {self.high:.2f}x)"


def _outside(count: int) -> int:
    """How many of so many sorted values may be left out at each end, for the median to lie between with 99 %."""
    tail, left = 0.0, 0
    while left < (count - 1) // 2:
        tail += math.comb(count, left) / 2**count
        if 2 * tail > _SURE:
            break
        left += 1
    return max(left - 1, 0)


class Rounds:
    """An iterator of rounds, in each of which everything is to be timed once, and the times taken.

    Rounds are numbered from 0, the ``warmup`` before that have negative numbers, and their times are forgotten. What is
    timed several times in one round adds up. There are ``count`` rounds, and up to ``most`` until everything has
    :data:`FEWEST` undisturbed times and ``least`` seconds are over; ``budget`` seconds after the start no further round
    is begun, but for the first :data:`FEWEST`.
    """

    def __init__(
        self, count: int, *, most: int | None = None, warmup: int = 0, budget: float = math.inf, least: float = 0.0
    ) -> None:
        self.count, self.most, self.warmup, self.budget = count, count if most is None else most, warmup, budget
        self.least = least
        self._turn = 0
        self._begun: dict[Hashable, tuple[int, float]] = {}
        self._times: dict[Hashable, dict[int, tuple[float, int]]] = {}

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        for turn in range(-self.warmup, self.most):
            passed = time.perf_counter() - start
            enough = turn >= self.count and passed >= self.least and all(map(self.is_settled, self._times))
            if enough or (turn >= FEWEST and passed > self.budget):
                return
            self._turn = turn
            yield turn

    def begin(self, key: Hashable) -> None:
        """Start the clock of one thing."""
        self._begun[key] = preemptions(), time.perf_counter()

    def end(self, key: Hashable, milliseconds: float | None = None) -> None:
        """Stop the clock, and take its time, or one that was measured in between."""
        passed = (time.perf_counter() - self._begun[key][1]) * 1e3
        preempted = preemptions() - self._begun[key][0]
        if self._turn >= 0:
            times = self._times.setdefault(key, {})
            before = times.get(self._turn, (0.0, 0))
            times[self._turn] = before[0] + (passed if milliseconds is None else milliseconds), before[1] + preempted

    def is_settled(self, key: Hashable) -> bool:
        """Whether enough times were taken without a disturbance."""
        return sum(not preempted for _, preempted in self._times.get(key, {}).values()) >= FEWEST

    def __contains__(self, key: Hashable) -> bool:
        return key in self._times

    def __getitem__(self, key: Hashable) -> Timing:
        samples, preempted = zip(*self._times[key].values(), strict=True)
        return Timing(samples, preempted)


def waiter(device: torch.device) -> Callable[[], None]:
    """What waits for all that a device has been given to do."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run with this many threads within operators, and set the former number again; None changes nothing.

    Two threads of the process do so one after the other.
    """
    with ALONE:
        before = torch.get_num_threads()
        try:
            if count is not None and count != before:
                torch.set_num_threads(count)
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


def preemptions() -> int:
    """How often the system took a core away from a thread of this process so far; 0 where it does not say."""
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
