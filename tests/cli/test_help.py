"""What a newcomer reads: help in sections, the page made of it, completion, and answers to typical mistakes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import spectrim
from benchmarks.command_line import PAGE, written
from benchmarks.door_mistakes import COMMAND_LINE, Mistake, in_python, make_folder, python
from spectrim.cli import completion, data
from spectrim.cli.app import app
from spectrim.cli.common import EXIT_CODES
from spectrim.cli.methods import NAMES
from spectrim.cli.options import InputOptions, TrainingOptions

COMMANDS = ("profile", "compress", "path", "evaluate", "export", "demo", "doctor")
DOCS = PAGE.parent


def shown(*arguments: str, columns: int = 80) -> str:
    done = CliRunner().invoke(app, [*arguments, "--help"], prog_name="spectrim", env={"COLUMNS": str(columns)})
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.table
@pytest.mark.parametrize("columns", [80, 45])
@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_fits_a_terminal_and_a_phone(command: tuple[str, ...], columns: int):
    assert max(map(len, shown(*command, columns=columns).splitlines())) <= columns


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_help_ends_with_examples_that_are_commands(command: str):
    text = shown(command, columns=80)
    examples = text[text.index("Examples:") :].replace("\\\n", " ")
    assert f"$ spectrim {command}" in examples


def test_options_stand_under_the_heading_of_their_group():
    text = shown("compress")
    for group, option in ((InputOptions, "--data"), (TrainingOptions, "--train")):
        heading = f"{(group.__doc__ or '').splitlines()[0].rstrip('.')}:"
        section = text[text.index(heading) :].split("\n\n")[0]
        assert option in section
    # Options that several groups have stand under the heading of each.
    assert "--input" in shown("evaluate").split("What it is run on:")[1].split("\n\n")[0]


def test_the_page_is_in_step_with_the_program():
    text = PAGE.read_text(encoding="utf-8")
    assert written(text) == text, "run python -m benchmarks.command_line"
    assert all(f"<!-- run: {name} --help -->" in text for name in COMMANDS)
    for code in EXIT_CODES:
        assert f"| {code} |" in text


def test_the_page_of_data_names_every_form_and_option():
    text = (DOCS / "data-references.md").read_text(encoding="utf-8")
    for name, scheme in data.SCHEMES.items():
        assert f"`{name}" in text or f".{name}`" in text
        for option in dataclasses.fields(scheme.options):
            assert f"`{option.name}`" in text


def test_completion_offers_methods_costs_and_files(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "net.py").touch()
    (tmp_path / "images.npz").touch()
    assert completion.methods("weight-s") == ["weight-svd"]
    assert completion.methods("") == list(NAMES)
    assert completion.budgets("m") == ["macs="]
    assert completion.models("n") == ["net.py:"]
    assert completion.data("imagefolder:ph") == ["imagefolder:photos/"]
    assert completion.data("imag") == ["imagefolder:", "images.npz"]


def test_a_shell_completes_without_torch():
    script = (
        "import sys; from spectrim.cli.app import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    environment = {"_SPECTRIM_COMPLETE": "complete_bash", "COMP_WORDS": "spectrim compress net.py:build --met",
                   "COMP_CWORD": "3"}  # fmt: skip
    program = f"import sys, os; os.environ.update({environment!r}); sys.argv = ['spectrim']; {script}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["--method", "False"], done.stderr


@pytest.fixture
def newcomer(tmp_path: Path) -> Path:
    make_folder(tmp_path)
    return tmp_path


LIGHT = [mistake for mistake in COMMAND_LINE if not mistake.needs_model]


def test_mistakes_are_answered_in_one_sentence_with_the_cure(newcomer: Path):
    assert len(LIGHT) >= 40
    for mistake in LIGHT:
        assert isinstance(mistake.given, tuple)
        done = CliRunner().invoke(app, list(mistake.given), prog_name="spectrim")
        assert done.exit_code == 2, mistake
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert mistake.cure in done.stderr, done.stderr
        assert not Path("compressed").exists()


def test_mistakes_in_python_are_answered_too():
    rows = [(each, in_python(each)) for each in python()]
    assert len(rows) >= 10
    for mistake, row in rows:
        assert row["one_sentence"], row
        assert row["cure"], (mistake, row)


def test_usage_errors_load_no_torch(newcomer: Path):
    """All mistakes in one process, which must not have torch at its end."""
    given = [mistake.given for mistake in LIGHT]
    script = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from spectrim.cli.app import app\n"
        "for given in json.loads(sys.argv[1]):\n"
        "    assert CliRunner().invoke(app, given).exit_code == 2, given\n"
        "    assert 'torch' not in sys.modules, given\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(given)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_package_runs_as_the_program() -> None:
    program = [sys.executable, "-m", "spectrim", "--version"]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, spectrim.__version__), done.stderr


def test_click_errors_are_a_document_too():
    done = CliRunner().invoke(app, ["compress", "net.py:build", "--bugdet", "1", "--json"])
    assert done.exit_code == 2
    assert "--budget" in json.loads(done.stdout)["error"]["message"]


def test_the_doctor_tells_what_is_missing_and_what_that_costs(monkeypatch: pytest.MonkeyPatch):
    from spectrim.cli import doctor

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "onnx" else real(name))
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found["versions"]["python"].startswith(f"{sys.version_info.major}.")
    assert found["torch"]["threads"] >= 1
    (export,) = [part for part in found["parts"] if "onnx" in part["packages"]]
    assert export["missing"] == ["onnx"]
    text = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "80"}).stdout
    assert 'pip install "spectrim[export]"' in " ".join(text.split())
    assert "Without: no export to .onnx" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_a_mistake_needs_its_cure():
    """The judge of mistakes can say no."""
    asked = Mistake("python", "nothing", lambda: None, "a cure")
    assert not in_python(asked)["met"]
