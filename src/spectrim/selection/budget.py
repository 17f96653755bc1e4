"""What a network may cost: limits on parameters, MACs, bytes and milliseconds, absolute or relative to dense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

COSTS = ("parameters", "macs", "bytes", "latency")
UNITS = {"parameters": "", "macs": "MAC", "bytes": "B", "latency": "ms"}

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%]*)\s*$")
_SUFFIXES: dict[str, dict[str, float]] = {
    "parameters": {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9},
    "macs": {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "kmac": 1e3, "mmac": 1e6, "gmac": 1e9},
    "bytes": {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
}


@dataclass(frozen=True)
class Budget:
    """What the whole network may cost, untouched layers included.

    Each limit is a fraction of dense if it is a number up to 1 or a string such as ``"50%"``, and absolute if it is a
    larger number or a string with a unit: ``"2.5M"``, ``"10MiB"``, ``"3ms"``. Latency is in milliseconds. Several
    limits hold together.

    Raises
    ------
    ValueError
        For no limit at all, a limit that is not positive, or text that cannot be read.
    """

    parameters: float | str | None = None
    macs: float | str | None = None
    bytes: float | str | None = None
    latency: float | str | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, c) is None for c in COSTS):
            raise ValueError("a budget needs at least one of parameters=, macs=, bytes=, latency=")
        for cost in COSTS:
            self._read(cost, 1.0)

    @classmethod
    def parse(cls, *texts: str) -> Budget:
        """Read ``"macs=50%"``, ``"latency=3ms"``, ... as given on a command line."""
        limits: dict[str, str] = {}
        for text in texts:
            cost, equals, value = text.partition("=")
            if not equals or cost not in COSTS:
                raise ValueError(f"cannot read budget {text!r}: write COST=VALUE with COST one of {', '.join(COSTS)}")
            if cost in limits:
                raise ValueError(f"the budget limits {cost} twice: {limits[cost]!r} and {value!r}")
            limits[cost] = value
        return cls(**limits)

    @property
    def costs(self) -> tuple[str, ...]:
        return tuple(c for c in COSTS if getattr(self, c) is not None)

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Absolute limits, given the dense network's costs."""
        missing = [c for c in self.costs if c not in dense]
        if missing:
            raise ValueError(
                f"the budget limits {', '.join(missing)}, which the table does not hold (it has {', '.join(dense)}). "
                "MACs need calibrate() or an example input; latency needs tabulate(..., latency=...)."
            )
        return {c: self._read(c, dense[c]) for c in self.costs}

    def _read(self, cost: str, dense: float) -> float:
        value = getattr(self, cost)
        if value is None:
            return float("inf")
        if isinstance(value, str):
            match = _NUMBER.match(value)
            suffixes = _SUFFIXES[cost]
            if match and match[2] == "%":
                number, relative = float(match[1]) / 100, True
            elif match and match[2].lower() in suffixes:
                number, relative = float(match[1]) * suffixes[match[2].lower()], False
            elif match and not match[2]:
                number, relative = float(match[1]), float(match[1]) <= 1
            else:
                raise ValueError(
                    f"cannot read {cost} budget {value!r}: write 0.5, 50% or a number with one of {suffixes}"
                )
        else:
            number, relative = float(value), value <= 1
        if not number > 0 or number == float("inf"):
            raise ValueError(f"{cost} budget {value!r} must be positive and finite")
        return number * dense if relative else number
