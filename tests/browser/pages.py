"""Reports to open in a browser: of a real compression, and of hundreds of layers with names that are no names."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch
from torch import nn

import spectrim as st
from spectrim.network.choices import DENSE, ChannelsChoice, LowRankChoice, Place, SharedChoice, SumChoice
from spectrim.network.choices import Choice as AnyChoice
from spectrim.network.sites import Skipped
from spectrim.nn.agreement import Agreement
from spectrim.report import (
    Comparison,
    Measure,
    Measured,
    Origin,
    Page,
    Part,
    Score,
    SideBySidePage,
    SweepPage,
    accuracy,
    compare,
    write_report,
)
from spectrim.selection.budget import Budget
from spectrim.selection.candidates import Candidates, Option, Row
from spectrim.selection.plan import Entry, Plan
from spectrim.selection.selectors import lagrangian
from spectrim.selection.trajectory import Record, Trajectory

HOSTILE = ("<script>alert(1)</script>", "a $\\frac{x$ & 'b' \"c\"", "{{ 7 * 7 }}" + "_" * 120, "\u2028\u202eevil")


def _small() -> tuple[nn.Module, list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """A network, batches, and the same with labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        ).eval()
        batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
        labels = [torch.randint(0, 10, (64,)) for _ in batches]
    return model, batches, list(zip(batches, labels, strict=True))


def real(folder: Path) -> Path:
    """A small network that was compressed, compared and written about."""
    model, batches, tested = _small()
    result = st.compress(model, batches, st.Budget(macs=0.5))
    comparison = compare(model, result.model, batches[0][:1], evaluate=lambda net: accuracy(net, tested), repeats=5)
    cost = {"dense": result.plan.dense_costs["macs"], "compressed": result.plan.costs["macs"]}
    measured = [
        Measured(name, cost[name], accuracy(net, tested))
        for name, net in (("dense", model), ("compressed", result.model))
    ]
    return write_report(folder / "real.html", result, title="A small network", comparison=comparison, measured=measured)


def _choice(number: int, how: random.Random) -> AnyChoice:
    rank = how.randint(2, 60)
    unfolding = ("channel", "input", "height-first", "width-first")[number % 4]
    return (
        LowRankChoice(unfolding, rank, True, method="ActivationSVD"),
        SumChoice("channel", rank, 0.05, "unstructured", True, method="LowRankPlusSparse"),
        DENSE,
    )[(number // 4) % 3]


def _table(names: list[str], how: random.Random) -> Candidates:
    rows = []
    for number, name in enumerate(names):
        size = 10 ** how.uniform(4, 6.5)
        dense = Option(DENSE, 0.0, {"macs": 60 * size, "parameters": size, "bytes": 4 * size})
        choice, share = _choice(number, how), how.uniform(0.2, 0.7)
        options = [dense]
        if not choice.is_dense:
            options.append(Option(choice, how.uniform(1e-4, 0.1), {c: share * v for c, v in dense.costs.items()}))
        spectra = {
            f"{method}/{cut}": tuple(slope**k for k in range(64))
            for method, cut, slope in (
                ("ActivationSVD", "channel", 0.8),
                ("ActivationSVD", "width-first", 0.7),
                ("LowRankPlusSparse", "channel", 0.9),
            )
        }
        rows.append(Row(name, "Conv2d 3x3", tuple(options), spectra=spectra))
    return Candidates(tuple(rows), {"macs": 5e6, "parameters": 1e5, "bytes": 4e5}, "weighted output energy")


def _learned(names: tuple[str, ...], steps: int) -> Trajectory:
    full = tuple(16 * (1 + n % 6) for n in range(len(names)))
    records = tuple(
        Record(
            0.01 * 1.4**step,
            {"macs": 1e-6},
            tuple(min(f, (step * (n + 3)) % (f + 1)) for n, f in enumerate(full)),
            tuple("dense" if (step + n) % 17 == 0 else f"channel {step % (2 + n)}" for n in range(len(names))),
            {"macs": 400.0 + 10 * step, "parameters": 300.0},
            0.9**step,
            80.0 + 0.1 * step,
        )
        for step in range(steps)
    )
    return Trajectory(names, full, {"macs": 1000.0, "parameters": 500.0}, {"macs": 600.0}, records)


def large(folder: Path, layers: int = 300) -> Path:
    """Hundreds of layers: groups, channels, sparse parts, learned ranks, and names that are code and signs."""
    how = random.Random(0)
    names = [*HOSTILE, *(f"encoder.layer.{n}.attention.self.query_projection" for n in range(layers - len(HOSTILE)))]
    table = _table(names, how)
    plan = lagrangian(table, Budget(macs=0.7))
    shared = SharedChoice("channel", 24, 24, True, once=True, method="JointSVD")
    group, channels = (
        plan.entries[8:10],
        ChannelsChoice(tuple(range(40)), 64, (Place("stem", "out", 1),), method="PrincipalFilters"),
    )
    joined = Entry(
        "group of " + group[0].site,
        "2 x Linear",
        shared,
        0.02,
        *({c: sum(getattr(e, field)[c] for e in group) for c in group[0].costs} for field in ("costs", "dense_costs")),
        members=tuple(e.site for e in group),
    )
    nothing = dict.fromkeys(plan.costs, 0.0)
    removed = Entry("stem.out", "64 channels", channels, 0.01, nothing, nothing, of_channels=True)
    plan = dataclasses.replace(plan, entries=(removed, *plan.entries[:8], joined, *plan.entries[10:]))
    rows = (
        Measure("accuracy", "%", Score(91.0, 2000), Score(90.6, 2000), "higher"),
        Measure("parameters", "", 3.1e8, 1.4e8),
        Measure("MACs", "MAC", 2e9, 1.2e9),
        Measure("file size", "B", 1.2e9, 5e8),
        Measure("peak memory", "B", 3e7, 3.1e7),
        Measure("latency p50", "ms", 22.0, 24.5),
        Measure("latency p90", "ms", 25.0, 30.5),
    )
    skipped = [
        Skipped(f"{name}.norm", "GroupedConv2d", f"depthwise, {name} has nothing to factor") for name in names[:40]
    ]
    page = Page(
        "Net " + HOSTILE[0],
        plan,
        table,
        Comparison(rows, 1, {"processor": "a processor", "threads": "2"}),
        skipped,
        [
            Measured("dense", table.dense["macs"], Score(91.0, 2000)),
            Measured("compressed", plan.costs["macs"], Score(90.6, 2000)),
            Measured("fine-tuned", plan.costs["macs"], Score(90.9, 2000)),
        ],
        ["A note about " + HOSTILE[2]],
        trajectory=_learned(tuple(names), 60),
        agreement=Agreement(512, 0.083, 0.9512),
        origin=Origin(
            command="spectrim compress ./net.py:build --data cifar10:DIR --budget macs=70% " + "--skip pattern " * 20,
            parts=(
                Part("weights", "weights/" + "x" * 90, "a1" * 32, "the file"),
                Part("test data", "digits", "", "no file"),
            ),
            seeds={"training": 0},
        ),
    )
    return page.write(folder / "large.html")


def bare(folder: Path) -> Path:
    """A plan and nothing else, of three layers."""
    plan = lagrangian(_table(["first", "second", "third"], random.Random(1)), Budget(macs=0.9))
    return Page("A plan", Plan.from_json(plan.to_json())).write(folder / "bare.html")


def swept(folder: Path) -> Path:
    """Networks of several sizes: a front of many dots whose error bars overlap, some of them trained."""
    model, batches, tested = _small()
    sweep = st.sweep(
        model,
        batches,
        evaluate=lambda net: accuracy(net, tested),
        fine_tune=lambda small, file: None,
    )
    return SweepPage("A small network", sweep, ["A note about " + HOSTILE[2]]).write(folder / "sweep.html")


def compared(folder: Path) -> Path:
    """Networks side by side, one of them with a name that is no name."""
    model, batches, tested = _small()
    small = {name: st.compress(model, batches, f"macs={s}%") for name, s in (("half", 50), (HOSTILE[0], 45))}
    found = compare(
        model,
        {name: result.model for name, result in small.items()},
        batches[0][:1],
        evaluate=lambda net: accuracy(net, tested),
        repeats=0,
    )
    plans = {name: result.plan for name, result in small.items()}
    return SideBySidePage("Networks " + HOSTILE[2], found, plans).write(folder / "compared.html")


REPORTS = {"real": real, "large": large, "bare": bare, "sweep": swept, "compared": compared}
