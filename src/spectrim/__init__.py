"""Spectrim makes a trained PyTorch network smaller and measurably faster by trimming spectra."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectrim._moved import Finder

__version__ = "0.1.0"

sys.meta_path.append(Finder())

# Public names and where they live. They are loaded on first use, so that the command line starts without torch.
_HOMES = {
    "ActivationSVD": "methods",
    "Budget": "selection.budget",
    "Candidates": "selection.candidates",
    "Choice": "network.choices",
    "Energy": "channel_plans.widths",
    "JointSVD": "methods",
    "KL": "channel_plans.widths",
    "Latency": "cost.latency",
    "LearnedRanks": "train",
    "LowRank": "network.factors",
    "LowRankPlusSparse": "methods",
    "Method": "methods",
    "Plan": "selection.plan",
    "PrincipalFilters": "methods",
    "Result": "pipeline",
    "SharedBasis": "network.factors",
    "Site": "network.sites",
    "Sites": "network.sites",
    "Trajectory": "selection.trajectory",
    "WeightSVD": "methods",
    "apply": "application",
    "budget_path": "train",
    "calibrate": "nn.watch.calibrate",
    "choose_kernels": "nn.sparse.kernels",
    "compare": "report",
    "compress": "pipeline",
    "couple": "nn.channels.graph",
    "export_onnx": "nn.export",
    "export_program": "nn.export",
    "find": "nn.find",
    "fine_tune": "train",
    "group": "network.groups",
    "learn_ranks": "train",
    "load": "nn.checkpoint",
    "macs": "cost.counted",
    "merge": "nn.surgery",
    "parameters": "cost.counted",
    "recommend": "channel_plans.widths",
    "save": "nn.checkpoint",
    "select": "selection.selectors",
    "sensitivity": "nn.watch.sensitivity",
    "size_bytes": "cost.counted",
    "tabulate": "tables",
    "write_report": "report",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]  (made from the table above)

if TYPE_CHECKING:
    from spectrim.application import apply
    from spectrim.channel_plans.widths import KL, Energy, recommend
    from spectrim.cost.counted import macs, parameters, size_bytes
    from spectrim.cost.latency import Latency
    from spectrim.methods import ActivationSVD, JointSVD, LowRankPlusSparse, Method, PrincipalFilters, WeightSVD
    from spectrim.network.choices import Choice
    from spectrim.network.factors import LowRank, SharedBasis
    from spectrim.network.groups import group
    from spectrim.network.sites import Site, Sites
    from spectrim.nn.channels.graph import couple
    from spectrim.nn.checkpoint import load, save
    from spectrim.nn.export import export_onnx, export_program
    from spectrim.nn.find import find
    from spectrim.nn.sparse.kernels import choose_kernels
    from spectrim.nn.surgery import merge
    from spectrim.nn.watch.calibrate import calibrate
    from spectrim.nn.watch.sensitivity import sensitivity
    from spectrim.pipeline import Result, compress
    from spectrim.report import compare, write_report
    from spectrim.selection.budget import Budget
    from spectrim.selection.candidates import Candidates
    from spectrim.selection.plan import Plan
    from spectrim.selection.selectors import select
    from spectrim.selection.trajectory import Trajectory
    from spectrim.tables import tabulate
    from spectrim.train import LearnedRanks, budget_path, fine_tune, learn_ranks


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spectrim' has no attribute {name!r}")
    value = getattr(import_module(f"spectrim.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
