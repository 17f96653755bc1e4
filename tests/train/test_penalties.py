"""Decay of the product of factors against the dense product."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spectrim.network.choices import Choice
from spectrim.nn.build import skeleton
from spectrim.nn.layers import spec_of
from spectrim.nn.surgery import merge
from spectrim.train import add_product_decay, factored_pairs, fine_tune, product_penalty
from tests.train.small import Pair

PAIRS: dict[str, Callable[[], nn.Sequential]] = {
    "linear": lambda: Pair(nn.Linear(7, 3, bias=False), nn.Linear(3, 5)),
    "channel": lambda: Pair(nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.Conv2d(3, 6, 1)),
    "input": lambda: Pair(nn.Conv2d(4, 3, 1, bias=False), nn.Conv2d(3, 6, 3, padding=1)),
    "height-first": lambda: Pair(nn.Conv2d(4, 3, (3, 1), bias=False), nn.Conv2d(3, 6, (1, 5))),
    "width-first": lambda: Pair(nn.Conv2d(4, 3, (1, 3), bias=False), nn.Conv2d(3, 6, (5, 1))),
    "grouped": lambda: Pair(nn.Conv2d(4, 6, (3, 1), groups=2, bias=False), nn.Conv2d(6, 8, (1, 3), groups=2)),
    "one-axis": lambda: Pair(nn.Conv1d(4, 2, 3, bias=False), nn.Conv1d(2, 5, 1)),
    "three-axes": lambda: Pair(nn.Conv3d(2, 3, (3, 1, 2), bias=False), nn.Conv3d(3, 4, (1, 3, 1))),
}


def dense(pair: nn.Sequential) -> Tensor:
    """The weight of the one layer, found by sending every unit impulse through both layers."""
    first, second = pair[0], pair[1]
    if isinstance(first, nn.Linear):
        return second.weight @ first.weight
    axes = len(first.kernel_size)
    kernel = [a * b for a, b in zip(first.kernel_size, second.kernel_size, strict=True)]
    impulses = torch.zeros(first.in_channels, first.in_channels, *(2 * k - 1 for k in kernel), dtype=first.weight.dtype)
    centre = tuple(k - 1 for k in kernel)
    for channel in range(first.in_channels):
        impulses[(channel, channel, *centre)] = 1.0
    function = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[axes - 1]
    hidden = function(impulses, first.weight, groups=first.groups)
    return function(hidden, second.weight, groups=second.groups)


@pytest.mark.parametrize("kind", PAIRS)
def test_value_and_gradients_are_those_of_the_dense_product(kind: str) -> None:
    module = PAIRS[kind]().double()
    wide = nn.ModuleDict({"layer": module})
    (pair,) = factored_pairs(wide)
    assert pair.name == "layer"
    expected = 0.3 / 2 * dense(module).square().sum()
    torch.testing.assert_close(product_penalty(wide, 0.3), expected)

    expected.backward()
    gradients = [pair.first.grad, pair.second.grad]
    pair.first.grad = pair.second.grad = None
    add_product_decay([pair], 0.3)
    torch.testing.assert_close([pair.first.grad, pair.second.grad], gradients)
    add_product_decay([pair], 0.3)
    torch.testing.assert_close(pair.first.grad, 2 * gradients[0])  # type: ignore[operator]


def test_shrinking_subtracts_from_the_weights() -> None:
    module = PAIRS["height-first"]()
    (pair,) = factored_pairs(module)
    before = [pair.first.detach().clone(), pair.second.detach().clone()]
    steps = pair.half_gradients()
    add_product_decay([pair], 0.01, shrink=True)
    for now, old, step in zip((pair.first, pair.second), before, steps, strict=True):
        torch.testing.assert_close(now.detach(), old - 0.01 * step)


def test_a_shared_factor_gets_the_sum() -> None:
    one, two = PAIRS["linear"](), PAIRS["linear"]()
    two[1].weight = one[1].weight
    model = nn.ModuleList([one, two])
    product_penalty(model, 1.0).backward()
    shared = one[1].weight
    expected, shared.grad = shared.grad, None
    add_product_decay(factored_pairs(model), 1.0)
    torch.testing.assert_close(shared.grad, expected)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)),
        Pair(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4)),
        Pair(nn.Conv2d(4, 2, 3), nn.Conv2d(2, 4, 3)),
        Pair(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1)),
    ],
    ids=["not marked", "three modules", "kernels overlap", "groups differ"],
)
def test_other_modules_are_no_pairs(module: nn.Module) -> None:
    assert factored_pairs(module) == ()
    assert product_penalty(module, 1.0) == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_decays_the_product(optimizer: str) -> None:
    """With a loss of zero, a step of plain SGD moves by the decay alone, in either form of decay."""
    model = Pair(nn.Linear(4, 2, bias=False), nn.Linear(2, 4))
    (pair,) = factored_pairs(model)
    start, bias = pair.first.detach().clone(), model[1].bias.detach().clone()
    step = pair.half_gradients()[0]
    fine_tune(
        model,
        [(torch.randn(3, 4), torch.zeros(3))],
        loss=lambda output, _: 0 * output.sum(),
        optimizer=optimizer,
        epochs=1,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.01,
        schedule="constant",
    )
    torch.testing.assert_close(pair.first.detach(), start - 0.1 * 0.01 * step)
    assert torch.equal(model[1].bias, bias)


TIED = {
    "linear-once": (lambda: nn.Linear(7, 6), "channel", 2, 2),
    "linear-both": (lambda: nn.Linear(6, 7), "channel", 4, 1),
    "right": (lambda: nn.Conv2d(4, 6, 3), "height-first", 3, 0),
    "both": (lambda: nn.Conv2d(4, 6, 3), "channel", 5, 3),
    "both-grouped": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), "height-first", 3, 2),
    "both-input": (lambda: nn.Conv1d(4, 6, 3), "input", 3, 1),
    "both-three-axes": (lambda: nn.Conv3d(2, 6, (3, 1, 2)), "depth-first", 3, 2),
}


def tied(kind: str, dtype: torch.dtype = torch.float64) -> nn.ModuleList:
    """Three layers that share factors, with random weights."""
    make, how, rank, left_rank = TIED[kind]
    specs = [spec_of(make().to(dtype), [f"layer{n}"]) for n in range(3)]
    settings = {"unfolding": how, "rank": rank, "left_rank": left_rank, "once": kind == "linear-once"}
    model = nn.ModuleList(skeleton(Choice("shared_basis", "m", settings), specs))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def weights_of(model: nn.Module) -> list[Tensor]:
    """The trainable weights, without biases."""
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


@pytest.mark.parametrize("kind", TIED)
def test_layers_that_share_factors_decay_as_the_dense_layers_they_stand_for(kind: str) -> None:
    model = tied(kind)
    pairs = factored_pairs(model)
    assert [pair.name for pair in pairs] == ["0", "1", "2"]
    assert {id(p) for pair in pairs for p in pair.parameters} == {id(p) for p in weights_of(model)}
    # The merged layers' weights come by another way: each unfolded product multiplied out and folded again.
    expected = 0.3 / 2 * sum(layer.weight.square().sum() for layer in merge(model))  # type: ignore[union-attr, operator]
    penalty = product_penalty(model, 0.3)
    torch.testing.assert_close(penalty.detach(), expected.detach())

    penalty.backward()
    gradients = [parameter.grad for parameter in weights_of(model)]
    assert all(gradient is not None for gradient in gradients)
    model.zero_grad()
    add_product_decay(pairs, 0.3)
    torch.testing.assert_close([parameter.grad for parameter in weights_of(model)], gradients)
    assert all(parameter.grad is None for parameter in model.parameters() if parameter.ndim == 1)


@pytest.mark.parametrize("kind", ["linear-once", "both-grouped"])
@pytest.mark.parametrize("shrink", [False, True])
def test_decay_of_shared_factors_is_a_step_down_the_penalty(kind: str, shrink: bool) -> None:
    model = tied(kind)
    autograd = copy.deepcopy(model)
    product_penalty(autograd, 0.01).backward()
    before = [parameter.detach().clone() for parameter in weights_of(model)]
    add_product_decay(factored_pairs(model), 0.01, shrink=shrink)
    for old, now, other in zip(before, weights_of(model), weights_of(autograd), strict=True):
        gradient = old - now.detach() if shrink else now.grad
        torch.testing.assert_close(gradient, other.grad)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["linear-once", "linear-both"])
def test_training_decays_the_products_of_shared_factors_and_nothing_twice(kind: str, optimizer: str) -> None:
    model = tied(kind, torch.float32)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, inputs: Tensor) -> Tensor:
            return sum(layer(inputs) for layer in self.layers)  # type: ignore[return-value]

    product_penalty(model, 0.01).backward()
    expected = [p.detach() - 0.1 * (0 if p.grad is None else p.grad) for p in model.parameters()]
    fine_tune(
        Sum(),
        [(torch.randn(3, TIED[kind][0]().in_features), torch.zeros(3))],  # type: ignore[union-attr]
        loss=lambda output, _: 0 * output.sum(),
        optimizer=optimizer,
        epochs=1,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.01,
        schedule="constant",
    )
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)


def test_a_transposed_pair_with_shared_parts_is_no_pair() -> None:
    specs = [spec_of(nn.ConvTranspose2d(4, 6, 3), [name]) for name in "ab"]
    settings = {"unfolding": "channel", "rank": 3, "left_rank": 1}
    assert factored_pairs(nn.ModuleList(skeleton(Choice("shared_basis", "m", settings), specs))) == ()
