"""A kind of choice of another package, with factors and a builder of its own, goes the whole way of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.errors import CheckpointError, PlanError
from spectrim.methods import Curve
from spectrim.network.choices import Choice
from spectrim.network.factors import Factors
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Site
from spectrim.nn.build import build, skeleton
from spectrim.nn.checkpoint import same_weights
from spectrim.report.page import Page


@dataclass(frozen=True)
class RowsChoice(Choice, kind="rows_for_this_test"):
    """Only some rows of the weight stay; the layer answers zero elsewhere."""

    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Rows(Factors, kind="rows_for_this_test"):
    weight: Tensor
    rows: tuple[int, ...]

    def dense(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def numel(self) -> int:
        return len(self.rows) * self.weight.shape[2]

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[int]], choice: RowsChoice) -> Rows:
        ((g, o, i),) = shapes
        if max(choice.rows) >= o:
            raise ValueError(f"there are {o} rows")
        return cls(torch.zeros(g, o, i), choice.rows)


class Thin(nn.Module):
    def __init__(self, factors: Rows) -> None:
        super().__init__()
        self.kept = nn.Parameter(factors.weight[0, list(factors.rows)].clone())
        self.rows, self.outputs = list(factors.rows), factors.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        answer = x.new_zeros(*x.shape[:-1], self.outputs)
        answer[..., self.rows] = x @ self.kept.mT
        return answer


@build.register
def _(factors: Rows, layers: Sequence[LayerSpec], biases: Sequence[Tensor | None]) -> tuple[nn.Module, ...]:
    return (Thin(factors),)


@dataclass(frozen=True)
class LargestRows(st.Method):
    offers = RowsChoice

    def curve(self, site: Site) -> Curve:
        energy = site.weight[0].square().sum(1)
        order = energy.argsort(descending=True).tolist()
        choices = [RowsChoice(tuple(sorted(order[:n])), method=self.name) for n in range(1, len(order))]
        lost = [float(energy[order[n:]].sum() / energy.sum()) for n in range(1, len(order))]
        return Curve(tuple(choices), tuple(lost), "weight energy")

    def layers(self, site: Site, choice: RowsChoice) -> tuple[LayerSpec, ...]:
        return (dataclasses.replace(site.spec, out_channels=len(choice.rows)),)

    def factorize(self, site: Site, choice: RowsChoice) -> Rows:
        weight = torch.zeros_like(site.weight)
        weight[:, list(choice.rows)] = site.weight[:, list(choice.rows)]
        return Rows(weight, choice.rows)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False)).eval()


def test_a_kind_of_another_package_goes_through_plans_files_and_reports(tmp_path) -> None:
    model = net()
    sites = st.find(model)
    plan = st.select(st.tabulate(sites, [LargestRows()]), st.Budget(parameters=0.5))
    (first, *_) = [entry for entry in plan if not entry.choice.is_dense]
    assert isinstance(first.choice, RowsChoice)
    plan.write(tmp_path / "plan.json")
    again = st.Plan.read(tmp_path / "plan.json")
    assert again == plan
    small = st.apply(model, sites, again)
    assert isinstance(small[int(first.site)], Thin)
    st.save(small, plan, tmp_path / "small.safetensors")
    loaded = st.load(net(), tmp_path / "small.safetensors")
    assert same_weights(loaded, small)
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), small(x))
    assert str(first.choice) == f"rows {first.choice.rows}"
    assert str(first.choice) in Page("Net", plan).html()


def test_what_does_not_fit_is_refused_by_the_factors(tmp_path) -> None:
    sites = st.find(net())
    with pytest.raises(PlanError, match=r"layer '0': the choice 'rows \(9,\)' does not fit Linear.*: there are 8 rows"):
        skeleton(RowsChoice((9,)), sites["0"].layers)
    plan = st.select(st.tabulate(sites, [LargestRows()]), st.Budget(parameters=0.5))
    st.save(st.apply(net(), sites, plan), plan, tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        st.load(
            nn.Sequential(nn.Linear(6, 2, bias=False), nn.ReLU(), nn.Linear(2, 5, bias=False)),
            tmp_path / "small.safetensors",
        )
