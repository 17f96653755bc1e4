"""How far a finished network is from the dense one: by the user's metric, or by the outputs on held-out samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from spectrim.errors import CalibrationError, check_function
from spectrim.nn.agreement import Agreement, metric_of
from spectrim.selection.front import Better

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Verdict:
    """What a network lost, by one measure; smaller is better."""

    # What ``evaluate`` returned for the network and for the dense one; None without it.
    metric: float | None = None
    dense: float | None = None
    # How much worse the metric is than the dense network's, in its own unit; below zero if it is better.
    drop: float | None = None
    # How far the outputs are from the dense network's; None where they cannot be compared.
    agreement: Agreement | None = None
    name: str = "evaluate gives"  # what gives the metric, for people

    @property
    def loss(self) -> float:
        """The drop of the metric, else the divergence of scores of classes, else the relative error of the outputs."""
        if self.drop is not None:
            return self.drop
        if self.agreement is None:
            return math.inf
        return self.agreement.error if self.agreement.divergence is None else self.agreement.divergence

    @property
    def standard_error(self) -> float | None:
        """How far the loss is off by chance, typically; None where it is not known, as for a metric."""
        return None if self.drop is not None or self.agreement is None else self.agreement.standard_error

    def like(self, other: Verdict) -> bool:
        """Whether as much was lost as another network lost, within the standard error where it is known."""
        if self.loss == other.loss:
            return True
        if self.drop is not None or self.agreement is None or other.agreement is None:
            return False
        return self.agreement.like(other.agreement)

    @property
    def agreed(self) -> float | None:
        """As :attr:`spectrim.Agreement.agreed`, where outputs can be compared."""
        return None if self.agreement is None else self.agreement.agreed


@dataclass(frozen=True)
class Judge:
    """Judges networks that were carried out."""

    # The user's metric: a function of a model alone, in evaluation mode and without gradients; None judges by the
    # outputs.
    evaluate: Evaluate | None = None
    better: Better = "higher"  # whether a ``higher`` or a ``lower`` number is good
    dense: float | None = None  # what the metric is of the dense network
    metric: str = "evaluate gives"  # what gives the number, for people

    @classmethod
    def of(cls, evaluate: Evaluate | None, better: Better) -> Judge:
        """A judge that has not seen the dense network yet.

        Raises
        ------
        TypeError, ValueError
            For what cannot be meant.
        """
        if evaluate is not None:
            check_function("evaluate", evaluate, ("a model",), "a function of a model that returns a number")
        if better not in ("higher", "lower"):
            raise ValueError(f"better is {better!r}: expected 'higher' or 'lower', whichever metric is good")
        if evaluate is None and better != "higher":
            raise ValueError(
                f"better={better!r} is of the number that evaluate= returns, and there is none: give evaluate=, a "
                "function of a model, too, or leave better out"
            )
        return cls(evaluate, better)

    def knowing(self, dense: nn.Module, max_drop: float | None = None) -> Judge:
        """The judge after it has measured the dense network, once.

        Raises
        ------
        ValueError
            If ``max_drop`` lets a metric fall to zero or below, as 1 point does one that is a share.
        """
        number = self._measured(dense, "the dense network")
        if number is not None and max_drop is not None and self.better == "higher" and 0 < number <= max_drop:
            raise ValueError(
                f"a drop of {max_drop:.6g} is allowed (max_drop) and {self.metric} {number:.6g} for the "
                "dense network, which limits nothing: give less, in the metric's own unit, as 0.01 where 1 is best"
            )
        return dataclasses.replace(self, dense=number)

    def verdict(self, small: nn.Module, agreement: Agreement | None) -> Verdict:
        """What a network lost: all where the metric is infinite on its bad side, as a perplexity may be.

        Raises
        ------
        CalibrationError
            If the metric is NaN, or infinite on its good side.
        TypeError
            If it is no number.
        """
        metric = self._measured(small, "a compressed network", -math.inf if self.better == "higher" else math.inf)
        if metric is None or self.dense is None:
            return Verdict(agreement=agreement)
        drop = self.dense - metric if self.better == "higher" else metric - self.dense
        return Verdict(metric, self.dense, drop, agreement, self.metric)

    def _measured(self, model: nn.Module, whose: str, worst: float | None = None) -> float | None:
        if self.evaluate is None:
            return None
        value = metric_of(self.evaluate, model, whose)
        if not math.isfinite(value) and value != worst:
            raise CalibrationError(
                f"evaluate returned {value} for {whose}, which no other number can be compared with: return a "
                "finite number for any network"
            )
        return value
