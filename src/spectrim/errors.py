"""The errors Spectrim raises. Each says what came, what was expected and what to do."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_REASONS = 5  # that are told, of layers left alone


class SpectrimError(Exception):
    """Base of all errors that Spectrim raises on purpose."""

    @property
    def brief(self) -> str:
        """What is wrong, for a line among others."""
        return str(self)


class UnsupportedLayerError(SpectrimError, TypeError):
    """A layer was asked for that Spectrim cannot factorise."""


class MissingMomentsError(SpectrimError, ValueError):
    """A method needs calibration statistics that the site does not hold."""


class CalibrationError(SpectrimError, ValueError):
    """The calibration data cannot be used: NaN, Inf, no samples, or a batch of unknown structure."""


class ForwardError(CalibrationError, RuntimeError):
    """A model cannot be run on a calibration batch; what it raised is the cause."""


class TrainingError(SpectrimError, RuntimeError):
    """A network cannot be trained: its forward or backward pass fails. What it raised is the cause."""


class InfeasibleBudgetError(SpectrimError, ValueError):
    """A budget lies below what the candidates can reach.

    Attributes
    ----------
    cost
        Name of the cost whose budget cannot be met.
    budget
        What was asked for, in the cost's own unit.
    lowest
        The lowest reachable cost of the whole network.
    dense
        Cost of the dense network.
    together
        Costs that can each be met alone but not all at once; empty if ``cost`` cannot even be met alone.
    skipped
        What was left alone, most of the cost first: ``(name, kind, reason, share of the dense cost)``.
    """

    def __init__(
        self, cost: str, budget: float, lowest: float, dense: float, together: tuple[str, ...] = (),
        skipped: tuple[tuple[str, str, str, float], ...] = (),
    ) -> None:  # fmt: skip
        self.cost, self.budget, self.lowest, self.dense, self.together = cost, budget, lowest, dense, together
        self.skipped = skipped
        also = f" Each limit can be met alone, but not {' and '.join(together)} together." if together else ""
        also += _left_alone(cost, skipped)
        super().__init__(
            f"budget {cost} <= {_short(budget, cost)} cannot be met: the lowest reachable is "
            f"{_short(_up(lowest), cost)} ({lowest / dense:.1%} of dense {_short(dense, cost)}). "
            "Raise the budget, skip fewer layers or allow smaller ranks." + also
        )

    @property
    def brief(self) -> str:
        """What is wrong, without the cure and what was left alone."""
        return str(self).partition(". ")[0]

    def of(self, dense: float) -> InfeasibleBudgetError:
        """The same told of a dense network that costs so much, as a file with another header."""
        skipped = tuple((name, kind, why, share * self.dense / dense) for name, kind, why, share in self.skipped)
        return InfeasibleBudgetError(self.cost, self.budget, self.lowest, dense, self.together, skipped)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.cost, self.budget, self.lowest, self.dense, self.together, self.skipped)


class SlowerError(InfeasibleBudgetError):
    """A budget leads to networks that were measured to be slower than the dense one, and none may be.

    Attributes
    ----------
    said
        Both times, and what ran the networks.
    """

    def __init__(self, cost: str, budget: float, dense: float, said: str) -> None:
        super().__init__(cost, budget, dense, dense)
        self.said = said
        self.args = (
            f"budget {cost} <= {_short(budget, cost)} ({budget / dense:.0%} of dense) makes a network that is "
            f"slower than dense here: {said}. Ask for less to be removed, or limit another cost without guard",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.cost, self.budget, self.dense, self.said)


class ToleranceError(SpectrimError, ValueError):
    """A budget can be met, but not with what the network may lose.

    Attributes
    ----------
    result
        The smallest network that was found to hold the tolerance; None if there is none but the dense network.
    """

    def __init__(self, said: str, result: Any = None) -> None:
        self.said, self.result = said, result
        super().__init__(said)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.said, self.result)


def _short(value: float, cost: str) -> str:
    """A cost in its own unit: ``2.043 M``, ``27,793``, ``18.94``; of a latency ``0.2845 ms``."""
    if cost == "latency":
        return f"{value:.4g} ms"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _up(value: float) -> float:
    """A cost as :func:`_short` tells it, rounded up, so that a budget of what is read can be met."""
    step = 1.0 if 1000 <= value < 1e6 else 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return math.ceil(value / step - 1e-9) * step


def _left_alone(cost: str, skipped: tuple[tuple[str, str, str, float], ...]) -> str:
    """Sentences on what was left alone and has some of the cost, or else on all of it, those of one reason together."""
    alike: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for name, kind, reason, share in [each for each in skipped if each[3]] or skipped:
        alike.setdefault((kind, reason), []).append((name or "the model", share))
    order = sorted(alike.items(), key=lambda item: -sum(share for _, share in item[1]))
    said = []
    for (kind, reason), layers in order[:_REASONS]:
        names = first_few([name for name, _ in layers], 1)
        share = sum(share for _, share in layers)
        said.append(f"{names} ({kind}{f', {share:.1%} of {cost}' if share else ''}): {reason.rstrip('.')}.")
    if not said:
        return ""
    more = f" And {len(order) - _REASONS} more reasons." if len(order) > _REASONS else ""
    return f" Left alone: {' '.join(said)}{more}"


class PlanError(SpectrimError, ValueError):
    """A plan cannot be read, or does not fit the model it is applied to.

    Attributes
    ----------
    said
        What is wrong, without what can be done about it.
    """

    def __init__(self, said: str, cure: str = "") -> None:
        self.said = said
        super().__init__(f"{said}: {cure}" if cure else said)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.said, str(self).removeprefix(self.said).removeprefix(": "))


class ProofError(SpectrimError, RuntimeError):
    """A compressed network does not do what its plan says, such as call the layers that were replaced."""


class ReadOnlyWeightError(SpectrimError, RuntimeError):
    """The weight of a compressed layer was written to, which is multiplied out of others."""


class CheckpointError(SpectrimError, ValueError):
    """A file is not a Spectrim checkpoint, is damaged, or belongs to another architecture."""


class ExportError(SpectrimError, RuntimeError):
    """An exported program could not be made, or does not compute what the model computes."""


def first_few(names: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """Some of many for people: ``a, b, c and 4 more``."""
    more = len(names) - most
    return between.join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def in_short(error: BaseException) -> str:
    """What an error of other code says: its first line, or all of it where that ends in a colon, up to 200 letters."""
    first = (str(error).strip().splitlines() or ["without a word"])[0]
    return (" ".join(str(error).split()) if first.endswith(":") else first)[:200]


def with_article(word: str) -> str:
    """A word behind its article."""
    return f"an {word}" if word[0] in "AEIOUaeiou" else f"a {word}"


def did_you_mean(word: str, known: Iterable[str], other_names: Mapping[str, str] = MappingProxyType({})) -> str:
    """A question that may follow what is said of an unknown name: `` Did you mean 'macs'?``, or nothing.

    Parameters
    ----------
    word
        As it was written.
    known
        Names that there are.
    other_names
        Other words for some of them, in small letters.
    """
    names = list(known)
    meant = other_names.get(word.lower())
    close = difflib.get_close_matches(word.lower(), [name.lower() for name in names], n=1, cutoff=0.6)
    known_name = meant or next((name for name in names if close and name.lower() == close[0]), None)
    return f" Did you mean {known_name!r}?" if known_name in names else ""


def check_function(name: str, given: object, of: Sequence[str], cure: str) -> None:
    """Raise TypeError for what is no function, or cannot be called with what it will be called with.

    Parameters
    ----------
    name
        Of the parameter that it was given for.
    of
        What it is called with, in words.
    cure
        What to give, as an end of the sentence: ``a function of a model that returns a number``.
    """
    if not callable(given):
        raise TypeError(f"{name} is {given!r:.80}: expected {cure}")
    try:
        signature = inspect.signature(given)
    except (TypeError, ValueError):  # some that are written in C tell nothing
        return
    try:
        signature.bind(*of)
    except TypeError as error:
        raise TypeError(
            f"{name} is called with {' and '.join(of)}, which {getattr(given, '__name__', type(given).__name__)}"
            f"{signature} does not take ({error}): give {cure}"
        ) from None


def called_as(cure: str, **kinds: type | tuple[type, ...]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a verb that is called with other arguments than it has say what was meant: a name of its own, or ``cure``.

    Arguments named in ``kinds`` that are of another type are refused with it too, before the verb begins. In torch's
    inference mode the verb works outside of it: tensors made there could not be trained afterwards. So it does of
    automatic casting and of a default device; what a model's own forward enters is there in it.
    """

    def explained(verb: Callable[P, R]) -> Callable[P, R]:
        places = list(verb.__code__.co_varnames) if kinds else []

        @functools.wraps(verb)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in {**dict(zip(places, args, strict=False)), **kwargs}.items():
                if not isinstance(value, kinds.get(name, object)):
                    kind = kinds[name]
                    wanted = kind if isinstance(kind, tuple) else (kind,)
                    expected = " or ".join(with_article(each.__name__) for each in wanted)
                    raise TypeError(f"{name} is {with_article(type(value).__name__)}: expected {expected}. {cure}")
            try:
                with _as_torch_begins():
                    return verb(*args, **kwargs)
            except TypeError as error:
                began = error.__traceback__ is not None and error.__traceback__.tb_next is not None
                said = str(error)
                if began or "Did you mean" in said:  # which later versions of Python ask themselves
                    raise
                names = inspect.signature(verb).parameters
                close = "".join(did_you_mean(name, names) for name in kwargs if name not in names)
                raise TypeError(f"{said}.{close or f' {cure}'}") from None

        return call

    return explained


# Devices that torch casts on by itself, where it is told to.
_CASTING = ("cpu", "cuda", "mps", "xpu")


@contextlib.contextmanager
def _as_torch_begins() -> Iterator[None]:
    """No inference mode, no automatic casting and new tensors on the CPU, if torch is there and is told otherwise.

    Casting would round what a verb works out by itself, and another device hold what it makes for the CPU.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in _CASTING:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
