"""Files that are there whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from spectrim.network.files import replacing


def fail_after_writing(scratch: Path) -> None:
    scratch.write_text("ne")
    raise RuntimeError("on the way")


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with replacing(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
        assert scratch.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="on the way"), replacing(path) as scratch:
        fail_after_writing(scratch)
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_at_the_same_time_do_not_meet(tmp_path: Path) -> None:
    path, both = tmp_path / "table.json", Barrier(2)

    def write(text: str) -> None:
        with replacing(path) as scratch:
            scratch.write_text(text)
            both.wait(timeout=30)
            assert scratch.read_text() == text

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["one", "other"]))
    assert path.read_text() in ("one", "other")
    assert list(tmp_path.iterdir()) == [path]
