"""A network that is compressed layer by layer, and where both networks are while they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from spectrim.network.chains import CP, Tucker2
from spectrim.network.factors import Factors, LowRank, SharedBasis
from spectrim.network.sites import Layer
from spectrim.nn.channels.narrow import narrow
from spectrim.nn.channels.removal import LEFT, Removal
from spectrim.nn.modules import Chained, Factored
from spectrim.nn.surgery import replace_module
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.lockstep import Seen
from spectrim.nn.watch.reconstruct import Errors, Joint, Split, refit_last
from spectrim.nn.watch.watchers import in_full


@dataclass(frozen=True)
class Stop:
    """What all passes show at the layer they stop at, of the samples of these batches."""

    seen: Sequence[Seen]
    split: Split


# Bytes that the moments a layer is fitted to may take.
_MOMENTS = 1 << 28


@dataclass
class Work:
    """A network that is compressed layer by layer, beside the dense one that it is fitted to."""

    dense: nn.Module
    removal: Removal
    follows: bool  # whether layers are fitted to what the compressed ones before them deliver
    feed: Feed
    split: Split = field(default_factory=lambda: Split.of(()))  # the samples that they are fitted to
    stop: Stop | None = None  # where both networks are, while they run
    # Moments by the layer, as long as more batches come; those of the last layers of pairs and chains by their names.
    joints: dict[str, Joint] = field(default_factory=dict)
    errors: dict[str, Errors] = field(default_factory=dict)  # what was learned on the way: see :class:`Applied`
    reached: set[str] = field(default_factory=set)  # layers that passes of both networks have stopped at

    def narrows(self, layer: Layer) -> bool:
        """Whether a layer has lost channels."""
        return layer.name in self.removal.changed

    @property
    def at_once(self) -> bool:
        """Whether all batches run side by side, so that what a layer is fitted to lives until the next one only."""
        assert self.stop is not None
        return len(self.stop.split.samples) == len(self.split.samples)

    @property
    def shares(self) -> tuple[float, float]:
        """What of the samples that were calibrated on is given."""
        return self.split.shares(self.removal.sites.samples)

    def observe(self, layer: Layer, *, sketch: bool) -> Layer:
        """A layer as it is to be fitted: the inputs it is given now, and what the dense one answers.

        Of inputs too many for calibration to keep their second moment a ``sketch`` is held where it is asked for, and
        where moments would take too much memory: products take less time than what makes rows fewer.
        """
        assert self.stop is not None
        joint = self.joints.get(layer.name)
        if joint is None:
            held = layer.statistics.input is not None or in_full(layer.spec)
            sketch = not held and (sketch or not self.at_once or Joint.bytes_of(layer.spec) > _MOMENTS)
            outputs = self.removal.outputs(layer.name)
            joint = self.joints[layer.name] = Joint.of(layer, sketch=sketch, outputs=outputs, shares=self.shares)
        joint.add(self.stop.seen, self.stop.split)
        return joint.layer(layer)

    def put(self, layer: Layer, module: nn.Module, factors: Factors, *, observed: bool) -> None:
        """Put a module in place of a layer. One fitted to nothing that was observed has its last factor fitted."""
        if self.stop is not None and self.stop.seen and not observed and _owns_last(factors):
            assert isinstance(module, (Factored, Chained))
            last = f"{layer.name}.{len(module) - 1}"
            joint = refit_last(
                module, layer, self.stop.seen, self.stop.split, self.joints.get(last), shares=self.shares
            )
            if joint is not None:
                self.joints[last] = joint
        replace_module(self.removal.model, layer.spec.names, module)

    def left(self, layer: Layer) -> None:
        """Both networks go on from a layer: what it was fitted to is dropped unless more batches come."""
        assert self.stop is not None
        if self.stop.seen:
            self.reached.add(layer.name)
        joint = self.joints.get(layer.name)
        errors = joint and joint.errors(self.removal.model.get_submodule(layer.name))
        if errors:
            self.errors[layer.name] = errors
        if self.at_once:
            self.joints.clear()


def _owns_last(factors: Factors) -> bool:
    """Whether the last layer of a pair or chain is the layer's own and may be fitted to it alone."""
    if isinstance(factors, SharedBasis):
        return not factors.ranks[1]
    return isinstance(factors, (LowRank, Tucker2, CP))


def narrow_as(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Remove from a copy of one network, in place, the channels that have gone on the way from it to another.

    Raises
    ------
    PlanError
        If the other was not made of this one.
    """
    for axes in vars(new).get(LEFT, ())[len(vars(old).get(LEFT, ())) :]:
        narrow(model, axes)
