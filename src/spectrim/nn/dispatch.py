"""Modes of torch that see operations, without loading torch's compiler for them, which takes some seconds."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import TorchDispatchMode


def _apart(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    hidden = _disable_dynamo(dispatch, recursive=True)

    @functools.wraps(dispatch)
    def function(*args: Any, **kwargs: Any) -> Any:
        return (hidden if "torch._dynamo" in sys.modules else dispatch)(*args, **kwargs)

    return function


class Uncompiled:
    """Has the compiler not look into what a mode does, where the compiler is loaded at all.

    Torch does the same for every mode, and loads the compiler when the first operation is seen.
    """

    __torch_dispatch__: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__torch_dispatch__ = _apart(inspect.unwrap(cls.__torch_dispatch__))


class Mode(Uncompiled, TorchDispatchMode):
    """Sees operations, also those that take functions, as fused attention with a score of one's own."""

    supports_higher_order_operators = True
