"""Networks and chains of layers as sessions of ONNX Runtime; imported where that is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spectrim.cost.chains import Operators
from spectrim.cost.exporter import quiet_exporter
from spectrim.network.layer import LayerSpec
from spectrim.network.structure import Chain

_OPSET = 19  # of which padding that wraps around is a part
_PADDING = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def exported(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """A session that takes what the module takes, in the shapes of these inputs."""
    with quiet_exporter(Warning), torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(module, args, dict(kwargs), strict=False)
        onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
        assert onnx_program is not None
        onnx_program.save(path := Path(folder) / "model.onnx")  # large weights lie beside it
        session = _session(str(path))
    names = [each.name for each in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> Any:
        values = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        return session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})

    run(*args, **kwargs)
    return run


def chain_session(chain: Chain, layers: Operators, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A session that runs a chain of layers with these weights on these inputs."""
    names = [f"x{number}" for number in range(len(inputs))]
    kinds = [helper.np_dtype_to_tensor_dtype(each.numpy().dtype) for each in inputs]
    nodes, weights, last = [], [], names[0]
    for number, (spec, weight, bias) in enumerate(zip(chain, layers.weights, layers.biases, strict=True)):
        tensors = {f"w{number}": weight} | ({} if bias is None else {f"b{number}": bias})
        weights += [numpy_helper.from_array(value.numpy(), name) for name, value in tensors.items()]
        if spec.padding_mode != "zeros":
            before, after = zip(*spec.sides, strict=True)
            pads = np.array([0, 0, *before, 0, 0, *after], dtype=np.int64)
            weights.append(numpy_helper.from_array(pads, f"p{number}"))
            mode = _PADDING[spec.padding_mode]
            nodes.append(helper.make_node("Pad", [last, f"p{number}"], [f"q{number}"], mode=mode))
            last = f"q{number}"
        arguments = [*tensors, last] if spec.looks_up else [last, *tensors]
        nodes.append(helper.make_node(_operator(spec), arguments, [f"y{number}"], **dict(_attributes(spec))))
        last = f"y{number}"
    if len(inputs) > 1:
        nodes.append(helper.make_node("Add", [last, names[1]], ["sum"]))
        last = "sum"
    taken = [
        helper.make_tensor_value_info(name, kind, x.shape) for name, kind, x in zip(names, kinds, inputs, strict=True)
    ]
    number = helper.np_dtype_to_tensor_dtype(layers.weights[0].numpy().dtype)
    outputs = [helper.make_tensor_value_info(last, number, None)]
    graph = helper.make_graph(nodes, "chain", taken, outputs, weights)
    version = helper.find_min_ir_version_for([helper.make_opsetid("", _OPSET)])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=version)
    session = _session(made.SerializeToString())
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return lambda: session.run(None, feeds)


def _operator(spec: LayerSpec) -> str:
    if spec.looks_up:
        return "Gather"
    return "Gemm" if spec.is_linear else "ConvTranspose" if spec.transposed else "Conv"


def _attributes(spec: LayerSpec) -> Iterator[tuple[str, Any]]:
    if spec.looks_up:
        return
    if spec.is_linear:
        yield "transB", 1
        return
    yield from (("kernel_shape", spec.kernel), ("strides", spec.stride), ("dilations", spec.dilation))
    yield "group", spec.groups
    if spec.padding_mode == "zeros":
        before, after = zip(*spec.sides, strict=True)
        yield "pads", [*before, *after]
    if spec.transposed:
        yield "output_padding", spec.output_padding


def _session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Threads that wait for more work would take the cores of what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
