"""What an import may load, and that the public names are all there."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim import errors, pipeline
from spectrim._moved import HOMES
from spectrim.report import page

HEAVY = ("scipy", "typer", "rich", "matplotlib", "torch_pruning", "transformers", "accelerate", "sklearn", "onnx")


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running ``code``."""
    script = f"{code}\nimport sys\nprint(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_is_light() -> None:
    loaded = loaded_after("import spectrim")
    assert "spectrim" in loaded
    assert not loaded & {*HEAVY, "torch", "numpy"}


def test_neither_public_names_nor_compressing_load_what_is_optional_or_the_compiler_of_torch() -> None:
    """In one process: loading torch takes longer than all else here."""
    names = [name for name in spectrim.__all__ if name not in ("compare", "write_report")]
    code = f"""
import sys, spectrim.selection.selectors, spectrim.pipeline, spectrim.application, spectrim as st, torch
for name in {names!r}: getattr(st, name)
assert all(callable(f) for f in (st.select, st.compress, st.apply, st.find, st.calibrate, st.sensitivity))
assert not torch.cuda.is_initialized()
assert not {set(HEAVY)!r} & set(sys.modules)
st.compress(torch.nn.Sequential(torch.nn.Linear(8, 8)), [torch.randn(16, 8)], "parameters=60%")
assert "torch._dynamo" not in sys.modules
"""
    assert "torch" in loaded_after(code)


def test_every_public_name_exists_and_is_listed() -> None:
    for name in spectrim.__all__:
        assert getattr(spectrim, name) is not None
        assert name in dir(spectrim)


def test_former_module_paths_lead_to_the_same_objects_with_a_warning() -> None:
    for former, homes in HOMES.items():
        sys.modules.pop(former, None)
        with pytest.warns(DeprecationWarning, match=f"{former} has moved"):
            alias = import_module(former)
        names = {name: home for home in reversed(homes) for name in vars(import_module(home)) if name[0] != "_"}
        assert names
        for name, home in names.items():
            assert getattr(alias, name) is getattr(import_module(home), name)
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            alias.nothing_of_the_kind  # noqa: B018


@pytest.mark.filterwarnings("ignore:spectrim:DeprecationWarning")
def test_a_former_path_gives_its_names_to_a_star() -> None:
    names: dict[str, Any] = {}
    exec("from spectrim.sites import *", names)
    assert names["Sites"] is spectrim.Sites
    assert names["LayerSpec"] is import_module("spectrim.network.layer").LayerSpec


@pytest.mark.filterwarnings("ignore:spectrim:DeprecationWarning")
def test_names_that_are_gone_answer_for_one_release() -> None:
    sites = spectrim.find(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    kept = spectrim.Choice("kept_channels", "m", {"kept": (0, 2), "of": 3, "sides": "a:out:1 b:in:4"})
    assert [s.name for s in pipeline.find_some(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "1", ())] == ["0"]
    (x,) = pipeline.one_batch(nn.Linear(4, 3), [torch.zeros(5, 4)], 2)
    assert x.shape == (2, 4)
    assert page.choice_text(kept) == "2 of 3 channels"
    assert import_module("spectrim.coupling").fewer((0, 2), 3, "a:out:1 b:in:4") == [("a", "out", 1), ("b", "in", 4)]
    assert import_module("spectrim.costs").fixed(sites, {"parameters": spectrim.parameters}) == {"parameters": 6}


@pytest.mark.parametrize(
    ("module", "former", "name"),
    [
        ("linalg.patterns", "Rows", "EvenRows"),
        ("linalg.patterns", "Channels", "WholeChannels"),
        ("linalg.low_rank_steps", "Split", "Alternating"),
        ("network.factors", "LowRankPlusSparse", "AdditiveFactors"),
        ("nn.find", "describe", "spec_of"),
    ],
)
def test_former_names_on_documented_pages_stand_for_the_same(module: str, former: str, name: str) -> None:
    held = import_module(f"spectrim.{module}")
    assert getattr(held, former) is getattr(held, name)


def test_a_path_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"spectrim\.nonsense"):
        import_module("spectrim.nonsense")


def test_completion_shows_public_names_alone() -> None:
    assert dir(spectrim) == sorted(["__version__", *spectrim.__all__])
    assert not [name for name in vars(spectrim) if name not in spectrim.__all__ and name[0] != "_" and name in HEAVY]


def test_the_errors_are_at_the_top() -> None:
    raised = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert raised <= set(spectrim.__all__)
    assert all(getattr(spectrim, name) is getattr(errors, name) for name in raised)


def test_type_checkers_see_what_is_loaded_at_run_time() -> None:
    stub = ast.parse((Path(spectrim.__file__).parent / "__init__.pyi").read_text(encoding="utf-8"))
    typed = {a.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert set(typed) == set(spectrim.__all__)
    for name, home in typed.items():
        assert getattr(import_module(home), name) is getattr(spectrim, name)


SCRIPT = """
import torch
from torch import nn
import spectrim as st

model = nn.Sequential(nn.Linear(8, 8))
batches = [torch.randn(4, 8)]
try:
    result = st.compress(model, batches, st.Budget(macs=0.5), methods=[st.WeightSVD()], progress=False)
except st.InfeasibleBudgetError as error:
    print(error.lowest + 1.0)
else:
    reveal_type(result.plan)
    print(result, result.report, result.candidates, result.sites, result.report.agreement, len(result.plan))
    names: list[str] = [row["layer"] for row in [*result.rows(), *result.plan.rows(), *result.sites.rows()]]
    lost: list[float] = [row["lost"] for row in result.candidates.rows() if row["layer"] in result.plan]
    frame = result.candidates.to_pandas()
    for entry in result.plan:
        print(entry.site, entry.choice, result.plan["0"].error, result.candidates["0"].worth("macs"))
    axes = result.plan.plot("macs")
    result.candidates.plot(layers=["0"], ax=axes)
    ratio: float = result.plan.ratio("macs")
    st.save(result.model, result.plan, "small.safetensors")
plan: st.Plan = st.select(st.tabulate(st.find(model)), st.Budget(parameters=0.5))
small: nn.Module = st.apply(model, st.find(model), plan)
wrong: int = st.apply(model, st.find(model), plan)
st.compres
"""


def test_a_users_script_is_type_checked(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}', encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert [d["message"] for d in found if d["severity"] == "information"] == ['Type of "result.plan" is "Plan"']
    errors_found = [(d["rule"], d["range"]["start"]["line"]) for d in found if d["severity"] == "error"]
    lines = SCRIPT.splitlines()
    wrong, unknown = lines.index("wrong: int = st.apply(model, st.find(model), plan)"), lines.index("st.compres")
    assert ("reportAssignmentType", wrong) in errors_found
    assert ("reportAttributeAccessIssue", unknown) in errors_found
    assert {line for _, line in errors_found} == {wrong, unknown}


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(spectrim.__file__).parent / "py.typed").exists()


def test_former_paths_are_there_until_0_3() -> None:
    """What 0.1 documented works in 0.2, and goes with the version that was named; this fails when that comes."""
    assert HOMES
    assert tuple(map(int, spectrim.__version__.split(".")[:2])) < (0, 3)


def test_the_version_has_one_source() -> None:
    root = Path(__file__).resolve().parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/spectrim/__init__.py"
    assert f"\nversion: {spectrim.__version__}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {spectrim.__version__}" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
