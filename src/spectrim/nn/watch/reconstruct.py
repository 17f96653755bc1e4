"""Watch one layer in two models at once: what it should answer, and what it is given once its predecessors changed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import CalibrationError
from spectrim.linalg.moments import Moments, shrunk
from spectrim.linalg.sketch import Sketch
from spectrim.network.sites import Layer
from spectrim.nn.find import canonical, describe
from spectrim.nn.modules import Factored, make_layer
from spectrim.nn.watch.batches import call, evaluating
from spectrim.nn.watch.observe import Hook, hooked
from spectrim.nn.watch.patches import outputs_at, patches_at
from spectrim.nn.watch.sampling import Samples, choose

# Positions sampled in every image: neighbouring patches overlap and tell little new.
POSITIONS = 64
# Directions of a sketch.
SKETCH = 1024


class _Reached(Exception):
    """Ends a forward pass at the layer of interest; what follows is not needed."""


def asymmetric_site(
    dense: nn.Module,
    compressed: nn.Module,
    site: Layer,
    batches: Iterable[Any],
    *,
    target: str | None = None,
    outputs: Tensor | None = None,
    rows: int | str | None = "auto",
    sketch: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
) -> Layer:
    """A layer as it should be factorised once the layers before it have been.

    The target is the dense layer's response ``y``, the input ``x`` is what the already compressed predecessors
    deliver. With their joint moments streamed from both models, ``min E ||y - W' x - b||^2`` equals a least-squares
    weight ``W* = D C^{-1}`` to be approximated in the metric ``C`` (Yu et al. 2017 call this asymmetric
    reconstruction). Directions that ``x`` hardly takes keep the dense weight.

    Parameters
    ----------
    dense, compressed
        The original, and a copy in which the layers before the site are compressed and this one is still dense.
    site
        By its name in the compressed model.
    target
        Layer of the dense model whose responses are wanted; the site's own by default.
    outputs
        Output channels of that layer which the site still has, ascending; all by default.
    rows
        Positions of a sample, all if None; ``"auto"`` takes 64.
    sketch
        Keep a sketch of the joint moments, for patches whose second moment is too large to hold.

    Returns
    -------
    Site
        With weight ``W*``, its bias, and the moments of ``x`` as ``input`` (or ``sketch``); a sensitivity is kept.
    """
    spec = site.spec
    g, o, *_ = spec.shape
    run = forward or call
    kind = _Joint if sketch else Moments
    held = kind(g, spec.features + o, device=site.weight.device)
    caught: list[Tensor] = []

    def catch_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy: what runs later may overwrite it in place.
        caught.append((args[0] if args else kwargs["input"]).clone())
        if len(caught) == calls:
            raise _Reached

    def catch_output(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        caught.append(output.clone())
        if len(caught) == calls:
            raise _Reached

    calls = max(1, len(spec.inputs))
    at_input = Hook(compressed.get_submodule(spec.name), catch_input, before=True)
    at_output = Hook(dense.get_submodule(target or spec.name), catch_output)
    with evaluating(dense, compressed):
        for batch in batches:
            inputs = _run(compressed, batch, run, at_input, caught)
            targets = _run(dense, batch, run, at_output, caught)
            samples = Samples.of(batch)
            count = POSITIONS if isinstance(rows, str) else rows
            for x, y in zip(inputs, targets, strict=True):
                index = choose(spec, tuple(x.shape), count, samples, seed).index
                patches = patches_at(spec, x, index).flatten(2)
                wanted = outputs_at(spec, y, index)
                if outputs is not None:
                    left = (outputs.to(wanted.device) % wanted.shape[2]).reshape(g, 1, -1)
                    wanted = torch.take_along_dim(wanted, left, 2)
                held.update(torch.cat([patches, wanted.to(patches.dtype)], dim=2))
    if not held.count or not held.is_finite():
        raise CalibrationError(
            f"layer {spec.name!r} was not reached, or sees NaN or Inf, in the reconstruction batches"
        )
    if isinstance(held, Sketch):
        weight, seen = _from_sketch(site, held)
        statistics = dataclasses.replace(site.statistics, sketch=seen)
    else:
        weight, seen = _from_moments(site, held)
        statistics = dataclasses.replace(site.statistics, input=seen)
    d = spec.features
    bias = (held.mean[:, d:] - torch.einsum("god,gd->go", weight.double(), held.mean[:, :d])).reshape(-1)
    return dataclasses.replace(site, weight=weight.reshape(site.weight.shape), bias=bias, statistics=statistics)


class _Joint(Sketch):
    """Room for as many directions as joint moments of inputs and targets need."""

    __slots__ = ()

    def __init__(self, groups: int, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(groups, features, size=SKETCH, device=device)


def _from_moments(site: Layer, held: Moments) -> tuple[Tensor, Moments]:
    """Least-squares weight ``[g, o, d]`` and the moments of the inputs."""
    g, o, *_ = site.spec.shape
    d = site.spec.features
    inputs = Moments(g, d, held.mean.device)
    inputs.count = held.count
    inputs.mean, inputs.scatter = held.mean[:, :d].clone(), held.scatter[:, :d, :d].clone()
    covariance, cross = held.covariance[:, :d, :d], held.covariance[:, d:, :d]
    weight = site.weight.double().reshape(g, o, d)
    damped = shrunk(covariance, held.count)
    # A layer that sees nothing but constants has no variance to divide by and keeps its weight.
    damped.diagonal(dim1=-2, dim2=-1).clamp_min_(1e-300)
    return weight + torch.linalg.solve(damped, (cross - weight @ covariance).mT).mT, inputs


def _from_sketch(site: Layer, held: Sketch) -> tuple[Tensor, Sketch]:
    """The same from a sketch, by the equations of its rows, which are fewer than the inputs."""
    g, o, *_ = site.spec.shape
    d = site.spec.features
    inputs = held.take(torch.arange(d).expand(g, d))
    weight = site.weight.float().reshape(g, o, d)
    missing = held.rows[..., d:] - inputs.rows @ weight.mT
    return weight + inputs.solve(missing.double()).to(weight.dtype), inputs


def refit_second(
    dense: nn.Module,
    compressed: nn.Module,
    site: Layer,
    pair: Factored,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Fit the second layer of a pair, and its bias, to the dense layer's responses. The pair is changed in place.

    For layers whose patches are too long to hold their second moment: the first factor's responses are short. Pairs
    without a bias are left alone, since the mean could not be kept.
    """
    names = tuple(f"{name}.1" for name in site.spec.names)
    spec = describe(pair.second, names).at(site.spec.inputs or ((),))
    weight, bias = canonical(pair.second)
    if bias is None:
        return
    second = Layer(spec, weight, bias)
    fitted = asymmetric_site(dense, compressed, second, batches, target=site.spec.name, forward=forward)
    pair[1] = make_layer(spec, fitted.weight, fitted.bias).train(pair.second.training)


def _run(model: nn.Module, batch: Any, run: Callable[..., Any], hook: Hook, caught: list[Tensor]) -> list[Tensor]:
    with hooked([hook]), contextlib.suppress(_Reached):
        run(model, batch)
    found = list(caught)
    caught.clear()
    return found
