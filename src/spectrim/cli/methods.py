"""``--method`` on the command line: ``NAME``, or ``NAME:OPTION=VALUE,OPTION=VALUE`` with options of the method.

==========================  ===================================================================================
name                        methods
==========================  ===================================================================================
``low-rank``                the default: low rank of the weights, with data of the responses, and Tucker-2
``auto``                    ``compress`` alone: sets of methods make a network each, the best is kept
``joint``                   the same, with every way to share factors
``weight-svd``, ...         one of this library; see :data:`CLASSES`
``learned-ranks``           ranks learned in training (``spectrim compress`` alone)
``package.module:Class``    your own subclass of :class:`spectrim.Method`
==========================  ===================================================================================

The options are the fields of the method's dataclass and their values are read as its types say: ``share=0.3``,
``exact=true``, ``share=none``; the values of a tuple are joined by ``+``, as in ``patterns=2:4+rows``. A name ends at
its colon and an option at its comma, so that values may hold colons. ``low-rank-plus-sparse`` by itself is offered
beside ``low-rank`` unless its ``share`` is fixed; several ``--method`` offer what they name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from spectrim.cli.common import usage
from spectrim.cli.references import Reference, UsageError, factory, filled, halves
from spectrim.cli.sources import check_factory, check_source_options
from spectrim.errors import did_you_mean

if TYPE_CHECKING:
    from spectrim.methods import Method

T = TypeVar("T")

LOW_RANK, AUTO, JOINT, SPARSE = "low-rank", "auto", "joint", "low-rank-plus-sparse"
FILTERS, LEARNED = "principal-filters", "learned-ranks"
CLASSES: Mapping[str, str] = {
    "weight-svd": "WeightSVD",
    "activation-svd": "ActivationSVD",
    "weight-cp": "WeightCP",
    "activation-cp": "ActivationCP",
    "weight-tucker2": "WeightTucker2",
    "activation-tucker2": "ActivationTucker2",
    "joint-svd": "JointSVD",
    SPARSE: "LowRankPlusSparse",
    FILTERS: "PrincipalFilters",
}
"""The classes of :mod:`spectrim.methods` by their names on the command line."""
OTHER_NAMES = {
    "svd": "weight-svd", "lowrank": LOW_RANK, "compete": AUTO, "pca": "activation-svd", "sparse": SPARSE,
    "pruning": FILTERS, "prune": FILTERS, "filters": FILTERS, "channels": FILTERS, "rank": LEARNED, "learned": LEARNED,
    "cp": "activation-cp", "parafac": "activation-cp", "tucker": "activation-tucker2", "tucker2": "activation-tucker2",
    "tucker-2": "activation-tucker2", "wsvd": "weight-svd", "asvd": "activation-svd",
    **{name.replace("-", ""): name for name in (*CLASSES, LEARNED)},
}  # fmt: skip
"""What people call them elsewhere."""
NAMES = (LOW_RANK, AUTO, JOINT, *CLASSES, LEARNED)
"""What ``--method`` takes, beside classes of the user's own."""
_CALIBRATED = ("activation-svd", "activation-cp", "activation-tucker2", FILTERS)


@dataclass(frozen=True)
class Asked:
    """One ``--method``."""

    text: str
    name: str
    options: Mapping[str, str]

    @classmethod
    def read(cls, text: str) -> Asked:
        """Take a value apart."""
        name, colon, rest = text.partition(":")
        if name not in NAMES:
            close = did_you_mean(name, NAMES, OTHER_NAMES)
            if not rest or "=" in rest.partition(":")[0]:
                raise UsageError(
                    f"--method {text!r} is not known; choose from {', '.join(NAMES)}, or write package.module:Class."
                    f"{close}"
                )
            place, colon, rest = rest.partition(":")
            name = f"{name}:{place}"
        options: dict[str, str] = {}
        for item in rest.split(",") if colon else ():
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not key.isidentifier():
                raise UsageError(
                    f"--method {text}: cannot read option {item!r}: write NAME=VALUE, several joined by ','"
                )
            if key in options:
                raise UsageError(f"--method {text}: option {key!r} is there twice; join values by '+'")
            options[key] = value
        if options and name in (LOW_RANK, AUTO, JOINT):
            raise UsageError(f"--method {text}: {name} has no options; name a method, as weight-svd:{rest}")
        return cls(text, name, options)

    def check(self) -> None:
        """Refuse a class that there is not, or options that it does not have, as far as sources tell."""
        if self.name in CLASSES:
            check_source_options("methods", CLASSES[self.name], self.options, f"--method {self.text}", self.name)
        elif self.name not in NAMES:
            check_factory(Reference(self.name, *halves(self.name)), "method", arguments=None)

    def build(self, **usual: Any) -> Method:
        """The method; ``usual`` values where it has such fields and the options do not say otherwise, None for none."""
        return self.filled(self._class(), **usual)

    def filled(self, kind: type[T], **usual: Any) -> T:
        """An object of a dataclass of options; see :func:`spectrim.cli.references.filled`."""
        return filled(kind, self.options, f"--method {self.text}", self.name, **usual)

    def _class(self) -> type[Method]:
        from spectrim import methods

        if self.name in CLASSES:
            return getattr(methods, CLASSES[self.name])
        module, place = halves(self.name)
        found: Any = factory(Reference(self.name, module, place), "method")
        if not (isinstance(found, type) and issubclass(found, methods.Method)):
            raise UsageError(f"--method {self.text}: {place} is no subclass of spectrim.Method, which is expected")
        return found


@dataclass(frozen=True)
class Methods:
    """All ``--method`` together."""

    asked: tuple[Asked, ...]  # one each; the default where there is none
    said: bool = True  # whether there is one

    @classmethod
    def read(cls, texts: Sequence[str] | None, *, competing: bool = False) -> Methods:
        """Read the values of options; with ``competing``, sets of methods may be asked for.

        Raises UsageError for what is not known, or does not go together.
        """
        asked = tuple(Asked.read(text) for text in texts or (LOW_RANK,))
        for each in asked:
            each.check()
        methods = cls(asked, bool(texts))
        if AUTO in methods and not competing:
            raise UsageError(
                f"--method {AUTO} is for compress, where sets of methods compete for one network: low rank and "
                f"Tucker-2 are --method {LOW_RANK}, the default"
            )
        if AUTO in methods and len(asked) > 1:
            raise UsageError(
                f"{methods}: sets of methods that compete bring their own. Leave out --method {AUTO}, or offer low "
                f"rank beside by --method {LOW_RANK}"
            )
        return methods

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __str__(self) -> str:
        return " ".join(f"--method {each.name}" for each in self.asked)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.asked)

    def check_data(self, calibrated: bool) -> None:
        """Refuse methods that need data where there is none."""
        for name in self.names:
            if name in _CALIBRATED and not calibrated:
                raise UsageError(f"--method {name} needs calibration batches: give --data")

    def chosen(self, calibrated: bool, *, multiple_of: int | None = None, share: bool = False) -> list[Method]:
        """The methods that are on offer.

        Parameters
        ----------
        multiple_of
            Of ranks and numbers of filters, where a method does not say so itself.
        share
            With those for layers that share a factor, unless they are named: the first or the second, and for ``joint``
            both at once too.
        """
        from spectrim.methods import JointSVD, LowRankPlusSparse, as_methods
        from spectrim.tables import low_rank

        self.check_data(calibrated)
        found: list[Method] = []
        with usage("--method"):
            by_default = low_rank(calibrated, multiple_of=multiple_of)
            for each in self.asked:
                if each.name in (LOW_RANK, AUTO, JOINT):
                    found += by_default
                    continue
                method = each.build(multiple_of=multiple_of)
                if len(self.asked) == 1 and isinstance(method, LowRankPlusSparse) and method.share is None:
                    found += by_default
                found.append(method)
            if share and not any(isinstance(method, JointSVD) for method in found):
                parts = ("left", "right", "both") if JOINT in self else ("left", "right")
                found += [JointSVD(part, multiple_of=multiple_of) for part in parts]
            return as_methods([method for number, method in enumerate(found) if method not in found[:number]])
