"""A user's script with every public verb, as a type checker reads it, strictly: ``make check`` has no error in it.

It is not run.
"""
# pyright: strict

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st
from spectrim.selection.selectors import lagrangian


def accuracy(net: nn.Module) -> float:
    return 1.0


def forward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    out: Tensor = net(batch[0])
    return out


model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
batches = [torch.randn(16, 8) for _ in range(4)]
labelled = [(x, torch.zeros(16, dtype=torch.long)) for x in batches]
loader = DataLoader(TensorDataset(torch.randn(64, 8), torch.zeros(64, dtype=torch.long)), batch_size=16)

# find, couple, calibrate, weigh
sites: st.Sites = st.find(model, skip=["2", nn.Embedding], only=lambda name, module: True)
for skipped in sites.skipped:
    print(skipped.name, skipped.kind, skipped.reason)
sites = st.couple(model, sites, batches[0])
sites = st.calibrate(model, sites, batches, rows=1000, progress=True)
sites = st.calibrate(model, sites, loader)
sites = st.sensitivity(model, sites, batches)
site: st.Site = sites["0"]
grouped: st.Sites = st.group(sites)

# tabulate, select
table: st.Candidates = st.tabulate(sites, [st.ActivationSVD(multiple_of=4), st.WeightSVD()])
table = st.tabulate(sites, st.JointSVD(), costs={"halves": lambda specs: st.parameters(specs) / 2})
table = st.tabulate(sites, costs={"ms": st.Latency(batch=4), "size": st.size_bytes, "work": st.macs})
for row in table:
    name: str = row.site
    for option in row.options:
        error: float = option.error
        choice: st.Choice = option.choice
budgets: list[st.Budget | str | dict[str, float]] = [
    st.Budget(macs=0.5),
    "macs=50%",
    "parameters=1.2M, bytes=10MiB",
    {"macs": 0.5},
]
plan: st.Plan = st.select(table, "macs=50%")
plan = st.select(table, st.Budget(macs=0.5, parameters="60%"))
plan = st.select(table, {"macs": 0.5})
plan = st.select(table, "macs=50%", lagrangian)
cost: float = plan.costs["macs"]
rows: list[dict[str, object]] = plan.rows()
plan.write("plan.json")
plan = st.Plan.read(Path("plan.json"))
for entry in plan:
    sites_of: tuple[str, ...] = entry.sites
    print(entry.site, entry.choice.is_dense)
number: int = len(plan)

# apply, save, load, merge
small: nn.Module = st.apply(model, sites, plan, batches)
small = st.apply(model, sites, plan)
st.save(small, plan, "small.safetensors")
loaded: nn.Sequential | nn.Module = st.load(model, "small.safetensors").eval()
merged: nn.Module = st.merge(small)
how = st.agreement(model, small, batches)
top: float | None = None if how is None else how.top1

# compress
result: st.Result = st.compress(model, batches, budget="macs=50%")
planned: st.Plan = result.plan
result = st.compress(model, loader, st.Budget(macs=0.5, latency="3ms"), latency=st.Latency(batch=8), forward=forward)
result = st.compress(model, batches, {"macs": 0.5}, methods=[st.PrincipalFilters(), st.ActivationSVD()])
result = st.compress(model, batches, "macs=50%", methods="auto", seconds=60, progress=False)
result = st.compress(model, batches, min_agreement=0.99)
result = st.compress(model, batches, max_drop=0.5, evaluate=accuracy, skip="0", guard=True, selector=lagrangian)
candidates: st.Candidates = result.candidates
report_notes: Sequence[str] = result.report.notes
small_model: nn.Module = result.model
print(result, repr(result), result.report)
st.save(result, "small.safetensors")

# sweep, compare, report
found: st.Sweep = st.sweep(model, batches, ("macs", [0.7, 0.5]), folder="sweep", evaluate=accuracy, better="higher")
found = st.sweep(model, batches, ["macs=50%", st.Budget(macs=0.3)])
front = found.front()
point_result: st.Result = found.result(-1)
comparison = st.compare(model, small, batches[0], evaluate=accuracy, repeats=5, threads=1)
ratio: float = comparison["MACs"].ratio
several = st.compare(model, {"half": small, "third": merged}, batches[0])
page: Path = st.write_report("report.html", result, comparison=comparison)

# training
done = st.fine_tune(small, labelled, teacher=model, epochs=2, checkpoint="c.ckpt")
losses: list[float] = [epoch.loss for epoch in done.history]
learned = st.learn_ranks(model, labelled, "macs=50%")
learned_model: nn.Module = learned.model
trajectory: st.Trajectory = learned.trajectory
path = st.budget_path(model, labelled, ["macs=70%", "macs=50%"], skip="0")
optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
carried = st.carry_optimizer(optimizer, small, small)
recommended = st.recommend(sites, st.Energy(0.9))
recommended = st.recommend(sites, st.KL())

# exports, kernels, rules
st.export_onnx(small, batches[0], "net.onnx")
st.export_program(small, batches[0], Path("net.pt2"))
st.choose_kernels(small, batches[0])
st.register_channels(nn.LayerNorm, {"weight": 0, "bias": 0})
try:
    st.select(table, "macs=1%")
except st.InfeasibleBudgetError as wrong:
    print(wrong)
except (st.PlanError, st.ProofError, st.SpectrimError):
    raise
