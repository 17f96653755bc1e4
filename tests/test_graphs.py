"""Graphs, whose nodes cannot be cut apart: edges name them, or a matrix has a row and a column for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as st

NODES, WIDTH = 40, 48


class Spread(nn.Module):
    """A layer, what its nodes give one another, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.b(self.spread(F.relu(self.a(x)), edges))

    def spread(self, h: Tensor, edges: Tensor) -> Tensor:
        return h + torch.zeros_like(h).index_add_(0, edges[1], h[edges[0]])


class Matrix(Spread):
    def spread(self, h: Tensor, edges: Tensor) -> Tensor:
        return edges @ h


def graphs(kind: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(2, NODES, NODES, generator=generator) > 0.8
    edges = {
        "list": lambda there: there.nonzero().T.contiguous(),
        "dense": lambda there: there.float(),
        "sparse": lambda there: there.float().to_sparse(),
    }[kind]
    return [{"x": torch.randn(NODES, 16, generator=generator), "edges": edges(there)} for there in drawn]


@pytest.mark.table
@pytest.mark.parametrize("kind", ["list", "dense", "sparse"])
@pytest.mark.parametrize("methods", [None, st.PrincipalFilters()], ids=["low rank", "filters"])
@pytest.mark.filterwarnings("ignore")
def test_graphs_are_compressed_whatever_their_edges_are(kind: str, methods: Any) -> None:
    torch.manual_seed(0)
    model, batches = (Spread if kind == "list" else Matrix)().eval(), graphs(kind)
    result = st.compress(model, batches, st.Budget(macs=0.8), methods=methods)
    small: Any = result.model
    with torch.no_grad():
        wanted, given = model(**batches[0]), small(**batches[0])
    assert 1.2 < result.plan.ratio("macs") < 1.6
    assert float((wanted - given).norm() / wanted.norm()) < 0.6
    if methods is not None:
        left = small.a.out_features
        # Products with a dense matrix lose the channels that layers lose, and are counted so.
        spread = NODES if kind == "dense" else 0
        assert small.b.in_features == left < WIDTH
        if kind != "sparse":
            assert result.plan.costs["macs"] == left * (16 + 8 + spread)


def test_a_layer_that_is_given_sparse_numbers_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    sites = st.calibrate(model, st.find(model), [torch.eye(24, 16).to_sparse()])
    assert [site.name for site in sites] == ["2"]
    assert "sparse tensor" in next(each.reason for each in sites.skipped if each.name == "0")


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)])
    with pytest.raises(st.CalibrationError, match=r"nested tensor.*mask="):
        st.compress(model, [nested], "macs=50%")


def test_tensors_on_the_meta_device_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with pytest.raises(st.CalibrationError, match="meta device.*tensors of data"):
        st.compress(model, [torch.randn(8, 16, device="meta")], "macs=50%")


class Dequantises(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.dequantize())


@pytest.mark.filterwarnings("ignore")
def test_quantised_batches_are_read_as_the_numbers_they_stand_for() -> None:
    torch.manual_seed(0)
    model = Dequantises(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    batches = [torch.quantize_per_tensor(torch.randn(32, 16), 0.05, 0, torch.qint8) for _ in range(2)]
    plain = nn.Sequential(*model)
    few, wanted = (
        st.compress(model, batches, "macs=60%"),
        st.compress(plain, [b.dequantize() for b in batches], "macs=60%"),
    )
    assert [e.choice for e in few.plan] == [e.choice for e in wanted.plan]


def test_a_mask_that_leaves_nothing_is_refused_and_a_batch_of_padding_is_not() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    def batch(value: float) -> dict[str, Tensor]:
        return {"x": torch.randn(8, 5, 16), "attention_mask": torch.full((8, 5), value)}

    with pytest.raises(st.CalibrationError, match=r"leaves no token.*mask="):
        st.compress(model, [batch(0), batch(0)], "macs=50%", forward=forward)
    assert st.compress(model, [batch(1), batch(0)], "macs=60%", forward=forward).plan.ratio("macs") > 1.5
