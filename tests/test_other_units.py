"""The same function of the same samples: outputs in other units, hidden channels of other sign or in another order."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st

Changed = tuple[nn.Sequential, Tensor, float]


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 6)).eval()


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 12, 3), nn.Tanh(), nn.ConvTranspose2d(12, 12, 3), nn.Tanh(), nn.Conv2d(12, 8, 3, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def per_channel(values: Tensor, axis: int, like: Tensor) -> Tensor:
    return values.reshape([-1 if each == axis else 1 for each in range(like.dim())])


def times(values: Tensor, factors: Tensor, axis: int) -> Tensor:
    return (values.double() * per_channel(factors, axis, values)).float()


def hidden_turned(net: Any, x: Tensor) -> Changed:
    """Channels of the other sign, which an odd activation hands on."""
    other = copy.deepcopy(net)
    first, second = net[0], net[2]
    signs = torch.where(torch.rand(len(first.bias), generator=torch.Generator().manual_seed(4)) < 0.5, -1.0, 1.0)
    other[0].weight.data = times(first.weight.data, signs, 0)
    other[0].bias.data = first.bias.data * signs
    other[2].weight.data = times(second.weight.data, signs, 0 if isinstance(second, nn.ConvTranspose2d) else 1)
    return other, x, 1.0


def hidden_permuted(net: Any, x: Tensor) -> Changed:
    other, order = copy.deepcopy(net), torch.randperm(len(net[0].bias), generator=torch.Generator().manual_seed(4))
    other[0].weight.data, other[0].bias.data = net[0].weight.data[order], net[0].bias.data[order]
    second = net[2].weight.data
    other[2].weight.data = second[order] if isinstance(net[2], nn.ConvTranspose2d) else second[:, order]
    return other, x, 1.0


def outputs_scaled(net: Any, x: Tensor) -> Changed:
    other = copy.deepcopy(net)
    for parameter in other[-1].parameters():
        parameter.data *= 1e9
    return other, x, 1e9


CHANGES = [hidden_turned, hidden_permuted, outputs_scaled]
# A fixed part of the numbers for the pair, so that there is one beside every sparse part.
SPARSE: list[st.Method] = [st.LowRankPlusSparse(share=0.4)]
LONGER: list[st.Method] = [st.ActivationTucker2(), st.ActivationCP(), st.ActivationSVD()]


@functools.cache
def unchanged(
    make: Callable[[], nn.Sequential], methods: tuple[st.Method, ...] | None
) -> tuple[nn.Sequential, Tensor, st.Result]:
    net = make()
    torch.manual_seed(1)
    x = torch.randn(144, 16) @ torch.randn(16, 16) if make is perceptron else torch.randn(96, 4, 6, 6)
    return net, x, st.compress(net, x.split(48), "parameters=70%", methods=methods)


@pytest.mark.table
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    ("make", "methods"),
    [(perceptron, None), (convolutional, None), (perceptron, SPARSE), (convolutional, LONGER)],
    ids=["perceptron", "convolutional", "perceptron, sparse", "convolutional, longer"],
)
def test_no_choice_and_no_output_changes(
    make: Callable[[], nn.Sequential], methods: list[st.Method] | None, change: Callable[[Any, Tensor], Changed]
) -> None:
    net, x, one = unchanged(make, None if methods is None else tuple(methods))
    other, changed, unit = change(net, x)
    two = st.compress(other, changed.split(48), "parameters=70%", methods=methods)
    assert [e.choice for e in two.plan] == [e.choice for e in one.plan]
    assert [e.error for e in two.plan] == pytest.approx([e.error for e in one.plan], rel=1e-3, abs=1e-5)
    with torch.no_grad():
        wanted, given = one.model(x), two.model(changed) / unit
    assert float((wanted - given).norm() / wanted.norm()) < 1e-3


@pytest.mark.table(every=2)
@pytest.mark.parametrize("methods", [None, [st.ActivationSVD()]], ids=["default", "low rank"])
def test_inputs_and_hidden_channels_of_every_layer_in_units_of_their_own(methods: list[st.Method] | None) -> None:
    """Over 12 decades: the same samples are held out, sharing is not taken for cheap, and what is gained is weighed."""
    torch.manual_seed(0)
    sizes = (40, 64, 64, 48, 9)
    net = nn.Sequential(*(each for a, b in pairwise(sizes) for each in (nn.Linear(a, b), nn.ReLU())))[:-1].eval()
    x = torch.randn(320, 40) @ torch.randn(40, 40) / 6
    other, draw = copy.deepcopy(net), torch.Generator().manual_seed(0)
    for first, second in ((0, 2), (2, 4), (4, 6)):
        units = 10 ** (12 * torch.rand(len(net[first].bias), generator=draw) - 6)
        other[first].weight.data, other[first].bias.data = (
            times(value.data, units, 0) for value in (other[first].weight, other[first].bias)
        )
        other[second].weight.data = times(other[second].weight.data, 1 / units, 1)
    units = 10 ** (12 * torch.rand(40, generator=draw) - 6)
    other[0].weight.data, scaled = times(other[0].weight.data, 1 / units, 1), x * units
    one, two = (
        st.compress(each, inputs.split(64), "parameters=60%", methods=methods)
        for each, inputs in ((net, x), (other, scaled))
    )
    assert [e.choice for e in two.plan] == [e.choice for e in one.plan]
    with torch.no_grad():
        wanted, given = one.model(x), two.model(scaled)
    assert float((wanted - given).norm() / wanted.norm()) < 1e-3


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(6, 12, batch_first=True)
        self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(self.first(x)[0][:, -1])))


def test_the_order_of_what_a_recurrent_layer_hands_on_decides_nothing() -> None:
    torch.manual_seed(0)
    net, x = Recurrent().eval(), torch.randn(96, 7, 6)
    other, order = copy.deepcopy(net), torch.randperm(12, generator=torch.Generator().manual_seed(4))
    gates = torch.cat([order + 12 * gate for gate in range(4)])
    for name, value in net.first.named_parameters():
        moved = value.data[gates]
        getattr(other.first, name).data = moved[:, order] if "hh" in name and moved.dim() == 2 else moved
    other.second.weight.data = net.second.weight.data[:, order]
    one, two = (st.compress(each, x.split(32), "parameters=90%") for each in (net, other))
    assert any(not e.choice.is_dense for e in one.plan)
    assert [e.choice for e in two.plan] == [e.choice for e in one.plan]
    with torch.no_grad():
        wanted, given = one.model(x), two.model(x)
    assert float((wanted - given).norm() / wanted.norm()) < 1e-3


@pytest.mark.table(every=2)
@pytest.mark.parametrize("change", [hidden_turned, hidden_permuted], ids=lambda change: change.__name__)
def test_of_sixteen_bits_the_same_is_lost(change: Callable[[Any, Tensor], Changed]) -> None:
    """Sums of sixteen bits in another order may be other ones by 1 %."""
    torch.manual_seed(1)
    x = torch.randn(160, 16) @ torch.randn(16, 16)
    net = perceptron()
    other, _, _ = change(net, x)
    results = [st.compress(each.bfloat16(), x.bfloat16().split(32), "parameters=70%") for each in (net, other)]
    assert [e.error for e in results[1].plan] == pytest.approx([e.error for e in results[0].plan], rel=0.1, abs=1e-3)
    with torch.no_grad():
        wanted, given = (result.model(x.bfloat16()).float() for result in results)
    assert float((wanted - given).norm() / wanted.norm()) < 0.02
