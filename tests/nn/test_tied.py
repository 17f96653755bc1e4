"""An embedding and a head of one weight as one site: one pair of factors with two readers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.methods import TiedSVD
from spectrim.methods.tied_svd import posed
from spectrim.network.choices import TiedChoice
from spectrim.nn.find import find
from spectrim.nn.modules import FactoredHead, FactoredTable
from spectrim.nn.surgery import parameter_count
from spectrim.nn.watch import watchers
from spectrim.nn.watch.watchers import expected
from spectrim.selection.plan import Plan


class Writer(nn.Module):
    """Words looked up, mixed, and told by the table that they came from."""

    def __init__(self, *, bias=False, dtype=torch.float32, **options):
        super().__init__()
        self.words = nn.Embedding(60, 24, dtype=dtype, **options)
        self.mix = nn.Linear(24, 24, dtype=dtype)
        self.head = nn.Linear(24, 60, bias=bias, dtype=dtype)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        return self.head(x + torch.tanh(self.mix(x)))


def texts(samples=24, length=8):
    likely = (1 / torch.arange(1.0, 61)).expand(samples, -1)
    return torch.multinomial(likely, length, replacement=True, generator=torch.Generator().manual_seed(0))


def small(model, budget="parameters=60%"):
    return st.compress(model, [texts()], budget, only=["words", "head"], methods=TiedSVD(multiple_of=1))


def test_both_layers_are_one_site_and_counted_once():
    model = Writer(bias=True)
    sites = find(model)
    (tied,) = sites.tied
    assert [layer.name for layer in tied.parts] == ["words", "head"]
    assert [site.name for site in sites] == ["mix"]
    assert not sites.skipped
    assert sites["words"] is tied
    assert st.tabulate(sites).dense["parameters"] == parameter_count(model)
    assert sum(row["parameters"] for row in sites.rows()) == parameter_count(model)


@pytest.mark.table
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", ["parameters=60%", "bytes=90%", "macs=75%"])
def test_a_pair_with_two_readers_is_counted_saved_loaded_and_merged(tmp_path, dtype, bias, budget):
    model, x = Writer(bias=bias, dtype=dtype).eval(), texts()
    result = small(model, budget)
    table, head = result.model.words, result.model.head
    assert isinstance(table, FactoredTable)
    assert isinstance(head, FactoredHead)
    assert isinstance(head, nn.Linear)
    assert head[1].weight is table[0].weight
    assert head[0].weight is table[1].weight
    assert torch.equal(head.weight, table.weight)
    rank = table.rank
    # The head's two layers and the table's second.
    assert result.plan.costs["macs"] == 8 * (rank * 60 + 2 * rank * 24) + 8 * 24 * 24
    assert parameter_count(result.model) == result.plan.costs["parameters"] < parameter_count(model)
    st.save(result, tmp_path / "small.safetensors")
    loaded = st.load(Writer(bias=bias, dtype=dtype), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(x), result.model(x))
    assert parameter_count(loaded) == parameter_count(result.model)
    merged = st.merge(result.model)
    assert type(merged.words) is nn.Embedding
    assert type(merged.head) is nn.Linear
    assert merged.head.weight is merged.words.weight
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    assert torch.allclose(merged(x), result.model(x), rtol=tolerance, atol=tolerance)


def test_both_readers_train_the_factors():
    model = small(Writer(bias=True)).model
    model(texts()).square().sum().backward()
    table = model.words
    assert isinstance(table, FactoredTable)
    whole = table[0].weight.grad.clone()
    model.zero_grad()
    model.head(torch.randn(3, 24)).square().sum().backward()
    alone = table[0].weight.grad
    assert bool((alone != 0).all())
    assert not torch.allclose(alone, whole)


def test_its_error_is_what_both_lose():
    model, x = Writer(dtype=torch.float64), texts(200)
    sites = st.calibrate(model, find(model), [x])
    method = TiedSVD(multiple_of=1, sweeps=1, to_full_rank=True)
    curve = method.curve(sites["words"])
    assert curve.scale == 2
    weight = model.words.weight.detach()
    shares = expected(torch.bincount(x.flatten(), minlength=60))
    inputs = []
    model.head.register_forward_hook(lambda _, args, output: inputs.append(args[0].detach()))
    model(x)
    seen = inputs[0].flatten(0, 1)
    # At ranks that the curve was fitted at.
    for choice, error in [(curve.choices[n], curve.errors[n]) for n in (0, 9, 14)]:
        (dense, _) = method.factorize(sites["words"], choice).dense()
        missing = weight - dense[0].mT
        table = (shares * missing.square().sum(1)).sum() / (shares * weight.square().sum(1)).sum()
        head = (seen @ missing.mT).square().sum() / (seen @ weight.mT).square().sum()
        assert float(0.5 * (table + head)) == pytest.approx(error, rel=0.05)


def test_turns_lose_less_than_the_curve_says():
    model, x = Writer(dtype=torch.float64), texts(100)
    sites = st.sensitivity(model, st.calibrate(model, find(model), [x]), [x])
    (tied,) = sites.tied
    assert tied.weights is not None
    assert tied.table.statistics.gradient is not None
    curve = TiedSVD(multiple_of=1).curve(tied)
    assert curve.unit == "weighted output energy"
    assert list(curve.errors) == sorted(curve.errors, reverse=True)
    before, after = (TiedSVD(multiple_of=1, sweeps=sweeps) for sweeps in (1, 4))
    problem = posed(tied)[0]
    for choice, error in [(curve.choices[n], curve.errors[n]) for n in (0, -1)]:
        lost = []
        for method in (before, after):
            factors = method.factorize(tied, choice)
            missing = problem.matrix - factors.rows @ factors.columns
            lost.append(float(sum(each.energy(missing) for each in problem.readings)) / curve.scale)
        assert lost[1] < lost[0] == pytest.approx(error, rel=1e-4)


def test_more_readers_bounded_rows_and_wishes_leave_both_alone():
    three = Writer()
    three.again = nn.Embedding(60, 24)
    three.again.weight = three.words.weight
    for model, options in ((three, {}), (Writer(max_norm=1.0), {}), (Writer(), {"skip": "head"})):
        sites = find(model, **options)
        assert not sites.tied
        reasons = {each.name: each.reason for each in sites.skipped}
        assert reasons.keys() >= {"words", "head"}
        assert any("tied to" in reason for reason in reasons.values())


def test_a_head_that_is_not_called_leaves_both_alone():
    class Half(Writer):
        def forward(self, ids):
            return self.mix(self.words(ids))

    model = Half()
    sites = st.calibrate(model, find(model), [texts()])
    assert not sites.tied
    assert {each.name for each in sites.skipped} == {"words", "head"}
    assert st.tabulate(sites).dense["parameters"] == parameter_count(model)


def test_inputs_too_wide_for_a_moment_leave_both_alone(monkeypatch):
    monkeypatch.setattr(watchers, "FULL_LINEAR", 20)
    model = Writer()
    sites = st.calibrate(model, find(model), [texts()])
    assert not sites.tied
    assert "24 inputs are more than the 20" in next(each.reason for each in sites.skipped if each.name == "head")


def test_padding_stays_zero():
    model = Writer(padding_idx=0)
    table = small(model).model.words
    assert isinstance(table, FactoredTable)
    assert table[0].padding_idx == 0
    assert not bool(table(torch.zeros(1, dtype=torch.long)).any())


def test_the_choice_is_read_as_it_was_written():
    plan = small(Writer()).plan
    again = Plan.from_json(plan.to_json())
    (choice,) = [entry.choice for entry in again if not entry.choice.is_dense]
    assert choice == plan["words"].choice
    assert choice.others == ("head",)
    assert choice.renamed({"head": "b.head"}) == TiedChoice(choice.rank, "b.head", method="TiedSVD")


def test_the_original_is_left_as_it_was():
    model = Writer(bias=True)
    before = copy.deepcopy(model.state_dict())
    small(model)
    assert model.head.weight is model.words.weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_learned_ranks_leave_both_alone():
    model = Writer()
    sites = find(model)
    run = st.LearnedRanks(model, sites, budget="parameters=90%")
    assert [site.name for site in run.sites] == ["mix"]
    assert st.tabulate(sites.untied()).dense["parameters"] == parameter_count(model)
