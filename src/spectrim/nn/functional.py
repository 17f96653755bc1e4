"""Run a layer with another weight than its own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from spectrim.network.layer import LayerSpec

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def run(host: Any, spec: LayerSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a plain layer, the host, would answer with this weight (in torch's layout) and this bias."""
    if not spec.kernel:
        return F.linear(x, weight, bias)
    if spec.transposed:
        up = _TRANSPOSED[len(spec.kernel)]
        return up(x, weight, bias, host.stride, host.padding, host.output_padding, host.groups, host.dilation)
    # torch's own way to run a convolution with another weight: it knows every padding.
    return host._conv_forward(x, weight, bias)
