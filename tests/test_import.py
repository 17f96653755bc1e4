"""What an import may load, and that the public names are all there."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import spectrim
from spectrim._moved import HOMES

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


def test_all_public_names_load_without_the_optional_packages() -> None:
    names = [name for name in spectrim.__all__ if name not in ("compare", "write_report")]
    loaded = loaded_after(f"import spectrim\nfor name in {names!r}: getattr(spectrim, name)")
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_no_device_is_touched() -> None:
    code = "import spectrim, torch\nspectrim.compress, spectrim.fine_tune\nassert not torch.cuda.is_initialized()"
    assert "torch" in loaded_after(code)


def test_every_public_name_exists_and_is_listed() -> None:
    for name in spectrim.__all__:
        assert getattr(spectrim, name) is not None
        assert name in dir(spectrim)


def test_functions_are_not_hidden_by_modules_of_the_same_name() -> None:
    code = "import spectrim.selection.selectors, spectrim.pipeline, spectrim.application, spectrim as st\n"
    code += "assert all(callable(f) for f in (st.select, st.compress, st.apply, st.find, st.calibrate, st.sensitivity))"
    assert "spectrim" in loaded_after(code)


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


def test_a_path_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"spectrim\.nonsense"):
        import_module("spectrim.nonsense")
