"""Decay of the product of factors against the dense product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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
