"""What stands for a layer: the layer's own object, of its own type, that answers for it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spectrim as st
from spectrim.errors import PlanError
from spectrim.nn.layers import run_with
from spectrim.nn.modules import Factored
from spectrim.nn.sparse.layers import Masked
from spectrim.nn.standing import StandIn, WholeWeight
from spectrim.nn.surgery import merge
from spectrim.nn.traits import Traits
from tests.nn.layers import LAYERS, Wrapped, close
from tests.nn.nets import compressed, low_rank, sparse

CHOICES = {
    "pair": lambda bias: low_rank(2, "channel", bias=bias),
    "masked": lambda bias: sparse(0, 0.5, "unstructured", bias=bias),
    "slim": lambda bias: sparse(0, 0.5, "channels", bias=bias),
    "sum": lambda bias: sparse(1, 0.4, "unstructured", bias=bias),
}


class Own(nn.Linear):
    """A user's own kind of layer."""


def standing(kind: str = "linear", choice: str = "pair") -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = Wrapped(make()).eval()
    layer = model.layer
    compressed(model, {"layer": CHOICES[choice](layer.bias is not None)})
    for part in model.modules():
        if isinstance(part, Masked):
            part.settle()
    return model, layer, shape


@pytest.mark.table
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_stays_the_object_and_the_type_it_was_and_answers_for_its_weight(kind: str, choice: str) -> None:
    own = type(LAYERS[kind][0]())
    model, layer, shape = standing(kind, choice)
    sizes = {name: value for name, value in vars(LAYERS[kind][0]()).items() if name in ("stride", "padding", "groups")}
    assert model.layer is layer
    assert isinstance(layer, own)
    assert isinstance(layer, StandIn)
    assert {name: getattr(layer, name) for name in sizes} == sizes
    x = torch.randn(shape)
    with torch.no_grad():
        assert close(run_with(layer, layer.original, x, layer.weight, layer.bias), layer(x), 1e-4)
    assert layer.weight.shape == LAYERS[kind][0]().weight.shape
    assert type(merge(model).layer) is own


@pytest.mark.parametrize("choice", CHOICES)
def test_copies_and_pickles_are_of_the_same_kind(choice: str) -> None:
    model, layer, shape = standing("conv2d", choice)
    x = torch.randn(shape)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.layer) is type(layer)
        assert other.layer is not layer
        assert torch.equal(other(x), model(x))


def test_a_users_type_hooks_attributes_and_modes_stay() -> None:
    torch.manual_seed(0)
    layer, calls = Own(6, 5), []
    layer.f, layer.i = -1, 7
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    model = compressed(Wrapped(layer).train(), {"layer": low_rank(2, bias=True)})
    assert (layer.f, layer.i, layer.training, layer[0].training) == (-1, 7, True, True)
    assert (layer.in_features, layer.out_features) == (6, 5)
    assert isinstance(layer, Own)
    model(torch.randn(3, 6, requires_grad=True)).sum().backward()
    assert calls == ["after", "backward"]
    assert type(merge(model).layer) is Own


WRITES = {
    "in place": lambda layer: layer.weight.add_(1),
    "operator": lambda layer: exec("layer.weight += 1", {"layer": layer}),
    "data": lambda layer: layer.weight.data.mul_(2),
    "detached": lambda layer: layer.weight.detach().zero_(),
    "entry": lambda layer: layer.weight.__setitem__(0, 1.0),
    "initialised": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "given": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(5, 7))),
    "data given": lambda layer: setattr(layer.weight, "data", torch.zeros(5, 7)),
    "out": lambda layer: torch.add(torch.ones(5, 7), 1, out=layer.weight),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_weight_that_is_multiplied_out_is_not_written_to_in_silence(write: str) -> None:
    _, layer, _ = standing()
    with pytest.raises(RuntimeError, match=r"the weight of layer 'layer' \(Linear\) cannot be written.*merge"):
        WRITES[write](layer)


def test_what_is_known_of_a_weight_takes_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer, _ = standing()
    monkeypatch.setattr(Factored, "whole", lambda self: pytest.fail("multiplied out"))
    weight = layer.weight
    assert isinstance(weight, WholeWeight)
    assert (weight.shape, weight.size(0), weight.dim(), weight.ndim) == ((5, 7), 5, 2, 2)
    assert (weight.dtype, weight.device, weight.numel()) == (torch.float32, torch.device("cpu"), 35)
    assert weight.requires_grad
    assert weight.is_floating_point()
    assert not weight.detach().requires_grad
    assert layer.bias is layer[1].bias
    half = torch.ones(2, dtype=torch.float16)
    assert half.to(weight).dtype == half.type_as(weight.data).dtype == torch.float32
    assert torch.equal(weight.new_zeros(2, 3), torch.zeros(2, 3))
    assert torch.equal(torch.ones_like(weight.detach()), torch.ones(5, 7))
    assert torch.ones(35).view_as(weight).shape == (5, 7)


def test_gradients_flow_through_a_weight_that_is_read() -> None:
    _, layer, shape = standing()
    F.linear(torch.randn(shape), layer.weight).square().sum().backward()
    assert all(factor.weight.grad is not None for factor in layer)


def test_layers_keep_what_is_trained_and_the_order_in_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = model.to(memory_format=torch.channels_last)
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    traits = Traits.of(model)
    small = compressed(copy.deepcopy(model), {n: low_rank(2, "height-first", bias=True) for n in ("0", "2", "4")})
    traits.give(small)
    trained = [name for name, p in small.named_parameters() if p.requires_grad]
    assert trained == ["2.1.bias", "4.0.weight", "4.1.weight", "4.1.bias"]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in small.parameters() if p.dim() == 4)
    assert [p.requires_grad for p in merge(small).parameters()] == [False, False, False, True, True, True]


def test_a_part_of_the_same_name_is_refused() -> None:
    layer = nn.Linear(6, 5)
    layer.register_buffer("mask", torch.ones(1))
    with pytest.raises(PlanError, match=r"a Linear has a part 'mask' of its own, which a Masked in its place needs"):
        compressed(Wrapped(layer), {"layer": sparse(0, 0.5, "unstructured", bias=True)})


class Undivided(nn.Linear):
    def __init_subclass__(cls, *, tag: str) -> None:
        raise AssertionError("no type is to be derived")


class Final(type):
    def __new__(cls, name, bases, entries):
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("is final")
        return super().__new__(cls, name, bases, entries)


class Sealed(nn.Linear, metaclass=Final):
    pass


def test_types_that_take_no_derived_ones_are_stood_for_or_left_whole() -> None:
    torch.manual_seed(0)
    layer = Undivided(6, 5)
    compressed(Wrapped(layer), {"layer": low_rank(2, "channel", bias=True)})
    assert isinstance(layer, Undivided)
    assert isinstance(layer, StandIn)
    sealed, weight = Sealed(6, 5), nn.Parameter(torch.ones(5, 6))
    sealed.weight = weight
    with pytest.raises(PlanError, match="the place of a Sealed, .*is final.* skip the layer"):
        compressed(Wrapped(sealed), {"layer": low_rank(2, "channel", bias=True)})
    assert sealed.weight is weight


@pytest.mark.parametrize("choice", CHOICES)
def test_exports_scripts_and_traces_see_the_parts(choice: str) -> None:
    model, layer, shape = standing("conv2d", choice)
    x = torch.randn(shape)
    program = torch.export.export(model, (x,), strict=False).module()
    assert close(program(x), model(x))
    with torch.no_grad():
        assert close(torch.jit.trace(model, x)(x), model(x))
    if choice == "pair":
        assert close(torch.jit.script(model)(x), model(x))
    assert layer in set(model.modules())


def test_a_compressed_layer_is_the_site_it_was_or_on_request_its_parts_are() -> None:
    model, _, _ = standing()
    assert [site.name for site in st.find(model)] == ["layer"]
    assert {site.name for site in st.find(model, parts=True)} == {"layer.0", "layer.1"}
    again = compressed(model, {"layer.0": low_rank(1)})
    assert isinstance(again.layer[0], Factored)
    assert type(merge(again).layer) is nn.Linear
