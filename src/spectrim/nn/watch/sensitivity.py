"""How much a layer's errors matter: gradients that reach its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import CalibrationError
from spectrim.linalg.moments import Moments
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Sites
from spectrim.nn.contiguity import contiguous_where_needed
from spectrim.nn.watch.batches import checked_batches, output_tensors
from spectrim.nn.watch.observe import Hook, observe
from spectrim.nn.watch.patches import outputs_at
from spectrim.nn.watch.sampling import Mask, Run, Samples, choose, directions

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
        Read until ``samples`` samples have been seen.
    rows
        Output positions that are taken over the whole run, an equal part of each sample; by default 16 times the
        number of a layer's output channels, and at least 4,096.
    mask
        Which tokens are data, as for :func:`spectrim.calibrate`: directions are zero at outputs of padding, and its
        gradients count nowhere.

    Returns
    -------
    Sites
        Every layer with ``gradient`` moments added. The model, its gradients and its mode are as before.

    Raises
    ------
    CalibrationError
        If no gradient reaches a site, or gradients are NaN or Inf; the message names the layer.
    """
    checked_batches(batches)
    run_of = Run(batches, mask)
    if run_of.samples is not None:
        run_of.samples = min(run_of.samples, samples)
    specs = [layer.spec for layer in sites]
    held = {s.name: Moments(s.groups, s.out_channels // s.groups, s.device) for s in specs}
    state: dict[str, Samples] = {}
    layers = {s.name: model.get_submodule(s.name) for s in specs}
    hooks = [Hook(layers[s.name], _hook(s, held[s.name], _positions(s, rows, run_of), seed, state)) for s in specs]
    parameters = list(model.parameters())
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    seen = 0
    try:
        with observe(model, hooks, gradients=True, forward=forward) as run, contiguous_where_needed(model):
            # Gradients of weights are not asked for, and would take as long as those of what passes.
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            for batch in batches:
                state["batch"] = run_of.see(batch)
                outputs = [z for z in output_tensors(run(batch)) if z.requires_grad]
                if not outputs:
                    raise CalibrationError(
                        "no gradient reaches the sites: the model's output does not depend on them, or is computed "
                        "without gradients"
                    )
                drawn = [directions(z, state["batch"], seed + number) for number, z in enumerate(outputs)]
                torch.autograd.backward(outputs, drawn)
                seen += state["batch"].size
                if seen >= samples:
                    break
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
    for name, moments in held.items():
        if not moments.count:
            raise CalibrationError(
                f"no gradient reached layer {name!r} in {seen} samples: the model's output does not depend on it. "
                "Skip it, or do without sensitivity."
            )
        if not moments.is_finite():
            raise CalibrationError(f"the gradients that reach layer {name!r} hold NaN or Inf")
    return dataclasses.replace(
        sites,
        sites=tuple(
            dataclasses.replace(layer, statistics=dataclasses.replace(layer.statistics, gradient=held[layer.name]))
            for layer in sites
        ),
    )


def _positions(spec: LayerSpec, rows: int | None, run: Run) -> int:
    """Rows of a sample of mean length."""
    return run.positions(max(FEWEST, FLOOR * spec.out_channels // spec.groups) if rows is None else rows)


def _hook(
    spec: LayerSpec, held: Moments, positions: int, seed: int, state: Mapping[str, Samples]
) -> Callable[..., Tensor]:
    def watch(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        shape = tuple((args[0] if args else kwargs["input"]).shape)

        def receive(gradient: Tensor) -> None:
            index = choose(spec, shape, positions, state["batch"], seed).index
            held.update(outputs_at(spec, gradient.detach(), index))

        if not torch.is_grad_enabled():
            return output
        # Where no gradient comes by so far, it begins: with a copy, since what begins may not be overwritten in place.
        tracked = output if output.requires_grad else output.detach().requires_grad_().clone()
        # A tensor hook sees the gradient of the value as it is now, even if it is overwritten in place later.
        tracked.register_hook(receive)
        return tracked

    return watch
