"""Export to ``torch.export`` programs and ONNX, each checked against the model before it is kept."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.cost.exporter import quiet_exporter
from spectrim.errors import ExportError, called_as
from spectrim.network.file_kinds import in_utf8
from spectrim.network.files import check_place, replacing
from spectrim.nn.watch.batches import arguments
from spectrim.nn.watch.chance import drawn_from
from spectrim.nn.watch.nesting import copied, dense, rebuilt, resized, tensors
from spectrim.nn.watch.state import evaluating, left_as_found

TOLERANCE = 1e-3
# Batches that a file for any batch is compared on beside the example: what depends on how many samples there are, and
# takes other ways for few and for many, is seen.
_SIZES = (3, 9)
_BAKED = "give dynamic_batch=False for a file that takes batches of the example's size alone"


@called_as(
    "Write export_program(model, example, path); of a result, its .model", model=nn.Module, path=(str, os.PathLike)
)
def export_program(
    model: nn.Module, example: Any, path: str | Path, *, dynamic_batch: bool = True, tolerance: float = TOLERANCE
) -> float:
    """Write a ``torch.export`` program (``.pt2``).

    Parameters
    ----------
    model
        Exported in evaluation mode; its mode is restored.
    example
        A batch: a tensor, a tuple ``(inputs, targets)`` or a mapping, as in calibration.
    path
        Where to write.
    dynamic_batch
        Let the first axis of every input vary.
    tolerance
        Largest difference between program and model allowed, relative to the largest output.

    Returns
    -------
    float
        The difference found: on the example and, where the batch may vary, on three and nine samples made of it.

    Raises
    ------
    ExportError
        If the model cannot be exported, or the program computes something else.
    ValueError
        If the tolerance is no number of at least 0.
    OSError
        If the file cannot be written: there is no such folder, or it is full or read-only.
    """
    check_place(path)
    _check_tolerance(tolerance)
    with _called_with(model, example) as (args, kwargs):
        program = _traced(model, args, kwargs, dynamic_batch)
        run = program.module()
        worst = _difference(model, args, kwargs, lambda a, k: run(*a, **k), dynamic_batch)
        _accept(worst, tolerance, "the exported program")
        # torch's own writer ends the process on a full disk.
        held = io.BytesIO()
        torch.export.save(program, held)
        with replacing(path) as scratch, open(scratch, "wb") as file:
            file.write(held.getbuffer())
    return worst


@called_as("Write export_onnx(model, example, path); of a result, its .model", model=nn.Module, path=(str, os.PathLike))
def export_onnx(
    model: nn.Module, example: Any, path: str | Path, *, dynamic_batch: bool = True, tolerance: float = TOLERANCE
) -> float:
    """Write an ONNX file and check it with onnxruntime on the CPU.

    Parameters, returns and errors as for :func:`export_program`. Needs the extra ``export``.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it and says so less clearly)
    except ImportError as error:
        raise ExportError(f"ONNX export needs {error.name}: pip install 'spectrim[export]'") from error
    check_place(path)
    _check_tolerance(tolerance)
    with _called_with(model, example) as (args, kwargs):
        program = _traced(model, args, kwargs, dynamic_batch)
        try:
            onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:
            raise ExportError(f"{type(model).__name__} cannot be converted to ONNX: {error}") from error
        assert onnx_program is not None
        _forget_origins(onnx_program.model)
        # What fails the check must not lie under the final name, nor replace a good file there.
        with replacing(path) as trial:
            onnx_program.save(trial)
            try:
                with in_utf8(trial) as readable:
                    session = onnxruntime.InferenceSession(str(readable), providers=["CPUExecutionProvider"])
                worst = _difference(model, args, kwargs, lambda a, k: _run_onnx(session, a, k), dynamic_batch)
            except ExportError:
                raise
            except Exception as error:
                raise ExportError(f"onnxruntime cannot run the ONNX file of {type(model).__name__}: {error}") from error
            _accept(worst, tolerance, "the ONNX file")
    return worst


@contextlib.contextmanager
def _called_with(model: nn.Module, example: Any) -> Iterator[tuple[Any, Any]]:
    """Arguments of a model in evaluation mode, which is left as it was found. Warnings of exporters are dropped."""
    with evaluating(model), quiet_exporter(FutureWarning, DeprecationWarning):
        args, kwargs = _inputs(model, example)
        with left_as_found(model, args, kwargs):
            yield args, kwargs


def _forget_origins(model: Any) -> None:
    """Drop what torch notes on every node, which can take as many bytes as the weights of a small network."""
    from onnx_ir.traversal import RecursiveGraphIterator

    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        nodes = list(RecursiveGraphIterator(graph))
        for noted in (
            graph,
            *nodes,
            *graph.inputs,
            *graph.initializers.values(),
            *(v for n in nodes for v in n.outputs),
        ):
            noted.metadata_props.clear()
            noted.doc_string = None


def _run_onnx(session: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    values = [t.detach().cpu().numpy() for t in tensors([*args, *kwargs.values()])]
    names = [i.name for i in session.get_inputs()]
    return [torch.from_numpy(o) for o in session.run(None, dict(zip(names, values, strict=True)))]


def _inputs(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = arguments(model, example)
    if any(not tensor.numel() for tensor in tensors([*args, *kwargs.values()])):
        raise ExportError("the example is empty: it holds no sample; give a batch of inputs as the model takes them")
    return args, kwargs


def _axes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {0: torch.export.Dim.DYNAMIC} if value.dim() else None
    if isinstance(value, Mapping):
        return {k: _axes(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return rebuilt(value, [_axes(v) for v in value])
    return None


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> Any:
    shapes = None
    if dynamic:
        import inspect

        # Export takes a first axis of length one for a constant.
        args, kwargs = resized(args, 2), resized(kwargs, 2)
        names = list(inspect.signature(model.forward).parameters)
        shapes = {**{n: _axes(a) for n, a in zip(names, args, strict=False)}, **_axes(kwargs)}
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        how = f" with a dynamic batch (where that is the reason, {_BAKED})" if dynamic else ""
        raise ExportError(f"{type(model).__name__} cannot be exported{how}: {error}") from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            # Lines and paths of the user's source, which a file that is shipped should not tell.
            node.meta.pop("stack_trace", None)
    return program


def _difference(model: nn.Module, args: Any, kwargs: Any, run: Any, dynamic: bool) -> float:
    """Largest deviation relative to the largest output, on the example and, if dynamic, on batches of other sizes."""
    worst, cure = 0.0, f"; {_BAKED}" if dynamic else ""
    for size in (None, *_SIZES) if dynamic else (None,):
        a, k = (args, kwargs) if size is None else (resized(args, size), resized(kwargs, size))
        with drawn_from(0), _told(f"the model cannot be run {_on(size)}", cure):
            wanted = [dense(each) for each in tensors(model(*copied(a), **copied(k)))]
        # ONNX knows complex numbers by their parts.
        with drawn_from(0), _told(f"the exported model cannot be run {_on(size)}", cure):
            given = [dense(each) for each in tensors(run(a, k))]
        if len(wanted) != len(given):
            raise ExportError(f"the exported model returns {len(given)} tensors, the model {len(wanted)}")
        for w, g in zip(wanted, given, strict=True):
            if bool(w.isnan().any()):
                raise ExportError(
                    "the model's own outputs hold NaN on the example, so that nothing can be compared with them: give "
                    "inputs prepared as in use, or mend the model's weights"
                )
            if w.shape != g.shape:
                returned = f"returns shape {tuple(g.shape)} {_on(size)}, the model {tuple(w.shape)}"
                raise ExportError(f"the exported model {returned}{cure}")
            if w.numel():
                worst = max(worst, _relative(w.cpu().double(), g.cpu().double()))
    return worst


@contextlib.contextmanager
def _told(what: str, cure: str) -> Iterator[None]:
    """Says what failed: what is for any batch may not take one after all."""
    try:
        yield
    except Exception as error:
        raise ExportError(f"{what} ({error}){cure}") from error


def _on(size: int | None) -> str:
    return "on the example" if size is None else f"on {size} samples"


def _relative(wanted: Tensor, given: Tensor) -> float:
    # Equal infinities, as masks give, are no difference; NaN anywhere is.
    gap = float(torch.where(wanted == given, 0.0, (wanted - given).abs()).max())
    scale = float(torch.where(wanted.isfinite(), wanted.abs(), 0.0).max())
    return math.inf if math.isnan(gap) else gap / max(scale, 1e-12)


def _check_tolerance(tolerance: object) -> None:
    if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance!r}: expected a number of at least 0, as {TOLERANCE:g}")


def _accept(worst: float, tolerance: float, what: str) -> None:
    if not worst <= tolerance:
        raise ExportError(
            f"{what} differs from the model by {worst:.2e} of its largest output (allowed {tolerance:.0e})"
        )
