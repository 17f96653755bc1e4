"""The hyper-parameters of a training run, and what they mean as optimizer and learning rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.train.distillation import Distillation

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]

_DEFAULT_LR = {"sgd": 0.05, "adamw": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Two runs with equal recipes, data and model end in equal weights on a CPU.

    Attributes
    ----------
    epochs
        Passes over the batches.
    optimizer
        ``"sgd"`` (Nesterov), ``"adamw"``, or a function from parameter groups to an optimizer.
    lr
        Highest learning rate; None is 0.05 for ``sgd``, 0.001 for ``adamw`` and the function's own otherwise.
    momentum
        Of ``sgd``.
    weight_decay
        Applied to weights of two or more axes, never to biases and normalisation.
    decay_product
        Decay the product of factored pairs instead of each factor; see :mod:`spectrim.train.penalties`.
    schedule
        ``"one_cycle"`` rises from lr / 25 and falls to 0 along a cosine, ``"cosine"`` falls from lr to 0,
        ``"constant"`` stays. The rate is set at every step.
    warmup
        Share of all steps spent rising to ``lr``; None is 0.2 for ``one_cycle`` and 0 otherwise.
    distillation
        How a teacher is used when one is given; None ignores it.
    precision
        ``"bfloat16"`` runs model and teacher under autocast. Weights and optimizer stay as they are.
    clip
        Largest norm of all gradients of the loss together, None for no limit; those of a penalty come on top. At the
        default rate, networks without normalisation diverge without a limit, most with a teacher.
    memory_format
        ``"channels_last"`` converts the model and 4-axis inputs, which is faster for most convolutions. Those whose
        gradients torch fails at stay contiguous, see :func:`~spectrim.nn.contiguity.contiguous_where_needed`.
    batch_norm
        ``"frozen"`` normalises with the running statistics and keeps them, as batches of few samples need (detectors,
        segmentation); ``"train"`` with those of each batch, as torch does. Weights and biases are trained in either.
    evaluate_every
        Epochs between two evaluations; the last epoch is always evaluated.
    keep
        Weights left in the model: those of the ``"last"`` epoch, or of the ``"best"`` evaluated one.
    checkpoint_every
        Steps between two checkpoints; None writes at the end of each epoch only.
    seed
        Seeds the global generators of torch, numpy and python for the run. Their states are put back afterwards.
    """

    epochs: int = 10
    optimizer: Literal["sgd", "adamw"] | MakeOptimizer = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_product: bool = True
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    warmup: float | None = None
    distillation: Distillation | None = field(default_factory=Distillation)
    precision: Literal["float32", "bfloat16"] = "float32"
    clip: float | None = 1.0
    memory_format: Literal["preserve", "channels_last"] = "preserve"
    batch_norm: Literal["train", "frozen"] = "train"
    evaluate_every: int = 1
    keep: Literal["last", "best"] = "last"
    checkpoint_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            value = getattr(self, name)
            if words and value not in words and not (name == "optimizer" and callable(value)):
                other = ", or give a function from parameter groups to an optimizer" if name == "optimizer" else ""
                said = " ".join(repr(value).split())
                raise ValueError(f"{name}={said:.80} is not known; choose from {', '.join(map(repr, words))}{other}")
        for name, least in (("epochs", 0), ("evaluate_every", 1), ("checkpoint_every", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        for name in ("lr", "momentum", "weight_decay", "clip"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0")
        if self.warmup is not None and not (isinstance(self.warmup, Real) and 0 <= self.warmup < 1):
            raise ValueError(f"warmup={self.warmup!r} is a share of all steps and must lie in [0, 1)")

    def lr_factor(self, step: int, total: int) -> float:
        """Share of ``lr`` to use at ``step`` (from 0) of ``total`` steps."""
        share = self.warmup if self.warmup is not None else (0.2 if self.schedule == "one_cycle" else 0.0)
        rising = share * total
        if step < rising:
            start = 1 / 25 if self.schedule == "one_cycle" else 0.0
            return start + (1 - start) * (step + 1) / (rising + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, total - rising))))

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer of this recipe on parameter groups from :func:`parameter_groups`."""
        if not isinstance(self.optimizer, str):
            return _stepping(self.optimizer(groups))
        lr = _DEFAULT_LR[self.optimizer] if self.lr is None else self.lr
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=self.momentum, nesterov=self.momentum > 0, foreach=True)
        return torch.optim.AdamW(groups, lr=lr, foreach=True)

    def record(self) -> Mapping[str, Any]:
        """The recipe as JSON values, to tell whether a checkpoint belongs to it."""
        values = asdict(self)
        if not isinstance(self.optimizer, str):
            values["optimizer"] = getattr(self.optimizer, "__qualname__", type(self.optimizer).__qualname__)
        if self.clip is None:
            values["clip"] = "none"  # None stands in checkpoints of before there was a limit by default
        if self.batch_norm == "train":
            del values["batch_norm"]  # checkpoints of before it was there have none
        return values


def _stepping(optimizer: object) -> Optimizer:
    """What a user's function made, if it can take a step by gradients that are there."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer= returned a {type(optimizer).__name__}: expected an optimizer of torch")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"{type(optimizer).__name__} runs the model several times a step, for which it needs a closure: give an "
            "optimizer that does not, such as torch.optim.AdamW"
        )
    return optimizer


# What fields may say in words, by their names.
_WORDS = {
    name: [word for part in (kind, *get_args(kind)) if get_origin(part) is Literal for word in get_args(part)]
    for name, kind in get_type_hints(Recipe).items()
}


def parameter_groups(model: nn.Module, weight_decay: float, apart: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed by the optimizer, and not.

    Parameters
    ----------
    model
        Parameters without ``requires_grad`` are left out.
    weight_decay
        Decay of the first group.
    apart
        Parameters that something else decays.

    Raises
    ------
    ValueError
        If there is nothing to train.
    """
    elsewhere = {id(p) for p in apart}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True: nothing to train")
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in elsewhere]
    chosen = {id(p) for p in decayed}
    rest = [p for p in trainable if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
