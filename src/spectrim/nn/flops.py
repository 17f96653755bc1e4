"""Counting what a whole model computes, attention on the CPU included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """torch's counter, silent, with the attention kernel of the CPU, which torch leaves out."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops})


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of attention on shapes ``[batch, heads, length, size]``, which torch counts on GPUs only."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
