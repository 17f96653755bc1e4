"""Models whose classes do things in their own way: what is right with them, or the sentence that says what is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as st
from tests.cases import one_thread

BATCHES = [torch.randn(32, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)]


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Any:
        return self.b(F.relu(self.a(x)))


class Trainable(Two):
    """Gives the parameters alone that are to be trained."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter([self.b.weight])


def test_parameters_that_a_class_does_not_give_are_counted_and_left_as_found():
    model = Trainable().eval()
    result = st.compress(model, BATCHES, "macs=70%")
    assert all(p.requires_grad and p.grad is None for _, p in model.named_parameters())
    assert result.plan.dense_costs["parameters"] == 8 * 24 * 2 + 32
    held = sum(p.numel() for _, p in result.model.named_parameters())
    assert result.plan.costs["parameters"] == held < 8 * 24 * 2 + 32


class Named(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=F.relu(self.a(input=x)))


def test_what_stands_for_a_layer_takes_its_input_by_name():
    methods = st.LowRankPlusSparse(patterns=("unstructured",))
    result = st.compress(Named().eval(), BATCHES, "macs=90%", methods=methods, only="b")
    kinds = {type(module).__name__ for module in result.model.modules()}
    assert kinds & {"Summed", "Masked", "MaskedLinear"}
    assert result.model(BATCHES[0]).shape == (32, 8)


class Partial(Two):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name.startswith("b")}


class Restoring(Partial):
    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(state, strict=False)


def test_a_state_that_leaves_out_weights_is_refused_before_the_work():
    with pytest.raises(st.CheckpointError, match=r"state_dict of the Partial leaves out 'a\.weight' and 1 more"):
        st.compress(Partial().eval(), BATCHES, "macs=70%")
    assert st.compress(Restoring().eval(), BATCHES, "macs=70%").plan.changed


class Itself(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b.forward(F.relu(self.a.forward(x)))


class Computing(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.a.weight)), self.b.weight)


class Numpy(Two):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).detach().numpy()


class Rebuilding(Two):
    def __deepcopy__(self, memo: Any) -> Two:
        new = type(self)()
        new.load_state_dict(self.state_dict())
        return new.train(self.training)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Itself, r"write layer\(x\) in place of layer\.forward\(x\)"),
        (Computing, "another module computes with its weight"),
        (Numpy, "ndarray holds no tensor: pass forward="),
        (
            Rebuilding,
            r"__deepcopy__ of Rebuilding fails with RuntimeError.*Missing key.*copy the modules that are there",
        ),
    ],
)
def test_what_cannot_be_compressed_is_told_with_a_cure(kind: type[nn.Module], says: str):
    with pytest.raises(st.SpectrimError, match=says):
        st.compress(kind().eval(), BATCHES, "macs=70%")


def test_vectors_without_an_axis_for_samples_are_told():
    single = [batch[0] for batch in BATCHES]
    with pytest.raises(st.CalibrationError, match=r"one sample of shape \(8,\).*x\.unsqueeze\(0\)"):
        st.compress(Two().eval(), single, "macs=70%")
    model = Two().eval()
    sites = st.calibrate(model, st.find(model), single, samples=lambda batch: 1)
    assert st.tabulate(sites).dense["macs"] == 2 * 8 * 24


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN or Inf"), (-1.0, "variances below zero")])
def test_the_buffer_that_spoils_what_layers_see_is_named(value: float, what: str):
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).eval()
    model[1].running_var[2] = value
    with pytest.raises(st.CalibrationError, match=rf"layer '2'.*'1\.running_var' holds {what}: mend it first"):
        st.calibrate(model, st.find(model), BATCHES)


class Each(nn.Module):
    """Runs its images one by one, without an axis for samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.c(F.relu(self.b(F.relu(self.a(image)))).mean((1, 2))) for image in x])


def test_channels_of_layers_that_are_given_single_samples():
    pytest.importorskip("torch_pruning")
    batches = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    result = st.compress(Each().eval(), batches, "macs=70%", methods=st.PrincipalFilters())
    assert result.model.a.out_channels < 8 or result.model.b.out_channels < 8
