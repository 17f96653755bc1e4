"""A layer that three layers or more shall stand for: what is approximated, in which metric, and what that loses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from jaxtyping import Float
from torch import Tensor

from spectrim.cost.counted import rank_multiple
from spectrim.errors import MissingMomentsError
from spectrim.linalg import response
from spectrim.linalg.metric import Plain
from spectrim.linalg.multilinear import Target
from spectrim.linalg.unfold import unfolding
from spectrim.methods import statistics
from spectrim.methods.base import Curve, Method, check_least
from spectrim.methods.statistics import Patches, Standard
from spectrim.network.chains import chains_fit
from spectrim.network.choices import Choice
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer

# Multiplications that the curve of one layer, or one choice that is carried out, may take: some seconds of one core.
WORK = 4e10


@dataclass(frozen=True, eq=False)
class ChainedLayer:
    """A layer as target and metric."""

    site: Layer  # the layer
    fitted: Target  # what is approximated, its outputs weighed where the site holds a sensitivity
    plain: Target  # the same without that weight of the outputs, which the best last factor does not depend on
    units: Standard | None  # those of the fit: the layer's own, or None for those of the weight
    # What errors are told by where it is not the fit: the layer in its own units, for fits to the weight.
    judge: tuple[Standard, Target] | None
    seen: Patches | None  # what the layer sees, or None without calibration

    @classmethod
    def of_weight(cls, site: Layer) -> ChainedLayer:
        """By the weight alone; where there are data, they tell what is lost."""
        how = unfolding(site.spec.kernel, "input")
        weight = site.weight[0].double()
        target = Target(weight, Plain(1, tuple(site.spec.shape[2:]), site.weight.device, how))
        units = Standard.of(site)
        seen = units.patches(how) if site.statistics else None
        judge = None if seen is None else (units, Target(units.mixed_weight[0], seen.metric))
        return cls(site, target, target, None, judge, seen)

    @classmethod
    def of_responses(cls, site: Layer, method: str) -> ChainedLayer:
        """By what it answers on the calibration data.

        Raises
        ------
        MissingMomentsError
            If calibration kept nothing of its inputs.
        """
        units = Standard.of(site)
        seen = units.patches(unfolding(site.spec.kernel, "input"))
        if seen is None:
            raise site.missing("input", method, site.statistics.names)
        return cls(
            site,
            Target(units.mixed_weight[0], seen.metric),
            Target(units.own_weight[0], seen.metric),
            units,
            None,
            seen,
        )

    @property
    def energy(self) -> float:
        """All there is to lose, in the unit of the errors."""
        return self.fitted.energy if self.judge is None else self.judge[1].energy

    def lost(self, columns: Float[Tensor, "n r"], error: float) -> float:
        """What a chain with these columns loses, of which the fit says ``error``."""
        if self.judge is None:
            return error
        units, target = self.judge
        left = units.own_left(columns.unsqueeze(0))
        right = response.mix(units.own_right(self.plain.outer(columns).mT.unsqueeze(0)), units.root)
        return target.lost((left @ right)[0].mT.reshape(target.weight.shape))

    def ends(
        self, inner: Float[Tensor, "i p"], columns: Float[Tensor, "n q"]
    ) -> tuple[Float[Tensor, "i p"], Float[Tensor, "o q"], Float[Tensor, " o"] | None]:
        """First and last factor for the layer as it is, and what its bias makes up for, if that is known."""
        outer = self.plain.outer(columns)
        shift = None
        if self.seen is not None:
            missing = self.plain.weight.flatten(1) - outer @ columns.mT
            if self.units is None:
                assert self.judge is not None
                units = self.judge[0]
                missing = units.own_right(units.own_left(missing.mT.unsqueeze(0)))[0].mT
            else:
                units = self.units
            shift = units.shift(self.seen.shift(self.seen.metric.unfold(missing.unsqueeze(0))))
        if self.units is None:
            return inner, outer, shift
        return self.units.left(inner.unsqueeze(0))[0], self.units.right(outer.mT.unsqueeze(0))[0].mT, shift


@dataclass(frozen=True)
class ChainMethod(Method):
    """What methods share that put three layers or more in place of a convolution."""

    # Offer ranks that are multiples of this; what suits the device and the layer's width if None.
    multiple_of: int | None = None
    # Of the error, when a choice is carried out. The curve is that of fewer, which more only improve.
    evaluations: int = 200

    def __post_init__(self) -> None:
        multiple = 1 if self.multiple_of is None else self.multiple_of
        for name, value in (("multiple_of", multiple), ("evaluations", self.evaluations)):
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise TypeError(f"{name} must be a whole number, got {value!r}: write {name}=8, or leave it out")
        check_least(self, 1, "multiple_of")
        if self.evaluations < 0:
            raise ValueError(f"evaluations must not be negative, got {self.evaluations}")

    def curve(self, site: Layer) -> Curve:
        unit = statistics.error_unit(site)
        if not chains_fit(site.spec):
            return Curve((), (), unit)
        layer = self.layer(site)
        pairs = [(choice, error) for choice, error in self.offered(layer) if error <= 1]
        choices, errors = tuple(choice for choice, _ in pairs), tuple(error for _, error in pairs)
        missing = "" if pairs or not self.leanest(site) else f"fitting {self.name} to it would take too long"
        return Curve(choices, errors, unit, statistics.scale(site, layer.energy), missing=missing)

    @abstractmethod
    def layer(self, site: Layer) -> ChainedLayer:
        """The layer as the method fits it."""

    @abstractmethod
    def offered(self, layer: ChainedLayer) -> Sequence[tuple[Choice, float]]:
        """Choices and what they lose."""

    def multiple(self, spec: LayerSpec, full: int) -> int:
        """What ranks are multiples of."""
        return self.multiple_of or rank_multiple(spec.device, spec.dtype, full)


class OfWeight:
    """Fitted to the weight alone."""

    def layer(self, site: Layer) -> ChainedLayer:
        return ChainedLayer.of_weight(site)


class OfResponses:
    """Fitted to what the layer answers on the calibration data."""

    def layer(self, site: Layer) -> ChainedLayer:
        name = type(self).__name__
        if not site.statistics:
            raise MissingMomentsError(
                f"{name} needs calibration statistics, and site {site.name!r} ({site.spec.kind}) holds none. Run "
                f"calibrate(model, sites, batches) first, or use {name.replace('Activation', 'Weight')}."
            )
        return ChainedLayer.of_responses(site, name)


def biased(layer: ChainedLayer) -> bool:
    """Whether chains have a bias: as the layer, and with data to carry the mean of what is left out."""
    return layer.site.spec.bias or layer.seen is not None


def typed(tensors: Sequence[Tensor], site: Layer) -> list[Tensor]:
    """Tensors in the layer's precision."""
    return [tensor.to(site.spec.dtype).contiguous() for tensor in tensors]


def shifted_bias(shift: Tensor | None, bias: bool | None, site: Layer) -> Tensor | None:
    """What the bias makes up for, where the chain has one."""
    return shift.to(site.spec.dtype) if bias and shift is not None else None
