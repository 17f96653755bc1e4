"""Standard streams that are full, closed, or have not all letters."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import spectrim.cli
from spectrim.cli.output import Output
from spectrim.network.files import write_text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_standard_output_is_told_when_all_else_is_done(run, monkeypatch, options: tuple[str, ...]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("spectrim.cli.common.Output", lambda json, quiet, _: Output(json, quiet, full))
        told = run("compress", "nets:tiny", "--input", "1x8x8", "-b", "macs=60%", *options, code=1).stderr
    assert told.endswith("standard output cannot be written: No space left on device; all else is done\n")
    assert Path("compressed/result.json").is_file()


def test_who_stops_reading_is_told_nothing(run, monkeypatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr("spectrim.cli.common.Output", lambda json, quiet, _: Output(json, quiet, pipe))
        assert "error" not in run("profile", "nets:tiny", "--input", "1x8x8", "-q", code=1).stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(closed: str) -> None:
    program = (
        "import os, sys, spectrim.cli; spectrim.cli._open_streams(); print(1); print(1, file=sys.stderr); "
        "open('done', 'w').write(str(os.dup(0) > 2))"
    )
    subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program], check=True)
    assert Path("done").read_text(encoding="utf-8") == "True"


def test_letters_that_a_stream_lacks_are_escaped(monkeypatch, tmp_path: Path) -> None:
    stream = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii", write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        spectrim.cli._open_streams()
        print("ö \udcff")
    assert raw.getvalue() == b"\\xf6 \\udcff\n"
    write_text(tmp_path / "page.html", "ö \udcff")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "ö \\udcff"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_no_text_takes_all_files(run) -> None:
    found = run.json("compress", "nets:tiny", "--input", "1x8x8", "-b", "macs=60%", "-o", "small-\udcff")
    written = json.loads(Path("small-\udcff/result.json").read_text(encoding="utf-8"))
    assert found["files"]["model"] == written["files"]["model"] == "small-\udcff/model.safetensors"
    assert Path("small-\udcff/report.html").is_file()
