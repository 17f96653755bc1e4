"""Gradients that reach layers, taken batch by batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import SpectrimError, in_short
from spectrim.linalg.moments import Moments, Squares
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Sites
from spectrim.nn.watch.nesting import output_tensors
from spectrim.nn.watch.observe import Hook, hooked
from spectrim.nn.watch.patches import outputs_at
from spectrim.nn.watch.positions import Positions
from spectrim.nn.watch.samples import Samples
from spectrim.nn.watch.sampling import Extent, choose, directions
from spectrim.nn.watch.switches import quiet_derivatives
from spectrim.nn.watch.watched import Call

# Output positions over the run at least, and in multiples of the number of output channels.
FEWEST, FLOOR = 4096, 16


@dataclass(frozen=True)
class Gradients:
    """Moments of gradients by the layer, over so many samples, and why there are none."""

    moments: Mapping[str, Moments | Squares] = field(default_factory=dict)
    samples: int = 0
    reason: str = ""
    # What the model raised in its forward pass, which is no fault of gradients if it does so without them too.
    error: Exception | None = None


class GradientWatch:
    """Takes the gradients that reach layers, batch by batch: a batch that fails leaves nothing."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        rows: int | None,
        run: Extent,
        samples: int,
        seed: int,
        positions: Positions = Positions(),  # noqa: B008 (frozen)
    ) -> None:
        specs = [layer.spec for layer in sites.layers]
        heads = {each.head.name for each in sites.tied}
        self.moments: dict[str, Moments | Squares] = {
            s.name: (Squares if s.name in heads else Moments)(s.groups, s.out_channels // s.groups, s.device)
            for s in specs
        }
        self.samples: Samples
        # Samples so far; why a batch gave no gradients, if one did, and what the model raised in its forward pass.
        self.seen, self.reason = 0, ""
        self.error: Exception | None = None
        self._run, self._seed, self._positions = run, seed, positions
        if run.samples is not None:
            run.samples = min(run.samples, samples)
        self._rows = {s.name: FEWEST if rows is None and s.name in heads else rows for s in specs}
        self._now: dict[str, list[Tensor]] = {}
        self._units: dict[int, float] = {}
        self._hooks = [Hook(model.get_submodule(spec.name), self.hook(spec)) for spec in specs]
        # Writing in place into what backward passes read is rare, and what allows for it is slow.
        self._mutable = False

    @property
    def found(self) -> Gradients:
        """What has been taken so far."""
        return Gradients({} if self.reason else self.moments, self.seen, self.reason, self.error)

    @property
    def fails_in_place(self) -> bool:
        """Whether something that the backward pass reads was written to, which can be allowed for."""
        return not self._mutable and "modified by an inplace operation" in self.reason

    def see(self, run: Call, batch: Any, *, again: bool = True) -> Any:
        """Add the gradients of a batch, or say why there are none, and give the output; it may be run ``again``."""
        self.samples = self._run.see(batch)
        output = self._tried(run, batch)
        if again and self.fails_in_place:
            self._mutable = True
            output = self._tried(run, batch)
        for name, parts in self._now.items():
            for part in parts:
                self.moments[name].update(part)
        self._now = {}
        self.seen += 0 if self.reason else int(self.samples.filled.sum())
        return output

    def _tried(self, run: Call, batch: Any) -> Any:
        self._now, self.reason, self.error = {}, "", None
        output, backward = None, False
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                stack.enter_context(hooked(self._hooks))
                if self._mutable:
                    stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
                output = run(batch)
                outputs = {place: z for place, z in enumerate(output_tensors(output)) if z.requires_grad}
                if not outputs:
                    self.reason = (
                        "no gradient reaches the sites: the model's output does not depend on them, or is computed "
                        "without gradients"
                    )
                    return output
                self._units = self._units or _units(outputs)
                drawn = [
                    directions(z, self.samples, self._seed + number, positions=self._positions.may_have(place))
                    / self._units.get(place, 1.0)
                    for number, (place, z) in enumerate(outputs.items())
                ]
                backward = True
                with quiet_derivatives():
                    torch.autograd.backward([*outputs.values()], drawn)
        except SpectrimError:
            raise
        except Exception as error:  # backward passes run foreign code, which may raise anything
            self._now = {}
            self.reason = (
                f"with gradients the {'backward' if backward else 'forward'} pass fails with {type(error).__name__}: "
                f"{in_short(error)}"
            )
            self.error = None if backward else error
        return output

    def hook(self, spec: LayerSpec) -> Callable[..., Tensor]:
        """For a layer, after it has run."""

        def watch(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            shape = spec.as_vectors(tuple((args[0] if args else kwargs["input"]).shape))

            def receive(gradient: Tensor | None) -> None:
                # A function may give none, which is zero.
                if gradient is not None:
                    positions = _positions(spec, self._rows[spec.name], self._run)
                    index = choose(spec, shape, positions, self.samples, self._seed).index
                    self._now.setdefault(spec.name, []).append(outputs_at(spec, gradient.detach(), index).clone())

            if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                return output
            # Where no gradient comes by so far, it begins: with a copy, since what begins may not be overwritten.
            tracked = output
            if not output.requires_grad:
                tracked = (output.clone() if output.is_inference() else output.detach()).requires_grad_().clone()
            # A tensor hook sees the gradient of the value as it is now, even if it is overwritten in place later.
            tracked.register_hook(receive)
            return tracked

        return watch


def _units(outputs: Mapping[int, Tensor]) -> dict[int, float]:
    """What to measure each of several outputs in, so that all count, as boxes in pixels beside scores of classes do.

    Powers of four, with which outputs of about the size of the first stay as they are: how batches are cut, the first
    of which tells, makes no difference.
    """
    norms = {place: float(z.detach().double().norm()) for place, z in outputs.items()}
    known = {place: norm for place, norm in norms.items() if 0 < norm < math.inf}
    return {place: 4.0 ** round(math.log(norm / next(iter(known.values())), 4)) for place, norm in known.items()}


def _positions(spec: LayerSpec, rows: int | None, run: Extent) -> int:
    """Rows of a sample of mean length."""
    return run.positions(max(FEWEST, FLOOR * spec.out_channels // spec.groups) if rows is None else rows)
