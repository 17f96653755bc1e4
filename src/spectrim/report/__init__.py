"""Comparison of two models, figures of tables, plans and learned ranks, and the HTML page."""

from spectrim.report.comparison import Comparison, Line, Measure, Measurements, compare, measure, show
from spectrim.report.figures import Measured
from spectrim.report.machine import machine_facts
from spectrim.report.measures import Score, accuracy
from spectrim.report.origin import Origin, Part, not_measured
from spectrim.report.page import Page, write_report
from spectrim.report.ranks import animate_ranks, cost_curve, rank_paths
from spectrim.report.side_by_side import SideBySide
from spectrim.report.side_page import SideBySidePage
from spectrim.report.sweep_page import SweepPage

__all__ = [
    "Comparison",
    "Line",
    "Measure",
    "Measured",
    "Measurements",
    "Origin",
    "Page",
    "Part",
    "Score",
    "SideBySide",
    "SideBySidePage",
    "SweepPage",
    "accuracy",
    "animate_ranks",
    "compare",
    "cost_curve",
    "machine_facts",
    "measure",
    "not_measured",
    "rank_paths",
    "show",
    "write_report",
]
