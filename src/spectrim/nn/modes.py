"""Whether a network whose layers are replaced can be trained: some write their layers' weights in training mode."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from spectrim.errors import CalibrationError, ReadOnlyWeightError
from spectrim.network.choices import LowRankChoice
from spectrim.network.sites import Sites
from spectrim.nn.build import skeleton
from spectrim.nn.copying import copy_model
from spectrim.nn.parameters import own_kinds
from spectrim.nn.surgery import replace_module
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.outside import names_in

_CURE = "take that out where the layer is compressed, or skip= the layer"


def said_of_training(dense: nn.Module, small: nn.Module, batch: Any, feed: Feed) -> Iterator[str]:
    """What a user should know who trains a compressed network: that it does not run in training mode, and why.

    Tried on copies, with two samples, where the code of the network's own modules asks for its mode.
    """
    if not asks_for_mode(small):
        return

    def fault(model: nn.Module) -> Exception | None:
        return fault_in_training(copy_model(model), lambda copied: feed(copied, feed.resized(batch, 2)))

    error = fault(small)
    if isinstance(error, ReadOnlyWeightError):
        yield f"the model cannot be trained as it is: in training mode it writes into a layer's weight, and {error}"
    elif error is not None and fault(dense) is None:
        yield (
            f"the model cannot be trained as it is: in training mode it raises {type(error).__name__}: {error}, which "
            f"the dense one does not. Something there counts on the layers' own weights: {_CURE}"
        )


def check_trainable(model: nn.Module, sites: Sites, batch: Any, feed: Feed) -> None:
    """Raise CalibrationError for a model that is to be trained compressed and writes into the weights of its sites."""
    if not asks_for_mode(model):
        return
    trial = copy_model(model)
    for layer in sites:
        spec = layer.spec
        (module,) = skeleton(LowRankChoice(unfolding="channel", rank=1), [spec])
        replace_module(trial, spec.names, module)
    error = fault_in_training(trial, lambda model: feed(model, feed.resized(batch, 2)))
    if isinstance(error, ReadOnlyWeightError):
        raise CalibrationError(
            f"in training mode the model writes into a layer's weight, which it will not have once it is compressed: "
            f"{error}; {_CURE}"
        ) from error


def fault_in_training(model: nn.Module, run: Callable[[nn.Module], Any]) -> Exception | None:
    """What a model, which is changed by it, raises where it is run in training mode."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run(model.train())
    except Exception as error:  # a model may raise anything
        return error
    return None


def asks_for_mode(model: nn.Module) -> bool:
    """Whether modules that are not torch's read ``training``."""
    held = (value for kind in own_kinds(model) for value in vars(kind).values())
    return any("training" in names_in(value.__code__) for value in held if isinstance(value, types.FunctionType))
