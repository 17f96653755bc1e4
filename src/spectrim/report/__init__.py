"""Comparison of two models, figures of tables and plans, and the HTML page."""

from spectrim.report.comparison import Comparison, Line, Measure, Measurements, compare, measure, show
from spectrim.report.figures import Measured
from spectrim.report.machine import machine_facts
from spectrim.report.measures import accuracy
from spectrim.report.page import Page, write_report

__all__ = [
    "Comparison",
    "Line",
    "Measure",
    "Measured",
    "Measurements",
    "Page",
    "accuracy",
    "compare",
    "machine_facts",
    "measure",
    "show",
    "write_report",
]
