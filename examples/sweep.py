"""Several budgets from one calibration: find, calibrate and tabulate once, then select and apply for each.

    python examples/sweep.py

Selecting takes no data and no network: only applying a plan runs the model again.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import spectrim as st
from spectrim.report import accuracy

BUDGETS = (0.8, 0.6, 0.4, 0.25)

torch.manual_seed(0)
data = load_digits()
images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
batches = list(zip(images.split(100), labels.split(100), strict=True))
train, test = batches[4:], batches[:4]

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))  # yours
st.fine_tune(model, train, epochs=6, lr=0.1)  # stands for the training that yours has behind it

sites = st.calibrate(model, st.find(model), train)
sites = st.sensitivity(model, sites, train)
table = st.tabulate(sites)

print(f"{'budget':>7} {'MACs':>8} {'parameters':>11} {'accuracy':>9}")
print(f"{'dense':>7} {table.dense['macs']:>8,.0f} {table.dense['parameters']:>11,.0f} {accuracy(model, test):>8.2f}%")
for share in BUDGETS:
    plan = st.select(table, st.Budget(macs=share))
    small = st.apply(model, sites, plan, train)  # with batches, layers are fitted to what those before them deliver
    cost = plan.costs
    print(f"{share:>7.0%} {cost['macs']:>8,.0f} {cost['parameters']:>11,.0f} {accuracy(small, test):>8.2f}%")
