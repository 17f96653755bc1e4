"""Networks as strangers write them: what the table of situations (benchmarks/situations.py) found, and its quickest."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import spectrim as st
from spectrim.nn.agreement import agreement

BATCHES = [torch.randn(48, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Inference(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().forward(x)


class ScriptedPart(Two):
    def __init__(self) -> None:
        super().__init__()
        self.c: Any = torch.jit.script(nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.c(x))


@pytest.mark.parametrize("kind", [Inference, ScriptedPart])
def test_inference_mode_of_the_models_own_and_scripted_parts_are_no_obstacle(kind: type[Two]) -> None:
    torch.manual_seed(0)
    model = kind()
    result = st.compress(model, BATCHES, st.Budget(parameters=0.7))
    assert result.plan.ratio("parameters") > 1.4
    with torch.no_grad():
        wanted, given = model.eval()(BATCHES[0]), result.model.eval()(BATCHES[0])
    assert 0 < float((wanted - given).norm() / wanted.norm()) < 0.9


def test_a_spectral_norm_in_training_is_not_moved_by_looking_at_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 64))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = st.compress(model, BATCHES, st.Budget(macs=0.8))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(
        torch.equal(t, before[name]) for name, t in result.model.state_dict().items() if name in before and "0." in name
    )
    assert model.training
    assert model[0].parametrizations.weight.training


class WavesOneByOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 24, 3, padding=1), nn.Conv1d(24, 24, 3, padding=1)

    def forward(self, waves: list[Tensor]) -> Tensor:
        return torch.cat([F.relu(self.b(F.relu(self.a(wave[None])))).mean(2) for wave in waves])


def test_inputs_of_other_sizes_are_counted_at_mean_sides_which_is_no_fault() -> None:
    batches = [[torch.randn(3, length) for length in (6, 7, 6, 7)] for _ in range(2)]
    torch.manual_seed(0)
    sites = st.calibrate(model := WavesOneByOne(), st.find(model), batches)
    # 6.5 times are counted as 6, and what goes at those.
    assert sites["b"].spec.inputs == ((6,),)
    result = st.compress(model, batches, st.Budget(macs=0.4), reconstruct=False)
    assert result.plan.ratio("macs") > 2
    assert result.model(batches[0]).shape == (4, 24)


def test_weights_made_in_inference_mode_are_refused_before_the_work(tmp_path: Path) -> None:
    result = st.compress(Two(), BATCHES, st.Budget(macs=0.8))
    st.save(result, tmp_path / "small.safetensors")
    with torch.inference_mode():
        made = Two()
    for verb in (lambda: st.compress(made, BATCHES, "macs=80%"), lambda: st.load(made, tmp_path / "small.safetensors")):
        with pytest.raises(st.UnsupportedLayerError, match=r"'a.weight' .*inference_mode.*copy.deepcopy"):
            verb()
    assert st.compress(copy.deepcopy(made), BATCHES, "macs=80%").plan.ratio("macs") > 1.2


@pytest.mark.filterwarnings("ignore")
def test_what_no_file_could_hold_afterwards_is_refused_before_the_work() -> None:
    if not {"fbgemm", "qnnpack", "x86"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("no quantised kernels on this machine")
    model = nn.Sequential(Two(), torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(32, 8)), {nn.LSTM})[0])
    with pytest.raises(st.CheckpointError, match=r"state '1\..*compress the network before it is quantised"):
        st.compress(model, BATCHES, st.Budget(macs=0.8))


class OutOfReach(Two):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(x > 0, -torch.inf)


class SparseAnswers(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x)).to_sparse()


class OneBias(Two):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(32, 64)
        self.c.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x) + self.c(x)))


@pytest.mark.parametrize("kind", [OutOfReach, SparseAnswers, OneBias])
def test_outputs_without_a_chance_sparse_ones_and_shared_biases_are_compared_and_counted(kind: type[Two]) -> None:
    torch.manual_seed(0)
    result = st.compress(kind(), BATCHES, "macs=85%")
    agreed = result.report.agreement
    assert agreed is not None
    assert 0 < agreed.error < 1
    assert result.plan.costs["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert st.compress(kind(), BATCHES, "macs=100%").plan.ratio("macs") == 1


@pytest.mark.parametrize("kind", [OutOfReach, SparseAnswers])
def test_filters_go_from_in_front_of_outputs_without_a_chance(kind: type[Two]) -> None:
    torch.manual_seed(0)
    result = st.compress(kind(), BATCHES, "macs=80%", methods=st.PrincipalFilters())
    assert [entry.choice.is_dense for entry in result.plan if entry.of_channels] == [False]


class OfEightBits(Two):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.randn(32, 32).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(x), self.c.float())


def test_filters_go_from_beside_parts_of_eight_bits() -> None:
    torch.manual_seed(0)
    result = st.compress(model := OfEightBits(), BATCHES, "macs=90%", methods=st.PrincipalFilters())
    assert torch.equal(result.model.c.view(torch.uint8), model.c.view(torch.uint8))  # type: ignore[operator, arg-type]
    assert result.plan.ratio("macs") > 1.1


class CopiesNothing(Two):
    def __deepcopy__(self, memo: Any) -> CopiesNothing:
        return self


class Yields(Two):
    def forward(self, x: Tensor) -> Any:
        yield super().forward(x)


@pytest.mark.parametrize(
    ("kind", "said"), [(CopiesNothing, r"'a'.*mend its __deepcopy__"), (Yields, "yields.*forward=")]
)
@pytest.mark.parametrize("methods", [None, st.PrincipalFilters()])
def test_what_copies_nothing_or_yields_is_refused_and_left_as_it_is(kind: type[Two], said: str, methods: Any) -> None:
    model = kind()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(st.SpectrimError, match=said):
        st.compress(model, BATCHES, "macs=60%", methods=methods)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_network_chosen_by_few_samples_is_said_to_be_a_guess() -> None:
    notes = st.compress(Two(), [BATCHES[0][:2]], "macs=60%").report.notes
    assert any("2 calibration samples are too few" in note and "a hundred" in note for note in notes)


def test_samples_that_repeat_are_told_and_no_share_of_what_does_not_vary() -> None:
    report = st.compress(Two(), [BATCHES[0][:1].expand(64, *BATCHES[0].shape[1:])] * 2, "macs=60%").report
    assert any(note.startswith("among 128 calibration samples there are only 1 different") for note in report.notes)
    assert all(fit.fitted <= 1.5 and (fit.held_out or 0) <= 1.5 for fit in report.fits.values())
    assert not any("different ones" in note for note in st.compress(Two(), BATCHES, "macs=60%").report.notes)


def test_a_sample_that_outweighs_all_others_is_told() -> None:
    said = "1.0 of 96 calibration samples have nearly all of the energy"
    assert any(note.startswith(said) for note in st.compress(Two(), _one_louder(1e6), "macs=60%").report.notes)
    assert not any("energy" in note for note in st.compress(Two(), _one_louder(2.0), "macs=60%").report.notes)


def test_a_network_in_training_mode_is_told_where_it_answers_otherwise() -> None:
    model = nn.Sequential(Two(), nn.Dropout(0.5))
    for mode in (True, False):
        result = st.compress(model.train(mode), BATCHES, "macs=60%")
        assert result.model.training == mode
        assert any("result.model.eval()" in note for note in result.report.notes) == mode


def _one_louder(times: float) -> list[Tensor]:
    first = BATCHES[0].clone()
    first[5] *= times
    return [first, BATCHES[1]]


def test_what_has_no_values_is_refused_before_the_work() -> None:
    model = Two()
    model.c = nn.Linear(32, 32, device="meta")
    with pytest.raises(
        st.CalibrationError, match=r"Two's weight 'c.weight' is on the meta device and has no numbers: load them first"
    ):
        st.compress(model, BATCHES, "macs=80%")


@pytest.mark.parametrize(
    "run",
    [
        lambda model: st.compress(model, BATCHES, "macs=80%"),
        lambda model: st.compress(model, BATCHES, "macs=80%", methods="auto"),
        lambda model: st.calibrate(model, st.find(model), BATCHES),
        lambda model: st.sensitivity(model, st.find(model), BATCHES),
        lambda model: st.learn_ranks(model, [(x, x) for x in BATCHES], "macs=80%", loss=F.mse_loss),
        lambda model: st.budget_path(model, [(x, x) for x in BATCHES], ["macs=80%"], loss=F.mse_loss),
        lambda model: st.sweep(model, BATCHES, ["macs=80%"]),
    ],
    ids=["compress", "auto", "calibrate", "sensitivity", "learn_ranks", "budget_path", "sweep"],
)
def test_a_model_without_numbers_is_told_to_be_loaded(run: Any) -> None:
    with pytest.raises(st.CalibrationError, match=r"'a.weight' is on the meta device and has no numbers: load them"):
        run(Two().to("meta"))
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32))
    model[1].running_mean = torch.zeros(32, device="meta")
    with pytest.raises(st.CalibrationError, match=r"Sequential's buffer '1.running_mean' is on the meta device"):
        run(model)


class Unanswered(Two):
    """Cannot say yet what it will have, in names that the library asks for too."""

    def _fail(self) -> Any:
        raise ValueError("not before the first epoch")

    mask = pattern = layer = batch_first = reads_weights = qkv = property(_fail)


def test_what_a_module_fails_to_answer_it_has_not() -> None:
    torch.manual_seed(0)
    assert st.compress(Unanswered(), BATCHES, "macs=80%").plan.ratio("macs") > 1.2


@dataclasses.dataclass
class Record:
    x: Tensor
    scale: Tensor | None = None
    ids: list[int] = dataclasses.field(default_factory=list)


class TakesRecord(Two):
    def forward(self, record: Record) -> Tensor:  # type: ignore[override]
        return super().forward(record.x)


class TakesFields(Two):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


@pytest.mark.parametrize("kind", [TakesRecord, TakesFields])
def test_records_are_given_whole_or_by_their_fields(kind: type[Two]) -> None:
    torch.manual_seed(0)
    batches = [Record(x, torch.ones(48, 1) if kind is TakesFields else None) for x in BATCHES]
    model = kind()
    sites = st.calibrate(model, st.find(model), batches)
    plain = Two()
    plain.load_state_dict(model.state_dict())
    wanted = st.calibrate(plain, st.find(plain), BATCHES)
    assert sites.samples == wanted.samples == 96
    assert all(
        torch.equal(a.statistics.input.mean, b.statistics.input.mean) for a, b in zip(sites, wanted, strict=True)
    )


class NestedOutput(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor(list(super().forward(x)), layout=torch.jagged)


def test_nested_outputs_are_compared_padded() -> None:
    torch.manual_seed(0)
    result = st.compress(NestedOutput(), BATCHES, "macs=80%")
    assert result.report.agreement is not None
    assert 0 < float(result.report.agreement.error) < 1


@pytest.mark.parametrize("method", [st.ActivationSVD(), st.PrincipalFilters()])
def test_hooks_of_backward_passes_are_no_reason_for_a_warning_of_torch(method: st.Method) -> None:
    torch.manual_seed(0)
    model = Two()
    gradients: list[Any] = []
    model.a.register_full_backward_hook(lambda *given: gradients.append(given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert st.compress(model, BATCHES, "macs=80%", methods=method).plan.changed


LABELS = torch.arange(48) % 32


class Labelled(Two):
    """Beside its answers it gives a loss, of another size, where it is given labels."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        y = super().forward(x)
        return {"loss": None if labels is None else F.cross_entropy(y, labels), "logits": y}


def test_a_loss_beside_the_answers_hides_no_difference_of_theirs() -> None:
    torch.manual_seed(0)
    dense = Labelled()
    small = st.compress(dense, [{"x": batch} for batch in BATCHES], "macs=80%").model
    told = [agreement(dense, small, [{"x": x, **labels} for x in BATCHES]) for labels in ({}, {"labels": LABELS})]
    plain = agreement(dense, small, BATCHES, forward=lambda model, batch: model(batch)["logits"])
    assert plain is not None
    assert plain.top1 is not None
    assert told == [plain, plain]


class UntilItStays(nn.Module):
    """A layer is called until what it gives no longer changes, which is sooner in another network."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.o = nn.Linear(48, 48), nn.Linear(32, 48), nn.Linear(48, 4)
        nn.init.normal_(self.w.weight, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.u(x), torch.zeros(())
        for _ in range(30):
            z, before = torch.tanh(self.w(z.expand(u.shape)) + u), z
            if (z - before).norm() < 1e-4 * z.norm():
                break
        return self.o(z)


def test_layers_that_are_called_until_it_converges_are_compressed_again_with_a_note() -> None:
    torch.manual_seed(0)
    every = [st.PrincipalFilters(), st.ActivationSVD()]
    first = st.compress(UntilItStays(), BATCHES, "macs=60%", methods=every)
    again = st.compress(first.model, BATCHES, "macs=80%", methods=every)
    assert again.plan.ratio("macs") > 1.2
    notes = [note for result in (first, again) for note in result.report.notes if "another number of times" in note]
    assert notes
    for note in notes:
        assert re.search(r"'w\S*'\. A sample of this batch takes [\d,]+ MACs$", note), note


class TwoTasks(nn.Module):
    """Places in pixels beside scores, each behind a branch of its own."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.left, self.right = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.places, self.scores, self.unit = nn.Linear(64, 4), nn.Linear(64, 8), unit

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.trunk(x))
        return {"places": self.places(F.relu(self.left(x))) * self.unit, "scores": self.scores(F.relu(self.right(x)))}


def test_outputs_count_alike_in_any_unit_and_the_worst_is_told() -> None:
    results = {unit: st.compress(TwoTasks(unit).eval(), BATCHES, "macs=50%") for unit in (1.0, 1024.0)}
    choices = [[(entry.site, entry.choice) for entry in result.plan] for result in results.values()]
    assert choices[0] == choices[1]
    for unit, result in results.items():
        told = st.agreement(dense := TwoTasks(unit).eval(), result.model, BATCHES)
        assert told is not None
        assert told.worst is not None
        x = torch.cat(BATCHES)
        with torch.no_grad():
            wanted, given = dense(x), result.model(x)
        off = [float((wanted[name] - given[name]).norm() / wanted[name].norm()) for name in wanted]
        assert told.worst == pytest.approx(max(off), rel=1e-4)
        assert min(off) <= told.error <= told.worst + 1e-9
        assert f"one of several by {told.worst:.2%}" in str(told)
