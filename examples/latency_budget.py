"""A budget in milliseconds: layers and ranks are timed on this machine, and the finished model beside the dense one.

    python examples/latency_budget.py

Times are kept in the user's cache folder (or SPECTRIM_CACHE), so that a second run measures only what is new.
"""

import torch
from torch import nn

import spectrim as st

SHARE = 0.7  # of the dense model's time
BATCH, THREADS = 64, 1  # a plan for one batch and one thread need not be fast at others

torch.manual_seed(0)
torch.set_num_threads(THREADS)
model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))  # yours
batches = [torch.randn(BATCH, 256) for _ in range(32)]  # yours: real inputs

try:
    result = st.compress(
        model, batches, st.Budget(latency=SHARE), latency=st.Latency(batch=BATCH, threads=THREADS), sensitivity=False
    )
except st.InfeasibleBudgetError as error:  # no plan is that fast on this machine; the error says what is
    print(error)
else:
    print(result.report)
    comparison = st.compare(model, result.model, batches[0], repeats=20, threads=THREADS)
    time = comparison["latency p50"]
    print(f"{time.dense:.3f} ms dense, {time.compressed:.3f} ms compressed: {time.change}{time.spread}")
