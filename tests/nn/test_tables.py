"""Embeddings as sites: what they are fitted to, what stands for them, and what it costs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.linalg.unfold import unfolding
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.modules import FactoredTable
from spectrim.nn.surgery import parameter_count
from spectrim.nn.watch.watchers import expected


class Reader(nn.Module):
    """Words and places looked up, added, and read."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        self.words, self.places = nn.Embedding(60, 24, dtype=dtype, **options), nn.Embedding(12, 24, dtype=dtype)
        self.mix, self.head = nn.Linear(24, 24, dtype=dtype), nn.Linear(24, 5, dtype=dtype)

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(self.mix(x)).mean(1))


def texts(samples=24, length=8):
    likely = (1 / torch.arange(1.0, 61)).expand(samples, -1)
    return torch.multinomial(likely, length, replacement=True, generator=torch.Generator().manual_seed(0))


def small(model, budget, batches):
    return st.compress(model, batches, budget, only="words", methods=st.ActivationSVD(multiple_of=1))


def pair_of(model):
    pair = model.words
    assert isinstance(pair, FactoredTable)
    return pair


@pytest.mark.table
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}], ids=str)
@pytest.mark.parametrize("budget", ["parameters=75%", "bytes=90%"])
def test_a_table_becomes_a_narrower_table_and_a_linear_layer(tmp_path, dtype, options, budget):
    model, x = Reader(dtype, **options).eval(), texts()
    result = small(model, budget, [x])
    table = result.model.words
    assert isinstance(table, FactoredTable)
    assert isinstance(table, nn.Embedding)
    assert table.weight.shape == (60, 24)
    assert table[0].padding_idx == model.words.padding_idx
    assert parameter_count(result.model) == result.plan.costs["parameters"] < parameter_count(model)
    st.save(result, tmp_path / "small.safetensors")
    loaded = st.load(Reader(dtype, **options), tmp_path / "small.safetensors")
    assert torch.equal(loaded.eval()(x), result.model(x))
    merged = st.merge(result.model)
    assert type(merged.words) is nn.Embedding
    assert merged.words.padding_idx == model.words.padding_idx
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert torch.allclose(merged(x), result.model(x), rtol=tolerance, atol=tolerance)


def test_rows_count_as_often_as_they_are_asked_for():
    model, x = Reader(torch.float64), texts(64)
    sites = st.calibrate(model, st.find(model, only="words"), [x[:40], x[40:]])
    moments = sites["words"].statistics.output
    weights = expected(torch.bincount(x.flatten(), minlength=60))
    rows, shares = model.words.weight.detach(), (weights / weights.sum()).unsqueeze(1)
    mean = (rows * shares).sum(0)
    assert moments.count == x.numel()
    assert torch.allclose(moments.mean[0], mean)
    assert torch.allclose(moments.covariance[0], ((rows - mean) * shares).mT @ (rows - mean))


def test_what_was_not_seen_has_the_part_of_what_was_seen_once():
    weights = expected(torch.tensor([5, 1, 1, 0, 0, 0, 0]))
    assert weights.tolist() == [5, 1, 1, 0.5, 0.5, 0.5, 0.5]
    assert expected(torch.tensor([3, 2])).tolist() == [3, 2]


def test_the_curve_is_what_the_pair_loses_and_less_than_the_weight_alone_loses():
    model, x = Reader(torch.float64), texts(200)
    site = st.calibrate(model, st.find(model, only="words"), [x])["words"]
    weights = expected(torch.bincount(x.flatten(), minlength=60))
    table = model.words.weight.detach()
    centred = table - (table * weights.unsqueeze(1)).sum(0) / weights.sum()
    energy = (centred.square().sum(1) * weights).sum()

    def lost(method, rank):
        curve = method.curve(site)
        number = next(n for n, choice in enumerate(curve.choices) if choice.rank == rank)
        made = method.factorize(site, curve.choices[number])
        weight = made.dense()[0][0].mT + made.shift
        return curve.errors[number], float(((weight - table).square().sum(1) * weights).sum() / energy)

    for rank in (4, 12):
        (stated, fitted), (_, plain) = (
            lost(method(multiple_of=1), rank) for method in (st.ActivationSVD, st.WeightSVD)
        )
        assert stated == pytest.approx(fitted, rel=1e-2)
        assert fitted < plain


def test_a_table_multiplies_nothing_and_its_pair_does():
    spec = spec_of(nn.Embedding(60, 24), ("words",)).at(((8,),))
    table, linear = spec.factor(unfolding((), "channel"), 6)
    assert st.macs([spec]) == st.macs([table]) == 0
    assert st.macs([linear]) == 8 * 6 * 24
    assert st.parameters([table, linear]) == 60 * 6 + 6 * 24


def test_nothing_is_gained_by_a_table_where_macs_count():
    model, x = Reader().eval(), texts()
    result = st.compress(model, [x], "macs=70%")
    assert result.plan["words"].choice.is_dense


def test_a_pair_of_a_table_is_one_site_again():
    model, x = Reader().eval(), texts()
    once = small(model, "parameters=75%", [x]).model
    site = st.find(once)["words"]
    assert site.spec == spec_of(model.words, ("words",))
    assert [part.kind for part in site.present] == ["Embedding", "Linear"]
    twice = small(once, "parameters=75%", [x]).model
    assert pair_of(twice).rank < pair_of(once).rank


def test_padding_stays_zero_before_and_after_training():
    model, x = Reader(padding_idx=0).eval(), texts()
    made = small(model, "parameters=75%", [x]).model
    pair = pair_of(made)
    last = pair[1]
    assert isinstance(last, nn.Linear)
    before = last.weight.clone()
    for _ in range(2):
        assert torch.equal(pair(torch.zeros(3, dtype=torch.long)), torch.zeros(3, 24))
        pair(texts()).square().sum().backward()
        torch.optim.SGD(pair.parameters(), lr=0.1).step()
    assert not torch.equal(last.weight, before)


def test_gradients_reach_the_pair_and_export_keeps_it():
    model, x = Reader().eval(), texts()
    made = small(model, "parameters=75%", [x]).model
    made(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in pair_of(made).parameters())
    exported = torch.export.export(copy.deepcopy(made), (x,)).module()
    assert torch.allclose(exported(x), made(x), atol=1e-6)
    weight, bias = canonical(pair_of(made)[0])
    assert weight.shape == (1, pair_of(made).rank, 60)
    assert bias is None
