"""The README's example and the tutorials run as they are written."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^spectrim (?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Python blocks of a page with the line number each starts at."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start(1)), match[1]


def run(page: Path) -> int:
    """Run the blocks of a page one after the other in one namespace; tracebacks show the page's own lines."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    count = 0
    for line, source in blocks(page):
        exec(compile("\n" * line + source, str(page), "exec"), namespace)
        count += 1
    return count


@pytest.fixture(autouse=True)
def _own_accelerate():
    """A Trainer settles accelerate on a device for the whole process, and other tests must not inherit it."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_there_are_tutorials():
    """Those that the site lists, and no other."""
    listed = re.findall(r"tutorials/([\w-]+)\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == [page.stem for page in TUTORIALS] != []


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert run(page) > 0


def test_readme_example_runs_and_keeps_its_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (_, source), _ = blocks(README)
    assert len([line for line in source.splitlines() if line.strip()]) == 12
    assert run(README) == 2
    assert (tmp_path / "small.safetensors").stat().st_size > 0


def command_lines() -> list[tuple[str, str]]:
    """What the pages tell to type, with the page."""
    pages = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    return [(page.name, line) for page in pages for line in COMMAND.findall(page.read_text(encoding="utf-8"))]


def test_command_lines_use_options_that_exist():
    from typer.main import get_command

    from spectrim.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = command_lines()
    assert {"compress", "path"} <= {line.split()[1] for _, line in lines}
    for page, line in lines:
        name, *words = line.replace("\\\n", " ").split()[1:]
        assert name in commands, f"{page}: there is no command {name!r}"
        known = {option for parameter in commands[name].params for option in parameter.opts}
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word not in known]
        assert not unknown, f"{page}: spectrim {name} has no option {unknown}"


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "benchmarks.md"], ids=lambda page: page.name)
def test_results_have_their_place(page: Path):
    text = page.read_text(encoding="utf-8")
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    assert text.count(begin) == text.count(end) == 1
    assert text.index(begin) < text.index(end)


def test_relative_links_of_the_top_pages_lead_somewhere():
    for page in [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
        missing = [target for target in targets if not (ROOT / target).exists()]
        assert not missing, f"{page.name} links to {missing}"


def test_every_public_name_has_a_reference_page():
    import spectrim

    pages = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    modules = re.findall(r"^::: (spectrim[\w.]*)", pages, re.MULTILINE)
    homes = {name: getattr(getattr(spectrim, name), "__module__", None) for name in spectrim.__all__}
    lost = {
        name: home
        for name, home in homes.items()
        if home and home.startswith("spectrim.") and not any(f"{home}.{name}".startswith(m) for m in modules)
    }
    assert not lost, f"no page of docs/api shows {lost}"
