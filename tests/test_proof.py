"""What is delivered has been run: replaced layers are called, costs are those planned, outputs are compared."""

from __future__ import annotations

import dataclasses
import functools
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import spectrim as st
from benchmarks.situation_table import Two
from spectrim.application import Applied, carry_out
from spectrim.network.choices import LowRankChoice
from spectrim.nn import merge_proof
from spectrim.nn.agreement import agreement
from spectrim.nn.checkpoint import read_plan, same_weights
from spectrim.nn.proof import NOT_RUN
from spectrim.nn.shipping import remembered
from spectrim.nn.standing import StandIn
from spectrim.nn.surgery import stand_ins
from spectrim.nn.watch.reconstruct import Split
from spectrim.nn.watch.sampling import Sampling
from spectrim.pipeline.report import reported

BATCHES = [torch.randn(64, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]


class Listed(Two):
    def begin(self) -> None:
        self.steps = [self.a, nn.ReLU(), self.b]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Hidden(Two):
    def begin(self) -> None:
        self.__dict__["first"] = self.a
        self.table = {"second": (self.b,)}

    def forward(self, x: Tensor) -> Tensor:
        return self.table["second"][0](F.relu(self.first(x)))


class Bound(Two):
    def begin(self) -> None:
        self.run = self.a.__call__

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.run(x)))


class Reads(Two):
    def forward(self, x: Tensor) -> Tensor:
        assert (self.a.in_features, self.b.out_features, len(self.b.weight), self.b.bias.numel()) == (32, 32, 32, 32)
        return self.b(F.relu(self.a(x.to(self.a.weight.dtype))).to(self.b.weight.device))


class AsksType(Two):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = F.relu(layer(x)) if isinstance(layer, nn.Linear) else layer(x)
        return x


@pytest.mark.parametrize("kind", [Two, Listed, Hidden, Bound, Reads, AsksType])
def test_layers_are_reached_however_they_are_held_and_read(kind: type[Two]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    result = st.compress(model, BATCHES, st.Budget(macs=0.5))
    assert [name for name, m in result.model.named_modules() if isinstance(m, StandIn)] == ["a", "b"]
    with torch.no_grad():
        wanted, given = model(BATCHES[0]), result.model(BATCHES[0])
    assert 0 < float((wanted - given).norm() / wanted.norm()) < 1
    assert kind is not AsksType or bool((given >= 0).all())


class Captured(Two):
    def begin(self) -> None:
        layers = [self.a]
        self.run = lambda x: layers[0](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.run(x)))


class ByNumber(Two):
    def begin(self) -> None:
        self.names = {id(self.a): "a"}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(self.names[id(self.a)])


class ByInstance(Two):
    """What it reads of the first one that was made is, in a copy, what that one last left there."""

    def begin(self) -> None:
        ByInstance.first: Any = self  # type: ignore[misc]
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = F.relu(self.a(x)).mean(0)
        return self.b(F.relu(self.a(x)) - ByInstance.first.mean)


class Slotted(Two):
    __slots__ = ("steps",)

    def begin(self) -> None:
        object.__setattr__(self, "steps", [self.a, nn.ReLU(), self.b])

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda x, step: step(x), self.steps, x)


class Registered(Two):
    """What was noted down of a module is not known of its copy, which runs all the same."""

    scales: ClassVar[weakref.WeakKeyDictionary[nn.Module, float]] = weakref.WeakKeyDictionary()

    def begin(self) -> None:
        self.scales[self] = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scales.get(self, 1.0)


class Itself(Two):
    def __deepcopy__(self, memo: Any) -> Itself:
        return self


@pytest.mark.table
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Captured, r"a copy of the Captured calls layer 'a' of the original.*a list of a closure.*skip='a'"),
        (ByNumber, r"a copy of the ByNumber cannot be run.*KeyError.*id\(\) of a module.*by attributes when it runs"),
        (ByInstance, r"a copy of the ByInstance computes something else.*as a global variable.*by attributes"),
        (Registered, r"a copy of the Registered computes something else.*noted down before"),
        (Slotted, r"a copy of the Slotted cannot be run.*AttributeError.*__slots__"),
        (Itself, r"copy.deepcopy of the Itself gives layer 'a' itself"),
    ],
)
@pytest.mark.parametrize("methods", [None, [st.PrincipalFilters(), st.ActivationSVD()], "auto"])
def test_a_copy_that_is_none_is_refused_before_the_work(kind: type[Two], message: str, methods: Any) -> None:
    model = kind().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(st.SpectrimError, match=message):
        st.compress(model, BATCHES, st.Budget(macs=0.5), methods=methods)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Registered, "a copy of the Registered computes something else"),
        (ByNumber, r"Left alone: a and 1 more .*: channels are left alone: tracing failed with KeyError"),
    ],
)
def test_where_channels_alone_may_go_a_copy_is_tried_too_and_why_they_stay_is_told(
    kind: type[Two], message: str
) -> None:
    with pytest.raises(st.SpectrimError, match=message):
        st.compress(kind().eval(), BATCHES, st.Budget(macs=0.5), methods=st.PrincipalFilters())


class Experts(nn.Module):
    """Each sample goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y, first = torch.zeros_like(x), x[:, 0] > 2.5
        for expert, mine in zip(self.experts, (first, ~first), strict=True):
            if bool(mine.any()):
                y[mine] = expert(x[mine])
        return y


def test_layers_that_are_called_for_some_samples_only_are_no_fault() -> None:
    torch.manual_seed(0)
    result = st.compress(Experts().eval(), BATCHES, st.Budget(parameters=0.6))
    assert result.plan.ratio("parameters") > 1.6


class Functional(Two):
    """Computes with the weight of a layer that it also calls."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.a(x)), self.a.weight.t()) + self.b(F.relu(self.a(x)))


def test_a_layer_whose_weight_others_compute_with_is_left_alone() -> None:
    result = st.compress(Functional().eval(), BATCHES, st.Budget(macs=0.9))
    assert isinstance(result.model.b, StandIn)
    assert type(result.model.a) is nn.Linear
    assert result.report.skipped[0][:2] == ("a", "Linear")
    assert "another module computes with its weight" in result.report.skipped[0][2]


def planned(model: nn.Module) -> tuple[st.Sites, st.Plan]:
    sites = st.calibrate(model, st.find(model), BATCHES)
    return sites, st.select(st.tabulate(sites, [st.ActivationSVD()]), st.Budget(macs=0.5))


def test_a_plan_that_was_edited_is_carried_out_and_its_costs_are_told() -> None:
    model = Two().eval()
    sites, plan = planned(model)
    other = dataclasses.replace(plan, costs={**plan.costs, "macs": 17.0})
    notes = carry_out(model, sites, other, BATCHES).notes
    assert len(notes) == 1
    assert f"the plan said 17 macs, its choices come to {plan.costs['macs']:,.0f}" in notes[0]
    assert carry_out(model, sites, plan, BATCHES).notes == ()


class Closure(Two):
    def begin(self) -> None:
        first = [self.a]
        self.run = lambda x: first[0](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.run(x)))


class Choosy(Two):
    def forward(self, x: Tensor) -> Tensor:
        assert any(x.equal(batch) for batch in BATCHES), "noise"
        return super().forward(x)


def test_without_batches_the_network_is_run_on_noise_of_the_shapes_of_calibration() -> None:
    model = Closure().eval()
    sites, plan = planned(model)
    with pytest.raises(st.ProofError, match="calls layer 'a' of the original"):
        st.apply(model, sites, plan)
    known = st.find(model)
    unseen = st.select(st.tabulate(known, [st.WeightSVD()]), "parameters=70%")
    assert carry_out(model, known, unseen).notes == (NOT_RUN,)
    model = Choosy().eval()
    sites, plan = planned(model)
    assert carry_out(model, sites, plan).notes == (NOT_RUN,)
    words = nn.Sequential(nn.Embedding(30, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    sites = st.calibrate(words, st.find(words), [torch.randint(0, 30, (8, 12))])
    plan = st.select(st.tabulate(sites, [st.WeightSVD()]), "parameters=70%")
    assert carry_out(words, sites, plan).notes == ()


def test_a_plan_of_another_network_is_told_from_an_edited_one() -> None:
    plans = {width: planned(nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32))) for width in (48, 64)}
    wide = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    sites = st.calibrate(wide, st.find(wide), BATCHES)
    notes = carry_out(wide, sites, plans[48][1], BATCHES).notes
    assert "made for another network, in which '2' has 1,568 parameters and not 2,080" in notes[0]
    # Its choices cost what it says: what they are a share of does not.
    once = st.compress(wide, BATCHES, "macs=50%")
    again = st.compress(once.model, BATCHES, "macs=60%")
    assert not carry_out(once.model, again.sites, again.plan, BATCHES).notes
    done = carry_out(wide, sites, again.plan, BATCHES)
    assert re.search(r"the plan said [0-9,]+ parameters of its dense network, this one has 4,192", done.notes[0])
    assert "made for another network" in done.notes[0]
    assert remembered(done.model)[-1].dense_costs["macs"] == plans[64][1].dense_costs["macs"]


def test_what_cannot_be_run_and_what_counts_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two().eval()
    sites, plan = planned(model)

    def broken(change: Callable[[nn.Module], None]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("spectrim.application.carried.Traits.give", lambda traits, small: change(small))
            st.apply(model, sites, plan, BATCHES)

    with pytest.raises(st.ProofError, match=r"the compressed network holds 1[\d,]+ parameters where its plan counts"):
        broken(lambda small: small.register_parameter("more", nn.Parameter(torch.zeros(10000))))
    with pytest.raises(st.ProofError, match=r"the compressed Two cannot be run: TypeError.*'a', 'b'.*skip="):
        broken(lambda small: setattr(small.b, "forward", lambda: None))
    with pytest.raises(st.ProofError, match="the compressed network gives NaN"):
        broken(lambda small: small.b[1].weight.data.fill_(float("nan")))
    with pytest.raises(st.ProofError, match=r"layer 'b' was replaced, and is not called any more"):
        broken(lambda small: setattr(small, "forward", lambda x: small.a(x)[:, :32]))
    with pytest.raises(st.ProofError, match=r"takes [\d,]+ MACs a sample where its plan counts"):
        broken(lambda small: small.a.register_forward_hook(lambda m, args, y: y + m.weight.sum() * 0))


class AsksWhatItIs(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) * (2 if type(self.a) is nn.Linear else 1)


class CountsParts(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) * len(list(self.modules()))


class WalksItsModules(Two):
    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules():
            x = torch.tanh(module(x)) if isinstance(module, nn.Linear) else x
        return x


@pytest.mark.parametrize("method", [None, st.LowRankPlusSparse(densities=(0.0, 0.3), ranks=2, turns=4)])
def test_what_cannot_be_run_while_layers_are_replaced_is_told_as_such(method: st.Method | None) -> None:
    with pytest.raises(st.ProofError, match=r"the compressed WalksItsModules cannot be run: RuntimeError.*skip="):
        st.compress(WalksItsModules().eval(), BATCHES, st.Budget(macs=0.5), methods=method, sensitivity=False)


@pytest.mark.parametrize("kind", [AsksWhatItIs, CountsParts])
def test_a_network_that_asks_what_its_layers_are_is_refused(kind: type[Two]) -> None:
    with pytest.raises(st.ProofError, match=r"merged, the compressed \w+ computes something else .*skip="):
        st.compress(kind().eval(), BATCHES, st.Budget(macs=0.5))


def test_layers_that_are_dear_to_merge_are_merged_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_proof, "_SOON", 0.0)
    monkeypatch.setattr(merge_proof, "_MULTIPLIED", 0.0)
    merged: list[Any] = []
    original = merge_proof._Merged.of
    monkeypatch.setattr(merge_proof._Merged, "of", lambda *a: merged.append(original(*a)) or merged[-1])
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, 4, 1), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 30), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(30, 32)).eval()
    sites = st.calibrate(model, st.find(model, only=["2", "4", "6"]), [x[:, None] for x in BATCHES])
    plan = st.select(st.tabulate(sites), "parameters=30%")
    assert all(not entry.choice.is_dense for entry in plan)
    assert carry_out(model, sites, plan, [x[:, None] for x in BATCHES]).notes == ()
    (found,) = merged
    # Each was called for the one sample, and held against what stands for it.
    assert [len(part.gaps) for part in found.parts] == [1, 1, 1]


def test_hooks_that_change_answers_stay_and_are_no_fault() -> None:
    model = Two().eval()
    model.b.register_forward_hook(lambda module, args, output: F.relu(output))
    small = st.compress(model, BATCHES, st.Budget(macs=0.5)).model
    assert bool((small(BATCHES[0]) >= 0).all())


class Cast(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class CastsToFewBits(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.to(torch.bfloat16))))


@pytest.mark.parametrize("kind", [Two, CastsToFewBits])
def test_what_rounds_twice_is_no_fault(kind: type[Two], monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[torch.dtype] = []
    original = merge_proof._answers
    monkeypatch.setattr(
        merge_proof, "_answers", lambda *a: answers.append(next(a[0].parameters()).dtype) or original(*a)
    )
    result = st.compress(kind().eval().to(torch.bfloat16), [b.to(torch.bfloat16) for b in BATCHES], "macs=60%")
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert answers == [torch.float32, torch.bfloat16][: 1 + (kind is CastsToFewBits)]


def test_statistics_are_exact_where_the_network_casts() -> None:
    torch.manual_seed(0)
    model, plain = Cast().eval(), Two().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        model.a.bias[0] = plain.a.bias[0] = -100.0
    found, wanted = (st.calibrate(m, st.find(m), BATCHES)["a"].statistics.input for m in (model, plain))
    assert found is not None
    assert wanted is not None
    torch.testing.assert_close(found.covariance, wanted.covariance)
    assert st.compress(model, BATCHES, st.Budget(macs=0.5)).report.agreement is not None


def test_the_proof_costs_two_passes_of_one_batch() -> None:
    model = Two().eval()
    sites, plan = planned(model)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    st.apply(model, sites, plan, BATCHES, reconstruct=False, batchnorm=False)
    # The copy carries the hook along: it is tried on one sample, and the model twice, to see that it repeats itself;
    # then both networks on the batch; in the end the compressed one, as it is and merged, on one sample: again only
    # where these two differ.
    assert calls == [1, 1, 1, 64, 64, 1, 1]


def test_agreement_is_of_samples_held_out_and_counts_first_classes() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 10)).eval()
    same = agreement(dense, dense, BATCHES)
    assert same is not None
    assert (same.error, same.top1, same.samples, same.held_out) == (0.0, 1.0, 192, False)
    other = nn.Sequential(nn.Linear(32, 10)).eval()
    held = [torch.arange(64) % 8 == 0] * 3
    found = agreement(dense, other, BATCHES, held)
    part = torch.cat([batch[::8] for batch in BATCHES])
    wanted, given = dense(part).detach(), other(part).detach()
    assert found is not None
    assert (found.samples, found.held_out) == (24, True)
    assert found.error == pytest.approx(float((wanted - given).norm() / wanted.norm()), rel=1e-5)
    assert found.top1 == float((wanted.argmax(1) == given.argmax(1)).float().mean())
    images = nn.Sequential(nn.Linear(32, 12), nn.Unflatten(1, (3, 2, 2))).eval()
    assert agreement(images, images, BATCHES).top1 is None  # type: ignore[union-attr]


def test_the_report_tells_how_far_outputs_agree() -> None:
    result = st.compress(Two().eval(), BATCHES, st.Budget(macs=0.5))
    assert result.report.agreement is not None
    assert result.report.agreement.samples == result.report.held_out == 24
    assert "on 24 held-out calibration samples" in str(result.report)


def test_where_channels_went_samples_are_held_out_that_were_left_out_of_the_statistics() -> None:
    """By which what reads the channels that are left makes up for the others."""
    model = Two().eval()
    result = st.compress(model, BATCHES, "macs=70%", methods=st.PrincipalFilters())
    agreed = result.report.agreement
    assert agreed is not None
    assert agreed.held_out
    done = Applied(result.model, held=Split.of(BATCHES).held)
    for sampling in (Sampling(), Sampling(apart=Split.of(BATCHES).apart)):
        report = reported(model, result.model, result.sites, result.plan, done, BATCHES, sampling=sampling)
        told = report.agreement
        assert told is not None
        assert told.held_out == bool(sampling.apart)
        assert ("held-out" in str(told)) == told.held_out


class Clipped(Two):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.a.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class Averaged(Two):
    """Has its second layer follow the first in training."""

    def begin(self) -> None:
        self.other = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.other.parameters(), self.a.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
        return self.b(F.relu(self.a(x) + self.other(x)))


@pytest.mark.parametrize(("kind", "says"), [(Clipped, "writes into a layer's weight"), (Averaged, "it raises")])
def test_a_network_that_cannot_be_trained_any_more_says_so(kind: type[Two], says: str):
    model = kind().eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = st.compress(model, BATCHES, st.Budget(macs=0.9), only="a")
    (note,) = (note for note in result.report.notes if "cannot be trained as it is" in note)
    assert says in note
    assert "skip=" in note
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not result.model.training
    with pytest.raises((st.ReadOnlyWeightError, RuntimeError, ValueError)):
        result.model.train()(BATCHES[0])


def test_what_writes_into_weights_in_training_is_refused_before_ranks_are_learned():
    batches = [(x, torch.zeros(len(x), dtype=torch.long)) for x in BATCHES]
    with pytest.raises(st.CalibrationError, match=r"in training mode .*the weight of layer 'a'.*skip="):
        st.learn_ranks(Clipped(), batches, st.Budget(macs=0.6))


def test_what_is_dear_to_multiply_out_is_known_without_multiplying_it_out() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 24)).eval(), torch.randn(8, 3, 6, 6)
    small = st.compress(model, [x], "parameters=60%", methods=[st.ActivationSVD(multiple_of=1)]).model
    parts = stand_ins(small)
    assert parts
    with FlopCounterMode(display=False) as counter:
        assert merge_proof._shared_out(parts, 1e9) == (parts, {})
    assert counter.get_total_flops() == 0


class Picks(nn.Module):
    """Rows go on if what the first layer computes of them says so, as boxes do in a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = y[y[:, 0] > y[:, 1]]
        return self.last(self.second(y).relu()).mean(0, keepdim=True).expand(len(x), -1)


def test_layers_that_get_other_rows_than_in_the_dense_network_keep_their_factors():
    torch.manual_seed(0)
    model, x = Picks().eval(), torch.randn(256, 16) @ torch.randn(16, 32)
    result = st.compress(model, [x], budget="macs=30%", progress=False)
    assert any("picks them by what it computes: 'second'" in note for note in result.report.sentences)
    with torch.no_grad():
        y = model.first(x).relu()
        wanted, given = model.second(y), result.model.second(y)
    assert (given - wanted).norm() < 0.9 * (wanted - wanted.mean(0)).norm()


def test_the_file_of_an_edited_plan_says_what_its_choices_cost(tmp_path: Path) -> None:
    model = Two().eval()
    sites, plan = planned(model)
    thin = [
        dataclasses.replace(entry, choice=dataclasses.replace(entry.choice, rank=1))
        if isinstance(entry.choice, LowRankChoice)
        else entry
        for entry in plan
    ]
    edited = dataclasses.replace(plan, entries=tuple(thin))
    small = st.apply(model, sites, edited)
    st.save(small, edited, tmp_path / "small.safetensors")
    kept = read_plan(tmp_path / "small.safetensors")
    assert kept.costs["parameters"] == sum(p.numel() for p in small.parameters()) < plan.costs["parameters"]
    assert kept.costs["macs"] < plan.costs["macs"] == edited.costs["macs"]
    assert sum(e.costs["macs"] for e in kept) == kept.costs["macs"]
    assert kept.diff(edited) == ()
    assert same_weights(st.load(Two().eval(), tmp_path / "small.safetensors"), small)
    with pytest.raises(st.CheckpointError, match=r"not the one that the model was made by: '\w' is .*rank 1 there"):
        st.save(small, plan, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
