"""Channels of networks whose gradients are switched off, or whose operations the graph does not know."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as st
from tests.cases import one_thread

pytest.importorskip("torch_pruning")


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 4)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.c(x)


class Inferring(Frozen):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.body(x))


class Detached(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.body(x).detach())


class Choosing(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.body(x)).argmax(-1)


class Dropping(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.dropout(self.body(x), 0.5, training=True))


class Gated(Frozen):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(6, 20)

    def body(self, x: Tensor) -> Tensor:
        return F.glu(self.b(F.glu(self.a(x), dim=1)))


@pytest.mark.parametrize("kind", [Frozen, Inferring, Detached, Choosing, Dropping, Gated])
def test_channels_are_found(kind: type[Frozen]):
    torch.manual_seed(0)
    model = kind().eval()
    sites = st.couple(model, st.find(model), torch.randn(4, 8))
    assert {coupling.name for coupling in sites.couplings} == {"a:out", "b:out"}
    assert [skipped.name for skipped in sites.skipped] == ["c:out"]
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.c = nn.Linear(8, 6), nn.GRUCell(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(self.cell(x, self.cell(x, torch.zeros_like(x))))


class Closed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)
        layers = [self.a, self.b]
        self.steps = [lambda x: F.relu(layers[0](x)), lambda x: layers[1](x)]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Cell, "cell: GRUCell holds parameters of its own that read or carry them"),
        (Closed, "a copy of the model does not call it, so that what reads its channels is not known"),
    ],
)
def test_the_reason_is_told_where_they_are_not_found(kind: type[nn.Module], reason: str):
    model = kind().eval()
    sites = st.couple(model, st.find(model), torch.randn(4, 8))
    assert {each.name: each.reason for each in sites.skipped}["a:out"] == reason


class Specialists(nn.Module):
    """A sample goes through the layer that its kind names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 24)
        self.each = nn.ModuleList(nn.Linear(24, 6) for _ in range(4))

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        hidden = F.relu(self.stem(x))
        answers = hidden.new_zeros(len(x), 6)
        for number, layer in enumerate(self.each):
            if (chosen := kinds == number).any():
                answers[chosen] = layer(hidden[chosen])
        return answers


def test_layers_that_the_first_samples_do_not_come_to_lose_their_inputs_too():
    torch.manual_seed(0)
    batches = [(torch.randn(32, 12), torch.arange(32) % 4) for _ in range(2)]
    result = st.compress(Specialists(), batches, "macs=70%", methods=st.PrincipalFilters())
    (stem,) = (entry.choice for entry in result.plan if entry.of_channels and not entry.choice.is_dense)
    assert {place.module for place in stem.lost} == {"stem", *(f"each.{number}" for number in range(4))}
