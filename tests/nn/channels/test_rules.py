"""Removal of channels through modules of a user's own, and what a removal leaves of the modules that it narrows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spectrim as st
from spectrim.nn.channels import rules
from tests.nn.coupled_nets import NETS, made

pytest.importorskip("torch_pruning")


class Mixture(nn.Module):
    """A number for each channel among others, which nothing tells by itself."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.register_buffer("table", torch.rand(3, channels))

    def forward(self, x):
        return x * self.gain * self.table.sum(0)[:, None, None]


class Reshape(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.shape = channels, 3, 3

    def forward(self, x):
        return x.view(-1, *self.shape)


class Reshapes:
    def size(self, module):
        return module.shape[0] * 9

    def cut(self, module, kept):
        module.shape = len(kept) // 9, 3, 3


@pytest.fixture(autouse=True)
def _no_rules_left(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


def mixed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Mixture(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    return model.eval(), torch.randn(64, 3, 8, 8)


def reshaped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 72), Reshape(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    return model.eval(), torch.randn(64, 6)


CASES = {
    "numbers of channels": (mixed, Mixture, {"gain": 1, "table": 1}, "0:out"),
    "a reshape": (reshaped, Reshape, Reshapes(), "0:out"),
}


@pytest.mark.parametrize(("make", "kind", "rule", "name"), CASES.values(), ids=CASES)
def test_a_rule_frees_channels_and_a_checkpoint_of_it_loads(make, kind, rule, name, tmp_path):
    model, x = make()
    before = st.couple(model, st.find(model), x)
    assert name not in {c.name for c in before.couplings}
    assert name in {s.name for s in before.skipped}
    st.register_channels(kind, rule)
    assert name in {c.name for c in st.couple(model, st.find(model), x).couplings}
    result = st.compress(model, x.split(16), "parameters=60%", methods=st.PrincipalFilters(multiple_of=1))
    assert any(entry.site == name and not entry.choice.is_dense for entry in result.plan)
    st.save(result.model, result.plan, tmp_path / "small.safetensors")
    loaded = st.load(make()[0], tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))
    assert sum(p.numel() for p in loaded.parameters()) == result.plan.costs["parameters"]


@pytest.mark.parametrize(
    ("kind", "rule"),
    [(Mixture(4), {"gain": 1}), (int, {"gain": 1}), (Mixture, {}), (Mixture, {"gain": "1"}), (Mixture, lambda m: m)],
)
def test_what_is_no_rule_is_refused(kind, rule):
    with pytest.raises(TypeError, match="expected"):
        st.register_channels(kind, rule)


def test_a_rule_for_a_norm_of_torch_takes_its_place():
    class Counted(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.register_buffer("seen", torch.zeros(channels))

        def forward(self, x):
            return super().forward(x) + self.seen[:, None, None]

    names = ("weight", "bias", "running_mean", "running_var", "seen")
    rule = rules.Held(dict.fromkeys(names, 0))

    class Rule:
        size = rule.size

        def cut(self, module, kept):
            rule.cut(module, kept)
            module.num_features = len(kept)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Counted(8), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    x = torch.randn(4, 3, 8, 8)
    assert not st.couple(model, st.find(model), x).couplings
    st.register_channels(Counted, Rule())
    assert [c.name for c in st.couple(model, st.find(model), x).couplings] == ["0:out"]


class Labelled(nn.Conv2d):
    """A subclass with an attribute, as parsers of configurations make them."""

    label = "conv"


def test_what_is_narrowed_keeps_its_type_its_attributes_and_its_hooks():
    model = nn.Sequential(Labelled(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Labelled(8, 4, 3))
    model[0].index, model[3].index = 0, 3
    model[1].index = 1
    called = []
    for layer in (model[0], model[1], model[3]):
        layer.register_forward_hook(lambda m, args, output: called.append(m.index))
    model.eval()
    x = torch.randn(64, 3, 8, 8)
    result = st.compress(model, x.split(16), "macs=60%", methods=st.PrincipalFilters(multiple_of=1))
    called.clear()
    result.model(x)
    assert called == [0, 1, 3]
    assert [type(m) for m in result.model] == [type(m) for m in model]
    assert result.model[0].out_channels < 8
    assert model[0].out_channels == 8
    assert result.model[3].label == "conv"


# Removal through a split, a shuffle of pixels, a reshape.
@pytest.mark.table(every=3)
@pytest.mark.parametrize(
    "name", ["c2f", "c2f without a sum", "pixel shuffle", "unflatten", "frozen norm", "option a", "own number"]
)
def test_a_network_loses_half_of_its_multiplications(name, tmp_path):
    model, _ = made(name, dtype=torch.float32)
    x = torch.randn(128, *NETS[name][1])
    result = st.compress(model, x.split(32), "macs=60%", methods=st.PrincipalFilters(multiple_of=1))
    assert result.plan.costs["macs"] <= 0.6 * result.plan.dense_costs["macs"]
    with torch.no_grad():
        given, wanted = result.model(x), model(x)
    assert given.shape == wanted.shape
    # Better than nothing at all, which misses all of the energy.
    assert float(F.mse_loss(given, wanted) / (wanted - wanted.mean(0)).square().mean()) < 1
    st.save(result.model, result.plan, tmp_path / "small.safetensors")
    loaded = st.load(made(name, dtype=torch.float32)[0], tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), given)
    assert torch.equal(copy.deepcopy(loaded)(x), given)
