"""Ways to multiply with the sparse weight of a layer, and the packed form that each needs."""

from __future__ import annotations

import enum
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.cost.chains import csr_product
from spectrim.linalg import csr
from spectrim.linalg.patterns import NofM, Pattern
from spectrim.network.layer import LayerSpec

Product = Callable[..., Tensor]
"""``(packed, x, bias, onto=None)``: the layer's response, added to ``onto`` if that is given, without gradients."""


class Kernel(enum.Enum):
    """How a layer with a sparse weight is multiplied in evaluation, when no gradients are wanted.

    Whatever the packed kernels do not take - another dtype or device, gradients, autocast, compilers and exporters -
    is multiplied as ``DENSE``. Kernels differ in rounding, and in what zeros of the weight make of infinite inputs:
    0 or NaN.
    """

    DENSE = "dense"
    """The weight with its zeros, by the kernels of a dense layer."""
    CSR = "csr"
    """Compressed rows, on the CPU in float32 and float64: linear layers, and convolutions over two axes without groups
    that pad with zeros."""
    SEMI_STRUCTURED = "2:4"
    """The sparse tensor cores of a GPU (compute capability 8.0 and up), in float16 and bfloat16: linear layers with the
    pattern 2:4, outputs a multiple of 32 and inputs of 64. Its tests are skipped without such a GPU."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight made ready for a kernel, and what it was made from.

    The parameter itself is kept, since an id or an address can be given out again.
    """

    weight: Tensor
    state: tuple[object, ...]
    content: Tensor
    product: Product

    def __call__(self, x: Tensor, bias: Tensor | None, onto: Tensor | None) -> Tensor:
        return self.product(self.content, x, bias, onto)

    @classmethod
    def of(cls, kernel: Kernel, weight: Tensor, mask: Tensor, product: Product) -> Packed:
        """Pack a weight in torch's layout."""
        # What is made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            matrix = weight.flatten(1)
            if kernel is Kernel.CSR:
                content = csr.pack(matrix)
            else:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
                    content = torch.sparse.to_sparse_semi_structured(matrix.contiguous())
        return cls(weight, cls.state_of(kernel, weight, mask), content, product)

    @staticmethod
    def state_of(kernel: Kernel, weight: Tensor, mask: Tensor) -> tuple[object, ...]:
        """What changes whenever weight or mask do."""
        return kernel, weight._version, weight.data_ptr(), weight.dtype, weight.device, mask._version

    def is_of(self, kernel: Kernel, weight: Tensor, mask: Tensor) -> bool:
        """Whether it still says what the weight does."""
        return self.weight is weight and self.state == self.state_of(kernel, weight, mask)


def products(spec: LayerSpec, pattern: Pattern) -> dict[Kernel, Product]:
    """The kernels besides ``DENSE`` that a layer with a sparse weight may be run with, by its shape and pattern."""
    found: dict[Kernel, Product] = {}
    if csr.is_available() and (product := csr_product(spec)) is not None:
        found[Kernel.CSR] = product
    # CUTLASS takes half-precision matrices in pieces of 32 x 64.
    if spec.is_linear and pattern == NofM(2, 4) and not (spec.out_channels % 32 or spec.in_channels % 64):
        found[Kernel.SEMI_STRUCTURED] = semi_structured
    return found


def semi_structured(packed: Tensor, x: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
    """``x @ W^T + bias`` with ``W`` in torch's semi-structured form."""
    # It takes matrices only.
    found = F.linear(x.reshape(-1, x.shape[-1]), packed, bias).reshape(*x.shape[:-1], packed.shape[0])
    return found if onto is None else onto.add_(found)


def takes(kernel: Kernel, weight: Tensor, mask: Tensor) -> bool:
    """Whether a kernel multiplies weights of this dtype on this device."""
    if weight.is_inference() or mask.is_inference():
        return False  # these do not count their changes, so that nothing made from them can be kept
    if kernel is Kernel.CSR:
        return weight.device.type == "cpu" and weight.dtype in csr.DTYPES
    if kernel is Kernel.SEMI_STRUCTURED:
        half = weight.dtype in (torch.float16, torch.bfloat16)
        return half and weight.device.type == "cuda" and _has_sparse_cores(weight.device)
    return True


@torch.no_grad()
def works(kernel: Kernel, product: Product, weight: Tensor, mask: Tensor) -> bool:
    """Whether this build of torch multiplies this weight with a kernel that takes it, which only a trial tells."""
    if kernel is not Kernel.SEMI_STRUCTURED:
        return True
    try:
        Packed.of(kernel, weight, mask, product)(weight.new_zeros(1, weight.shape[1]), None, None)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@functools.cache
def _has_sparse_cores(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def is_plain_call(x: Tensor, spec: LayerSpec, weight: Tensor, bias: Tensor | None, onto: Tensor | None) -> bool:
    """Whether a call is an ordinary one, with tensors of numbers and nobody recording it or asking for gradients."""
    if torch.compiler.is_compiling() or _is_recorded():
        return False
    graded = torch.is_grad_enabled()
    for t in (x, bias, onto):
        if t is None:
            continue
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout is not torch.strided:
            return False
        if t.dtype != weight.dtype or t.device != weight.device or (graded and t.requires_grad):
            return False
    if (graded and weight.requires_grad) or torch.is_autocast_enabled(weight.device.type):
        return False
    return x.numel() > 0 and (spec.is_linear or x.dim() == 4)


def _is_recorded() -> bool:
    """Whether ``torch.jit``, ``torch.func``, forward derivatives or a mode, such as a counter, look at the call."""
    api: Any = torch
    try:
        dual = api.autograd.forward_ad._current_level >= 0
        internals = api._C
        transformed = internals._are_functorch_transforms_active() or internals._len_torch_dispatch_stack() > 0
    except AttributeError:
        # torch tells of these in private only; where it no longer does, the dense weight is always right.
        return True
    return dual or transformed or api.jit.is_tracing()
