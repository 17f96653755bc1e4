from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from spectrim.cli.app import app

# Building all commands from their signatures takes longer than most of them run.
built = functools.cache(get_command)


@pytest.fixture(autouse=True)
def near(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run in an empty folder, with ``nets`` importable and measured latencies kept out of the user's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("SPECTRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("typer.testing._get_command", built)
    # Commands have --threads; put back what they set.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


class Run:
    """Runs the program in this process."""

    def __call__(self, *arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    def json(self, *arguments: str, code: int = 0) -> Any:
        """The document on standard output, which must hold nothing else."""
        return json.loads(self(*arguments, "--json", code=code).stdout)


@pytest.fixture
def run() -> Run:
    return Run()
