"""Groups from end to end: found, chosen under a budget, built with one parameter for what is shared, saved."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.errors import CheckpointError, PlanError
from spectrim.network.choices import Choice
from spectrim.network.sites import Sites
from spectrim.nn.checkpoint import same_weights
from spectrim.nn.shared import Once
from spectrim.nn.surgery import merge, parameter_count, size_in_bytes
from spectrim.selection.plan import Entry, Plan
from tests.cases import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Block(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        change = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(x[..., :: self.stride, :: self.stride] + change)


class Convolutions(nn.Module):
    """A stem, three blocks of which the first halves the size, a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 1), Block(width, 1))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        x = x + self.out((self.query(seen) @ self.key(seen).mT).softmax(-1) @ self.value(seen))
        return x + self.down(torch.relu(self.up(x)))


class Attention(nn.Module):
    """Two blocks of attention on sequences of vectors."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@dataclass(frozen=True, eq=False)
class Case:
    model: nn.Module
    batches: list[Tensor]
    sites: Sites
    grouped: Sites

    def lost(self, small: nn.Module) -> float:
        """Share of the outputs that differs, on inputs that were not used."""
        x = torch.randn(128, *self.batches[0].shape[1:], generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            wanted = self.model(x)
            return float((small(x) - wanted).norm() / wanted.norm())


NETS = {"convolutions": (Convolutions, (3, 8, 8)), "attention": (Attention, (7, 6))}
_SOME = ("channel", "height-first")
METHODS = {
    "left": (st.JointSVD("left", unfoldings=_SOME),),
    "right": (st.JointSVD("right", unfoldings=_SOME),),
    "both": (st.JointSVD("both", proportion=0.5, unfoldings=_SOME, sweeps=3),),
    "mixed": (st.ActivationSVD(), st.JointSVD("left"), st.JointSVD("right")),
}
# Every set of methods in one network; the others are slow tests.
SOME = {("convolutions", "right"), ("convolutions", "both"), ("attention", "left"), ("attention", "mixed")}
PLANS = [
    pytest.param(net, methods, marks=[] if (net, methods) in SOME else pytest.mark.slow)
    for net in NETS
    for methods in METHODS
]


@cache
def case(net: str) -> Case:
    make, shape = NETS[net]
    torch.manual_seed(1)
    model = make().eval()
    batches = [torch.randn(32, *shape) for _ in range(2)]
    sites = st.calibrate(model, st.find(model), batches)
    return Case(model, batches, sites, st.group(sites))


@cache
def planned(net: str, methods: str) -> Plan:
    return st.select(st.tabulate(case(net).grouped, METHODS[methods]), st.Budget(parameters=0.5))


@cache
def applied(net: str, methods: str, fitted: bool) -> nn.Module:
    held = case(net)
    return st.apply(held.model, held.grouped, planned(net, methods), held.batches if fitted else None)


def ties(model: nn.Module) -> list[list[str]]:
    """Names of every parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def joint(plan: Plan) -> list[Entry]:
    return [entry for entry in plan if entry.members and not entry.choice.is_dense]


@pytest.mark.table
@pytest.mark.parametrize("fitted", [False, True], ids=["alone", "fitted"])
@pytest.mark.parametrize(("net", "methods"), PLANS)
def test_the_result_costs_what_the_plan_says_and_shares_what_it_says(net: str, methods: str, fitted: bool) -> None:
    held, plan, small = case(net), planned(net, methods), applied(net, methods, fitted)
    assert joint(plan)
    assert plan.costs["parameters"] <= 0.5 * plan.dense_costs["parameters"]
    assert parameter_count(small) == plan.costs["parameters"]
    assert size_in_bytes(small) == plan.costs["bytes"]
    assert not ties(held.model)
    expected = []
    for entry in joint(plan):
        rank, left_rank = entry.choice["rank"], entry.choice["left_rank"]
        shared = [index for index, used in ((0, left_rank), (1, rank - left_rank)) if used]
        expected += [sorted(_weight(small, name, index) for name in entry.members) for index in shared]
    assert sorted(map(sorted, ties(small))) == sorted(expected)
    assert not small.training
    assert held.lost(small) < 0.5


def _weight(model: nn.Module, site: str, index: int) -> str:
    """Name of the shared weight of a layer: the first part of a first factor, the last part of a second one."""
    factor = model.get_submodule(f"{site}.{index}")
    if isinstance(factor, Once):
        return f"{site}.{index}.layer.weight"
    return f"{site}.{index}.parts.{index}.weight" if hasattr(factor, "parts") else f"{site}.{index}.weight"


@pytest.mark.parametrize(("net", "methods"), PLANS)
def test_fitting_to_the_compressed_predecessors_loses_no_more(net: str, methods: str) -> None:
    held = case(net)
    assert held.lost(applied(net, methods, True)) <= held.lost(applied(net, methods, False))


@pytest.mark.parametrize(("net", "methods"), PLANS)
def test_merged_it_computes_the_same_in_the_original_layers(net: str, methods: str) -> None:
    held, small = case(net), applied(net, methods, True)
    merged = merge(small)
    assert {k: v.shape for k, v in merged.state_dict().items() if "bias" not in k} == {
        k: v.shape for k, v in held.model.state_dict().items() if "bias" not in k
    }
    with torch.no_grad():
        torch.testing.assert_close(merged(held.batches[0]), small(held.batches[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.table(every=2)
@pytest.mark.parametrize(("net", "methods"), [("convolutions", "both"), ("attention", "mixed")])
def test_a_plan_from_a_file_gives_the_same_bits_also_on_sites_without_groups(net: str, methods: str, tmp_path) -> None:
    held, plan = case(net), planned(net, methods)
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again == plan
    assert not held.sites.groups
    small = st.apply(held.model, held.sites, again, held.batches)
    assert same_weights(small, applied(net, methods, True))
    assert ties(small) == ties(applied(net, methods, True))


@pytest.mark.parametrize(("net", "methods"), PLANS)
def test_a_checkpoint_holds_what_is_shared_once_and_comes_back_bit_for_bit(net: str, methods: str, tmp_path) -> None:
    held, plan, small = case(net), planned(net, methods), applied(net, methods, True)
    path = tmp_path / "small.safetensors"
    st.save(small, plan, path)
    data = path.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    assert len(data) - 8 - header == plan.costs["bytes"]
    again = st.load(NETS[net][0]().eval(), path)
    assert ties(again) == ties(small)
    assert same_weights(again, small)
    with torch.no_grad():
        assert torch.equal(again(held.batches[0]), small(held.batches[0]))


def test_queries_keys_and_values_compute_their_shared_factor_once() -> None:
    held, small = case("attention"), applied("attention", "left", True)
    entries = [entry for entry in joint(planned("attention", "left")) if entry.choice.settings.get("once")]
    assert [entry.members[0] for entry in entries] == ["layers.0.query", "layers.1.query"]
    calls: list[str] = []
    handles = []
    for entry in entries:
        for name in entry.members:
            inner = small.get_submodule(f"{name}.0.layer")
            handles.append(inner.register_forward_hook(lambda *_, name=name: calls.append(name)))
    with torch.no_grad():
        small(held.batches[0])
    for handle in handles:
        handle.remove()
    assert calls == ["layers.0.query", "layers.1.query"]


def test_the_counted_work_is_that_of_the_model() -> None:
    held, plan = case("attention"), planned("attention", "left")
    counted = st.calibrate(held.model, held.sites, held.batches[:1], statistics=False)
    found = {}
    for name, model in (("small", applied("attention", "left", True)), ("dense", held.model)):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
            model(held.batches[0])
        found[name] = counter.get_total_flops() / 2 / len(held.batches[0])
    assert counted.seen
    assert plan.costs["macs"] == found["small"]
    assert plan.dense_costs["macs"] == found["dense"]


def test_ranks_above_those_of_one_layer_can_be_saved() -> None:
    """Layers with few inputs have a low rank each, and all together a higher one in what they answer."""
    model = nn.ModuleDict({f"layer{n}": nn.Linear(3, 40) for n in range(8)})
    sites = st.group(st.find(model), {"all": [f"layer{n}" for n in range(8)]})
    method = st.JointSVD("right", multiple_of=1)
    choice = max(method.curve(sites["all"]).choices, key=lambda choice: choice["rank"])
    assert choice["rank"] > 6
    plan = by_hand([f"layer{n}" for n in range(8)], **choice.settings)
    small = st.apply(model, sites, plan)
    again = st.load(nn.ModuleDict({f"layer{n}": nn.Linear(3, 40) for n in range(8)}), _saved(small, plan))
    assert same_weights(again, small)


# Plans that do not fit.


def written(members: Sequence[str], share: str = "right", *, kind: str = "shared_basis", **settings: object) -> str:
    """A plan of one group, as in a file; settings that are None are left out."""
    method = st.JointSVD(share)
    given = {"unfolding": "channel", "rank": 2, "left_rank": {"left": 2, "right": 0}[share], "bias": True, **settings}
    given = {name: value for name, value in given.items() if value is not None}
    costs = {"costs": {"parameters": 1.0}, "dense_costs": {"parameters": 2.0}}
    choice = {"kind": kind, "method": method.name, "settings": given}
    entry = {"site": "group", "kind": "layers", "choice": choice, "error": 0.1, "members": list(members), **costs}
    return json.dumps({"entries": [entry], "methods": {method.name: method.record()}, **costs})


def by_hand(members: Sequence[str], share: str = "right", **settings: object) -> Plan:
    return Plan.from_json(written(members, share, **settings))


def odd() -> nn.Module:
    return nn.ModuleDict({
        "a": nn.Conv2d(4, 6, 3, padding=1),
        "b": nn.Conv2d(4, 6, 3, padding=1, stride=2),
        "wide": nn.Conv2d(6, 4, 3),
        "small": nn.Conv2d(4, 6, 1),
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "turned": nn.ConvTranspose2d(4, 6, 3),
        "other": nn.Conv2d(4, 6, 3).half(),
        "line": nn.Linear(4, 6),
        "norm": nn.BatchNorm2d(4),
    })  # fmt: skip


@pytest.fixture(params=["apply", "load"])
def refuse(request, tmp_path_factory):
    """Carries out a plan on a model with odd layers, or loads a checkpoint with that plan."""

    def apply(plan: Plan) -> nn.Module:
        model = odd()
        return st.apply(model, st.find(model), plan)

    def load(plan: Plan) -> nn.Module:
        with pytest.MonkeyPatch.context() as patch:
            # A file that save would not have written.
            patch.setattr("spectrim.nn.checkpoint._check_carried_out", lambda model, plan: None)
            path = _saved(odd(), plan, tmp_path_factory.mktemp("plans"))
        return st.load(odd(), path)

    return apply if request.param == "apply" else load


def _saved(model: nn.Module, plan: Plan, folder=None):
    import tempfile
    from pathlib import Path

    path = Path(folder or tempfile.mkdtemp()) / "model.safetensors"
    st.save(model, plan, path)
    return path


MISFITS = {
    "a member twice": (written(["a", "a"]), "once|'a'"),
    "an unknown member": (written(["a", "none"]), "'none'"),
    "a member that is no layer": (written(["a", "norm"]), "'norm'"),
    "no second member": (written(["a"]), "'a'"),
    "other outputs": (written(["a", "wide"]), "'a'"),
    "other inputs": (written(["a", "wide"], "left"), "'a'"),
    "another kernel": (written(["a", "small"]), "'a'"),
    "other groups": (written(["a", "grouped"]), "'a'"),
    "another direction": (written(["a", "turned"]), "'a'"),
    "another dtype": (written(["a", "other"]), "'a'"),
    "another kind of layer": (written(["line", "a"]), "'line'"),
    "a choice for one layer": (
        written(["a", "b"], kind="low_rank", left_rank=None),
        "'group': .* not 'low_rank' ones|'a'.* one layer, not for 2",
    ),
    "an unknown kind": (written(["a", "b"], kind="os.system"), "'group'"),
    "once with other strides": (written(["a", "b"], "left", once=True), "'a'"),
    "once with a second factor": (written(["a", "b"], once=True), "'group'"),
    "once of another kind": (written(["a", "b"], "left", once="yes"), "'group'"),
    "rank 0": (written(["a", "b"], rank=0), "'group'"),
    "a huge rank": (written(["a", "b"], rank=10**15), "'a'"),
    "a huge left rank": (written(["a", "b"], "left", rank=2**62, left_rank=2**62), "'a'"),
    "more left than in all": (written(["a", "b"], "left", rank=1), "'group'"),
    "a negative left rank": (written(["a", "b"], left_rank=-1), "'group'"),
    "a rank as text": (written(["a", "b"], rank="2"), "'group'"),
    "a rank that is a truth": (written(["a", "b"], rank=True), "'group'"),
    "an unknown unfolding": (written(["a", "b"], unfolding="__import__"), "'a'"),
    "a bias that is no truth": (written(["a", "b"], bias=3), "'group'"),
}


@pytest.mark.table
@pytest.mark.parametrize("name", MISFITS)
def test_a_plan_that_does_not_fit_is_refused_by_name(name: str, refuse) -> None:
    text, message = MISFITS[name]
    with pytest.raises((PlanError, CheckpointError), match=message):
        refuse(Plan.from_json(text))


@pytest.mark.parametrize("missing", ["rank", "left_rank", "unfolding"])
def test_a_missing_setting_is_named(missing: str) -> None:
    with pytest.raises(PlanError, match=f"site 'group': .* lacks the field '{missing}'"):
        by_hand(["a", "b"], **{missing: None})


def test_groups_that_overlap_and_groups_in_place_of_sites_are_refused() -> None:
    model = odd()
    sites = st.group(st.find(model), {"group": ["a", "b"]})
    (entry,) = by_hand(["a", "b"]).entries
    alone = dataclasses.replace(entry, site="b", members=(), choice=Choice())
    plan = dataclasses.replace(by_hand(["a", "b"]), entries=(entry, alone))
    with pytest.raises(PlanError, match="'b'"):
        st.apply(model, sites, plan)
    with pytest.raises(PlanError, match="once"):
        Plan.from_json(plan.to_json())
    nameless = dataclasses.replace(plan, entries=(dataclasses.replace(entry, members=()),))
    with pytest.raises(PlanError, match="'group'"):
        st.apply(model, sites, nameless)


def test_members_of_an_edited_plan_keep_their_order() -> None:
    """The order of the members is that of the factors: turned round, the same layers get their own parts."""
    model = odd()
    sites = st.find(model)
    small = st.apply(model, sites, by_hand(["a", "b"]))
    turned = st.apply(model, sites, by_hand(["b", "a"]))
    for name in ("a", "b"):
        one, other = (merge(net)[name].weight for net in (small, turned))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert json.loads(by_hand(["b", "a"]).to_json())["entries"][0]["members"] == ["b", "a"]
