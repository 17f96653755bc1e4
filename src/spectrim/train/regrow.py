"""Let the support of sparse weights move while training: drop the smallest entries, grow where the gradient is largest.

A mask that was found before training is not the best one afterwards. Every so many steps a share of the units in the
mask with the smallest magnitudes is dropped, and as many are grown where the loss would change fastest: where the
gradient of the whole weight, mask or not, is largest. The share falls along a cosine to nothing at ``until``.

Source: Evci, Gale, Menick, Castro and Elsen, Rigging the Lottery: Making All Tickets Winners (RigL), ICML 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spectrim.errors import CheckpointError
from spectrim.nn.sparse.layers import Masked, laid_open, laid_out

# Values looked at to guess how large the largest are.
_SAMPLE = 100_000


class Regrow:
    """Moves the masks of a model's sparse layers every ``every`` steps; an ``after_step`` of a training loop.

    Masks keep their patterns and numbers of units: a layer drops its smallest units wherever they are, and every pool
    grows as many as it lost. Layers that sparsity has made smaller (``channels``, ``taps``) stay as they are.

    Parameters
    ----------
    model
        With layers of a sparse weight, :class:`~spectrim.nn.sparse.layers.Masked`.
    every
        Steps between two moves.
    until
        Step after which nothing moves; three quarters of all steps in the paper.
    share
        Part of a layer's kept units that moves at first, 0.3 in the paper.

    Attributes
    ----------
    step
        Steps counted.

    Notes
    -----
    The step before a move costs what any other does: the gradient of the whole weight is there anyway, and is kept
    instead of thrown away. Parameters get the gradients inside their masks, in that step too.

    Units are measured by the norms of their entries. One that is dropped and grown at once keeps its values.
    All others start at zero, and so does what the optimizer holds for them, in every tensor of its state that has the
    shape of the weight. Step counts are those of the whole weight, as AdamW's correction for its start.

    :class:`~spectrim.train.Loop` keeps the state in its checkpoints. A loop of your own calls :meth:`attach` before
    the first step, the object after every step and :meth:`detach` at the end.

    Examples
    --------
    >>> fine_tune(small, batches, after_step=Regrow(small, every=100, until=3000))  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, *, every: int = 100, until: int, share: float = 0.3) -> None:
        if every < 1:
            raise ValueError(f"every={every!r} must be at least 1")
        if until < 1:
            raise ValueError(f"until={until!r} must be at least 1")
        if not 0 < share <= 1:
            raise ValueError(f"share={share!r} must lie above 0 and be at most 1")
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Masked)}
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no layer with a mask that could move")
        self.model, self.every, self.until, self.share = model, every, until, share
        self.step = 0
        self._optimizer: Optimizer | None = None
        self._watches: dict[str, _Watch] = {}

    def attach(self, optimizer: Optimizer) -> None:
        """Name the optimizer whose state follows the masks, and get ready for the next step."""
        self._optimizer = optimizer
        self._prepare()

    def detach(self) -> None:
        """Leave the model alone until :meth:`attach`."""
        self._optimizer = None
        self._prepare()

    def __call__(self, model: nn.Module) -> None:
        """Count a step, and move the masks if it is time."""
        if model is not self.model:
            raise ValueError("the masks belong to another model than the one that is trained")
        if self._optimizer is None:
            raise RuntimeError("call attach(optimizer) before the first step")
        self.step += 1
        # Nothing was watched if the layers were not run.
        for name, watch in self._watches.items():
            if watch.gradient is not None:
                self._move(self.layers[name], watch.gradient)
        self._prepare()

    def share_at(self, step: int) -> float:
        """Part of the kept units that moves after so many steps."""
        return self.share / 2 * (1 + math.cos(math.pi * min(step, self.until) / self.until))

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors; masks and weights are the model's."""
        return {"step": torch.tensor(self.step), "options": torch.tensor(self._options(), dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` returned.

        Raises
        ------
        CheckpointError
            If it is the state of something else, or of other options.
        """
        if state.keys() != {"step", "options"}:
            raise CheckpointError("the checkpoint holds no state of Regrow: the run it is from had none")
        then, now = state["options"].tolist(), self._options()
        if then != now:
            raise CheckpointError(
                f"the checkpoint belongs to another run: every, until and share were {then} and are {now}"
            )
        self.step = int(state["step"])
        self._prepare()

    def _options(self) -> list[float]:
        return [float(self.every), float(self.until), float(self.share)]

    def _prepare(self) -> None:
        """Watch the gradients of the coming step if masks move after it."""
        for watch in self._watches.values():
            watch.end()
        after = self.step + 1
        due = self._optimizer is not None and after % self.every == 0 and after < self.until
        self._watches = {}
        if due:
            learning = {name: layer for name, layer in self.layers.items() if _weight(layer).requires_grad}
            self._watches = {name: _Watch(layer) for name, layer in learning.items()}

    @torch.no_grad()
    def _move(self, layer: Masked, gradient: Tensor) -> None:
        if dist.is_available() and dist.is_initialized():
            # Each process has seen its part of the batch; all move the same.
            dist.all_reduce(gradient)
        weight, pattern, spec = _weight(layer), layer.pattern, layer.original
        size, growth = (_sizes(pattern.open(laid_open(t, spec))) for t in (weight, gradient))
        kept = pattern.open(layer.support).any(-1)
        moved = swapped(kept, size, growth, round(self.share_at(self.step) * int(kept.sum())))
        mask = laid_out(pattern.expand(moved.reshape(-1), spec.shape), spec)
        changed = mask != layer.mask
        layer.mask.copy_(mask)
        layer.settle()
        state = self._optimizer.state.get(weight, {}) if self._optimizer is not None else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(changed, 0)


def swapped(kept: Tensor, size: Tensor, growth: Tensor, count: int) -> Tensor:
    """Flags of the units kept after ``count`` have moved.

    Parameters
    ----------
    kept
        ``[pools, units]``, the same number in every pool.
    size, growth
        Of every unit: the smallest sizes are dropped, the largest growths come in their place, in the same pool. What
        is dropped may come back.
    """
    if not count:
        return kept
    inside = kept.reshape(-1).nonzero().squeeze(1)
    smallest = inside[size.reshape(-1)[inside].topk(count, largest=False, sorted=False).indices]
    stay = kept.clone()
    stay.view(-1)[smallest] = False
    wanted = kept.sum(1, keepdim=True) - stay.sum(1, keepdim=True)
    most = int(wanted.max())
    growth = growth.masked_fill(stay, -math.inf)
    if len(kept) == 1:
        return stay | _largest(growth[0], most).unsqueeze(0)
    best = growth.topk(most, dim=1).indices
    first = torch.arange(most, device=kept.device) < wanted
    return stay | torch.zeros_like(kept).scatter_(1, best, first)


def _largest(values: Tensor, count: int) -> Tensor:
    """Flags of the ``count`` largest of many values."""
    flags = torch.zeros_like(values, dtype=torch.bool)
    # A sample gives a bound that few pass. Where too few do, all are compared.
    sample = values[:: max(1, values.numel() // _SAMPLE)].contiguous()
    bound = sample.kthvalue(max(1, round(sample.numel() * (1 - 1.5 * count / values.numel())))).values
    candidates = (values > bound).nonzero().squeeze(1)
    if candidates.numel() < count:
        candidates = torch.arange(values.numel(), device=values.device)
    flags[candidates[values[candidates].topk(count, sorted=False).indices]] = True
    return flags


def _sizes(opened: Tensor) -> Tensor:
    """Norms of units, ``[pools, units]`` from ``[pools, units, entries]``."""
    return torch.linalg.vector_norm(opened, dim=-1, dtype=torch.promote_types(opened.dtype, torch.float32))


def _weight(layer: Masked) -> Any:
    return layer.layer.weight


class _Watch:
    """Keeps the gradient of the whole weight of a layer, until :meth:`end`.

    The layer runs with a mask of ones, which changes no output, since the weight is zero outside its mask. What the
    parameter gets is cut to the mask again. Copies of the layer that are made in the meantime watch nothing.
    """

    def __init__(self, layer: Masked) -> None:
        self.gradient: Tensor | None = None
        self._mask: Tensor | None = layer.mask
        self._handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._open),
            layer.register_forward_hook(self._close, always_call=True),
            _weight(layer).register_hook(self._keep),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"gradient": None, "_mask": None, "_handles": []}

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _open(self, layer: Any, args: object) -> None:
        if self._mask is not None and torch.is_grad_enabled():
            layer.mask = torch.ones_like(self._mask)

    def _close(self, layer: Any, args: object, output: object) -> None:
        if self._mask is not None:
            layer.mask = self._mask

    def _keep(self, gradient: Tensor) -> Tensor:
        assert self._mask is not None
        self.gradient = gradient.clone() if self.gradient is None else self.gradient + gradient
        return gradient * self._mask
