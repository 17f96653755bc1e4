"""Modules cut along an axis: what is left computes what indexing the dense module gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.errors import PlanError
from spectrim.nn.channels.narrow import add_bias, narrow, reshape
from tests.nn.layers import Wrapped

# (maker, shape of an input, axis, what stays, attributes afterwards); "fed" cuts what the module is given, "read" what
# it answers, along the channels.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, list[int], dict[str, Any]]] = {
    "linear out": (lambda: nn.Linear(6, 8), (3, 6), "out", [0, 3, 7], {"out_features": 3, "in_features": 6}),
    "linear in": (lambda: nn.Linear(6, 8, bias=False), (3, 6), "in", [1, 2, 5], {"in_features": 3, "out_features": 8}),
    "conv1d out": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9), "out", [1, 5], {"out_channels": 2}),
    "conv1d in": (
        lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect"),
        (2, 4, 9),
        "in",
        [0, 3],
        {"in_channels": 2},
    ),
    "conv2d out": (lambda: nn.Conv2d(4, 6, (3, 1), stride=2), (2, 4, 7, 7), "out", [0, 1, 4], {"out_channels": 3}),
    "conv2d in": (lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 7, 7), "in", [2], {"in_channels": 1}),
    "conv3d out": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 3), "out", [1, 3], {"out_channels": 2}),
    "conv3d in": (lambda: nn.Conv3d(4, 2, 2), (2, 4, 3, 3, 3), "in", [1, 3], {"in_channels": 2}),
    "grouped out": (
        lambda: nn.Conv2d(4, 8, 3, groups=2),
        (2, 4, 5, 5),
        "out",
        [0, 3, 5, 6],
        {"out_channels": 4, "groups": 2},
    ),
    "grouped in": (
        lambda: nn.Conv2d(8, 4, 3, groups=2),
        (2, 8, 5, 5),
        "in",
        [1, 2, 4, 7],
        {"in_channels": 4, "groups": 2},
    ),
    "transposed out": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), "out", [0, 5], {"out_channels": 2}),
    "transposed in": (
        lambda: nn.ConvTranspose1d(4, 6, 3, output_padding=1, stride=2),
        (2, 4, 5),
        "in",
        [0, 2],
        {"in_channels": 2},
    ),
    "transposed grouped out": (
        lambda: nn.ConvTranspose2d(4, 8, 3, groups=2),
        (2, 4, 5, 5),
        "out",
        [1, 3, 4, 6],
        {"out_channels": 4, "groups": 2},
    ),
    "transposed grouped in": (
        lambda: nn.ConvTranspose2d(8, 4, 2, groups=2),
        (2, 8, 5, 5),
        "in",
        [1, 3, 4, 6],
        {"in_channels": 4, "groups": 2},
    ),
    "depthwise": (
        lambda: nn.Conv2d(6, 6, 3, groups=6),
        (2, 6, 5, 5),
        "through",
        [0, 4, 5],
        {"in_channels": 3, "out_channels": 3, "groups": 3},
    ),
    "depthwise transposed": (
        lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
        (2, 4, 5),
        "through",
        [1, 2],
        {"groups": 2},
    ),
    "batchnorm": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 3), "through", [0, 2, 5], {"num_features": 3}),
    "batchnorm bare": (lambda: nn.BatchNorm1d(6, affine=False), (4, 6), "through", [1, 4], {"num_features": 2}),
    "batchnorm without statistics": (
        lambda: nn.BatchNorm1d(6, track_running_stats=False),
        (4, 6),
        "through",
        [1, 4],
        {"num_features": 2},
    ),
    "instancenorm": (lambda: nn.InstanceNorm2d(6), (4, 6, 3, 3), "through", [0, 2, 5], {"num_features": 3}),
    "instancenorm with statistics": (
        lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
        (4, 6, 3),
        "through",
        [0, 5],
        {"num_features": 2},
    ),
    "groupnorm, whole groups of one": (
        lambda: nn.GroupNorm(1, 4),
        (2, 4, 3),
        "through",
        [0, 1, 2, 3],
        {"num_channels": 4},
    ),
    "prelu": (lambda: nn.PReLU(6), (3, 6, 2), "through", [0, 1, 5], {"num_parameters": 3}),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def filled(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    module = make().to(dtype).eval()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return module


def cut(module: nn.Module, axis: str, kept: list[int]) -> nn.Module:
    model = Wrapped(copy.deepcopy(module))
    narrow(model, {("layer", axis): torch.tensor(kept)})
    return model.layer


@pytest.mark.table
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_cut_module_is_the_dense_one_indexed(name: str, dtype: torch.dtype) -> None:
    make, shape, axis, kept, attributes = CASES[name]
    module = filled(make, dtype)
    x = torch.randn(shape).to(dtype)
    channel = -1 if isinstance(module, nn.Linear) else 1
    fed, index = x, torch.tensor(kept)
    if axis in ("in", "through"):
        # What is no longer read is as if it were zero.
        silent = torch.zeros(x.shape[channel], dtype=torch.bool).index_fill(0, index, True)
        view = [1] * x.dim()
        view[channel] = -1
        fed = x * silent.reshape(view).to(dtype)
    small = cut(module, axis, kept)
    with torch.no_grad():
        wanted = module(fed if axis == "in" else x)
        given = small(x if axis == "out" else x.index_select(channel, index))
        if axis != "in":
            wanted = wanted.index_select(channel, index)
    assert given.dtype == dtype
    assert torch.allclose(given, wanted, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert {key: getattr(small, key) for key in attributes} == attributes
    fresh = copy.deepcopy(small)
    fresh.load_state_dict(small.state_dict())
    assert all(t.is_contiguous() for t in small.state_dict().values())


@pytest.mark.parametrize("name", CASES)
def test_gradients_stay_wanted_or_not_and_nothing_is_shared_with_the_dense_module(name: str) -> None:
    make, _, axis, kept, _ = CASES[name]
    for wanted in (True, False):
        module = make().requires_grad_(wanted)
        model = Wrapped(module)
        before = [p.data_ptr() for p in module.parameters()]
        narrow(model, {("layer", axis): torch.tensor(kept)})
        assert model.layer is module
        assert all(p.requires_grad is wanted and isinstance(p, nn.Parameter) for p in module.parameters())
        if axis != "through" and len(kept) < 4:
            assert module.weight.data_ptr() not in before


@pytest.mark.parametrize("name", CASES)
def test_reshape_leaves_the_shapes_that_a_cut_leaves(name: str) -> None:
    make, _, axis, kept, _ = CASES[name]
    small = cut(make(), axis, kept)
    model = Wrapped(make())
    size = {"in": "in_features", "out": "out_features"}[axis] if isinstance(model.layer, nn.Linear) else None
    for held in (size, "num_features", "num_channels", "num_parameters", f"{axis}_channels", "in_channels"):
        if held and hasattr(model.layer, held):
            reshape(model, "layer", axis, getattr(model.layer, held) - len(kept))
            break
    assert {k: t.shape for k, t in model.layer.state_dict().items()} == {
        k: t.shape for k, t in small.state_dict().items()
    }
    model.layer.load_state_dict(small.state_dict())
    assert repr(model.layer) == repr(small)


def test_layernorm_and_groupnorm_keep_the_scales_of_what_stays() -> None:
    norm = filled(lambda: nn.LayerNorm(6), torch.float64)
    small = cut(norm, "through", [1, 4, 5])
    assert small.normalized_shape == (3,)
    assert torch.equal(small.weight, norm.weight[[1, 4, 5]])
    assert torch.equal(small.bias, norm.bias[[1, 4, 5]])
    x = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(small(x), torch.nn.functional.layer_norm(x, (3,), norm.weight[[1, 4, 5]], norm.bias[[1, 4, 5]]))
    grouped = filled(lambda: nn.GroupNorm(2, 6), torch.float64)
    thin = cut(grouped, "through", [0, 2, 4, 5])
    assert (thin.num_channels, thin.num_groups) == (4, 2)
    assert torch.equal(thin.weight, grouped.weight[[0, 2, 4, 5]])
    assert thin(torch.randn(2, 4, 3, dtype=torch.float64)).shape == (2, 4, 3)
    bare = cut(nn.LayerNorm(6, elementwise_affine=False), "through", [0, 1])
    assert (bare.weight, bare.normalized_shape) == (None, (2,))


def test_embeddings_and_parameters_without_a_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(5, 6, padding_idx=2)
            self.pos = nn.Parameter(torch.randn(1, 4, 6), requires_grad=False)
            self.inner = nn.Module()
            self.inner.scale = nn.Parameter(torch.randn(6))

    net = Net()
    table, pos, scale = net.e.weight.detach().clone(), net.pos.detach().clone(), net.inner.scale.detach().clone()
    left = torch.tensor([0, 3, 5])
    narrow(net, {("e", "out"): left, ("pos", "2"): left, ("inner.scale", "0"): left})
    assert torch.equal(net.e(torch.tensor([1, 2])), table[[1, 2]][:, left])
    assert (net.e.embedding_dim, net.e.num_embeddings, net.e.padding_idx) == (3, 5, 2)
    assert torch.equal(net.pos, pos[..., left])
    assert not net.pos.requires_grad
    assert torch.equal(net.inner.scale, scale[left])
    assert {name for name, _ in net.named_parameters()} == {"e.weight", "pos", "inner.scale"}
    reshape(net, "pos", "2", 1)
    assert net.pos.shape == (1, 4, 2)


BAD: dict[str, tuple[Callable[[], nn.Module], str, str, list[int], str]] = {
    "no module": (lambda: nn.Linear(4, 4), "nothing", "out", [0], "'nothing'"),
    "no layer": (lambda: nn.ReLU(), "layer", "out", [0], "'layer'.*'out' to 1.*ReLU"),
    "beyond the end": (lambda: nn.Linear(4, 4), "layer", "out", [0, 4], "'layer'.*'out' to 2"),
    "beyond the end of a convolution": (lambda: nn.Conv2d(4, 4, 3), "layer", "in", [0, 4], "'layer'.*'in' to 2"),
    "negative": (lambda: nn.Conv2d(4, 4, 3), "layer", "in", [-1, 2], "'layer'"),
    "different numbers": (
        lambda: nn.Conv2d(4, 4, 3, groups=2),
        "layer",
        "in",
        [0, 1, 2],
        r"different numbers .*\[2, 1\]",
    ),
    "not depthwise": (lambda: nn.Conv2d(4, 4, 3), "layer", "through", [0], "depthwise"),
    "a norm's groups": (lambda: nn.GroupNorm(2, 4), "layer", "through", [0, 1, 2], r"\[2, 1\]"),
    "no such axis": (lambda: nn.Linear(4, 4), "layer.weight", "5", [0], "'layer.weight'"),
    "axis in words": (lambda: nn.Linear(4, 4), "layer.weight", "out", [0], "'layer.weight'"),
    "a method": (lambda: nn.Linear(4, 4), "layer.forward", "out", [0], "'layer.forward'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_cuts_are_refused_by_name(name: str) -> None:
    make, path, axis, kept, text = BAD[name]
    with pytest.raises(PlanError, match=text):
        narrow(Wrapped(make()), {(path, axis): torch.tensor(kept)})


@pytest.mark.parametrize(
    ("make", "name", "axis", "fewer"),
    [
        (lambda: nn.Linear(4, 4), "layer", "out", 4), (lambda: nn.Linear(4, 4), "layer", "out", 10**30),
        (lambda: nn.Linear(4, 4), "layer", "out", -1), (lambda: nn.Linear(4, 4), "layer", "through", 1),
        (lambda: nn.Linear(4, 4), "", "out", 1), (lambda: nn.Linear(4, 4), "nothing", "out", 1),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "layer", "in", 1), (lambda: nn.Conv2d(4, 4, 3), "layer", "through", 1),
        (lambda: nn.GroupNorm(2, 4), "layer", "through", 1), (lambda: nn.PReLU(), "layer", "through", 1),
        (lambda: nn.Linear(4, 4), "layer.weight", "²", 1), (lambda: nn.Linear(4, 4), "layer.weight", "2", 1),
        (lambda: nn.Linear(4, 4), "layer.forward", "0", 1), (lambda: nn.Embedding(3, 4), "layer", "in", 1),
        (lambda: nn.ReLU(), "layer", "out", 1), (lambda: nn.Linear(4, 4), "layer.weight.data", "0", 1),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_taken_away(make, name: str, axis: str, fewer: int) -> None:
    with pytest.raises(PlanError):
        reshape(Wrapped(make()), name, axis, fewer)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(3, 5, bias=False), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)]
)
def test_a_bias_of_zeros_changes_nothing(make) -> None:
    model = Wrapped(make().double())
    x = (
        torch.randn(2, 3, dtype=torch.float64)
        if isinstance(model.layer, nn.Linear)
        else torch.randn(2, 4, 5, 5).double()
    )
    model.layer.weight.requires_grad_(False)
    before: Tensor = model(x)
    add_bias(model.layer, "layer")
    assert torch.equal(model(x), before)
    assert (model.layer.bias.dtype, model.layer.bias.requires_grad) == (torch.float64, False)
    held = model.layer.bias
    add_bias(model.layer, "layer")
    assert model.layer.bias is held
    with pytest.raises(PlanError, match="'n' is a BatchNorm1d"):
        add_bias(nn.BatchNorm1d(3), "n")
