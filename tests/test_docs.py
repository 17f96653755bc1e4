"""The README's example and the tutorials run as they are written."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import door_readme
from benchmarks.printed import shown

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
REFERENCE = sorted((ROOT / "docs" / "api").glob("*.md"))
METHODS = [ROOT / "docs" / "methods" / f"{name}.md" for name in ("weight-svd", "activation-svd", "chains")]
# Pages whose code needs what no extra brings.
EXTERNAL = {"lightning": "lightning", "text-detector": "easyocr_en_models"}
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


# They train, load transformers or lightning, export or take seconds: `make docs` runs them beside the build.
LONG = (
    "getting-started",
    "hugging-face",
    "learned-ranks",
    "lightning",
    "low-rank-plus-sparse",
    "recipes",
    "removing-filters",
    "sharing",
    "shipping",
    "step-by-step",
    "text-detector",
    "tolerance",
    "what-each-method-is-for",
)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page.stem in LONG else page for page in TUTORIALS],
    ids=lambda page: page.stem,
)
def test_tutorial_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if page.stem in EXTERNAL:
        pytest.importorskip(EXTERNAL[page.stem])
    monkeypatch.chdir(tmp_path)
    assert run(page) > 0


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page.stem == "chains" else page for page in (*REFERENCE, *METHODS)],
    ids=lambda page: page.stem,
)
def test_pages_have_an_example_that_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert run(page) > 0


def numbers_and_words(text: str) -> tuple[list[float], list[str]]:
    """What a text says, numbers apart from words."""
    found = re.findall(r"\d[\d,]*\.?\d*", text)
    return [float(each.replace(",", "")) for each in found], re.sub(r"\d[\d,]*\.?\d*", "#", text).split()


def test_the_readme_shows_what_its_six_lines_print(capsys: pytest.CaptureFixture[str]):
    import torch

    ((_, source),) = blocks(README)
    assert len([line for line in source.splitlines() if line]) == 6
    torch.manual_seed(0)
    exec(compile(source, str(README), "exec"), {})
    text = README.read_text(encoding="utf-8")
    shown = text.partition("<!-- output:begin -->")[2].partition("<!-- output:end -->")[0].strip()
    numbers, words = numbers_and_words(shown.removeprefix("```text").removesuffix("```"))
    printed, said = numbers_and_words(capsys.readouterr().out)
    assert words == said, "make bench-report BENCH_ARGS=--example"
    # Another processor may round in another way, and never by much.
    assert printed == pytest.approx(numbers, rel=0.1)


def test_the_page_of_values_shows_what_its_lines_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "api" / "values.md"
    parts = [(source, output) for source, output in shown(page.read_text(encoding="utf-8")) if output]
    assert len(parts) == 2
    namespace: dict[str, object] = {}
    for source, output in parts:
        exec(compile(source, str(page), "exec"), namespace)
        numbers, words = numbers_and_words(output)
        printed, said = numbers_and_words(capsys.readouterr().out)
        assert words == said
        assert printed == pytest.approx(numbers, rel=0.1)


def test_the_readme_is_short_and_explains_its_terms():
    found = door_readme.measured(README.read_text(encoding="utf-8"))
    assert found.pop("unexplained") == []
    assert {name: found[name] <= door_readme.LIMITS[name] for name in found} == dict.fromkeys(found, True), found


def test_terms_without_an_explanation_are_found():
    assert door_readme.unexplained("It saves MACs. See F6.") == ["MACs", "F6"]
    assert door_readme.unexplained("It saves MACs (multiply-accumulates), ResNet-20 and MiniLM-L6.") == []


def test_words_are_counted_without_code_and_addresses():
    text = "# One\n\n```sh\nnot this\n```\n| two | [three](address/of.md) |\n|---|---|\n<!-- nor this -->"
    assert door_readme.words_of(text).split() == ["One", "two", "three"]


def test_every_picture_has_an_alternative_text():
    for page in [README, *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        said = re.findall(r"!\[([^\]]*)\]\(", text) + re.findall(r'<img[^>]*?alt="([^"]*)"', text)
        assert len(said) == text.count("![") + text.count("<img "), f"{page.name}: a picture without words"
        assert all(len(each) > 20 for each in said), page.name


def test_pictures_of_the_pages_are_there():
    for page in [README, ROOT / "docs" / "index.md", ROOT / "docs" / "benchmarks.md"]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"(?:\]\(|srcset=\"|src=\")([\w/.-]+\.svg)", text):
            assert (page.parent / target).exists(), f"{page.name} shows {target}"


def command_lines() -> list[tuple[str, str]]:
    """What the pages tell to type, with the page."""
    pages = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    return [(page.name, line) for page in pages for line in COMMAND.findall(page.read_text(encoding="utf-8"))]


def test_command_lines_use_options_that_exist():
    from typer.main import get_command

    from spectrim.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = command_lines()
    assert {"compress"} <= {line.split()[1] for _, line in lines}
    for page, line in lines:
        name, *words = line.replace("\\\n", " ").split()[1:]
        assert name in commands, f"{page}: there is no command {name!r}"
        known = {option for parameter in commands[name].params for option in parameter.opts}
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word not in known]
        assert not unknown, f"{page}: spectrim {name} has no option {unknown}"


def test_relative_links_of_the_top_pages_lead_somewhere():
    for page in [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
        missing = [target for target in targets if not (ROOT / target).exists()]
        assert not missing, f"{page.name} links to {missing}"


def test_every_public_name_has_a_reference_page():
    import spectrim

    pages = " ".join(path.read_text(encoding="utf-8") for path in REFERENCE)
    listed = set(re.findall(r"^::: (spectrim[\w.]*)", pages, re.MULTILINE))
    homes = {name: getattr(getattr(spectrim, name), "__module__", None) for name in spectrim.__all__}
    # By the name that users write, or with the module that defines it.
    lost = {name: home for name, home in homes.items() if home and not {f"spectrim.{name}", home} & listed}
    assert not lost, f"no page of docs/api shows {lost}"
