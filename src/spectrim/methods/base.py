"""What a method is: it says what every choice at a site would lose, and carries one out."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
from torch import Tensor

from spectrim.cost.counted import macs, parameters, rank_multiple
from spectrim.errors import PlanError
from spectrim.linalg import lowrank
from spectrim.linalg.bisection import last_integer
from spectrim.linalg.unfold import Unfolding, unfolding, unfoldings, unfoldings_named
from spectrim.methods import statistics
from spectrim.methods.statistics import OUTPUT_ENERGY as OUTPUT_ENERGY
from spectrim.methods.statistics import WEIGHT_ENERGY as WEIGHT_ENERGY
from spectrim.methods.statistics import WEIGHTED_ENERGY as WEIGHTED_ENERGY
from spectrim.methods.statistics import Standard
from spectrim.network.choices import Choice, LowRankChoice
from spectrim.network.factors import Factors
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Channels, Group, Layer, Site

# The names that any kernel's unfoldings have.
_UNFOLDINGS = tuple(dict.fromkeys(how.name for axes in (1, 2, 3) for how in unfoldings((2,) * axes)))


@dataclass(frozen=True)
class Curve:
    """Error of every choice a method offers at one site.

    Attributes
    ----------
    choices, errors
        In step; errors are fractions of the site's energy.
    unit
        ``output energy``; ``weighted output energy`` where the site holds a sensitivity; without data
        ``weight energy``.
    scale
        What losing all of the site's energy would add to the loss that selectors minimise.
    spectra
        Normalised energies a component by unfolding, for people to look at.
    missing
        Why there is no choice where the method is for such a site, for people.
    """

    choices: tuple[Choice, ...]
    errors: tuple[float, ...]
    unit: str
    scale: float = 1.0
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    missing: str = ""

    @classmethod
    def joined(cls, unit: str, curves: Iterable[Curve]) -> Curve:
        """Those of several unfoldings in one."""
        parts = list(curves)
        return cls(
            tuple(choice for part in parts for choice in part.choices),
            tuple(error for part in parts for error in part.errors),
            unit,
            parts[-1].scale if parts else 1.0,
            {name: spectrum for part in parts for name, spectrum in part.spectra.items()},
        )


@dataclass(frozen=True)
class Method(ABC):
    """A way to compress a site. Subclasses are frozen dataclasses whose fields are their options.

    A method sees sites, never modules: it can be written and tested without a network.

    Attributes
    ----------
    takes
        The kind of site it is for, and is asked for alone: :class:`~spectrim.network.sites.Layer`, ``Group`` or
        ``Channels``.
    offers
        The type of its choices.
    reads_sketches
        Whether it takes a sketch of the inputs where their second moment is too large to hold.
    """

    takes: ClassVar[type[Site]] = Layer
    offers: ClassVar[type[Choice]] = Choice
    reads_sketches: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The word plans use; the class name."""
        return type(self).__name__

    @property
    def removes_channels(self) -> bool:
        """Whether it is for coupled channels, in place of layers."""
        return issubclass(self.takes, Channels)

    @abstractmethod
    def curve(self, site: Site) -> Curve:
        """Error of every choice, from one decomposition an unfolding. Empty where the method does not fit the site."""

    def leanest(self, site: Site) -> Sequence[Choice] | None:
        """Those choices of the curve that cost least, without fitting any; None, by default, where that is not known.

        A few more do no harm. They tell that a budget is out of reach before anything is fitted.
        """
        return None

    @abstractmethod
    def factorize(self, site: Site, choice: Choice) -> Factors:
        """Carry out one choice."""

    @abstractmethod
    def layers(self, site: Site, choice: Choice) -> Sequence[LayerSpec]:
        """The layers a choice leads to, what every cost is computed from.

        A :class:`spectrim.network.structure.Chain` or plain tuple of layers that run one after the other, a ``Sum`` of
        chains, or what stands ``Apart``, such as the layers of a group.
        """

    def refit(self, site: Layer, factors: Any, number: int) -> Any:
        """Fit what the ``number``-th layer of a group has of its own to the layer's new inputs and targets.

        ``site`` is the layer alone. By default the factors stay as they are.
        """
        return factors

    def record(self) -> dict[str, Any]:
        """Type, its module and options as JSON values, as kept in a plan."""
        options = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {"type": type(self).__name__, "module": type(self).__module__, "options": options}


def as_methods(methods: Method | Iterable[Method]) -> list[Method]:
    """One method or several as a list.

    Raises
    ------
    TypeError
        For what is no method, such as its name or its class.
    ValueError
        For two different methods of one name, by which a plan tells methods apart.
    """
    several = [methods] if isinstance(methods, (Method, type, str)) or not isinstance(methods, Iterable) else [*methods]
    named: dict[str, Method] = {}
    for method in several:
        if not isinstance(method, Method):
            name = method.__name__ if isinstance(method, type) else repr(method)
            auto = str(method).lower() == "auto"
            cure = "; methods='auto', in small letters, is for compress(), where sets of them compete" if auto else ""
            raise TypeError(f"methods has {name}: expected objects of method classes, such as WeightSVD(){cure}")
        if named.setdefault(method.name, method) != method:
            raise ValueError(
                f"two methods are called {method.name!r} ({named[method.name]} and {method}), and a plan tells methods "
                "apart by their names; give one a subclass of its own"
            )
    return several


def on_offer(methods: Method | Iterable[Method], *, groups: bool) -> list[Method]:
    """The methods as a list, of which some can be chosen where there are groups of layers or not.

    Raises
    ------
    TypeError, ValueError
        As :func:`as_methods`, and where nothing would be on offer but to leave all layers dense.
    """
    several = as_methods(methods)
    if not several:
        raise ValueError("methods is empty, so nothing is on offer: give a method such as WeightSVD(), or None")
    if not groups and all(method.takes is Group for method in several):
        raise ValueError(
            f"{' and '.join(method.name for method in several)} can be chosen for groups of layers only, and there are "
            "none: give groups=True, groups={name: layers}, or a method for single layers too. True finds repeated "
            "layers and linear layers of one input"
        )
    return several


class _Record(msgspec.Struct):
    """What a plan says of a method; without a module in files of version 0.1."""

    type: str
    module: str | None = None
    options: dict[str, Any] = {}


def from_record(record: Mapping[str, Any]) -> Method:
    """The method that :meth:`Method.record` described.

    Nothing is imported for it: its class is one of those that have been.

    Raises
    ------
    PlanError
        If no method class of that name and module has been imported, several of a record without a module have, or the
        options do not fit it.
    """
    try:
        written = msgspec.convert(dict(record), _Record)
    except msgspec.ValidationError as error:
        raise PlanError(f"a method is written as type, module and options: {error}") from error
    cls = _class_of(written)
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(written.options) - known)
    if unknown:
        raise PlanError(f"method {written.type} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
    try:
        return msgspec.convert(written.options, type=cls)
    except msgspec.ValidationError as error:
        raise PlanError(f"options of method {written.type}: {error}") from error


def _class_of(written: _Record) -> type[Method]:
    """The class that a record means. One that was made again, as by a cell that runs twice, is the last."""
    known = {(cls.__module__, cls.__name__): cls for cls in _concrete(Method)}
    fitting = {module: cls for (module, name), cls in known.items() if name == written.type}
    ours = [cls for module, cls in fitting.items() if _is_own(module)]
    # Modules of Spectrim move from version to version, and a record of version 0.1 has none.
    if ours and (written.module is None or _is_own(written.module)):
        return ours[0]
    if written.module is None and len(fitting) > 1:
        raise PlanError(
            f"the plan needs method {written.type!r} and does not say whose, of modules {', '.join(sorted(fitting))}. "
            "Pass methods="
        )
    module = next(iter(fitting), None) if written.module is None else written.module
    if module not in fitting:
        names = sorted(name if _is_own(module) else f"{module}.{name}" for module, name in known)
        whose = "" if module is None or _is_own(module) else f" of module {module!r}"
        raise PlanError(
            f"the plan needs method {written.type!r}{whose}; known are {', '.join(names)}. Import its module, or pass "
            "methods="
        )
    return fitting[module]


def _is_own(module: str) -> bool:
    return module.partition(".")[0] == "spectrim"


def _concrete(cls: type[Method]) -> list[type[Method]]:
    classes = [] if cls.__abstractmethods__ else [cls]
    for child in cls.__subclasses__():
        classes += _concrete(child)
    return classes


@dataclass(frozen=True)
class LowRankMethod(Method):
    """What methods share that put a rank-``r`` pair in place of one layer.

    Attributes
    ----------
    unfoldings
        Names of the unfoldings to offer; all that fit the layer if None.
    multiple_of
        Offer ranks that are multiples of this; what suits the device and the layer's width if None.
    to_full_rank
        Offer also ranks at which the pair costs more than the layer, up to full rank.
    """

    offers: ClassVar[type[Choice]] = LowRankChoice

    unfoldings: tuple[str, ...] | None = None
    multiple_of: int | None = None
    to_full_rank: bool = False

    def __post_init__(self) -> None:
        check_unfoldings(self.unfoldings)
        check_least(self, 1, "multiple_of")

    def curve(self, site: Layer) -> Curve:
        units, unit = Standard.of(site), statistics.error_unit(site)
        biased = site.spec.bias or bool(site.statistics)
        curves: list[Curve] = []
        for how in self.offered(site.spec):
            ranks = self.ranks(site.spec, how)
            losses = self.lost(units, how, ranks[-1]) if ranks else None
            if losses is not None:
                errors, energies, total = losses
                choices = tuple(self.choice(site, how, rank, bias=biased) for rank in ranks)
                spectra = {how.name: lowrank.profile(energies)}
                scale = statistics.scale(site, total)
                curves.append(Curve(choices, tuple(errors[list(ranks)].tolist()), unit, scale, spectra))
        return Curve.joined(unit, curves)

    def leanest(self, site: Layer) -> Sequence[Choice]:
        biased = site.spec.bias or bool(site.statistics)
        ranks = {how: self.ranks(site.spec, how) for how in self.offered(site.spec)}
        return [self.choice(site, how, least[0], bias=biased) for how, least in ranks.items() if least]

    def lost(self, units: Standard, how: Unfolding, most: int) -> tuple[Tensor, Tensor, float] | None:
        """Share of the energy lost at every rank up to ``most`` at least, the spectrum, and all of the energy.

        None for an unfolding that calibration kept nothing for. Asked by :meth:`curve`.
        """
        raise NotImplementedError

    def offered(self, spec: LayerSpec) -> tuple[Unfolding, ...]:
        return unfoldings_named(spec.kernel, self.unfoldings)

    def ranks(self, spec: LayerSpec, how: Unfolding) -> range:
        """Ranks on offer: multiples, as long as the pair has fewer parameters or fewer MACs than the layer."""
        full = full_rank(spec, how)
        step = self.multiple_of or rank_multiple(spec.device, spec.dtype, full)
        return range(step, (full if self.to_full_rank else break_even(spec, how)) + 1, step)

    def layers(self, site: Layer, choice: LowRankChoice) -> Sequence[LayerSpec]:
        how = unfolding(site.spec.kernel, choice.unfolding)
        return site.spec.factor(how, choice.rank, bias=choice.bias)

    def choice(self, site: Layer, how: Unfolding, rank: int, *, bias: bool) -> LowRankChoice:
        return LowRankChoice(how.name, rank, bias and not site.spec.keeps_zero, method=self.name)


def check_unfoldings(names: tuple[str, ...] | None) -> None:
    """Raise ValueError for what is no tuple of names of unfoldings."""
    if names is not None and (isinstance(names, str) or not set(names) <= set(_UNFOLDINGS)):
        raise ValueError(f"unfoldings is {names!r}; expected a tuple of names out of {', '.join(_UNFOLDINGS)}")


def check_least(method: Method, least: int, *names: str) -> None:
    """Raise ValueError for options that are smaller; None is no number."""
    for name in names:
        value = getattr(method, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def pays(layers: Sequence[LayerSpec], present: Sequence[LayerSpec]) -> bool:
    """Whether layers have fewer parameters, or fewer MACs where these are known, than those that they stand for."""
    seen = all(spec.inputs for spec in present)
    return parameters(layers) < parameters(present) or (seen and macs(layers) < macs(present))


def full_rank(spec: LayerSpec, how: Unfolding) -> int:
    """Rank at which a pair can equal the layer."""
    _, o, i, *kernel = spec.shape
    rows, columns = how.sizes(kernel)
    return min(i * rows, o * columns)


@functools.lru_cache(maxsize=4096)
def break_even(spec: LayerSpec, how: Unfolding) -> int:
    """The largest rank at which a pair costs fewer parameters or fewer MACs than the layer; 0 if there is none."""
    return last_integer(lambda rank: pays(spec.factor(how, rank), (spec,)), 0, full_rank(spec, how) + 1)
