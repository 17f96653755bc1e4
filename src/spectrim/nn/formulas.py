"""What operations compute, as formulas: those that torch's counter of operations does not know.

Counted are products of numbers that are added up: matrix products, convolutions, attention, recurrent layers, bilinear
forms, distances and Fourier transforms. What works on every number alone (activations, normalisation, pooling,
sampling, look-ups) is not, as in torch. A formula gives multiply-accumulates, for the tensors of one call:

- recurrent layers: every matrix of a layer once for each step of each sample, as the same layer written out would;
- bilinear forms: every weight once for each row, whatever the order of the products;
- distances: one a coordinate of each pair, whether they are found by a matrix product or not;
- Fourier transforms: half of the 5 N log2 N operations of a complex transform of length N (Cooley and Tukey 1965), and
  half of that where one side is real.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Formula = Callable[..., float]

# Of operations without a formula: what is known to multiply matrices, and is named as not counted.
_PRODUCTS = re.compile(
    r"linalg_(?!vector_norm|cross|check|diagonal)|cholesky|_mm$|_mm_|mm_v2|matmul|conv|rnn|lstm|gru|attention|linear"
    r"|triangular_solve|lu_solve|ormqr|householder|_svd|eigh?$|lobpcg|attn|gemm|einsum"
)
# Pack or convert weights, or work on each number of a padded or interpolated tensor alone.
_NO_PRODUCTS = re.compile(
    r"_convert_weight|_pack_|convert_element|upsample|(to|from)_mkldnn|_check_errors|backward|_linear_scale"
)
# Custom operations of libraries that look things up, sort or sample.
_KNOWN_SPACES = ("aten", "prim", "prims", "profiler", "inductor", "c10d", "_c10d_functional", "rngprims", "debugprims")
_LOOK_UPS = re.compile(r"torchvision::(nms|roi_|ps_roi_)|quantized::(embedding|add|mul|cat|relu|batch_norm|layer_norm)")


def formula(operation: str) -> Formula | None:
    """What gives the multiply-accumulates of an operation, such as ``"aten::mv"``, called with its arguments."""
    return _FORMULAS.get(operation)


def is_unknown(operation: str) -> bool:
    """Whether an operation without a formula may multiply numbers and add them up."""
    space, _, name = operation.partition("::")
    if space not in _KNOWN_SPACES:
        return not _LOOK_UPS.search(operation)
    return bool(_PRODUCTS.search(name)) and not _NO_PRODUCTS.search(name)


def _rows(x: Tensor) -> int:
    """All axes but the last multiplied; of a nested tensor the lengths of its samples."""
    return sum(lengths) if (lengths := _lengths(x)) else math.prod(x.shape[:-1])


def _lengths(x: Tensor) -> list[int]:
    return x._nested_tensor_size()[:, 0].tolist() if x.is_nested else []


def _onto(count: Formula) -> Formula:
    """The same of what is added to a first argument."""
    return lambda onto, *args, **kwargs: count(*args, **kwargs)


def _first_by_last(first: Tensor, second: Tensor, *_: Any, out: Any, **__: Any) -> float:
    """A product whose second factor holds one column an output: ``[.., k] x [k, n]``."""
    return first.numel() * second.shape[-1]


def _vector(matrix: Tensor, *_: Any, out: Any, **__: Any) -> float:
    return matrix.numel()


def _outer(first: Tensor, second: Tensor, *_: Any, out: Any, **__: Any) -> float:
    return first.numel() * second.numel()


def _packed_linear(x: Tensor, *_: Any, out: Tensor, **__: Any) -> float:
    """A linear layer whose weight cannot be read: all inputs for each output."""
    return x.numel() * out.shape[-1]


def _packed_conv(x: Tensor, weight: Any, *_: Any, out: Tensor, **__: Any) -> float:
    return out.numel() * math.prod(weight.unpack()[0].shape[1:])


def _deformed_conv(x: Tensor, weight: Tensor, *_: Any, out: Tensor, **__: Any) -> float:
    return out.numel() * math.prod(weight.shape[1:])


def _conv_over_time(x: Tensor, weight: Tensor, *_: Any, out: Tensor, **__: Any) -> float:
    return math.prod(out.shape[:2]) * weight.numel()


def _recurrent_layer(x: Tensor, inputs: Tensor, states: Tensor, *_: Any, out: Any, **__: Any) -> float:
    """One layer in one direction."""
    return _rows(x) * (inputs.numel() + states.numel())


def _recurrent(x: Tensor, weights: Sequence[Tensor], *_: Any, out: Any, **__: Any) -> float:
    """All layers and directions."""
    return _rows(x) * sum(w.numel() for w in weights if w.dim() == 2)


def _packed_recurrent(gates: int) -> Formula:
    def count(
        x: Tensor, states: Any, weights: Any, biases: bool, layers: int, dropout: float, train: bool,
        both_ways: bool, *_: Any, out: Any, **__: Any,
    ) -> float:  # fmt: skip
        hidden = (states if isinstance(states, Tensor) else states[0]).shape[-1]
        ways = 2 if both_ways else 1
        inputs = [x.shape[-1], *[ways * hidden] * (layers - 1)]
        return _rows(x) * sum(ways * gates * hidden * (size + hidden) for size in inputs)

    return count


def _cell(x: Tensor, states: Any, inputs: Tensor, recurrent: Tensor, *_: Any, out: Any, **__: Any) -> float:
    return _rows(x) * (inputs.numel() + recurrent.numel())


def _trilinear(
    first: Tensor, second: Tensor, third: Tensor, expand1: Any, expand2: Any, expand3: Any, *_: Any,
    out: Any, **__: Any,
) -> float:  # fmt: skip
    """Three tensors multiplied over the axes of all of them: of a bilinear layer every weight for each row."""
    shapes = []
    for tensor, axes in ((first, expand1), (second, expand2), (third, expand3)):
        shape = list(tensor.shape)
        for axis in axes:
            shape.insert(axis, 1)
        shapes.append(shape)
    return math.prod(torch.broadcast_shapes(*shapes))


def _distances(points: Tensor, *_: Any, out: Tensor, **__: Any) -> float:
    return out.numel() * points.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, out: Any, **__: Any) -> float:
    """Of shapes ``[.., length, size]``."""
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, size: int, heads: int, inputs: Tensor, bias: Any, outputs: Tensor,
    *_: Any, out: Any, **__: Any,
) -> float:  # fmt: skip
    """The fast path of ``nn.MultiheadAttention``: projections and products."""
    return _rows(query) * (inputs.numel() + outputs.numel()) + 2 * _pairs(query) * size


def _pairs(x: Tensor) -> int:
    """Of positions of a sequence, ``[samples, length, size]``."""
    return sum(length**2 for length in _lengths(x)) if x.is_nested else x.shape[0] * x.shape[1] ** 2


def _encoder_layer(
    x: Tensor, size: int, heads: int, inputs: Tensor, in_bias: Any, outputs: Tensor, *rest: Any, out: Any, **__: Any
) -> float:
    """The fast path of ``nn.TransformerEncoderLayer``: attention and the two layers behind it."""
    wide = [t for t in rest if isinstance(t, Tensor) and t.dim() == 2 and t.is_floating_point()][:2]
    return _rows(x) * sum(w.numel() for w in (inputs, outputs, *wide)) + 2 * _pairs(x) * size


def _fourier(share: float) -> Formula:
    def count(x: Tensor, axes: Sequence[int], *_: Any, out: Tensor, **__: Any) -> float:
        # Of a real transform one side has half the length; that of the other counts.
        longer = x if x.numel() > out.numel() else out
        return share * longer.numel() * sum(math.log2(max(longer.shape[axis], 1)) for axis in axes)

    return count


def _sparse_product(sparse: Tensor, dense: Tensor, *_: Any, out: Any, **__: Any) -> float:
    return sparse._nnz() * dense.shape[-1]


# By the names of operations of ``aten``; in place (``_``) an operation counts as it does elsewhere.
_ATEN: dict[Formula, str] = {
    _vector: "mv dot vdot",
    _onto(_vector): "addmv addmv_",
    _onto(_outer): "addr addr_",
    _onto(_first_by_last): "addbmm addbmm_ _addmm_activation",
    _first_by_last: "_int_mm _cslt_sparse_mm",
    _sparse_product: "_sparse_mm",
    _onto(_sparse_product): "_sparse_addmm",
    _packed_linear: "_weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu "
    "_weight_int4pack_mm_with_scales_and_zeros _dyn_quant_matmul_4bit _sparse_semi_structured_linear _grouped_mm "
    "_scaled_grouped_mm mkldnn_linear",
    _conv_over_time: "conv_tbc",
    _recurrent_layer: "mkldnn_rnn_layer",
    _recurrent: "_cudnn_rnn miopen_rnn",
    _packed_recurrent(4): "quantized_lstm",
    _packed_recurrent(3): "quantized_gru",
    _cell: "quantized_lstm_cell quantized_gru_cell quantized_rnn_relu_cell quantized_rnn_tanh_cell",
    _trilinear: "_trilinear",
    _distances: "_cdist_forward _euclidean_dist _pdist_forward",
    _attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable "
    "_scaled_dot_product_attention_math_for_mps",
    _fused_attention: "_native_multi_head_attention",
    _encoder_layer: "_transformer_encoder_layer_fwd",
    _fourier(2.5): "_fft_c2c",
    _fourier(1.25): "_fft_r2c _fft_c2r",
}
_LINEAR = ("", "_relu", "_dynamic", "_relu_dynamic", "_leaky_relu", "_tanh", "_dynamic_fp16", "_relu_dynamic_fp16")
_FORMULAS: dict[str, Formula] = {
    # Of nested tensors: it is taken apart for others.
    "aten::linear": lambda x, weight, bias=None, *, out: out.numel() * weight.shape[-1],
    **{f"aten::{name}": count for count, names in _ATEN.items() for name in names.split()},
    # Whatever its mask leaves out, as of the others.
    "flex_attention": _attention,
    "torchvision::deform_conv2d": _deformed_conv,
    "mkldnn::_linear_pointwise": _packed_linear,
    **{f"quantized::linear{end}": _packed_linear for end in _LINEAR},
    **{f"quantized::conv{n}d{end}": _packed_conv for n in (1, 2, 3) for end in ("", "_relu", "_dynamic")},
}
