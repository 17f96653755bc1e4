"""A user's script as a type checker reads it, strictly: ``make check`` has no error in it. It is not run."""
# pyright: strict

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import spectrim as st


def accuracy(net: nn.Module) -> float:
    return 1.0


model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
batches = [torch.randn(16, 8) for _ in range(4)]
result = st.compress(model, batches, "macs=50%", evaluate=accuracy, max_drop=0.5)
smaller: nn.Module = result.model
plan: st.Plan = result.plan
st.save(result, "small.safetensors")
again: nn.Module = st.load(model, Path("small.safetensors"))
sizes = st.sweep(model, batches, ("macs", [0.8, 0.5]), folder="sweep")
costs: list[float] = [point.costs["macs"] for point in sizes]
