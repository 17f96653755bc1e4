"""Torch's exporter without what it tells those who work on it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_exporter(*kinds: type[Warning]) -> Iterator[None]:
    """Drop what the exporter logs, as of packages that it would know and nobody needs, and warnings of these kinds."""
    exporter = logging.getLogger("torch.onnx")
    before = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in kinds:
                warnings.filterwarnings("ignore", category=kind)
            yield
    finally:
        exporter.setLevel(before)
