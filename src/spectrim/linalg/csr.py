"""Products with a sparse matrix in compressed rows (CSR), on the CPU.

Of the ways to multiply that torch offers, ``W_csr @ x^T`` with 32-bit indices is the fast one: MKL has a kernel for it
that takes several columns of a row-major ``x^T`` at a time, while ``x @ W^T`` with either layout runs single numbers
and is some 30 times slower. One or two rows of ``x`` are multiplied one after the other as vectors.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.float64)
"""That MKL multiplies."""
_VECTORS = 2  # rows that are faster one after the other than together


def is_available() -> bool:
    """Whether this torch multiplies CSR matrices on the CPU fast, which takes MKL."""
    return torch.backends.mkl.is_available()


def pack(weight: Tensor) -> Tensor:
    """The non-zero entries of a matrix ``[o, i]`` in CSR, with 32-bit indices where they suffice."""
    # A tensor made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        packed = weight.detach().to_sparse_csr()
        starts, columns = packed.crow_indices(), packed.col_indices()
        if columns.numel() < 2**31:
            starts, columns = starts.int(), columns.int()
        return torch.sparse_csr_tensor(starts, columns, packed.values(), tuple(weight.shape), check_invariants=False)


def linear(packed: Tensor, x: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
    """``x @ W^T + bias``, without gradients.

    Parameters
    ----------
    packed
        ``W`` as :func:`pack` gives it, ``[o, i]``.
    x
        ``[..., i]``.
    bias
        ``[o]`` or None.
    onto
        ``[..., o]``: the result is added to it in place, and it is returned.
    """
    outputs, inputs = packed.shape
    flat = x.reshape(-1, inputs)
    rows = flat.shape[0]
    if onto is not None and not onto.is_contiguous():
        return onto.add_(linear(packed, x, bias))
    out = x.new_empty(rows, outputs) if onto is None else onto.view(rows, outputs)
    if rows <= _VECTORS:
        if onto is None:
            out.zero_() if bias is None else out.copy_(bias)
        elif bias is not None:
            out.add_(bias)
        for line, seen in zip(out.unbind(), flat.contiguous().unbind(), strict=True):
            torch.addmv(line, packed, seen, out=line)
    else:
        product = (packed @ flat.t()).t()
        if onto is not None:
            out.add_(product)
            if bias is not None:
                out.add_(bias)
        elif bias is None:
            out.copy_(product)
        else:
            torch.add(product, bias, out=out)
    return out.view(*x.shape[:-1], outputs) if onto is None else onto


def conv2d(
    packed: Tensor,
    x: Tensor,
    bias: Tensor | None,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    onto: Tensor | None = None,
) -> Tensor:
    """A convolution padded with zeros and without groups, without gradients: patches times the unfolded weight.

    Sample by sample, so that no more than one sample's patches are in memory and each product is written where it
    belongs.

    Parameters
    ----------
    packed
        The weight as a matrix ``[o, i * kh * kw]``, as :func:`pack` gives it.
    x
        ``[n, i, h, w]``.
    bias
        ``[o]`` or None.
    onto
        ``[n, o, h', w']``: the result is added to it in place, and it is returned.

    Returns
    -------
    Tensor
        In the memory format of ``x``.
    """
    if onto is not None and not onto.is_contiguous():
        return onto.add_(conv2d(packed, x, bias, kernel, stride, padding, dilation))
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    shape = (x.shape[0], packed.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes))
    out = x.new_empty(shape) if onto is None else onto
    if onto is None:
        out.zero_() if bias is None else out.copy_(bias[:, None, None])
    elif bias is not None:
        out.add_(bias[:, None, None])
    pointwise = (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0)
    for seen, maps in zip(x.unbind(), out.flatten(2).unbind(), strict=True):
        columns = seen.flatten(1) if pointwise else F.unfold(seen, kernel, dilation, padding, stride)
        torch.addmm(maps, packed, columns, out=maps)
    if onto is None and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return out.contiguous(memory_format=torch.channels_last)
    return out
