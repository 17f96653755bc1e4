"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

import spectrim as st
from spectrim.errors import PlanError
from spectrim.network import tensor_files
from spectrim.network.files import as_read, record_of, replacing, write_text


def fail_after_writing(scratch: Path) -> None:
    scratch.write_text("ne")
    raise RuntimeError("on the way")


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with replacing(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
        assert scratch.name == path.name
        assert scratch.parent.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="on the way"), replacing(path) as scratch:
        fail_after_writing(scratch)
    with pytest.raises(FileNotFoundError, match=r"plan\.json"), replacing(path):
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


def test_errors_name_the_file_and_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*none'.*: '.*plan\.json'"):
        write_text(tmp_path / "none" / "plan.json", "text")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        write_text(tmp_path, "text")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"file/plan\.json"):
        write_text(tmp_path / "file" / "plan.json", "text")


def test_a_full_disk_is_an_error_of_the_file_and_the_old_one_stands(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def full(scratch: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*plan\.json'") as caught, replacing(path) as scratch:
        full(scratch)
    assert caught.value.errno == 28
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_names_modes_and_links_are_kept(tmp_path: Path) -> None:
    path, link = tmp_path / ("x" * 251 + ".txt"), tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_text(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    (tmp_path / "usual").touch()
    tensor_files.write(tmp_path / "new", {"a": torch.zeros(2)}, {})
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode
    write_text(os.devnull, "text")  # no file that another one could replace
    assert not Path(os.devnull).is_file()


KILLED = """
import sys
from pathlib import Path
from spectrim.network.files import replacing
with replacing(Path(sys.argv[1])) as scratch:
    scratch.write_text("half")
    print("here", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_what_a_killed_writer_leaves_goes_with_the_next_write_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "here\n"
        write_text(tmp_path / "other.json", "text")
        assert len(list(tmp_path.iterdir())) == 3  # what it writes is there still
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list(tmp_path.iterdir())) == 3
        write_text(tmp_path / "other.json", "text")
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "plan.json"]


def test_a_document_that_says_a_thing_twice_says_neither(tmp_path: Path) -> None:
    sites = st.find(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)))
    plan = st.select(st.tabulate(sites, [st.WeightSVD()]), st.Budget(parameters=0.5))
    text = plan.to_json()
    assert st.Plan.from_json(text) == plan
    for twice in (
        f'{{"entries": [], {text[text.index("{") + 1 :]}',
        text.replace('"kind"', '"kind": "dense", "kind"', 1),
    ):
        with pytest.raises(PlanError, match=r"not a plan: it has '(entries|kind)' twice"):
            st.Plan.from_json(twice)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(OSError, match=r"it is a pipe: give the name of a file: .*plan\.json"):
        st.Plan.read(tmp_path / "plan.json")


def test_a_file_where_a_folder_would_have_to_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "plan.json", tmp_path / "file" / "more" / "plan.json"):
        with pytest.raises(
            NotADirectoryError, match=r"cannot be written: '.*/file' is a file, no folder: '.*plan\.json'"
        ):
            write_text(path, "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_record_is_compared_as_it_will_be_read() -> None:
    record = {"data": Path(os.fsdecode(b"w\xff")), "é": (1, 2.5, None)}
    assert as_read(record) == {"data": "w?", "é": [1, 2.5, None]}
    assert record_of(json.dumps(as_read(record)), "a record", 1000) == as_read(record)
