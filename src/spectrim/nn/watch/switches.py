"""Switches of torch and Python that belong to a thread or the process, and that a forward pass may turn for itself.

Passes that wait side by side in one thread have their own: without that, one would go on as another has set them, and
what the last one took for the state before would be left behind.
"""

from __future__ import annotations

import contextlib
import warnings
from asyncio import events
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._C import _autograd
from torch.autograd import graph
from torch.backends import cuda, mha

from spectrim.nn.watch.chance import draws_kept


class _Switch(NamedTuple):
    get: Callable[[], Any]
    set: Callable[[Any], object]


def _casting(device: str) -> _Switch:
    def put(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, value[0])
        torch.set_autocast_dtype(device, value[1])

    return _Switch(lambda: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)), put)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _saving() -> tuple[Sequence[Any], str | None]:
    """Hooks on what is saved for gradients, outermost first, and why there may be none, if so."""
    hooks: list[Any] = []
    while (hook := _autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.insert(0, hook)
        _autograd._pop_saved_tensors_default_hooks()
    for hook in hooks:
        _autograd._push_saved_tensors_default_hooks(*hook)
    return hooks, _autograd._saved_tensors_hooks_get_disabled_error_message()


def _save(value: tuple[Sequence[Any], str | None]) -> None:
    hooks, refused = value
    for _ in _saving()[0]:
        _autograd._pop_saved_tensors_default_hooks()
    _autograd._saved_tensors_hooks_enable()
    for hook in hooks:
        _autograd._push_saved_tensors_default_hooks(*hook)
    if refused is not None:
        _autograd._saved_tensors_hooks_disable(refused)


def _anomalies() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _attribute(holder: Any, name: str) -> _Switch:
    return _Switch(lambda: getattr(holder, name), lambda value: setattr(holder, name, value))


_SWITCHES = (
    _Switch(torch.is_grad_enabled, torch.set_grad_enabled),
    _Switch(_saving, _save),
    _attribute(graph, "_allow_mutation_on_saved_tensors_enabled"),
    _Switch(_anomalies, lambda value: torch.set_anomaly_enabled(*value)),
    _Switch(torch._C._is_multithreading_enabled, torch._C._set_multithreading_enabled),
    _Switch(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *(_casting(kind) for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)),
    _Switch(torch.get_default_dtype, torch.set_default_dtype),
    _Switch(torch.get_num_threads, torch.set_num_threads),
    _Switch(_deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
    _Switch(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    _Switch(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    _Switch(cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    _Switch(cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    _Switch(cuda.math_sdp_enabled, cuda.enable_math_sdp),
    _Switch(cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    _Switch(mha.get_fastpath_enabled, mha.set_fastpath_enabled),
    *(_attribute(torch.backends.cudnn, name) for name in ("benchmark", "deterministic")),
    _attribute(warnings, "filters"),
    _Switch(events._get_running_loop, events._set_running_loop),
)


@contextlib.contextmanager
def switches_kept(generators: Iterable[Any]) -> Iterator[None]:
    """All are afterwards as they were, generators too, whatever a pass that goes on meanwhile leaves them as."""
    before = [switch.get() for switch in _SWITCHES]
    try:
        with draws_kept(generators):
            yield
    finally:
        for switch, value in zip(_SWITCHES, before, strict=True):
            if switch.get() != value:
                switch.set(value)


@contextlib.contextmanager
def quiet_derivatives() -> Iterator[None]:
    """Derivatives of what a network gives, without torch's word that its own hooks of backward passes fire late.

    They do where the first layers' inputs take no gradients, which whoever calls us has not asked for.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        yield


@contextlib.contextmanager
def switches_of_pass(generators: Iterable[Any]) -> Iterator[None]:
    """The same for a pass while others go on. Inference mode, which cannot be set, is left and entered again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(switches_kept(generators))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        yield
