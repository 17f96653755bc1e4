"""How much a layer's errors matter: gradients that reach its outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import CalibrationError, ForwardError, SpectrimError, first_line
from spectrim.linalg.moments import Moments, Squares
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Layer, Sites, Tied
from spectrim.nn.contiguity import contiguous_where_needed
from spectrim.nn.parameters import parameters_of
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.calibrate import Call, PassMaker, calibrated
from spectrim.nn.watch.layout import Where
from spectrim.nn.watch.masks import Mask
from spectrim.nn.watch.nesting import begun, checked_batches, output_tensors
from spectrim.nn.watch.observe import Hook, hooked, observe
from spectrim.nn.watch.patches import outputs_at
from spectrim.nn.watch.samples import Samples
from spectrim.nn.watch.sampling import Extent, Sampling, choose, directions
from spectrim.progress import Steps

log = logging.getLogger(__name__)

# Output positions over the run at least, and in multiples of the number of output channels.
FEWEST, FLOOR = 4096, 16


def sensitivity(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    *,
    samples: int = 512,
    rows: int | None = None,
    mask: Mask = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    axis: Where = None,
    seed: int = 0,
) -> Sites:
    """Weigh every site's output channels by what an error there does to the network's output.

    An error ``e`` in a layer's response moves the network's output ``z`` by ``J e``. Drawing ``v`` from a standard
    normal, the gradient of ``v . z`` at the response is ``J^T v``, and its second moment ``G`` gives the expected
    squared movement ``e^T G e``: the Gauss-Newton approximation of a squared error on the outputs. Summed over sites
    and positions, such errors share one unit, so that a table may trade one site against another. No labels are used.

    Parameters
    ----------
    sites
        Calibrated with the same model.
    batches
        Those that give ``samples`` samples, spread over the whole run where a list or loader says how long it is; else
        the first ones.
    rows
        Output positions that are taken over the whole run, an equal part of each sample; by default 16 times the
        number of a layer's output channels, and at least 4,096.
    mask
        Which tokens are data, as for :func:`spectrim.calibrate`: directions are zero at outputs of padding, and its
        gradients count nowhere.
    axis
        Where a batch's samples are: what other verbs call ``samples``, which is a number of them here.

    Returns
    -------
    Sites
        Every layer with ``gradient`` moments added. The model, its gradients and its mode are as before.

    Raises
    ------
    CalibrationError
        If no gradient reaches a site, or gradients are NaN or Inf; the message names the layer.
    """
    found = _gradients(model, sites, batches, samples, rows, mask, Feed.of(forward, axis), seed)
    if found.error is not None:
        raise ForwardError(found.reason) from found.error
    if found.reason:
        raise CalibrationError(found.reason)
    for name, moments in found.moments.items():
        if not moments.count:
            raise CalibrationError(
                f"no gradient reached layer {name!r} in {found.samples} samples: the model's output does not depend on "
                "it. Skip it, or do without sensitivity."
            )
        if not moments.is_finite():
            raise CalibrationError(f"the gradients that reach layer {name!r} hold NaN or Inf")
    return _with_gradients(sites, found.moments)


def weighed(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    *,
    samples: int = 512,
    mask: Mask = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Sites:
    """The same as far as gradients can be had; ``notes`` of the sites say where they cannot, and why.

    Errors of layers that none reaches count as if losing a layer's whole response mattered as much as it does, in the
    median, at the others. Where none reaches any, errors are not weighed at all.
    """
    return with_weights(sites, _gradients(model, sites, batches, samples, None, mask, Feed.of(forward), 0))


def calibrated_and_weighed(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    amount: Sampling,
    feed: Feed,
    *,
    progress: Steps,
    samples: int = 512,
) -> Sites:
    """As :func:`calibrate` and then :func:`weighed`, where both watch the same forward passes.

    The first batch is run for each of them: what a pass computes is counted without gradients, and whether there are
    gradients is known then. Where a later pass fails with them, which it may not without, both begin again, apart.
    """
    try:
        with _weights_apart(model):
            shared = _Shared(model, sites, batches, samples, amount.mask, feed)
            found = calibrated(model, sites, batches, amount, feed, progress=progress, passes=shared)
    except _Refused as error:
        log.info("sites are calibrated and weighed in passes of their own: %s", error)
        found = calibrated(model, sites, batches, amount, feed, progress=progress)
        return weighed(model, found, batches, samples=samples, mask=amount.mask, forward=feed)
    return with_weights(found, shared.found)


def with_weights(sites: Sites, found: Gradients) -> Sites:
    """Calibrated sites with the gradients that could be had; ``notes`` say where they could not."""
    moments = found.moments.items()
    usable = {name: m for name, m in moments if m.count and m.is_finite() and float(m.mean_squares.sum()) > 0}
    without = [layer.name for layer in sites.layers if layer.name not in usable]
    if not without:
        return _with_gradients(sites, usable)
    names = ", ".join(map(repr, without[:5])) + (", ..." if len(without) > 5 else "")
    reason = found.reason or (
        "no gradient reaches them, or one that is zero or not finite: the way to the output is cut by a layer without "
        "gradients, no_grad, detach, or a selection"
    )
    if not usable:
        note = f"errors are not weighed by what they do to the model's output: {reason}"
        return dataclasses.replace(sites, notes=(*sites.notes, note))
    note = (
        f"errors of {len(without)} of {len(sites.layers)} layers ({names}) are not weighed by gradients, but as in the "
        f"median of the others: {reason}"
    )
    known = [(layer, usable[layer.name]) for layer in sites if layer.name in usable]
    weights = [_energy(layer, gradient.second_moment) for layer, gradient in known if isinstance(gradient, Moments)]
    typical = statistics.median(weights) if weights else 1.0
    assumed: dict[str, Moments | Squares] = {
        layer.name: _even(layer, typical)
        for layer in (*sites, *(each.table for each in sites.tied))
        if layer.name in without
    }
    assumed |= {each.head.name: _even_head(each, typical) for each in sites.tied if each.head.name in without}
    return dataclasses.replace(_with_gradients(sites, usable | assumed), notes=(*sites.notes, note))


@dataclass(frozen=True)
class Gradients:
    """Moments of gradients by the layer, over so many samples, and why there are none.

    Attributes
    ----------
    error
        What the model raised in its forward pass, which is no fault of gradients if it does so without them too.
    """

    moments: Mapping[str, Moments | Squares] = field(default_factory=dict)
    samples: int = 0
    reason: str = ""
    error: Exception | None = None


def _gradients(
    model: nn.Module, sites: Sites, batches: Iterable[Any], samples: int, rows: int | None, mask: Mask, feed: Feed,
    seed: int,
) -> Gradients:  # fmt: skip
    """Run batches forwards and backwards. The model, its gradients and its mode are as before."""
    layers = [model.get_submodule(layer.name) for layer in sites.layers]
    first, stream = begun(checked_batches(batches))
    feed.decide(model, first)
    watch = _Gradients(layers, sites, rows, Extent(batches, mask, feed.layout), samples, seed)
    with _weights_apart(model), observe(model, forward=feed) as run:
        for batch in stream:
            if watch.takes(batch):
                watch.see(run, batch)
            if watch.reason or watch.seen >= samples:
                break
    return watch.found


@contextlib.contextmanager
def _weights_apart(model: nn.Module) -> Iterator[None]:
    """Gradients of weights are not asked for, and would take as long as those of what passes."""
    before = [(p, p.requires_grad, p.grad) for p in parameters_of(model)]
    try:
        with contiguous_where_needed(model):
            for parameter, _, _ in before:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


class _Refused(SpectrimError):
    """A forward pass fails with gradients."""


class _Shared(PassMaker):
    """Passes that a network is calibrated by and that gradients go back through, as long as there are any."""

    def __init__(
        self, model: nn.Module, sites: Sites, batches: Iterable[Any], samples: int, mask: Mask, feed: Feed
    ) -> None:
        layers = [model.get_submodule(layer.name) for layer in sites.layers]
        self._made = lambda: _Gradients(layers, sites, None, Extent(batches, mask, feed.layout), samples, 0)
        self._watch: _Gradients | None = None

    @property
    def found(self) -> Gradients:
        return self._watch.found if self._watch is not None else Gradients()

    def make(self, call: Call, batch: Any, index: int) -> Any:
        watch = self._watch
        if watch is None or not watch.takes(batch):
            return call(batch)
        output = watch.see(call, batch, again=False)
        if watch.error is not None or watch.fails_in_place:
            raise _Refused(watch.reason) from watch.error
        return output

    def behind(self, call: Call, batch: Any, index: int) -> None:
        if not index:
            # How the model is fed is decided by now.
            self._watch = self._made()
            if self._watch.takes(batch):
                self._watch.see(call, batch)


class _Gradients:
    """Takes the gradients that reach layers, batch by batch: a batch that fails leaves nothing.

    Attributes
    ----------
    seen
        Samples so far.
    reason, error
        Why a batch gave none, if one did, and what the model raised in its forward pass.
    """

    def __init__(
        self, layers: Sequence[nn.Module], sites: Sites, rows: int | None, run: Extent, samples: int, seed: int
    ) -> None:
        specs = [layer.spec for layer in sites.layers]
        heads = {each.head.name for each in sites.tied}
        self.moments: dict[str, Moments | Squares] = {
            s.name: (Squares if s.name in heads else Moments)(s.groups, s.out_channels // s.groups, s.device)
            for s in specs
        }
        self.samples: Samples
        self.seen, self.reason = 0, ""
        self.error: Exception | None = None
        self._run, self._seed = run, seed
        self._wanted, self._all, self._passed = samples, run.samples, 0
        if run.samples is not None:
            run.samples = min(run.samples, samples)
        self._rows = {s.name: FEWEST if rows is None and s.name in heads else rows for s in specs}
        self._now: dict[str, list[Tensor]] = {}
        self._hooks = [Hook(layer, self.hook(spec)) for layer, spec in zip(layers, specs, strict=True)]
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

    def takes(self, batch: Any) -> bool:
        """Whether the next batch is one of those that give as many samples as are wanted, spread over the whole run.

        The first ones would be of a few classes where data are sorted by them.
        """
        self._passed += self._run.layout.size(batch)
        behind = self._all is None or self.seen * self._all < self._passed * self._wanted
        return not self.reason and self.seen < self._wanted and behind

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
        self.seen += 0 if self.reason else self.samples.size
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
                outputs = [z for z in output_tensors(output) if z.requires_grad]
                if not outputs:
                    self.reason = (
                        "no gradient reaches the sites: the model's output does not depend on them, or is computed "
                        "without gradients"
                    )
                    return output
                drawn = [directions(z, self.samples, self._seed + number) for number, z in enumerate(outputs)]
                backward = True
                torch.autograd.backward(outputs, drawn)
        except SpectrimError:
            raise
        except Exception as error:  # backward passes run foreign code, which may raise anything
            self._now = {}
            self.reason = (
                f"with gradients the {'backward' if backward else 'forward'} pass fails with {type(error).__name__}: "
                f"{first_line(error)}"
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


def _with_gradients(sites: Sites, moments: Mapping[str, Moments | Squares]) -> Sites:
    def of(layer: Layer) -> Layer:
        statistics = dataclasses.replace(layer.statistics, gradient=moments[layer.name])
        return dataclasses.replace(layer, statistics=statistics)

    tied = (
        dataclasses.replace(each, table=of(each.table), weights=moments[each.head.name].mean_squares[0])
        for each in sites.tied
    )
    return dataclasses.replace(sites, sites=tuple(map(of, sites)), tied=tuple(tied))


def _even_head(tied: Tied, total: float) -> Squares:
    """Gradients that are alike at all outputs of a head, by which losing the whole response matters so much."""
    head = tied.head
    weight, inputs = head.weight[0].double(), head.statistics.input
    energy = float(weight.square().sum() if inputs is None else (weight @ inputs.covariance[0] * weight).sum())
    even = Squares(1, head.spec.out_channels, head.weight.device)
    even.update(torch.full((1, 1, head.spec.out_channels), math.sqrt(total / energy) if energy > 0 else 1.0))
    return even


def _energy(layer: Layer, gradient: Tensor | None = None) -> float:
    """Energy of a layer's responses about their mean, weighed by a moment ``[g, o, o]`` if there is one."""
    inputs, outputs = layer.statistics.input, layer.statistics.output
    g, o, *_ = layer.spec.shape
    if outputs is not None:
        covariance = outputs.covariance
    elif inputs is not None:
        weight = layer.weight.double().reshape(g, o, -1)
        covariance = weight @ inputs.covariance.double() @ weight.mT
    else:
        return 1.0
    return float((covariance * (torch.eye(o).to(covariance) if gradient is None else gradient)).sum())


def _even(layer: Layer, total: float) -> Moments:
    """Moments of gradients that are alike at all outputs, by which losing the whole response matters so much."""
    g, o, *_ = layer.spec.shape
    even = Moments(g, o, layer.weight.device)
    energy = _energy(layer)
    size = total / energy if energy > 0 and total > 0 else 1.0
    even.count = FEWEST
    even.scatter += torch.eye(o).to(even.scatter) * size * even.count
    return even


def _positions(spec: LayerSpec, rows: int | None, run: Extent) -> int:
    """Rows of a sample of mean length."""
    return run.positions(max(FEWEST, FLOOR * spec.out_channels // spec.groups) if rows is None else rows)
