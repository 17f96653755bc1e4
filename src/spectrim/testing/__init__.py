"""For writers of methods: matrices with planted spectra, small layers of every kind, the contract as a check.

A method of your own is tested in one line, ``check_method(MyMethod())``, or ``check_joint_method(MyMethod())`` if it
takes sites of several layers.
"""

from __future__ import annotations

from spectrim.testing.contract import check_method
from spectrim.testing.joint_contract import check_joint_method
from spectrim.testing.layers import LAYERS, SmallLayer, planted, sample_inputs, small_group, small_site
from spectrim.testing.measures import measured_error

__all__ = [
    "LAYERS",
    "SmallLayer",
    "check_joint_method",
    "check_method",
    "measured_error",
    "planted",
    "sample_inputs",
    "small_group",
    "small_site",
]
