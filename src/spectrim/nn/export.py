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
        The difference found, on the example and on a batch of another size.

    Raises
    ------
    ExportError
        If the model cannot be exported, or the program computes something else.
    OSError
        If the file cannot be written: there is no such folder, or it is full or read-only.
    """
    check_place(path)
    with _called_with(model, example, dynamic_batch) as (args, kwargs):
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
    with _called_with(model, example, dynamic_batch) as (args, kwargs):
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
def _called_with(model: nn.Module, example: Any, dynamic_batch: bool) -> Iterator[tuple[Any, Any]]:
    """Arguments of a model in evaluation mode, which is left as it was found. Warnings of exporters are dropped."""
    with evaluating(model), quiet_exporter(FutureWarning, DeprecationWarning):
        args, kwargs = _inputs(model, example, dynamic_batch)
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


def _inputs(model: nn.Module, example: Any, dynamic: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = arguments(model, example)
    if any(not tensor.numel() for tensor in tensors([*args, *kwargs.values()])):
        raise ExportError("the example is empty: it holds no sample; give a batch of inputs as the model takes them")
    # Export takes a first axis of length one for a constant.
    return (resized(args, 2), resized(kwargs, 2)) if dynamic else (args, kwargs)


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

        names = list(inspect.signature(model.forward).parameters)
        shapes = {**{n: _axes(a) for n, a in zip(names, args, strict=False)}, **_axes(kwargs)}
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be exported{' with a dynamic batch' if dynamic else ''}: {error}"
        ) from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            # Lines and paths of the user's source, which a file that is shipped should not tell.
            node.meta.pop("stack_trace", None)
    return program


def _difference(model: nn.Module, args: Any, kwargs: Any, run: Any, dynamic: bool) -> float:
    """Largest deviation relative to the largest output, on the example and, if dynamic, on three samples."""
    worst = 0.0
    for size in (None, 3) if dynamic else (None,):
        a, k = (args, kwargs) if size is None else (resized(args, size), resized(kwargs, size))
        with drawn_from(0):
            wanted = [dense(each) for each in tensors(model(*copied(a), **copied(k)))]
        with drawn_from(0):
            # ONNX knows complex numbers by their parts.
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
                raise ExportError(f"the exported model returns shape {tuple(g.shape)}, the model {tuple(w.shape)}")
            if w.numel():
                worst = max(worst, _relative(w.cpu().double(), g.cpu().double()))
    return worst


def _relative(wanted: Tensor, given: Tensor) -> float:
    # Equal infinities, as masks give, are no difference; NaN anywhere is.
    gap = float(torch.where(wanted == given, 0.0, (wanted - given).abs()).max())
    scale = float(torch.where(wanted.isfinite(), wanted.abs(), 0.0).max())
    return math.inf if math.isnan(gap) else gap / max(scale, 1e-12)


def _accept(worst: float, tolerance: float, what: str) -> None:
    if not worst <= tolerance:
        raise ExportError(
            f"{what} differs from the model by {worst:.2e} of its largest output (allowed {tolerance:.0e})"
        )
