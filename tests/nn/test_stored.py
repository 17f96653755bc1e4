"""Files of models whose state is not their parameters and buffers by name: hooks and methods of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.nn.stored import bytes_of_state

SPARSE = st.LowRankPlusSparse(patterns=("unstructured",), densities=(0.0, 0.2), ranks=2, turns=3)
X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 8)
        self.register_buffer("held", torch.ones(500))
        self.register_buffer("passing", torch.ones(5000), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x))))) + self.held[0]


def renames(old: str, new: str, found: str | None = None) -> Callable[[], Plain]:
    def moved(state: dict[str, Any], before: str, after: str) -> None:
        for name in [name for name in state if name.startswith(before)]:
            state[after + name[len(before) :]] = state.pop(name)

    def make() -> Plain:
        model = Plain()
        model.register_state_dict_post_hook(lambda module, state, prefix, meta: moved(state, old, new))
        model.register_load_state_dict_pre_hook(lambda module, state, *_: moved(state, found or new, old))
        return model

    return make


class Copies(Plain):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"net.{name}": t.detach().clone() for name, t in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({name[4:]: t for name, t in state.items()}, *args, **kwargs)


class Extra(Plain):
    def get_extra_state(self) -> Tensor:
        return torch.arange(600)

    def set_extra_state(self, state: Tensor) -> None:
        pass


def without(name: str) -> Callable[[], Plain]:
    def make() -> Plain:
        model = Plain()

        def hook(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
            for key in [key for key in state if key.endswith(name)]:
                del state[key]

        model.register_state_dict_post_hook(hook)
        model.register_load_state_dict_pre_hook(
            lambda module, state, *_: name == "held" and state.setdefault(name, model.held)
        )
        return model

    return make


@pytest.mark.table
@pytest.mark.parametrize("make", [Plain, renames("", "net."), renames("b.", "body."), Copies, Extra, without("held")])
@pytest.mark.parametrize("method", [None, SPARSE])
def test_files_have_the_size_of_the_plan_and_are_read_back(
    make: Callable[[], nn.Module], method: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    result = st.compress(make().eval(), [X], "bytes=70%", methods=method, sensitivity=False)
    path = tmp_path / "small.safetensors"
    st.save(result, path)
    planned = result.plan.costs["bytes"]
    # A header is counted at its largest.
    assert planned - 1700 < path.stat().st_size <= planned <= result.plan.budget["bytes"]
    torch.manual_seed(0)  # what a state leaves out is as it is made
    again = st.load(make(), path).eval()
    assert torch.equal(again(X), result.model(X))


def test_a_state_that_does_not_become_smaller_with_the_layers_is_refused() -> None:
    def halves(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        state.update({f"{key}_half": value.half() for key, value in list(state.items())})

    model = Plain().eval()
    model.register_state_dict_post_hook(halves)
    with pytest.raises(st.ProofError, match=r"would have [\d,]+ bytes, where the budget allows .*such as '.*_half'"):
        st.compress(model, [X], "bytes=70%", methods=SPARSE, sensitivity=False)


@pytest.mark.parametrize("make", [Plain, Copies, Extra, without("held")])
def test_bytes_are_those_of_the_state(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert bytes_of_state(model) == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert bytes_of_state(copy.deepcopy(model).to("meta")) > 0


def test_a_state_without_what_stands_for_a_layer_is_not_saved(tmp_path: Path) -> None:
    result = st.compress(without("mask")().eval(), [X], "bytes=70%", methods=SPARSE, sensitivity=False)
    with pytest.raises(st.CheckpointError, match=r"leaves out '\w[\w.]*mask' of what stands for layer '\w'.*skip="):
        st.save(result, tmp_path / "small.safetensors")


def test_a_model_that_does_not_load_its_own_state_says_so(tmp_path: Path) -> None:
    make = renames("b.", "body.", "other.")
    result = st.compress(make().eval(), [X], "macs=60%", sensitivity=False)
    st.save(result, tmp_path / "small.safetensors")
    with pytest.raises(st.CheckpointError, match="the Plain does not load what its state_dict gives"):
        st.load(make(), tmp_path / "small.safetensors")
