"""Weights that no site holds are listed, whatever holds them, with what they cost and what frees them."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import spectrim as st
from spectrim.nn.surgery import parameter_count


class Conv1D(nn.Module):
    """As in transformers: a linear layer that holds its weight transposed."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.mixing = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.einsum("bchw,cd->bdhw", F.conv2d(x, self.kernel), self.mixing)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(16, 16))

    def forward(self, x):
        return x @ self.weight


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrices = [nn.Parameter(torch.randn(16, 16))]

    def forward(self, x):
        return x @ self.matrices[0]


def tied():
    embedding, head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
    head.weight = embedding.weight
    return nn.Sequential(embedding, head)


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(16, 16))


LEFT = {
    "LSTM": (lambda: nn.LSTM(16, 16), "LSTM", "hidden_size"),
    "GRU": (lambda: nn.GRU(16, 16, bidirectional=True), "GRU", "hidden_size"),
    "cell": (lambda: nn.LSTMCell(16, 16), "LSTMCell", "nn.Linear"),
    "bilinear": (lambda: nn.Bilinear(16, 16, 4), "Bilinear", "three axes"),
    "embedding of bounded rows": (lambda: nn.Embedding(10, 16, max_norm=1.0), "Embedding", "max_norm"),
    "embedding of sparse gradients": (lambda: nn.Embedding(10, 16, sparse=True), "Embedding", "gradients"),
    "bag": (lambda: nn.EmbeddingBag(10, 16), "EmbeddingBag", "nn.Embedding"),
    "attention": (lambda: nn.MultiheadAttention(16, 2), "MultiheadAttention", "nn.Linear layers"),
    "transposed linear": (lambda: Conv1D(16, 16), "Conv1D", "nn.Linear"),
    "functional": (Functional, "Functional", "kernel (8, 3, 3, 3), mixing (8, 8)"),
    "list of parameters": (
        lambda: nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)]), "ParameterList", "0 (4, 4), 1 (4, 4)"
    ),
    "buffer": (Frozen, "Frozen", "buffer"),
    "plain list": (Hidden, "list", "nn.ParameterList"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(16, 16)), "Linear", "remove_parametrizations"),
    "old weight norm": (old_weight_norm, "Linear", "remove_weight_norm"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(16, 16)), "Linear", "remove_spectral_norm"),
    "pruned": (
        lambda: prune.random_unstructured(nn.Linear(16, 16), "weight", 0.5), "Linear", "prune.remove"
    ),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Linear(16, 16))), "RecursiveScriptModule", "TorchScript"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "cure"), LEFT.values(), ids=LEFT)
def test_a_weight_that_no_site_holds_is_listed(make, kind, cure):
    module = make()
    sites = st.find(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), module))
    assert [s.name for s in sites] == ["0"]
    told = [s for s in sites.skipped if s.kind == kind]
    (left,) = told[-1:]
    assert left.name.startswith("2")
    assert cure in left.reason
    # All that is stored in the module is counted once, with what is listed of it (a spec among the untouched, too).
    held = sum(s.costs.get("parameters", 0.0) for s in sites.skipped) + st.parameters(sites.untouched)
    assert held == parameter_count(module)


@pytest.mark.parametrize(
    ("persistent", "shape", "listed"), [(True, (64, 32), 1), (False, (64, 32), 0), (True, (64,), 0)]
)
def test_buffers_that_files_hold_are_listed_with_their_bytes(persistent: bool, shape: tuple[int, ...], listed: int):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(shape), persistent=persistent)

        def forward(self, x):
            return x + self.table.sum()

    sites = st.find(nn.Sequential(nn.Linear(8, 8), Table()))
    assert [(s.name, s.costs) for s in sites.skipped] == [("1", {"bytes": 4.0 * 64 * 32})] * listed
    if listed:
        with pytest.raises(
            st.InfeasibleBudgetError, match=r"Left alone: 1 \(Table, [\d.]+% of bytes\): its table \(64, 32\)"
        ):
            st.select(st.tabulate(sites, [st.WeightSVD()]), "bytes=50%")


def test_everything_is_listed_once():
    model = tied()
    sites = st.find(model, skip="1")
    assert [(s.name, s.kind) for s in sites.skipped] == [("0", "Embedding"), ("1", "Linear")]
    assert st.parameters(sites.untouched) + sites.other_parameters == parameter_count(model)


def test_vectors_are_not_listed():
    sites = st.find(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.PReLU(4)))
    assert not sites.skipped


def saved(model):
    file = io.BytesIO()
    torch.jit.save(model, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("compiled", [
    torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, 16)), lambda m: saved(torch.jit.script(m))
])  # fmt: skip
def test_a_compiled_network_is_refused_with_the_reason(compiled):
    model = compiled(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    with pytest.raises(st.PlanError, match="compiled by TorchScript.*Compress the Python model"):
        st.compress(model, [torch.ones(4, 16)], "macs=50%")


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.l, self.o = nn.Linear(16, 16), nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 4)

    def forward(self, x):
        return self.o(self.l(F.relu(self.a(x)))[0][:, -1])


BATCHES = [torch.randn(8, 5, 16) for _ in range(2)]


def test_an_infeasible_budget_tells_what_was_left_alone():
    with pytest.raises(
        st.InfeasibleBudgetError, match=r"l \(LSTM, 9\d\.\d% of macs\): recurrent.*hidden_size"
    ) as caught:
        st.compress(Recurrent(), BATCHES, "macs=50%")
    (name, kind, reason, share), *_ = caught.value.skipped
    assert (name, kind) == ("l", "LSTM")
    assert share == pytest.approx(5 * 4 * 64 * (16 + 64) / caught.value.dense)
    assert "recurrent" in reason
    # Nothing is met below what is left alone.
    assert caught.value.lowest >= share * caught.value.dense


@pytest.mark.parametrize("budget", ["macs=30%", "parameters=30%", "bytes=30%"])
def test_a_parametrised_layer_in_the_way_of_a_budget(budget):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(32, 256)), nn.ReLU(), nn.Linear(256, 8))
    cost = budget.partition("=")[0]
    told = rf"0 \(Linear, 8\d\.\d% of {cost}\): parametrised: remove the parametrisation first"
    with pytest.raises(st.InfeasibleBudgetError, match=told):
        st.compress(model, [torch.randn(64, 32) for _ in range(2)], budget)


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        return self.o(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


def test_products_of_no_weights_are_told_too():
    with pytest.raises(st.InfeasibleBudgetError, match=r"the model \(products, \d+\.\d% of macs\)"):
        st.compress(Products(), [torch.randn(4, 100, 16)] * 2, "macs=10%")


def test_a_report_tells_how_much_was_left_alone():
    result = st.compress(Recurrent(), BATCHES, "macs=99.5%", reconstruct=False)
    (note,) = (note for note in result.report.notes if "left alone" in note)
    share = result.sites.other_macs / result.plan.dense_costs["macs"]
    assert note.startswith(f"{share:.1%} of macs is in what was left alone, most in l (LSTM")


def test_layers_that_lose_channels_are_not_told_as_left_alone():
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    batches = [torch.randn(8, 3, 8, 8)] * 2
    result = st.compress(model, batches, "macs=70%", methods=[st.PrincipalFilters(multiple_of=1)])
    assert not [note for note in result.report.notes if "left alone" in note]


def test_layers_that_share_factors_are_not_told_as_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)).eval()
    how = {"methods": st.JointSVD(), "groups": {"pair": ["0", "1"]}, "reconstruct": False}
    result = st.compress(model, [torch.randn(32, 16)] * 2, "parameters=80%", **how)
    (row,) = result.candidates.left_alone("parameters")
    assert row[0] == "2"
    assert not [note for note in result.report.notes if "left alone" in note]


@pytest.mark.parametrize("cost", ["parameters", "bytes"])
def test_what_no_batch_runs_by_itself_counts_among_what_was_left_alone(cost: str):
    """An output projection that torch's attention multiplies itself has no call of its own."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    sites = st.calibrate(model, st.find(model), [torch.randn(2, 4, 16)])
    shares = {name: share for name, _, _, share in st.tabulate(sites, [st.WeightSVD()]).left_alone(cost)}
    stored, attention = sum(p.numel() for p in model.parameters()), model.self_attn
    for name, module in (("self_attn", None), ("self_attn.out_proj", attention.out_proj)):
        parts = module.parameters() if module else (attention.in_proj_weight, attention.in_proj_bias)
        assert shares[name] == pytest.approx(sum(p.numel() for p in parts) / stored)
