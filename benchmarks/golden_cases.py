"""The cases of the golden set: what is compressed in which way, and what is kept of it (:mod:`benchmarks.golden`).

They use the public names of the package alone, and its documented modules by their paths of version 0.1.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as st
from benchmarks.golden_nets import batches, dense, inputs, labelled


def module(name: str) -> Any:
    """A documented module of the package by its path of version 0.1, which may lead elsewhere by now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"spectrim.{name}")


# What a case leaves.


@dataclass
class Record:
    """JSON values and tensors by name."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def plan(self, plan: st.Plan, name: str = "plan") -> None:
        self.values[name] = json.loads(plan.to_json())

    def table(self, table: st.Candidates, name: str = "table") -> None:
        costs = sorted(table.costs)
        self.values[name] = {
            "costs": costs,
            "fixed": {cost: float(table.fixed[cost]) for cost in costs},
            "unit": table.unit,
            "methods": _plain(table.methods),
            "facts": _plain(table.facts),
            "rows": [
                {
                    "site": row.site,
                    "kind": row.kind,
                    "members": list(row.members),
                    "scale": float(row.scale),
                    "exponent": float(row.exponent),
                    "choices": [_choice(option.choice) for option in row.options],
                    "spectra": sorted(row.spectra),
                }
                for row in table
            ],
        }
        options = [option for row in table for option in row.options]
        spectra = [value for row in table for key in sorted(row.spectra) for value in row.spectra[key]]
        self.numbers([option.error for option in options], f"{name}/errors")
        self.numbers([[option.costs[cost] for cost in costs] for option in options], f"{name}/costs")
        self.numbers(spectra, f"{name}/spectra")

    def model(self, model: nn.Module, x: Tensor, name: str = "model") -> None:
        for key, tensor in model.state_dict().items():
            self.tensors[f"{name}/{key}"] = tensor.detach().contiguous().clone()
        with torch.no_grad():
            self.tensors[f"{name}()"] = model.eval()(x).contiguous().clone()

    def numbers(self, values: Sequence[Any], name: str) -> None:
        self.tensors[name] = torch.tensor(values, dtype=torch.float64)

    def result(self, result: st.Result, x: Tensor, name: str = "") -> None:
        """What :func:`spectrim.compress` and :func:`spectrim.train.learn_ranks` return."""
        self.table(result.candidates, f"{name}table")
        self.plan(result.plan, f"{name}plan")
        self.model(result.model, x, f"{name}model")

    def trajectory(self, trajectory: st.Trajectory, name: str = "trajectory") -> None:
        """The ranks and costs of every C step, without its time."""
        self.values[name] = {
            "full": list(trajectory.full),
            "budget": dict(trajectory.budget),
            "records": [
                {
                    "mu": record.mu,
                    "multipliers": dict(record.multipliers),
                    "ranks": list(record.ranks),
                    "costs": dict(record.costs),
                    "distance": record.distance,
                    "metric": record.metric,
                }
                for record in trajectory.records
            ],
        }


def _choice(choice: st.Choice) -> dict[str, Any]:
    return {"kind": choice.kind, "method": choice.method, "settings": _plain(choice.settings)}


def _plain(value: Any) -> Any:
    """What JSON makes of mappings and tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value


# The cases.

Case = Callable[[Record], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__.replace("_", "-")] = function
    return function


def calibrated(model: nn.Module, data: Iterable[Any], *, weigh: bool = False) -> st.Sites:
    sites = st.calibrate(model, st.find(model), data)
    return st.sensitivity(model, sites, data) if weigh else sites


def carry_out(
    record: Record,
    net: str,
    sites: st.Sites,
    methods: Sequence[st.Method] | None,
    budget: st.Budget,
    name: str = "",
    **options: Any,
) -> st.Plan:
    """Tabulate, select and apply, and keep all three."""
    table = st.tabulate(sites, methods)
    plan = st.select(table, budget)
    record.table(table, f"{name}table")
    apply(record, net, sites, plan, name, **options)
    return plan


def apply(record: Record, net: str, sites: st.Sites, plan: st.Plan, name: str = "", **options: Any) -> nn.Module:
    small = st.apply(dense(net), sites, plan, **options)
    record.plan(plan, f"{name}plan")
    record.model(small, fixed(net), f"{name}model")
    return small


def fixed(net: str) -> Tensor:
    """The inputs that outputs are kept for."""
    return inputs(net, 8, seed=1)


def clock(chains: Sequence[Sequence[Any]], **_: Any) -> list[float]:
    """Milliseconds in step with MACs, and a fixed time for each layer."""
    return [sum(st.macs([spec]) * 1e-5 + 0.01 for spec in chain) for chain in chains]


@case
def weight_svd_without_data(record: Record) -> None:
    net = "convolutions"
    methods = [st.WeightSVD()]
    carry_out(record, net, st.find(dense(net)), methods, st.Budget(parameters=0.5))


@case
def compress_by_default(record: Record) -> None:
    net = "convolutions"
    record.result(st.compress(dense(net), batches(net), st.Budget(macs=0.5)), fixed(net))


@case
def compress_without_sensitivity_or_reconstruction(record: Record) -> None:
    net = "convolutions"
    for sensitivity, reconstruct, name in ((False, True, "fitted/"), (True, False, "weighed/"), (False, False, "")):
        result = st.compress(
            dense(net), batches(net), st.Budget(macs=0.45), sensitivity=sensitivity, reconstruct=reconstruct
        )
        record.result(result, fixed(net), name)


@case
def spatial_unfoldings(record: Record) -> None:
    net, data = "spatial", batches("spatial")
    splits = ("height-first", "width-first", "input")
    methods = [
        st.ActivationSVD(unfoldings=splits, multiple_of=1),
        st.WeightSVD(unfoldings=(*splits, "channel"), multiple_of=2, to_full_rank=True),
    ]
    sites = calibrated(dense(net), data, weigh=True)
    carry_out(record, net, sites, methods, st.Budget(macs=0.35), batches=data)
    carry_out(record, net, sites, [methods[1]], st.Budget(macs=0.35), "weights/", batches=data)
    carry_out(record, net, st.find(dense(net)), [methods[1]], st.Budget(parameters=0.4), "without data/")


@case
def linear_layers(record: Record) -> None:
    net = "perceptron"
    record.result(st.compress(dense(net), batches(net), st.Budget(parameters=0.5, bytes=0.6)), fixed(net))
    sites = calibrated(dense(net), batches(net))
    methods = [st.ActivationSVD(multiple_of=1)]
    carry_out(record, net, sites, methods, st.Budget(macs=0.3, parameters=2000), "ranks/", batches=batches(net))
    wide = [x.double() for x in batches(net)]
    record.result(st.compress(dense(net).double(), wide, st.Budget(macs=0.4)), fixed(net).double(), "float64/")


@case
def grouped_and_transposed_convolutions(record: Record) -> None:
    for net in ("grouped", "transposed"):
        data = batches(net)
        record.result(st.compress(dense(net), data, st.Budget(macs=0.55)), fixed(net), f"{net}/")
        methods = [st.WeightSVD(multiple_of=1)]
        carry_out(record, net, st.find(dense(net)), methods, st.Budget(parameters=0.6), f"{net} without data/")


@case
def convolutions_over_one_and_three_axes(record: Record) -> None:
    for net in ("one axis", "three axes"):
        methods = [st.ActivationSVD(multiple_of=1), st.WeightSVD(multiple_of=1)]
        result = st.compress(dense(net), batches(net), st.Budget(macs=0.5), methods=methods)
        record.result(result, fixed(net), f"{net}/")


@case
def long_patches(record: Record) -> None:
    """A convolution whose statistics are those of slices, and a linear layer with a sketch."""
    net, data = "long patches", batches("long patches", 2)
    sites = calibrated(dense(net), data, weigh=True)
    methods = [st.ActivationSVD(multiple_of=2), st.WeightSVD(multiple_of=2)]
    carry_out(record, net, sites, methods, st.Budget(macs=0.3), "slices/", batches=data)
    sparse = [st.LowRankPlusSparse(densities=(0.0, 0.1, 0.3), ranks=2, turns=8)]
    # Few samples: a sketch is shrunk once where it is renewed.
    carry_out(record, net, sites, sparse, st.Budget(parameters=0.3), "sketch/", batches=[data[0][:10]])


@case
def groups_found(record: Record) -> None:
    net, data = "residual", batches("residual", 2)
    result = st.compress(dense(net), data, st.Budget(parameters=0.35))
    record.values["groups"] = _plain(result.sites.groups)
    record.result(result, fixed(net))
    net, data = "attention", batches("attention")
    sites = st.group(calibrated(dense(net), data, weigh=True))
    record.values["one input/groups"] = _plain(sites.groups)
    methods = [st.JointSVD("left", multiple_of=1), st.JointSVD("right", multiple_of=1), st.ActivationSVD()]
    carry_out(record, net, sites, methods, st.Budget(macs=0.7), "one input/", batches=data)


@case
def groups_by_hand(record: Record) -> None:
    net, data = "residual", batches("residual", 2)
    groups = {
        "wide": ["layer2.1.conv1", "layer2.2.conv1", "layer2.1.conv2"],
        "narrow": ["layer1.0.conv1", "layer1.1.conv2"],
    }
    spatial = ("height-first",)
    plain = st.group(st.find(dense(net)), groups)
    for method in (
        st.JointSVD("both", unfoldings=spatial),
        st.JointSVD("both", 0.25, unfoldings=spatial, first="right"),
        st.JointSVD("left"),
        st.JointSVD("right"),
    ):
        carry_out(record, net, plain, [method], st.Budget(parameters=0.7), f"{method.name} without data/")
    methods = [st.JointSVD("both", unfoldings=spatial, sweeps=4), st.JointSVD("left", sweeps=4), st.ActivationSVD()]
    sites = st.group(calibrated(dense(net), data, weigh=True), groups)
    carry_out(record, net, sites, methods, st.Budget(parameters=0.4), batches=data)


@case
def ranks_of_one_rate(record: Record) -> None:
    net = "residual"
    rates, residual = module("rates"), module("groups").residual
    sites = st.find(dense(net))
    for scheme in ("svd", "rjsvd-1", "rjsvd-2", "ljsvd", "bi-jsvd"):
        apply(record, net, sites, rates.at_rate(sites, 0.2, scheme), f"{scheme}/")
    data = batches(net, 2)
    preset = residual(calibrated(dense(net), data))
    apply(record, net, preset, rates.at_rate(preset, 0.3, "rjsvd-1"), "preset/", batches=data)


@case
def filters_alone(record: Record) -> None:
    for net in ("residual", "concatenation"):
        result = st.compress(dense(net), batches(net, 3), st.Budget(macs=0.5), methods=[st.PrincipalFilters()])
        record.result(result, fixed(net), f"{net}/")
    method = st.PrincipalFilters("l1-max", pooling="mean", multiple_of=2, least=2)
    result = st.compress(
        dense(net), batches(net), st.Budget(parameters=0.6), methods=[method], sensitivity=False, reconstruct=False
    )
    record.result(result, fixed(net), "correlated/")


@case
def filters_and_low_rank(record: Record) -> None:
    net = "small residual"
    methods = [st.PrincipalFilters(multiple_of=2), st.ActivationSVD(multiple_of=2)]
    result = st.compress(dense(net), batches(net, 2), st.Budget(macs=0.25), methods=methods)
    record.result(result, fixed(net))
    net = "concatenation"
    methods = [st.PrincipalFilters(multiple_of=2), st.LowRankPlusSparse(densities=(0.0, 0.2, 0.4), ranks=2, turns=8)]
    result = st.compress(dense(net), batches(net, 2), st.Budget(parameters=0.4), methods=methods)
    record.result(result, fixed(net), "sparse/")


@case
def filters_recommended(record: Record) -> None:
    net, data = "concatenation", batches("concatenation")
    sites = st.couple(dense(net), st.find(dense(net)), data[0])
    sites = st.sensitivity(dense(net), st.calibrate(dense(net), sites, data), data)
    recipes: dict[str, Any] = {"energy": st.Energy(0.9), "kl": st.KL(), "budget": st.Budget(macs=0.6)}
    for name, recipe in recipes.items():
        apply(record, net, sites, st.recommend(sites, recipe), f"{name}/", batches=data)
    method = st.PrincipalFilters("abs-max", pooling="none", multiple_of=1)
    plan = st.recommend(sites, st.Energy(0.8), method=method)
    apply(record, net, sites, plan, "unpooled/", batches=data, reconstruct=False)


@case
def low_rank_plus_sparse(record: Record) -> None:
    net, data = "convolutions", batches("convolutions")
    sites = calibrated(dense(net), data, weigh=True)
    patterns = ("unstructured", "rows", "2:4", "4x4", "channels", "taps")
    every = st.LowRankPlusSparse(patterns[2:], densities=(0.0, 0.3), ranks=1, turns=4)
    plan = carry_out(record, net, sites, [every], st.Budget(bytes=0.4), batches=data)
    for pattern in patterns:
        # A fixed split has both parts in every layer that can have the pattern.
        method = st.LowRankPlusSparse((pattern,), densities=(0.4,), share=0.3, turns=4)
        carry_out(record, net, sites, [method], st.Budget(parameters=0.7), f"{pattern}/", batches=data)
    exact = st.LowRankPlusSparse(densities=(0.0, 0.2, 0.4), ranks=2, turns=6, exact=True)
    carry_out(record, net, st.find(dense(net)), [exact], st.Budget(bytes=0.5), "without data/")
    train = module("train")
    small = st.apply(dense(net), sites, plan, data)
    moving = train.Regrow(small, every=2, until=6)
    st.fine_tune(
        small, labelled(net), teacher=dense(net), epochs=2, after_step=moving, progress=False, accelerate=False
    )
    record.model(small, fixed(net), "regrown")


def train(model: nn.Module, ranks: st.LearnedRanks, data: Sequence[tuple[Tensor, Tensor]]) -> None:
    """A loop of one's own: an epoch between two C steps, until the schedule is over."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    while ranks.step < ranks.schedule.steps:
        for x, labels in data:
            optimizer.zero_grad()
            (F.cross_entropy(model(x), labels) + ranks.penalty()).backward()
            optimizer.step()
        ranks.c_step()
    model.eval()


@case
def learned_ranks(record: Record) -> None:
    net, data = "convolutions", batches("convolutions")
    schedule = module("train").Schedule(start=0.02, factor=2.0, steps=4)
    budget: dict[str, Any] = {"budget": st.Budget(macs=0.4)}
    multiplier: dict[str, Any] = {"multiplier": 1e-4, "cost": "parameters", "dense": False}
    runs = {
        "budget": budget,
        "output energy": {**budget, "energy": "output", "augmented": True},
        "multiplier": multiplier,
        "unnormalised": {**multiplier, "normalize": False, "dense": True},
    }
    for name, options in runs.items():
        model = dense(net)
        ranks = st.LearnedRanks(model, calibrated(model, data), schedule=schedule, **options)
        train(model, ranks, labelled(net))
        small, plan = ranks.finish(data)
        record.trajectory(ranks.trajectory, f"{name}/trajectory")
        record.table(ranks.candidates, f"{name}/table")
        record.plan(plan, f"{name}/plan")
        record.model(small, fixed(net), f"{name}/model")
        record.model(model, fixed(net), f"{name}/trained")


@case
def learn_ranks(record: Record) -> None:
    schedule = module("train").Schedule(start=0.05, factor=2.0, steps=4)
    recipe = module("train").Recipe(epochs=2, lr=0.02)
    common: dict[str, Any] = {"learning": recipe, "schedule": schedule, "progress": False, "accelerate": False}
    net = "small residual"
    result = st.learn_ranks(
        dense(net), labelled(net), st.Budget(parameters=0.35), tuning=recipe, groups=True, calibration=batches(net, 2),
        **common,
    )  # fmt: skip
    record.trajectory(result.trajectory)
    record.result(result, fixed(net))
    net = "perceptron"
    budgets = [st.Budget(macs=0.7), st.Budget(macs=0.4)]
    for n, result in enumerate(st.budget_path(dense(net), labelled(net), budgets, tuning=recipe, **common)):
        record.trajectory(result.trajectory, f"path {n}/trajectory")
        record.result(result, fixed(net), f"path {n}/")
    methods = [st.LowRankPlusSparse(densities=(0.0, 0.1, 0.3), ranks=2, turns=6), st.WeightSVD()]
    result = st.learn_ranks(
        dense(net), labelled(net), st.Budget(bytes=0.4), tuning=recipe, methods=methods, start=methods, **common
    )
    record.trajectory(result.trajectory, "sparse/trajectory")
    record.result(result, fixed(net), "sparse/")


@case
def plans_and_files_again(record: Record) -> None:
    """Plans read back, edited and applied; models saved, loaded and merged."""
    sparse = st.LowRankPlusSparse(("unstructured", "4x4"), densities=(0.0, 0.2, 0.4), ranks=2, turns=6)
    runs: dict[str, tuple[str, st.Budget, list[st.Method] | None]] = {
        "low rank": ("convolutions", st.Budget(macs=0.4), None),
        "shared": ("residual", st.Budget(parameters=0.3), None),
        "sparse": ("perceptron", st.Budget(parameters=0.4), [sparse]),
        "channels": ("concatenation", st.Budget(macs=0.5), [st.PrincipalFilters()]),
        "mixed": ("concatenation", st.Budget(macs=0.15), [st.PrincipalFilters(multiple_of=2), st.ActivationSVD()]),
    }
    for name, (net, budget, methods) in runs.items():
        data = batches(net, 2)
        result = st.compress(dense(net), data, budget, methods=methods)
        text = result.plan.to_json()
        plan = st.Plan.from_json(text)
        small = apply(record, net, result.sites, plan, f"{name}/replayed ", batches=data)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            st.save(small, plan, path)
            loaded = st.load(dense(net, seed=7), path)
        record.model(loaded, fixed(net), f"{name}/loaded")
        if methods is None or methods == [sparse]:
            record.model(st.merge(loaded), fixed(net), f"{name}/merged")
    net = "convolutions"
    sites = calibrated(dense(net), batches(net))
    record_of_plan = json.loads(st.select(st.tabulate(sites), st.Budget(macs=0.5)).to_json())
    for entry in record_of_plan["entries"]:
        if entry["choice"]["kind"] == "low_rank":
            entry["choice"]["settings"]["rank"] = max(1, entry["choice"]["settings"]["rank"] - 1)
    edited = st.Plan.from_json(json.dumps(record_of_plan))
    apply(record, net, sites, edited, "edited/", batches=batches(net))


@case
def every_selector(record: Record) -> None:
    selectors = module("selectors")
    net, data = "residual", batches("residual", 2)
    sites = calibrated(dense(net), data, weigh=True)
    table, shared = st.tabulate(sites), st.tabulate(st.group(sites))
    budgets = {
        "macs": st.Budget(macs=0.4),
        "parameters": st.Budget(parameters="45%"),
        "three": st.Budget(macs=0.6, parameters=0.5, bytes=0.45),
    }
    for name, budget in budgets.items():
        for selector in ("exact", "lagrangian", "greedy", "uniform", "energy"):
            for kind, rows in (("alone", table), ("shared", shared)):
                record.plan(st.select(rows, budget, getattr(selectors, selector)), f"{selector}, {name}, {kind}")
    for kind, rows in (("alone", table), ("shared", shared)):
        record.plan(selectors.at_multiplier(rows, "macs", 1e-5), f"at a multiplier, {kind}")
        record.plan(selectors.at_multiplier(rows, "parameters", 1e-3, dense=False), f"never dense, {kind}")
    weighted = table.weighted({"stem": (3.0, 0.5), "head": (0.1, 2.0)})
    record.plan(st.select(weighted, st.Budget(macs=0.5)), "weighted")
    record.table(table, "alone")
    record.table(shared, "shared")
    plan = st.select(table, budgets["three"], selectors.lagrangian)
    apply(record, net, sites, plan, "lagrangian/", batches=data)


@case
def latency_by_a_made_up_clock(record: Record) -> None:
    net, data = "convolutions", batches("convolutions")
    latency = st.Latency(threads=1, batch=4, cache=None, timer=clock)
    sites = calibrated(dense(net), data, weigh=True)
    options: dict[str, Any] = {"latency": latency, "dense_latency": 4.0}
    # A user's own cost beside it.
    table = st.tabulate(sites, costs={"layers": lambda specs: float(len(specs))}, guard=True, **options)
    record.table(table)
    for name, budget in {"": st.Budget(latency=0.75), "both/": st.Budget(latency="3.3ms", parameters=0.6)}.items():
        apply(record, net, sites, st.select(table, budget), name, batches=data)
    net, data = "concatenation", batches("concatenation")
    coupled = st.calibrate(dense(net), st.couple(dense(net), st.find(dense(net)), data[0]), data)
    plan = st.recommend(coupled, st.Budget(latency=0.8), latency=st.Latency(threads=1, cache=None, timer=clock))
    apply(record, net, coupled, plan, "channels/", batches=data)
    shared = st.group(calibrated(dense("residual"), batches("residual", 1)))
    table = st.tabulate(shared, latency=st.Latency(threads=1, cache=None, timer=clock))
    record.table(table, "shared/table")
    record.plan(st.select(table, st.Budget(latency=0.9)), "shared/plan")
