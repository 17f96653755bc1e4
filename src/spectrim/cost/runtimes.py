"""What runs a network where time is measured: torch's own kernels one by one, ``torch.compile``, or ONNX Runtime."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectrim.cost.chains import COPIES, Variant, numel_of, random_layers, variants
from spectrim.network.structure import Chain


@dataclass(frozen=True)
class Runtime(ABC):
    """What turns a network into something that runs. A class of your own needs a ``name`` and :meth:`ready`.

    Attributes
    ----------
    name
        As ``Latency(runtime=...)``, plans and reports call it. Times of other names are kept apart.
    runs_modules
        Whether it calls the modules themselves, so that sparse weights may be multiplied in CSR.
    """

    name: ClassVar[str]
    runs_modules: ClassVar[bool] = False

    @abstractmethod
    def ready(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., object]:
        """What runs a module on inputs of the shapes of these; all that is done once has been done.

        It is called as the module is, with ``*args`` and ``**kwargs`` of those shapes.

        Called in evaluation and inference mode, with as many threads as will be timed. It raises anything if the module
        cannot be run so; :func:`spectrim.nn.timing.ready` says why in a sentence.
        """

    def check(self, device: str, dtype: torch.dtype, memory_format: str) -> None:  # noqa: B027 (nothing to check by default)
        """Raise ImportError where a package or compiler is missing, ValueError for what it cannot run."""

    def facts(self) -> dict[str, Any]:
        """What times hold for, besides the machine and torch."""
        return {"runtime": self.name}

    def ways(self, chain: Chain, pool: Tensor, batch: int, channels_last: bool) -> list[Variant]:
        """How a chain of layers is run alone; the least time counts. Weights and inputs are views of ``pool``.

        Here the chain is a module. Before each call as much memory is read as the copies of
        :func:`spectrim.cost.chains.dense_run` take, so that weights are cold.
        """
        layers, inputs = random_layers(chain, pool, batch, channels_last)
        run = checked_run(self, self.ready(layers, inputs, {}), inputs, {})
        return [Variant(lambda: run(*inputs), chill(chain, pool))]


@dataclass(frozen=True)
class Eager(Runtime):
    """torch's kernels one after the other, as a model runs that nothing was done to."""

    name = "eager"
    runs_modules = True

    def ready(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., object]:
        return module

    def facts(self) -> dict[str, Any]:
        return {}  # as times were written before there were others

    def ways(self, chain: Chain, pool: Tensor, batch: int, channels_last: bool) -> list[Variant]:
        return variants(chain, pool, batch, channels_last)


@dataclass(frozen=True)
class Compiled(Runtime):
    """``torch.compile`` with its default backend.

    Networks are compiled and timed whole. Layers are not timed compiled: each alone would take seconds to compile and
    be charged for the guards of a graph of its own, which a network pays once. Their times are those of the dense
    kernels in eager mode, which is what a compiled graph calls for convolutions and products on a CPU. What is fused
    around them (normalisation, activation, addition) is in no layer's time. A budget in milliseconds is met by the
    compiled network's time.
    """

    name = "compile"

    def check(self, device: str, dtype: torch.dtype, memory_format: str) -> None:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if torch.device(device).type == "cpu" and sys.platform != "win32" and shutil.which(compiler) is None:
            raise ImportError(
                f"runtime='compile' needs a C++ compiler, and there is no {compiler}: install one (g++ on Debian and "
                "Ubuntu), or let the environment variable CXX name it"
            )

    def ready(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., object]:
        def call(*inputs: Any, **named: Any) -> object:
            return module(*inputs, **named)

        # torch keeps what it compiled by code object, and runs eagerly, without a word, what has been compiled too
        # often. A code object of its own has no past.
        code = call.__code__.replace(co_firstlineno=id(module) % 2**31)
        fresh = types.FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)
        run = torch.compile(fresh, dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20):
            run(*args, **kwargs)
        return run

    def ways(self, chain: Chain, pool: Tensor, batch: int, channels_last: bool) -> list[Variant]:
        return variants(chain, pool, batch, channels_last)[:1]


@dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU, with as many threads as torch has. Networks are exported by ``torch.onnx``.

    A chain of layers is a session of its own, with nothing before and behind it. In a network ONNX Runtime folds
    normalisation and activation into the layer before them, which takes no longer; between two layers it may change
    the order in memory, which takes longer, and is in no layer's time.
    """

    name = "onnxruntime"

    def check(self, device: str, dtype: torch.dtype, memory_format: str) -> None:
        for package in ("onnxruntime", "onnx", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"runtime='onnxruntime' needs {package}: pip install 'spectrim[export]'")
        if torch.device(device).type != "cpu":
            raise ValueError(f"runtime='onnxruntime' runs on the CPU, and device is {device!r}: write device='cpu'")
        if dtype not in (torch.float16, torch.float32, torch.float64):
            raise ValueError(f"runtime='onnxruntime' takes no {dtype}: convert the model, as model.float()")
        if memory_format != "contiguous":
            raise ValueError(
                f"runtime='onnxruntime' has its own order in memory, and none that is {memory_format!r}: leave "
                "memory_format out"
            )

    def facts(self) -> dict[str, Any]:
        import onnxruntime

        return {"runtime": self.name, "onnxruntime": onnxruntime.__version__}

    def ready(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., object]:
        from spectrim.cost.onnx_sessions import exported

        return exported(module, args, kwargs)

    def ways(self, chain: Chain, pool: Tensor, batch: int, channels_last: bool) -> list[Variant]:
        from spectrim.cost.onnx_sessions import chain_session

        layers, inputs = random_layers(chain, pool, batch, channels_last)
        run = chain_session(chain, layers, inputs)
        return [Variant(run, chill(chain, pool))]


RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (Eager(), Compiled(), OnnxRuntime())}
"""By name. :func:`register` adds to them."""


def register(runtime: Runtime) -> Runtime:
    """Let a runtime be meant by its name, as in ``Latency(runtime="mine")``.

    Raises
    ------
    TypeError
        If it is no runtime, or has no name.
    ValueError
        If there is one of another class by that name.
    """
    runtime = _instance(runtime)
    if type(RUNTIMES.get(runtime.name, runtime)) is not type(runtime):
        raise ValueError(f"there is a runtime {runtime.name!r} already: choose another name")
    RUNTIMES[runtime.name] = runtime
    return runtime


def runtime_of(runtime: Runtime | str) -> Runtime:
    """A runtime, or the one of that name.

    Raises
    ------
    TypeError, ValueError
        For anything else; the message quotes it.
    """
    if not isinstance(runtime, str):
        return _instance(runtime)
    if runtime not in RUNTIMES:
        raise ValueError(
            f"runtime {runtime!r} is not known: give one of {', '.join(RUNTIMES)}, or a Runtime of your own"
        )
    return RUNTIMES[runtime]


def _instance(runtime: Any) -> Runtime:
    """A runtime that has a name.

    Raises
    ------
    TypeError
        For anything else.
    """
    if isinstance(runtime, type) and issubclass(runtime, Runtime):
        raise TypeError(
            f"runtime is the class {runtime.__name__}, and an instance of it is needed: write {runtime.__name__}()"
        )
    if not isinstance(runtime, Runtime):
        raise TypeError(f"runtime is {runtime!r}: expected one of {', '.join(RUNTIMES)}, or a Runtime")
    name = getattr(runtime, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"the runtime {type(runtime).__name__} has no name to keep its times by: write name = 'mine' in the class"
        )
    return runtime


def checked_run(runtime: Runtime, run: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., object]:
    """What :meth:`Runtime.ready` returned.

    Raises
    ------
    TypeError
        If it cannot be called with those inputs.
    """
    cure = "return a function that is called with the inputs, as the module is"
    if not callable(run):
        raise TypeError(f"ready of the runtime {runtime.name!r} returned {run!r:.80}: {cure}")
    try:
        signature = inspect.signature(run)
    except (TypeError, ValueError):  # some that are written in C tell nothing
        return run
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"ready of the runtime {runtime.name!r} returned a function of {signature}, which does not take the "
            f"inputs ({error}): {cure}"
        ) from None
    return run


def chill(chain: Chain, pool: Tensor) -> Callable[[], object]:
    """What makes the weights of a chain cold that does not take turns with copies of them."""
    between = (COPIES - 1) * numel_of(chain)
    return lambda: pool[:between].sum()
