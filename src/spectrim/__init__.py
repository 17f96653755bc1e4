"""Spectrim makes a trained PyTorch network smaller and measurably faster by trimming spectra."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and where they live. They are loaded on first use, so that the command line starts without torch.
_HOMES = {
    "ActivationSVD": "methods",
    "Budget": "budget",
    "Candidates": "plan",
    "Choice": "plan",
    "Energy": "widths",
    "JointSVD": "methods",
    "KL": "widths",
    "Latency": "latency",
    "LearnedRanks": "train",
    "LowRank": "factors",
    "LowRankPlusSparse": "methods",
    "Method": "methods",
    "Plan": "plan",
    "PrincipalFilters": "methods",
    "Result": "pipeline",
    "SharedBasis": "factors",
    "Site": "sites",
    "Sites": "sites",
    "Trajectory": "trajectory",
    "WeightSVD": "methods",
    "apply": "application",
    "budget_path": "train",
    "calibrate": "nn.calibrate",
    "choose_kernels": "nn.kernels",
    "compare": "report",
    "compress": "pipeline",
    "couple": "nn.filters",
    "export_onnx": "nn.export",
    "export_program": "nn.export",
    "find": "nn.find",
    "fine_tune": "train",
    "group": "groups",
    "learn_ranks": "train",
    "load": "nn.checkpoint",
    "macs": "costs",
    "merge": "nn.surgery",
    "parameters": "costs",
    "recommend": "widths",
    "save": "nn.checkpoint",
    "select": "selectors",
    "sensitivity": "nn.sensitivity",
    "size_bytes": "costs",
    "tabulate": "tables",
    "write_report": "report",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]  (made from the table above)

if TYPE_CHECKING:
    from spectrim.application import apply
    from spectrim.budget import Budget
    from spectrim.costs import macs, parameters, size_bytes
    from spectrim.factors import LowRank, SharedBasis
    from spectrim.groups import group
    from spectrim.latency import Latency
    from spectrim.methods import ActivationSVD, JointSVD, LowRankPlusSparse, Method, PrincipalFilters, WeightSVD
    from spectrim.nn.calibrate import calibrate
    from spectrim.nn.checkpoint import load, save
    from spectrim.nn.export import export_onnx, export_program
    from spectrim.nn.filters import couple
    from spectrim.nn.find import find
    from spectrim.nn.kernels import choose_kernels
    from spectrim.nn.sensitivity import sensitivity
    from spectrim.nn.surgery import merge
    from spectrim.pipeline import Result, compress
    from spectrim.plan import Candidates, Choice, Plan
    from spectrim.report import compare, write_report
    from spectrim.selectors import select
    from spectrim.sites import Site, Sites
    from spectrim.tables import tabulate
    from spectrim.train import LearnedRanks, budget_path, fine_tune, learn_ranks
    from spectrim.trajectory import Trajectory
    from spectrim.widths import KL, Energy, recommend


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spectrim' has no attribute {name!r}")
    value = getattr(import_module(f"spectrim.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
