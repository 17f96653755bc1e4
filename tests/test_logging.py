"""What the library decides goes to loggers under its name, and nowhere else by itself."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.network.skipped import Skipped
from tests.cases import ENVIRONMENT

MODEL = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
BATCHES = [torch.randn(32, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]


def test_decisions_are_logged_under_the_name_of_the_room(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="spectrim"):
        result = st.compress(MODEL, BATCHES, "macs=70%", skip="2")
    told = {record.name: record for record in reversed(caplog.records)}
    assert all(name.startswith("spectrim.") for name in told)
    assert "left alone: 2 (Linear): skipped on request" in [record.getMessage() for record in caplog.records]
    assert told["spectrim.nn.find"].getMessage() == "Sequential: 1 layers to choose at, 1 left alone"
    assert told["spectrim.tables"].levelno == logging.INFO
    warned = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert warned >= set(result.report.notes) != set()
    assert result.plan.skipped == (Skipped("2", "Linear", "skipped on request"),)


def test_waves_and_epochs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    sites = st.calibrate(MODEL, st.find(MODEL), BATCHES)
    plan = st.select(st.tabulate(sites), "macs=50%")
    with caplog.at_level(logging.INFO, logger="spectrim"):
        small = st.apply(MODEL, sites, plan, BATCHES, memory=1)
        st.fine_tune(small, [(BATCHES[0], torch.zeros(32, dtype=torch.long))], epochs=1)
    told = [record.getMessage() for record in caplog.records]
    assert any(message.endswith("more than 1 bytes: 2 batches go in 2 waves") for message in told)
    assert any(message.startswith("epoch 1 of 1: loss ") for message in told)


def test_nothing_is_said_where_nobody_listens() -> None:
    script = "import logging, spectrim; logging.getLogger('spectrim.tables').warning('unheard'); print('done')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout == "done\n"
    assert done.stderr == ""
