"""Plans that remove channels, carried out: what is left, what it costs, and what it computes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

import spectrim as st
from spectrim.errors import CheckpointError, InfeasibleBudgetError, PlanError, ProofError
from spectrim.linalg.principal import energy_width, kl_width
from spectrim.network.choices import DENSE, Choice, LowRankChoice
from spectrim.network.coupling import axes_left
from spectrim.network.narrowing import narrowed
from spectrim.nn.channels.narrow import narrow
from spectrim.nn.checkpoint import same_weights
from spectrim.nn.flops import WorkCounter
from spectrim.nn.surgery import parameter_count, size_in_bytes
from spectrim.nn.watch.batches import evaluating
from spectrim.search.widths import widths
from spectrim.selection.plan import Entry, Plan
from tests.cases import one_thread
from tests.nn.coupled_nets import made

pytest.importorskip("torch_pruning")

NAMES = [
    "chain", "mlp", "conv3d", "residual", "projection", "concat", "dense", "depthwise", "grouped", "transposed",
    "flatten", "chunk", "prelu", "squeeze", "attention", "twice", "embedding", "parameter", "option a",
]  # fmt: skip
FINE = st.PrincipalFilters(multiple_of=1)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def calibrated(name: str, *, samples: int = 48, dtype: torch.dtype = torch.float32):
    model, x, sites = _calibrated(name, samples, dtype)
    return copy.deepcopy(model), x, sites


@functools.cache
def _calibrated(name: str, samples: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor, st.Sites]:
    model, x = made(name, samples=samples, dtype=dtype)
    half = samples // 2
    return model, x, st.calibrate(model, st.couple(model, st.find(model), x), [x[:half], x[half:]], rows=None)


def plan_of(sites: st.Sites, share: float = 0.6, **more: Choice) -> Plan:
    """Every group keeps a share of its channels; other layers as given."""
    entries = []
    for site in sites.coupled():
        n, pools = site.coupling.channels, site.coupling.pools
        width = max(1, int(n // pools * share)) * pools
        order, errors, _ = FINE.elimination(site)
        choice = FINE.choice(site, order[: n - width])
        entries.append(Entry(site.name, f"{n} channels", choice, float(errors[n - width]), {}, {}))
    entries += [Entry(site.name, "layer", more.get(site.name, DENSE), 0.1, {}, {}) for site in sites]
    records = {method.name: method.record() for method in (FINE, st.WeightSVD(), st.ActivationSVD())}
    return Plan(tuple(entries), costs={}, dense_costs={}, methods=records)


def kept(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {e.site: e.choice["kept"] for e in plan if e.choice.kind == "kept_channels"}


def without_correction(model: nn.Module, sites: st.Sites, plan: Plan) -> nn.Module:
    small = copy.deepcopy(model)
    narrow(small, axes_left(sites.couplings, kept(plan)))
    return small


@torch.no_grad()
def gap(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    wanted = model.eval()(x)
    return float((small.eval()(x) - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())


@pytest.mark.table(every=5)
@pytest.mark.parametrize("name", NAMES)
def test_costs_are_those_of_the_plan_and_correction_keeps_what_the_network_computes(name: str):
    model, x, sites = calibrated(name)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan = st.recommend(sites, st.Energy(0.9), method=FINE)
    assert any(len(channels) < sites.couplings[0].channels for channels in kept(plan).values())
    bare = gap(without_correction(model, sites, plan), model, x)
    for batches in (None, [x]):
        small = st.apply(model, sites, plan, batches)
        assert parameter_count(small) == plan.costs["parameters"]
        assert size_in_bytes(small) == plan.costs["bytes"]
        with WorkCounter() as counter, evaluating(small):
            small(x)
        assert counter.get_total_flops() / 2 / len(x) == pytest.approx(plan.costs["macs"], rel=1e-9)
        assert gap(small, model, x) < bare
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert plan.dense_costs["parameters"] == parameter_count(model)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", ["chain", "residual", "concat", "grouped", "transposed", "flatten", "twice", "conv3d"])
def test_reconstruction_beats_the_closed_form_which_beats_no_correction(name: str):
    model, x, sites = calibrated(name, samples=96)
    plan = plan_of(sites, 0.5)
    bare, closed, full = (
        gap(small, model, x)
        for small in (
            without_correction(model, sites, plan),
            st.apply(model, sites, plan),
            st.apply(model, sites, plan, [x[:48], x[48:]]),
        )
    )
    assert full < 1.001 * closed
    assert closed < bare


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def test_a_narrowed_encoder_runs_by_the_kernels_that_it_runs_by_once_it_is_loaded(tmp_path):
    x = torch.randn(96, 5, 8)
    result = st.compress(Encoder().eval(), list(x.split(48)), "macs=85%", methods=st.PrincipalFilters())
    st.save(result, tmp_path / "narrowed.safetensors")
    loaded = st.load(Encoder(), tmp_path / "narrowed.safetensors").eval()
    small, again = (model.encoder.layers[0] for model in (result.model, loaded))
    assert small.linear1.out_features == again.linear1.out_features < 32
    assert small.activation_relu_or_gelu == again.activation_relu_or_gelu == 1  # torch's mark of fused kernels
    with torch.no_grad():
        assert torch.equal(result.model(x), loaded(x))


@pytest.mark.table(every=5)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [True, False])
def test_a_checkpoint_loads_into_the_users_constructor_bit_for_bit(name: str, given: bool, tmp_path):
    model, x, sites = calibrated(name)
    plan = plan_of(sites)
    small = st.apply(model, sites, plan, [x] if given else None)
    st.save(small, plan, tmp_path / "small.safetensors")
    fresh, _ = made(name, dtype=torch.float32)
    torch.nn.init.normal_(next(fresh.parameters()))
    loaded = st.load(fresh, tmp_path / "small.safetensors")
    assert same_weights(small, loaded)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), small.eval()(x))


def test_the_same_plan_weights_and_batches_give_the_same_bits():
    model, x, sites = calibrated("concat")
    plan = plan_of(sites)
    assert same_weights(st.apply(model, sites, plan, [x]), st.apply(model, sites, plan, [x]))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert same_weights(st.apply(model, sites, again, [x]), st.apply(model, sites, plan, [x]))


def test_modes_hooks_and_gradients_of_the_dense_model_stay():
    model, x, sites = calibrated("residual")
    model.train()
    model.c1.eval()
    model.c1.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = [module.training for module in model.modules()]
    small = st.apply(model, sites, plan_of(sites), [x])
    assert [module.training for module in model.modules()] == before
    assert [module.training for module in small.modules()] == before
    assert not model.c1.weight.requires_grad
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert not set(map(id, small.parameters())) & set(map(id, model.parameters()))


def test_a_reader_without_a_bias_gets_one_unless_a_norm_takes_the_mean():
    model, x, sites = calibrated("mlp")
    small = st.apply(model, sites, plan_of(sites), [x])
    assert small.a.bias is None
    assert bool((small.c.bias != 0).any())
    model, x, sites = calibrated("residual")
    small = st.apply(model, sites, plan_of(sites), [x])
    assert (small.c1.bias, small.c2.bias) == (None, None)
    plain = without_correction(model, sites, plan_of(sites))
    assert not torch.equal(small.n2.running_mean, plain.n2.running_mean)


def test_the_mean_of_what_a_layer_delivers_stays_right():
    """Also through BatchNorm and without biases: the mean of every response is that of the dense model."""
    for name, layer in (("mlp", "c"), ("residual", "n1"), ("grouped", "n"), ("chain", "b"), ("flatten", "c")):
        model, x, sites = calibrated(name, dtype=torch.float64)
        plan = plan_of(sites)
        axes = axes_left(sites.couplings, kept(plan))
        small = st.apply(model, sites, plan, [x], rows=None)
        means = []
        for net in (model, small):
            held: list[Tensor] = []
            handle = net.get_submodule(layer).register_forward_hook(lambda m, i, o, held=held: held.append(o.detach()))
            with torch.no_grad():
                net.eval()(x)
            handle.remove()
            means.append(held[0].mean([d for d in range(held[0].dim()) if d != 1]))
        left = axes.get((layer, "out"), axes.get((layer, "through"), torch.arange(len(means[0]))))
        assert torch.allclose(means[1], means[0][left], atol=2e-5 * float(means[0].abs().max())), layer


# A pair that is counted without a bias loses the mean where no normalisation takes it.
MIXED = [
    ("residual", "c2", True), ("residual", "c2", False), ("residual", "c1", True), ("residual", "c1", False),
    ("projection", "p", True), ("mlp", "c", True), ("chain", "b", True), ("flatten", "c", True),
]  # fmt: skip


@pytest.mark.table
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("name", "layer", "bias"), MIXED)
def test_a_pair_of_full_rank_computes_what_the_narrowed_layer_does(name, layer, bias, given, tmp_path):
    """No choice of the low-rank methods may count the mean of removed channels twice, or lose it."""
    model, x, sites = calibrated(name)
    alone = plan_of(sites)
    thin = st.apply(model, sites, alone, [x] if given else None)
    spec = st.find(thin)[layer].spec
    how, taps = ("channel", 1) if max(spec.kernel, default=1) == 1 else ("input", 9)
    rank = min(spec.out_channels * taps, spec.in_channels)
    choice = Choice("low_rank", "WeightSVD", {"rank": rank, "unfolding": how, "bias": bias})
    plan = plan_of(sites, **{layer: choice})
    mixed = st.apply(model, sites, plan, [x] if given else None)
    assert mixed.get_submodule(layer).is_factored
    assert gap(mixed, thin, x) < 1e-4
    st.save(mixed, plan, tmp_path / "mixed.safetensors")
    assert same_weights(mixed, st.load(made(name, dtype=torch.float32)[0], tmp_path / "mixed.safetensors"))
    whole = st.merge(mixed)
    assert not any(getattr(module, "is_factored", False) for module in whole.modules())
    with torch.no_grad():
        assert torch.allclose(whole.eval()(x), mixed.eval()(x), atol=1e-5)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", ["chain", "residual", "attention", "flatten"])
def test_activation_svd_of_what_is_left(name: str, tmp_path):
    model, x, sites = calibrated(name)
    removal = plan_of(sites, 0.75)
    svd = st.ActivationSVD()
    choices = {}
    for site in narrowed(sites, kept(removal)):
        curve = svd.curve(site)
        if curve.choices:
            choices[site.name] = curve.choices[len(curve.choices) // 2]
    assert choices
    plan = plan_of(sites, 0.75, **choices)
    small = st.apply(model, sites, plan, [x])
    st.save(small, plan, tmp_path / "small.safetensors")
    loaded = st.load(made(name, dtype=torch.float32)[0], tmp_path / "small.safetensors")
    assert same_weights(small, loaded)
    assert gap(small, model, x) < 1
    assert gap(st.merge(small), small, x) < 1e-6


def test_a_grouped_layer_that_is_left_one_channel_a_group_may_still_be_factored(tmp_path):
    model, x, sites = calibrated("grouped")
    choice = Choice("low_rank", "WeightSVD", {"rank": 1, "unfolding": "input", "bias": True})
    plan = plan_of(sites, 0.5, g=choice)
    small = st.apply(model, sites, plan, [x])
    assert small.g.original.shape[2] == 1
    st.save(small, plan, tmp_path / "small.safetensors")
    assert same_weights(small, st.load(made("grouped", dtype=torch.float32)[0], tmp_path / "small.safetensors"))


WRONG_KEPT = {
    "too far": [0, 99],
    "twice": [1, 1, 2],
    "backwards": [3, 2],
    "none": [],
    "negative": [-1, 2],
    "a number": 3,
    "text": "0123",
}


@pytest.mark.parametrize("what", WRONG_KEPT)
def test_wrong_channels_are_refused_when_a_plan_is_applied(what: str):
    model, _, sites = calibrated("chain")
    text = edited(plan_of(sites), kept=WRONG_KEPT[what])
    with pytest.raises(PlanError, match="a:out"):
        st.apply(model, sites, Plan.from_json(text))


@functools.cache
def narrow_file() -> tuple[Plan, dict[str, str], dict[str, Tensor]]:
    """What a checkpoint of the chain holds, with its plan."""
    model, _, sites = calibrated("chain")
    plan = plan_of(sites)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        st.save(st.apply(model, sites, plan), plan, path)
        with safe_open(path, "pt") as file:
            return plan, file.metadata(), load_file(path)


def edited(plan: Plan, **settings: object) -> str:
    """The text of a plan with other settings of its first choice; None takes one away."""
    document = json.loads(plan.to_json())
    held = document["entries"][0]["choice"]["settings"]
    held.update(settings)
    for key in [key for key, value in held.items() if value is None]:
        del held[key]
    return json.dumps(document)


@pytest.mark.parametrize("reconstruct", [True, False])
def test_what_reads_how_many_channels_there_were_is_told_of(reconstruct: bool):
    x = torch.randn(24, 12)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    sites = st.calibrate(model, st.couple(model, st.find(model), x), [x])
    model[1].register_forward_hook(lambda module, args, output: output + torch.zeros(16))
    for more in ({}, {"2": LowRankChoice("channel", 2, bias=True, method="ActivationSVD")}):
        with pytest.raises(ProofError, match="cannot be run.*channels that are gone; skip= the layers before it"):
            st.apply(model, sites, plan_of(sites, **more), [x], reconstruct=reconstruct)


def test_a_choice_without_channels_and_channels_that_are_not_there():
    model, _, sites = calibrated("chain")
    with pytest.raises(PlanError, match="site 'a:out': .* lacks the field 'kept'"):
        Plan.from_json(edited(plan_of(sites), kept=None))
    with pytest.raises(PlanError, match=r"removes channels 'a:out'.*couple"):
        st.apply(model, dataclasses.replace(sites, couplings=()), plan_of(sites))
    grouped, _, others = calibrated("grouped")
    with pytest.raises(PlanError, match="the same number"):
        st.apply(grouped, others, Plan.from_json(edited(plan_of(others), kept=[0, 2, 4, 5, 6])))


@pytest.mark.parametrize(
    "settings",
    [
        {"sides": "a:out:1 b:in:9"}, {"sides": "a:out b:in"}, {"sides": "a:out:1 nothing:in:1"}, {"sides": 5},
        {"sides": "a:out:1 b:in:-1"}, {"sides": "a:through:1"}, {"sides": "a:²:1"}, {"sides": "a.weight:²:1"},
        {"sides": "run:in:1"}, {"sides": "a.weight:7:1"}, {"sides": None}, {"of": 10**30}, {"of": "8"}, {"of": None},
        {"of": 2}, {"kept": []}, {"kept": 5}, {"kept": None}, {"kept": True}, {"sides": "a:out:" + "9" * 6000},
        {"sides": ""}, {"sides": "a:out:1 b:in:1 :in:1"}, {"sides": "__class__:in:1"}, {"sides": "forward:in:1"},
    ],
)  # fmt: skip
def test_a_checkpoint_whose_plan_was_tampered_with_is_refused(settings: dict[str, object], tmp_path):
    (plan, metadata, tensors), path = narrow_file(), tmp_path / "small.safetensors"
    save_file(tensors, path, {**metadata, "plan": edited(plan, **settings)})
    with pytest.raises(CheckpointError):
        st.load(made("chain", dtype=torch.float32)[0], path)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    model, _, sites = calibrated("chain")
    plan = plan_of(sites)
    st.save(st.apply(model, sites, plan), plan, tmp_path / "small.safetensors")
    for other in ("mlp", "residual", "conv1d"):
        with pytest.raises(CheckpointError):
            st.load(made(other, dtype=torch.float32)[0], tmp_path / "small.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["depthwise"])
def test_exported_programs_compute_what_the_narrowed_model_computes(name: str, tmp_path):
    model, x, sites = calibrated(name)
    small = st.apply(model, sites, plan_of(sites), [x]).eval()
    assert st.export_program(small, x[:4], tmp_path / "small.pt2") < 1e-4
    program = torch.export.load(tmp_path / "small.pt2").module()
    with torch.no_grad():
        assert torch.allclose(program(x[:7]), small(x[:7]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x, sites = calibrated("concat")
    small = st.apply(model, sites, plan_of(sites), [x]).eval()
    st.export_onnx(small, x[:4], tmp_path / "small.onnx")
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    given = torch.from_numpy(session.run(None, {"x": x[:5].numpy()})[0])
    with torch.no_grad():
        assert torch.allclose(given, small(x[:5]), atol=1e-4)


def test_a_result_can_be_narrowed_again():
    model, x, sites = calibrated("residual")
    small = st.apply(model, sites, plan_of(sites, 0.75), [x])
    again = st.calibrate(small, st.couple(small, st.find(small), x), [x])
    assert {c.name: c.channels for c in again.couplings} == {
        c.name: len(kept(plan_of(sites, 0.75))[c.name]) for c in sites.couplings
    }
    smaller = st.apply(small, again, plan_of(again, 0.5), [x])
    assert parameter_count(smaller) < parameter_count(small)
    assert smaller(x).shape == model(x).shape


def test_removed_channels_never_come_back_in_training():
    model, x, sites = calibrated("residual")
    small = st.apply(model, sites, plan_of(sites), [x]).train()
    shapes = [p.shape for p in small.parameters()]
    optimiser = torch.optim.SGD(small.parameters(), 0.1)
    loss = small(x).square().mean()
    loss.backward()
    optimiser.step()
    assert all(p.grad is not None for p in small.parameters())
    assert [p.shape for p in small.parameters()] == shapes


class TestRecommendations:
    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*more channels than responses")
    def test_a_budget_is_met_within_one_percent_on_a_wide_network(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 96, 3, padding=1),
            nn.BatchNorm2d(96), nn.ReLU(), nn.Conv2d(96, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 16, 40), nn.ReLU(), nn.Linear(40, 10),
        )  # fmt: skip
        x = torch.randn(24, 3, 4, 4)
        sites = st.calibrate(model.eval(), st.couple(model, st.find(model), x), [x])
        for cost, counted in (("parameters", parameter_count), ("macs", None)):
            plan = st.recommend(sites, st.Budget(**{cost: 0.5}), method=FINE)
            small = st.apply(model, sites, plan)
            with WorkCounter() as counter, evaluating(small):
                small(x)
            spent = counter.get_total_flops() / 2 / len(x) if counted is None else counted(small)
            assert spent == pytest.approx(plan.costs[cost], rel=1e-9)
            assert 0.99 * plan.budget[cost] <= spent <= plan.budget[cost] * (1 + 1e-9)
            assert plan.budget[cost] == pytest.approx(plan.dense_costs[cost] / 2)
            assert 0 < plan.facts["energy share"] <= 1

    def test_recipes_recommend_what_the_spectrum_says(self):
        _, _, sites = calibrated("chain")
        for site in sites.coupled():
            energies = FINE.energies(site)
            assert widths(sites, st.KL(), method=FINE)[site.name] == kl_width(energies)
            assert widths(sites, st.Energy(0.8), method=FINE)[site.name] == energy_width(energies, 0.8)
            chosen = kept(st.recommend(sites, st.KL(), method=FINE)).get(site.name, range(len(energies)))
            assert len(chosen) == kl_width(energies)
        assert widths(sites, lambda energies: 3, method=FINE) == {"a:out": 3, "b:out": 3}
        four = st.PrincipalFilters(multiple_of=4)
        assert widths(sites, lambda energies: 5, method=four) == {"a:out": 8, "b:out": 8}
        assert widths(sites, lambda energies: 5, method=four, rounded=False) == {"a:out": 5, "b:out": 5}
        assert widths(sites, lambda energies: 99, method=four) == {"a:out": 8, "b:out": 12}

    def test_widths_are_those_of_the_machine_that_was_measured(self):
        model, x = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 3)), torch.randn(300, 4)
        sites = st.calibrate(model.eval(), st.couple(model, st.find(model), x), [x])
        for told in (8, 16):
            clock = st.Latency(cache=None, register_width=told, timer=lambda chains, **_: [1.0] * len(chains))
            plan = st.recommend(sites, lambda energies: 3, latency=clock)
            assert [len(channels) for channels in kept(plan).values()] == [told]
            assert plan.facts["register_width"] == told

    def test_groups_of_a_grouped_convolution_keep_the_same_number(self):
        model, x, sites = calibrated("grouped")
        plan = st.recommend(sites, lambda energies: 6, method=FINE)
        assert {name: len(channels) for name, channels in kept(plan).items()} == {"g:out": 8, "c:out": 6}
        assert st.apply(model, sites, plan)(x).shape == (len(x), 4)

    def test_all_energy_keeps_all_but_what_repeats_others(self):
        model, _, sites = calibrated("residual")
        plan = st.recommend(sites, lambda energies: len(energies), method=FINE)
        assert kept(plan) == {}
        assert all(entry.choice.is_dense for entry in plan)
        assert plan.costs == plan.dense_costs
        assert plan.loss == 0
        assert same_weights(st.apply(model, sites, plan), model)

    def test_a_plan_edited_by_hand(self):
        model, x, sites = calibrated("chain")
        plan = st.recommend(sites, st.KL(), method=FINE)
        small = st.apply(model, sites, edited_entry(plan, "b:out", [0, 5, 7]), [x])
        assert (small.b.out_channels, small.c.in_features) == (3, 3)

    def test_budgets_that_cannot_be_met_and_shares_out_of_range(self):
        _, _, sites = calibrated("chain")
        with pytest.raises(InfeasibleBudgetError, match="macs") as caught:
            st.recommend(sites, st.Budget(macs=0.001))
        assert caught.value.lowest > caught.value.budget
        for share in (0, -0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="share of energy"):
                st.Energy(share)


def edited_entry(plan: Plan, site: str, channels: list[int]) -> Plan:
    document = json.loads(plan.to_json())
    for entry in document["entries"]:
        if entry["site"] == site:
            entry["choice"]["settings"]["kept"] = channels
    return Plan.from_json(json.dumps(document))


class TestTables:
    def test_coupled_channels_have_rows_whose_savings_are_exact_one_at_a_time(self):
        model, _, sites = calibrated("residual")
        table = st.tabulate(sites, [FINE])
        assert table.dense["parameters"] == pytest.approx(parameter_count(model))
        assert [row.site for row in table if row.site.endswith(":out")] == [c.name for c in sites.couplings]
        for row in table:
            for option in row.options[1::2]:
                entry = Entry(row.site, row.kind, option.choice, option.error, {}, {})
                plan = Plan((entry,), costs={}, dense_costs={}, methods={FINE.name: FINE.record()})
                small = st.apply(model, sites, plan)
                saved = row.dense.costs["parameters"] - option.costs["parameters"]
                # A reader without a bias and a norm gets one: the head has a bias, the others norms.
                assert parameter_count(model) - parameter_count(small) == pytest.approx(saved)

    def test_errors_fall_with_the_width(self):
        _, _, sites = calibrated("concat")
        for row in st.tabulate(sites, [FINE]):
            errors = [option.error for option in row.options]
            assert errors == sorted(errors)
            assert all(0 <= error <= 1 for error in errors)
