"""What is left alone, and why: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Skipped:
    """A layer, weight or work that is left alone, and why.

    Attributes
    ----------
    name, kind, reason
        The path, what it is, and why it is left alone with what can be done about it, for people.
    costs
        What it costs, as far as that is known, by the name of the cost: after :func:`spectrim.find` what it stores
        beside its spec among the untouched ones, in a table everything.
    """

    name: str
    kind: str
    reason: str
    costs: Mapping[str, float] = field(default_factory=dict, compare=False)
