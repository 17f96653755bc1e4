"""What a network may cost: limits on any cost of its table, absolute or relative to dense."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from spectrim.errors import called_as, did_you_mean

COSTS = ("parameters", "macs", "bytes", "latency")
UNITS = {"parameters": "", "macs": "MAC", "bytes": "B", "latency": "ms"}
OTHER_NAMES = {
    "flops": "macs", "flop": "macs", "mac": "macs", "gmacs": "macs", "mult-adds": "macs", "compute": "macs",
    "params": "parameters", "param": "parameters", "weights": "parameters", "size": "bytes", "memory": "bytes",
    "mb": "bytes", "mib": "bytes", "file": "bytes", "time": "latency", "ms": "latency", "speed": "latency",
    "milliseconds": "latency", "runtime": "latency",
}  # fmt: skip
"""What people call the costs of the library elsewhere. A MAC is one multiplication with its addition: two FLOPs."""

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%]*)\s*$")
_SUFFIXES: dict[str, dict[str, float]] = {
    "parameters": {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9},
    "macs": {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "kmac": 1e3, "mmac": 1e6, "gmac": 1e9},
    "bytes": {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
}
# Of a cost of the user's own, in whatever unit it is counted.
_ANY_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SHOWN = {"parameters": "k, M, G, B", "bytes": "B, KB, MB, GB, KiB, MiB, GiB", "latency": "us, ms, s"}
# Costs of which no network has so few as a percentage has: what they count, and what follows a prefix such as M.
_WHOLE = {"parameters": ("parameters", ""), "macs": ("multiply-accumulates", ""), "bytes": ("bytes", "B")}
# Between limits in one text: a comma or space that another COST= follows.
_BETWEEN = re.compile(r"[,\s]+(?=[^\s,=]+\s*=)")


@dataclass(frozen=True)
class Limit:
    """A limit as a number, which is absolute or a share of the dense network's cost, whatever its size."""

    number: float
    relative: bool = False

    def of(self, dense: float) -> float:
        """The absolute limit, given what the dense network costs."""
        return self.number * dense if self.relative else self.number


Amount = float | str | Limit


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Budget:
    """What the whole network may cost, untouched layers included.

    Each limit is a fraction of dense if it is a number up to 1 or a string such as ``"50%"``, and absolute if it is a
    larger number, a string with a unit or suffix (``"2.5M"``, ``"10MiB"``, ``"3ms"``) or a :class:`Limit`. Latency is
    in milliseconds. Several limits hold together. Two budgets are equal if their limits are, however written.

    Parameters
    ----------
    parameters, macs, bytes, latency
        Limits on the costs that the library counts and measures; None for no limit.
    **others
        Limits on costs of your own, by the names given to ``tabulate(..., costs=)`` or ``compress(..., costs=)``. They
        have no unit; text takes ``%``, ``k``, ``M``, ``G`` and ``T``.

    Raises
    ------
    ValueError
        For no limit at all, a limit that is not positive, a share above 100 %, text that cannot be read, or a number
        such as 1.5 for parameters, MACs or bytes, which is neither a share nor a count.
    TypeError
        For a limit that is neither a number nor text, or that does not say of which cost.
    """

    parameters: Amount | None = field(init=False)
    macs: Amount | None = field(init=False)
    bytes: Amount | None = field(init=False)
    latency: Amount | None = field(init=False)
    _stated: Mapping[str, Amount] = field(init=False)
    _limits: Mapping[str, Limit] = field(init=False)

    @called_as("Say what is limited, as Budget(macs=0.5) or Budget(parameters='2M', bytes='10MiB')")
    def __init__(
        self,
        *,
        parameters: Amount | None = None,
        macs: Amount | None = None,
        bytes: Amount | None = None,  # noqa: A002
        latency: Amount | None = None,
        **others: Amount | None,
    ) -> None:
        known = {"parameters": parameters, "macs": macs, "bytes": bytes, "latency": latency}
        amounts = known | {cost: others[cost] for cost in sorted(others)}
        stated = {cost: amount for cost, amount in amounts.items() if amount is not None}
        if not stated:
            raise ValueError("a budget needs at least one of parameters=, macs=, bytes=, latency=, or a cost of yours")
        limits = {cost: _read(cost, amount) for cost, amount in stated.items()}
        for name, value in {**{c: amounts[c] for c in COSTS}, "_stated": stated, "_limits": limits}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, value: BudgetLike) -> Budget:
        """A budget from what a user may give for one: itself, ``"macs=50%, latency=3ms"``, or limits by cost.

        Raises
        ------
        TypeError
            For anything else.
        ValueError
            As for the budget itself.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return cls.parse(value).meant()
        if isinstance(value, Mapping) and all(isinstance(cost, str) for cost in value):
            return cls(**value)
        raise TypeError(
            f"the budget is {value!r}: expected Budget(macs=0.5), text such as 'macs=50%', or a mapping from costs to "
            "limits, {'macs': 0.5}"
        )

    @classmethod
    def absolute(cls, limits: Mapping[str, float]) -> Budget:
        """Limits by cost in the costs' own units, also where they are numbers up to 1."""
        return cls(**{cost: Limit(limit) for cost, limit in limits.items()})

    @classmethod
    def parse(cls, *texts: str) -> Budget:
        """Read ``"macs=50%"``, ``"latency=3ms"``, ... as given on a command line, one or several a text."""
        limits: dict[str, str] = {}
        for text in (part for whole in texts for part in _BETWEEN.split(whole.strip(", \t\n"))):
            cost, equals, value = text.partition("=")
            cost = cost.strip()
            if not equals or not cost:
                named = f" Did you mean {example}?" if (example := _example(text)) else ""
                raise ValueError(
                    f"cannot read budget {text!r}: write COST=VALUE with COST one of {', '.join(COSTS)} or one of "
                    f"yours.{named}"
                )
            if cost in limits:
                raise ValueError(f"the budget limits {cost} twice: {limits[cost]!r} and {value!r}")
            limits[cost] = value
        return cls(**limits)

    def meant(self) -> Budget:
        """The budget, unless it was a percentage or a number of millions that lacks its sign: no network has so few.

        Raises
        ------
        ValueError
            Says how a share is written, also of text that is 1, which may be all of dense, a hundredth or a unit.
        """
        for cost, stated in self._stated.items():
            limit = self._limits[cost]
            match = _NUMBER.match(stated) if isinstance(stated, str) else None
            if match is None or match[2]:
                continue
            units, suffix = _WHOLE.get(cost, ("", ""))
            number, few = f"{limit.number:g}", limit.number / 1e3
            if limit.number == 1:
                one = f"M{suffix}" if units else {"latency": "ms"}.get(cost, "M")
                raise ValueError(
                    f"the {cost} budget {stated!r} may mean all or a hundredth of what the dense network has: write "
                    f"{cost}=100%, {cost}=1%, or with a unit {cost}=1{one}"
                )
            if units and not limit.relative and limit.number <= 100:
                raise ValueError(
                    f"the {cost} budget {stated!r} is {number} {units} for a whole network: for a share write "
                    f"{cost}={number}%, for millions {cost}={number}M{suffix}, and for so few indeed "
                    f"{cost}={few:g}k{suffix}"
                )
        return self

    @property
    def costs(self) -> tuple[str, ...]:
        """Names of the costs that are limited."""
        return tuple(self._stated)

    def check(self, costs: Iterable[str]) -> None:
        """Raise ValueError if another cost is limited than these, which a table will hold."""
        check_costs("the budget limits", self.costs, costs)

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Absolute limits, given the dense network's costs."""
        self.check(dense)
        return {cost: limit.of(dense[cost]) for cost, limit in self._limits.items()}

    def among(self, costs: Iterable[str]) -> Budget | None:
        """The limits on these costs alone; None if there are none."""
        limits = {cost: self._stated[cost] for cost in costs if cost in self._stated}
        return Budget(**limits) if limits else None

    def replace(self, **limits: Amount | None) -> Budget:
        """The same budget with other limits on some costs; None takes a limit away."""
        return Budget(**{**self._stated, **limits})

    def record(self) -> dict[str, Any]:
        """The limits as JSON values as they were stated, by cost; None where a cost of the library has none."""
        stated = {c: asdict(amount) if isinstance(amount, Limit) else amount for c, amount in self._stated.items()}
        return {**dict.fromkeys(COSTS), **stated}

    def __eq__(self, other: object) -> bool:
        return self._limits == other._limits if isinstance(other, Budget) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._limits.items()))

    def __str__(self) -> str:
        """The limits as text, shares in percent: ``macs=50%,latency=3``."""
        limits = self._limits.items()
        return ",".join(f"{c}={f'{100 * n.number:.6g}%' if n.relative else f'{n.number:.10g}'}" for c, n in limits)

    def __repr__(self) -> str:
        if all(cost.isidentifier() for cost in self._stated):
            return f"Budget({', '.join(f'{cost}={amount!r}' for cost, amount in self._stated.items())})"
        return f"Budget(**{self._stated!r})"


def _example(text: str) -> str:
    """What a text that limits no cost may have meant: a share or a number with a unit alone, or ``macs:50%``."""
    if match := re.fullmatch(r"(\w+)\s*(?::|<=|<|==)\s*(\S+)", text):
        cost = OTHER_NAMES.get(match[1].lower(), match[1])
        return f"{cost}={match[2]}"
    if _NUMBER.match(text):
        units = {unit: cost for cost in ("latency", "bytes") for unit in _SUFFIXES[cost]}
        return f"{units.get(text.strip(' 0123456789.').lower(), 'macs')}={text}"
    return ""


BudgetLike = Budget | str | Mapping[str, Amount]
"""What :meth:`Budget.of` takes."""


def _read(cost: str, amount: Amount) -> Limit:
    """The limit that is stated for a cost."""
    if isinstance(amount, str):
        limit = _parsed(cost, amount)
    elif isinstance(amount, Real) and not isinstance(amount, bool):
        limit = Limit(float(amount), relative=float(amount) <= 1)
    elif isinstance(amount, Limit):
        limit = amount
    else:
        raise TypeError(f"{cost} budget is {amount!r}: expected a number, or text such as '50%'")
    if not 0 < limit.number < float("inf"):
        raise ValueError(f"{cost} budget {amount!r} must be positive and finite")
    if limit.relative and limit.number > 1:
        raise ValueError(f"the {cost} budget {amount!r} is more than the dense network has: write at most 100%")
    if cost in _WHOLE and isinstance(amount, float) and amount < 100 and not amount.is_integer() and amount > 1:
        raise ValueError(
            f"the {cost} budget {amount!r} is {amount} {_WHOLE[cost][0]} for a whole network, as only numbers up to 1 "
            "are shares of dense: write at most 1, or '50%'"
        )
    return limit


def _parsed(cost: str, text: str) -> Limit:
    match, suffixes = _NUMBER.match(text), _SUFFIXES.get(cost, _ANY_SUFFIXES)
    if match and match[2] == "%":
        return Limit(float(match[1]) / 100, relative=True)
    if match and match[2].lower() in suffixes:
        return Limit(float(match[1]) * suffixes[match[2].lower()])
    if match and not match[2]:
        return Limit(float(match[1]), relative=float(match[1]) <= 1)
    units = _SHOWN.get(cost, "k, M, G, T")
    sweep = f". For several sizes: sweep, with ({cost!r}, [0.7, 0.5]) or --points 0.7,0.5" if "," in text else ""
    raise ValueError(
        f"cannot read {cost} budget {text!r}: write 0.5, 50% or a number with one of the units {units}; it "
        f"must be positive{sweep}"
    )


def check_costs(what: str, named: Iterable[str], costs: Iterable[str]) -> None:
    """Raise ValueError, which begins with ``what`` names them, for costs that a table does not hold."""
    known = tuple(costs)
    if missing := [cost for cost in named if cost not in known]:
        other = "" if missing[0] in COSTS else did_you_mean(missing[0], COSTS, OTHER_NAMES)
        raise ValueError(
            f"{what} {', '.join(missing)}, which the table does not hold (it has {', '.join(known)}). MACs need "
            "calibrate() or an example input; latency needs tabulate(..., latency=...); a cost of your own needs "
            f"costs={{name: function}}.{other}"
        )
