"""Spectrim makes a trained PyTorch network smaller and measurably faster by trimming spectra."""

import importlib as _importlib
import logging as _logging
import sys as _sys

from spectrim import _moved

__version__ = "0.2.0"

_sys.meta_path.append(_moved.Finder())
# What the library decides on its way goes to loggers "spectrim.*", and nowhere until somebody listens.
_logging.getLogger("spectrim").addHandler(_logging.NullHandler())

# Public names and where they live; ``__init__.pyi`` says the same to type checkers. They are loaded on first use, so
# that the command line starts without torch.
_HOMES = {
    "ActivationCP": "methods",
    "ActivationSVD": "methods",
    "ActivationTucker2": "methods",
    "Budget": "selection.budget",
    "CalibrationError": "errors",
    "Candidates": "selection.candidates",
    "CheckpointError": "errors",
    "ChannelRule": "nn.channels.rules",
    "Choice": "network.choices",
    "Energy": "search.widths",
    "ExportError": "errors",
    "ForwardError": "errors",
    "InfeasibleBudgetError": "errors",
    "JointSVD": "methods",
    "KL": "search.widths",
    "Latency": "cost.latency",
    "LearnedRanks": "train",
    "LowRank": "network.factors",
    "LowRankPlusSparse": "methods",
    "Method": "methods",
    "MissingMomentsError": "errors",
    "Plan": "selection.plan",
    "PlanError": "errors",
    "ProofError": "errors",
    "ReadOnlyWeightError": "errors",
    "PrincipalFilters": "methods",
    "Result": "pipeline",
    "SharedBasis": "network.factors",
    "Site": "network.sites",
    "Sites": "network.sites",
    "SpectrimError": "errors",
    "Sweep": "selection.front",
    "Trajectory": "selection.trajectory",
    "SlowerError": "errors",
    "TiedSVD": "methods",
    "ToleranceError": "errors",
    "TrainingError": "errors",
    "UnsupportedLayerError": "errors",
    "WeightCP": "methods",
    "WeightSVD": "methods",
    "WeightTucker2": "methods",
    "agreement": "nn.agreement",
    "apply": "application",
    "budget_path": "train",
    "calibrate": "nn.watch.calibrate",
    "carry_optimizer": "train",
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
    "recommend": "search.widths",
    "register_channels": "nn.channels.rules",
    "save": "nn.checkpoint",
    "select": "selection.selectors",
    "sensitivity": "nn.watch.sensitivity",
    "size_bytes": "cost.counted",
    "sweep": "train",
    "tabulate": "tables",
    "with_linear_layers": "nn.linears",
    "write_report": "report",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]  (made from the table above)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'spectrim' has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"spectrim.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return ["__version__", *__all__]
