"""Switches of torch and Python that belong to a thread or the process, and that a forward pass may turn for itself.

Passes that wait side by side in one thread have their own: without that, one would go on as another has set them, and
what the last one took for the state before would be left behind.
"""

from __future__ import annotations

import contextlib
import warnings
from asyncio import events
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.backends import cuda, mha


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


_SWITCHES = (
    _Switch(torch.is_grad_enabled, torch.set_grad_enabled),
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
    _Switch(lambda: warnings.filters, lambda value: setattr(warnings, "filters", value)),
    _Switch(events._get_running_loop, events._set_running_loop),
)


@contextlib.contextmanager
def switches_kept() -> Iterator[None]:
    """All are afterwards as they were, whatever a pass that goes on meanwhile leaves them as."""
    before = [switch.get() for switch in _SWITCHES]
    try:
        yield
    finally:
        for switch, value in zip(_SWITCHES, before, strict=True):
            if switch.get() != value:
                switch.set(value)


@contextlib.contextmanager
def switches_of_pass() -> Iterator[None]:
    """The same for a pass while others go on. Inference mode, which cannot be set, is left and entered again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(switches_kept())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        yield
