"""Whole models measured: latency side by side, and peak memory of inference."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.cost.latency import Latency
from spectrim.cost.latency import device_name as device_name
from spectrim.cost.rounds import Rounds, Timing, torch_threads, waiter
from spectrim.cost.rounds import Speed as Speed
from spectrim.cost.runtimes import Runtime as Runtime
from spectrim.cost.runtimes import checked_run
from spectrim.cost.runtimes import runtime_of as runtime_of
from spectrim.errors import ExportError
from spectrim.nn.copying import copy_model
from spectrim.nn.parameters import modes_kept, parameters_of
from spectrim.nn.sparse.kernels import choose_kernels
from spectrim.nn.watch.contents import contents_kept
from spectrim.nn.watch.nesting import copied
from spectrim.nn.watch.state import ALONE, kept, left_as_found
from spectrim.progress import Steps, reports_steps, told

_MOST = 1000  # repeats of models that are timed for so many seconds at least
_REASON = 200  # characters of what another library says that are passed on

# How rounds of timing are told: a function of how many are done and of how many, True for a bar.
Told = Steps | bool | None


@reports_steps
def measure_latency(
    models: Mapping[str, nn.Module],
    example: Any,
    *,
    repeats: int = 30,
    warmup: int = 3,
    threads: int | None = None,
    runtime: Runtime | str = "eager",
    seconds: float = math.inf,
    least: float = 0.0,
    progress: Told = None,
) -> dict[str, Timing]:
    """Time models side by side: in each repeat every model runs once, so that a busy moment hits all of them.

    How two of them compare is :meth:`spectrim.cost.rounds.Speed.of` of their timings.

    The models run in evaluation and inference mode and are left as they were found: the mode of each of their modules,
    and what passes write into buffers, caches and weights, which each pass finds as the first one did.

    Parameters
    ----------
    models
        By the name that the result uses. They must be on one device, and in the memory format to be measured.
    example
        One batch: a tensor, a tuple of positional arguments or a dict of keyword arguments, on the models' device.
    repeats, warmup
        Timed and untimed runs of each model.
    threads
        Of the CPU's operators; None leaves the number as it is.
    runtime
        What runs the models, as for :class:`spectrim.Latency`. Each is exported or compiled before the first repeat.
    seconds
        After which no further repeat is begun; three are made in any case.
    least
        Seconds that repeats go on for, so that fast models are compared as surely as slow ones; in up to 1,000 repeats.
    progress
        True for a bar, or a function called with the repeats done and their number.

    Raises
    ------
    ValueError
        For no model or fewer than one repeat.
    ExportError
        If a model cannot be exported or compiled for the runtime; the message says why.
    """
    if not models or repeats < 1:
        raise ValueError(
            f"measuring needs a model and at least one repeat; got {len(models)} models, repeats={repeats}"
        )
    args, kwargs = called_with(example)
    rounds = Rounds(repeats, most=max(repeats, _MOST) if least else None, warmup=warmup, budget=seconds, least=least)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        put_back = {name: stack.enter_context(_evaluating(model, args, kwargs)) for name, model in models.items()}
        stack.enter_context(torch.inference_mode())
        wait = {name: waiter(_device(model)) for name, model in models.items()}
        runs = {name: ready(model, example, runtime) for name, model in models.items()}
        for turn in rounds:
            # In another order each time: the first to run finds the caches as the last has left them.
            for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
                # Each has its own inputs, which the model may write into.
                own, named = copied(args), copied(kwargs)
                put_back[name]()
                wait[name]()
                rounds.begin(name)
                run(*own, **named)
                wait[name]()
                rounds.end(name)
            if turn >= 0:
                told(progress)(min(turn + 1, repeats), repeats)
    return {name: rounds[name] for name in models}


def peak_memory(model: nn.Module, example: Any) -> int:
    """Most bytes that one inference holds at a time above the model and its input: activations, output, workspaces.

    On the CPU the allocations that ``torch.profiler`` records are added up, which covers what torch's allocator hands
    out, also inside operators. On a GPU it is what the caching allocator reports.
    """
    args, kwargs = called_with(example)
    device = _device(model)
    with _evaluating(model, args, kwargs) as put_back, torch.inference_mode():
        model(*copied(args), **copied(kwargs))  # what is made once and kept does not count
        put_back()
        call = functools.partial(model, *copied(args), **copied(kwargs))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        with _muted():
            profile.start()
        try:
            output = call()
        finally:
            with _muted():
                profile.stop()
        del output
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        if not path.exists():  # torch itself only logs it
            raise OSError(errno.ENOSPC, "the profiler cannot write there; TMPDIR names another folder", str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], index, event["args"]["Bytes"])
        for index, event in enumerate(events)
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    )
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def same_layers(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models are made of the same modules with tensors of the same shapes, so that they take as long."""

    def made_of(model: nn.Module) -> list[Any]:
        modules = [(name, type(module), module.extra_repr()) for name, module in model.named_modules()]
        return [*modules, *((name, t.shape, t.dtype, t.stride()) for name, t in model.state_dict().items())]

    return made_of(first) == made_of(second)


def called_with(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that an example stands for. Raises TypeError for what is none."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise TypeError(
        f"example is a {type(example).__name__}; expected one batch as a tensor, a tuple of positional arguments or a "
        "dict of keyword arguments"
    )


def ready(model: nn.Module, example: Any, runtime: Runtime | str) -> Callable[..., object]:
    """A model as a runtime runs it, in evaluation and inference mode, on batches of the shapes of an example.

    Raises ExportError if it cannot be exported or compiled, with the reason, and TypeError if a runtime of a user's own
    returns what cannot be called with the inputs.
    """
    args, kwargs = called_with(example)
    how = runtime_of(runtime)
    try:
        with _in_evaluation(model), kept(model), torch.inference_mode():
            run: Any = how.ready(model, copied(args), copied(kwargs))
    except Exception as error:  # of other libraries: anything
        first = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "")
        said = f"{type(error).__name__}: {first}"[:_REASON]
        raise ExportError(
            f"{type(model).__name__} cannot be run by {how.name} ({said}): choose another runtime to measure time with"
        ) from error
    return checked_run(how, run, args, kwargs)


def _device(model: nn.Module) -> torch.device:
    for tensor in (*parameters_of(model), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Drop what native code writes to standard error: some builds of the profiler announce each start and stop."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _evaluating(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Evaluation mode for passes on copies of these inputs, each of which finds the model as it was."""
    with _in_evaluation(model), left_as_found(model, args, kwargs) as put_back:
        yield put_back


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    with ALONE, modes_kept(model), contents_kept(model):
        model.eval()
        yield


def as_timed(model: nn.Module, latency: Latency) -> nn.Module:
    """The model in the memory format that is measured; a copy if that is not the plain one."""
    if latency.memory_format == "contiguous":
        return model
    return copy_model(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def as_run(small: nn.Module, example: Any, latency: Latency) -> nn.Module:
    """A compressed model in the memory format that is measured, its sparse layers run by their fastest kernels where
    modules are what runs."""
    small = as_timed(small, latency)
    if latency.runs.runs_modules:
        choose_kernels(small, example, threads=latency.threads)
    return small
