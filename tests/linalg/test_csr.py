from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spectrim.linalg import csr

pytestmark = pytest.mark.skipif(not csr.is_available(), reason="this torch has no fast CSR products")
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.fixture(params=MODES)
def mode(request):
    with MODES[request.param]():
        yield


def sparse(*shape, density=0.2, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype) * (torch.rand(*shape) < density)


def test_indices_have_32_bits_and_zeros_are_left_out():
    weight = sparse(9, 7)
    packed = csr.pack(weight)
    assert packed.crow_indices().dtype == packed.col_indices().dtype == torch.int32
    assert packed.values().numel() == int((weight != 0).sum())
    assert torch.equal(packed.to_dense(), weight)


def test_what_is_packed_in_inference_mode_can_be_used_outside():
    weight = sparse(6, 7)
    with torch.inference_mode():
        packed = csr.pack(weight)
    assert not packed.is_inference()
    x = torch.randn(4, 7)
    with torch.no_grad():
        torch.testing.assert_close(csr.linear(packed, x, None), x @ weight.t())


@pytest.mark.table
@pytest.mark.parametrize("dtype", csr.DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 7), (3, 7), (2, 3, 7), (0, 7)])
def test_linear(mode, dtype, density, shape):
    weight, bias, x = (
        sparse(5, 7, density=density, dtype=dtype),
        torch.randn(5, dtype=dtype),
        torch.randn(shape).to(dtype),
    )
    packed = csr.pack(weight)
    for b in (bias, None):
        wanted = F.linear(x, weight, b)
        given = csr.linear(packed, x, b)
        assert given.is_contiguous()
        torch.testing.assert_close(given, wanted)
        onto = torch.randn_like(wanted)
        total = onto + wanted
        assert csr.linear(packed, x, b, onto) is onto
        torch.testing.assert_close(onto, total)


def test_linear_with_inputs_and_outputs_laid_out_otherwise(mode):
    weight, bias = sparse(5, 7), torch.randn(5)
    packed = csr.pack(weight)
    for rows in (1, 6):
        x = torch.randn(7, rows).t()
        torch.testing.assert_close(csr.linear(packed, x, bias), F.linear(x, weight, bias))
        onto = torch.randn(5, rows).t()
        total = onto + F.linear(x, weight, bias)
        csr.linear(packed, x, bias, onto)
        torch.testing.assert_close(onto, total)


CONVOLUTIONS = {
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "pointwise": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "pointwise-strided": ((1, 1), (2, 2), (0, 0), (1, 1)),
    "pointwise-padded": ((1, 1), (1, 1), (1, 0), (1, 1)),
    "oblong": ((2, 3), (2, 1), (0, 2), (1, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions(mode, name, samples, layout):
    kernel, stride, padding, dilation = CONVOLUTIONS[name]
    weight, bias = sparse(6, 4, *kernel), torch.randn(6)
    packed = csr.pack(weight.flatten(1))
    x = torch.randn(samples, 4, 8, 7).contiguous(memory_format=layout)
    for b in (bias, None):
        wanted = F.conv2d(x, weight, b, stride, padding, dilation)
        given = csr.conv2d(packed, x, b, kernel, stride, padding, dilation)
        torch.testing.assert_close(given, wanted)
        assert given.is_contiguous(memory_format=layout) or not samples
        onto = torch.randn_like(wanted)
        total = onto + wanted
        assert csr.conv2d(packed, x, b, kernel, stride, padding, dilation, onto) is onto
        torch.testing.assert_close(onto, total)
