"""What was compressed before goes tighter: pairs and chains are sites again, and never become chains of chains."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.network.choices import ChannelsChoice, LowRankChoice
from spectrim.nn.checkpoint import save
from spectrim.nn.find import find
from spectrim.nn.layers import canonical
from spectrim.nn.modules import Chained, Factored
from spectrim.nn.shared import Wide
from spectrim.nn.shipping import carry
from spectrim.nn.surgery import parameter_count
from spectrim.train import carry_optimizer
from tests.cases import one_thread
from tests.nn.nets import compressed, low_rank, plan_of, settle, sparse

SPARSE = st.LowRankPlusSparse(densities=(0.0, 0.1, 0.3), ranks=2, turns=4)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return list(torch.randn(96, 2, 6, 6, generator=torch.Generator().manual_seed(3)).split(48))


@pytest.fixture(scope="module")
def once(batches: list[Tensor]) -> st.Result:
    return st.compress(made(), batches, "macs=70%")


def test_a_second_compression_is_that_of_the_product_and_counts_what_is_there(
    once: st.Result, batches: list[Tensor], tmp_path: Path
) -> None:
    twice = st.compress(once.model, batches, "macs=60%")
    assert twice.plan.dense_costs == once.plan.costs
    assert twice.plan.costs["macs"] <= 0.6 * once.plan.costs["macs"]
    assert twice.plan.costs["parameters"] == parameter_count(twice.model)
    assert all(name.count(".") <= 2 for name in twice.model.state_dict())  # never a pair within a pair
    product = st.compress(st.merge(once.model), batches, st.Budget(macs=twice.plan.costs["macs"] + 1))
    ours, products = (st.agreement(once.model, each.model, batches) for each in (twice, product))
    assert ours is not None
    assert products is not None
    assert ours.error < 1.25 * products.error
    st.save(twice, tmp_path / "twice.safetensors")
    loaded = st.load(made(), tmp_path / "twice.safetensors").eval()
    assert torch.equal(loaded(batches[0]), twice.model(batches[0]))


class WithScale(nn.Linear):
    """With numbers of its own, which whoever holds it reads."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, outputs))


class ReadsScales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([WithScale(16, 32), WithScale(32, 32), WithScale(32, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x) * layer.scale)
        return x


def test_parameters_that_a_class_adds_to_its_layers_are_counted_each_time() -> None:
    batches = list(torch.randn(96, 16, generator=torch.Generator().manual_seed(3)).split(48))
    first = st.compress(ReadsScales().eval(), batches, "parameters=70%")
    second = st.compress(first.model, batches, "parameters=80%")
    for result in (first, second):
        assert result.plan.costs["parameters"] == parameter_count(result.model)
    assert second.plan.dense_costs["parameters"] == first.plan.costs["parameters"]


def test_a_pair_that_nothing_is_chosen_for_stays_bit_for_bit(once: st.Result, batches: list[Tensor]) -> None:
    changed = [entry.site for entry in once.plan if not entry.choice.is_dense]
    again = st.compress(once.model, batches, "macs=99.9%", skip=changed)
    for name in changed:
        for old, new in zip(
            once.model.get_submodule(name).parameters(), again.model.get_submodule(name).parameters(), strict=True
        ):
            assert torch.equal(old, new)
    kept = st.compress(once.model, batches, "macs=100%")
    assert kept.plan.costs == once.plan.costs
    assert torch.equal(kept.model(batches[0]), once.model(batches[0]))


def test_sites_of_pairs_are_the_layers_they_stand_for() -> None:
    dense, model = made(), compressed(made(), {"2": low_rank(3, "height-first"), "5": low_rank(4)})
    sites = find(model)
    assert [site.name for site in sites] == [site.name for site in find(dense)]
    pair = sites.layer("2")
    assert pair.spec == find(dense).layer("2").spec
    assert torch.allclose(pair.weight, canonical(model.get_submodule("2"))[0], atol=1e-6)
    assert [part.name for part in pair.present] == ["2.0", "2.1"]
    counted = sum(part.stored for site in sites for part in site.running)
    biases = sum(part.out_channels for site in sites for part in site.running if part.bias)
    assert counted + biases == parameter_count(model)
    left = find(model, skip="2")
    assert [each.name for each in left.skipped] == ["2.0", "2.1"]
    assert [site.name for site in find(model, parts=True)] == ["0", "2.0", "2.1", "5.0", "5.1", "7"]


@pytest.mark.slow
def test_other_methods_compete_for_pairs_and_learned_ranks_refuse_them_by_name(
    once: st.Result, batches: list[Tensor]
) -> None:
    sparse = st.compress(once.model, batches, "parameters=70%", methods=SPARSE)
    assert parameter_count(sparse.model) <= 0.7 * parameter_count(once.model)
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3))).eval()
    data = list(torch.randn(64, 12).split(32))
    pairs = st.compress(stack, data, "parameters=70%", groups=False).model
    shared = st.compress(pairs, data, "parameters=60%", groups={"all": ["0", "1", "2"]}, methods=st.JointSVD("left"))
    assert parameter_count(shared.model) == shared.plan.costs["parameters"] <= 0.6 * parameter_count(pairs)
    with pytest.raises(ValueError, match=r"find\(model, parts=True\)"):
        st.LearnedRanks(once.model, find(once.model), "parameters=50%")


def test_factors_that_layers_share_are_left_alone_with_the_reason(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3))).eval()
    data = list(torch.randn(64, 12).split(32))
    groups = {"all": ["0", "1", "2"]}
    shared = st.compress(stack, data, "parameters=40%", groups=groups, methods=[st.JointSVD("left"), st.WeightSVD()])
    assert any(entry.members for entry in shared.plan)
    reasons = [each.reason for each in st.find(shared.model).skipped]
    assert any("tied" in reason and "spectrim.merge(model)" in reason for reason in reasons)


def made_sparse(model: nn.Sequential, densities: Mapping[str, float]) -> nn.Sequential:
    """With layers that are sparse by themselves, and one beside a pair."""
    choices = {name: sparse(0, density, "unstructured") for name, density in densities.items()}
    choices["5"] = sparse(2, 0.3, "rows")
    compressed(model, choices)
    settle(model)
    carry(model, plan_of(choices))
    return model


@pytest.mark.parametrize("methods", [None, SPARSE], ids=["default", "sparse"])
def test_layers_beside_sparse_ones_are_compressed_again(methods: Any, batches: list[Tensor], tmp_path: Path) -> None:
    once = made_sparse(made(), {"2": 0.4})
    twice = st.compress(once, batches, "macs=85%", methods=methods)
    # What masks a layer is left alone, and costs what is inside the mask: nothing is a product beside the layers.
    told = {each.name: each.reason for each in twice.sites.skipped}
    assert all(told[name].startswith("sparse") and "spectrim.merge" in told[name] for name in ("2", "5.sparse"))
    assert not twice.sites.work
    dense = 36 * 144 + 4 * round(0.4 * 576) + 2 * (32 + 12) + 4 * 32 + 60
    assert twice.plan.dense_costs["macs"] == pytest.approx(dense, rel=0.002)
    st.save(twice, tmp_path / "twice.safetensors")
    assert torch.equal(st.load(made(), tmp_path / "twice.safetensors").eval()(batches[0]), twice.model(batches[0]))


def test_a_budget_that_sparse_layers_make_impossible_names_them(batches: list[Tensor]) -> None:
    with pytest.raises(st.InfeasibleBudgetError, match=r"Left alone: 0 .*% of macs\): sparse: .*merge"):
        st.compress(made_sparse(made(), {"0": 0.4, "2": 0.4}), batches, "macs=50%")


def test_parts_that_layers_share_side_by_side_are_told_of_where_they_are_multiplied() -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 24)).eval()
    data, groups = list(torch.randn(64, 12).split(32)), {"all": ["0", "1", "2"]}
    once = st.compress(stack, data, "parameters=60%", groups=groups, methods=st.JointSVD("both", sweeps=2))
    wide = [name for name, module in once.model.named_modules() if isinstance(module, Wide)]
    twice = st.compress(once.model, data, "macs=95%", methods=st.WeightSVD())
    assert wide
    assert not twice.sites.work
    for cost in ("macs", "parameters"):
        assert twice.plan.dense_costs[cost] == once.plan.costs[cost]
    told = {each.name: each.reason for each in twice.sites.skipped}
    assert all("spectrim.merge(model)" in told[name] for name in wide)


def test_files_whose_second_plan_names_the_layers_of_a_pair_load_as_before(
    batches: list[Tensor], tmp_path: Path
) -> None:
    model = made()
    for choices in ({"2": low_rank(3)}, {"2.0": low_rank(2)}):
        compressed(model, choices)
        carry(model, plan := plan_of(choices))
    save(model, plan, tmp_path / "old.safetensors")
    loaded = st.load(made(), tmp_path / "old.safetensors").eval()
    assert torch.equal(loaded(batches[0]), model(batches[0]))
    assert [site.name for site in find(loaded, only="2*")] == ["2.0", "2.1"]  # a pair within a pair stays as it is


def test_channels_go_from_pairs_whose_first_layer_gets_a_bias(batches: list[Tensor], tmp_path: Path) -> None:
    once = st.compress(made(), batches, "macs=60%", methods=st.ActivationSVD())
    twice = st.compress(once.model, batches, "macs=80%", methods=st.PrincipalFilters())
    pairs = [m for m in twice.model.modules() if isinstance(m, Factored)]
    assert any(pair.first.bias is not None and pair.bias_parameter() is None for pair in pairs)
    assert twice.plan.costs["macs"] <= 0.8 * once.plan.costs["macs"]
    st.save(twice, tmp_path / "twice.safetensors")
    loaded = st.load(made(), tmp_path / "twice.safetensors").eval()
    assert torch.equal(loaded(batches[0]), twice.model(batches[0]))


@pytest.mark.table(every=2)
@pytest.mark.parametrize("method", [SPARSE, st.JointSVD("both", sweeps=2)], ids=lambda m: type(m).__name__)
def test_what_has_to_be_merged_first_says_so(method: st.Method) -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3))).eval()
    data = list(torch.randn(64, 12).split(32))
    once = st.compress(stack, data, "parameters=60%", groups={"all": ["0", "1", "2"]}, methods=method)
    assert any("spectrim.merge(model)" in each.reason for each in st.find(once.model).skipped)
    twice = st.compress(st.merge(once.model), data, "parameters=50%", methods=st.WeightSVD())
    assert parameter_count(twice.model) <= 0.5 * parameter_count(stack)


# The optimizer's state is carried over.


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> torch.optim.Optimizer:
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_momentum_of_unchanged_layers_stays_and_that_of_factors_is_projected(batches: list[Tensor]) -> None:
    dense = made()
    optimizer = trained(dense, sgd(dense), batches)
    small = copy.deepcopy(dense)
    compressed(small, {"5": LowRankChoice("channel", 4, True)})
    carried = carry_optimizer(optimizer, dense, small)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in small.parameters()]
    held = {name: optimizer.state[p]["momentum_buffer"] for name, p in small.named_parameters()}
    assert set(carried.kept) == {n for n, _ in small.named_parameters() if not n.startswith("5.") or n == "5.1.bias"}
    assert set(carried.projected) == {"5.0.weight", "5.1.weight"}
    before = trained(again := made(), sgd(again), batches).state
    gradient = before[again.get_parameter("5.weight")]["momentum_buffer"]
    first, second = small.get_parameter("5.0.weight"), small.get_parameter("5.1.weight")
    assert torch.allclose(held["5.0.weight"], second.T @ gradient, atol=1e-6)
    assert torch.allclose(held["5.1.weight"], gradient @ first.T, atol=1e-6)
    assert torch.equal(held["0.weight"], before[again.get_parameter("0.weight")]["momentum_buffer"])
    small(batches[0]).square().mean().backward()
    optimizer.step()


def test_squares_of_gradients_are_reset_and_said(batches: list[Tensor]) -> None:
    dense = made()
    optimizer = trained(dense, torch.optim.AdamW(dense.parameters()), batches)
    small = copy.deepcopy(dense)
    compressed(small, {"2": low_rank(3, "height-first")})
    carried = carry_optimizer(optimizer, dense, small)
    assert set(carried.reset) == {"2.0.weight", "2.1.weight"}
    assert "reset" in str(carried)
    small(batches[0]).square().mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="holds no parameter of"):
        carry_optimizer(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), made(), small)


def test_of_channels_that_went_the_state_goes_and_all_other_state_stays(batches: list[Tensor]) -> None:
    dense = made()
    optimizer = trained(dense, torch.optim.Adam(dense.parameters(), amsgrad=True), batches)
    before = {name: dict(optimizer.state[p]) for name, p in dense.named_parameters()}
    result = st.compress(dense, batches, "macs=60%", methods=st.PrincipalFilters())
    carried = carry_optimizer(optimizer, dense, result.model)
    kept = {entry.site: list(entry.choice.kept) for entry in result.plan if isinstance(entry.choice, ChannelsChoice)}
    outputs, inputs = kept["2:out"], kept["0:out"]
    assert len(outputs) < 8
    assert not carried.reset
    state = optimizer.state[result.model.get_parameter("2.weight")]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(state[key], before["2.weight"][key][outputs][:, inputs])
        assert torch.equal(optimizer.state[result.model.get_parameter("2.bias")][key], before["2.bias"][key][outputs])
    assert state["step"] == before["2.weight"]["step"]
    result.model(batches[0]).square().mean().backward()
    optimizer.step()


def test_a_factor_that_layers_share_has_the_sum_of_their_momenta() -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3))).eval()
    data = list(torch.randn(64, 12).split(32))
    optimizer = trained(stack, sgd(stack), data)
    momenta = [optimizer.state[stack.get_parameter(f"{n}.weight")]["momentum_buffer"].clone() for n in range(3)]
    groups = {"all": ["0", "1", "2"]}
    small = st.compress(stack, data, "parameters=60%", groups=groups, methods=st.JointSVD("left")).model
    carried = carry_optimizer(optimizer, stack, small)
    assert not carried.reset
    shared = small.get_parameter("0.0.weight")
    assert shared is small.get_submodule("1.0").get_parameter("weight")
    own = [small.get_parameter(f"{n}.1.weight") for n in range(3)]
    wanted = sum(second.mT @ momentum for second, momentum in zip(own, momenta, strict=True))
    torch.testing.assert_close(optimizer.state[shared]["momentum_buffer"], wanted, rtol=1e-4, atol=1e-6)
    for second, momentum in zip(own, momenta, strict=True):
        found = optimizer.state[second]["momentum_buffer"]
        torch.testing.assert_close(found, momentum @ shared.mT, rtol=1e-4, atol=1e-6)


def test_chains_have_the_momentum_of_the_layer_and_its_bias(batches: list[Tensor]) -> None:
    dense = made()
    optimizer = trained(dense, sgd(dense), batches)
    state = {name: optimizer.state[p] for name, p in dense.named_parameters()}
    small = st.compress(dense, batches, "macs=60%", methods=st.WeightTucker2()).model
    layer = next(name for name, module in small.named_modules() if isinstance(module, Chained))
    momentum, bias = (state[f"{layer}.{part}"]["momentum_buffer"].clone() for part in ("weight", "bias"))
    carried = carry_optimizer(optimizer, dense, small)
    assert not carried.reset
    assert torch.equal(optimizer.state[small.get_parameter(f"{layer}.2.bias")]["momentum_buffer"], bias)
    inner, core, outer = (small.get_parameter(f"{layer}.{n}.weight") for n in range(3))
    wanted = torch.einsum("oikl,om,ri->mrkl", momentum, outer[:, :, 0, 0], inner[:, :, 0, 0])
    torch.testing.assert_close(optimizer.state[core]["momentum_buffer"], wanted, rtol=1e-4, atol=1e-6)


def test_a_network_whose_weights_lie_otherwise_is_refused() -> None:
    attention = nn.ModuleList([nn.MultiheadAttention(8, 2)])
    linear = st.with_linear_layers(attention)
    with pytest.raises(ValueError, match="'0' has nn.Linear layers in the new network"):
        carry_optimizer(sgd(attention), attention, linear)


class Scaled(nn.Module):
    """A layer's width between two, and a scale that is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layers(x)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adafactor])
def test_steps_are_counted_on_and_state_that_cannot_be_cut_is_reset(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    dense, data = Scaled().eval(), [torch.randn(64, 12)]
    optimizer = trained(dense, kind(dense.parameters()), data)  # type: ignore[call-arg]
    small = st.compress(dense, data, "macs=60%", methods=st.PrincipalFilters()).model
    carried = carry_optimizer(optimizer, dense, small)
    matrices = ("layers.0.weight", "layers.2.weight")
    assert set(carried.reset) == (set() if kind is torch.optim.Adam else set(matrices))
    assert all(optimizer.state[small.get_parameter(name)]["step"] == 1 for name in carried.kept)
    trained(small, optimizer, data)
