"""Runs that can be killed: children of a program that has imported everything once, and forks for each of them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.cases import ENVIRONMENT

LIMIT = 120  # seconds


def serve(run: Callable[[], object]) -> None:
    """The program's side: a child runs for each line of standard input; its id is written, then its exit code."""
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            code = 1
            try:
                run()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Runs:
    """The test's side."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self) -> int:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.answer())

    def answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.process.stderr and self.process.stderr.read()
        return line

    def killed(self, when: Callable[[], bool], delay: float) -> None:
        """A run that is killed so many seconds after something has come true, which it must while it runs."""
        child, deadline = self.start(), time.monotonic() + LIMIT
        while not when():
            ended, *_ = select.select([self.process.stdout], [], [], 0.002)
            assert not ended, "the run ended before it could be killed"
            assert time.monotonic() < deadline
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert int(self.answer()) == -signal.SIGKILL

    def whole(self) -> None:
        """A run that ends by itself."""
        self.start()
        assert int(self.answer()) == 0


@contextlib.contextmanager
def runs(*command: str, cwd: Path) -> Iterator[Runs]:
    """Runs of a program that calls :func:`serve`."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, *command], env=ENVIRONMENT, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    with process:
        try:
            yield Runs(process)
        finally:
            process.kill()
