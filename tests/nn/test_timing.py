from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.nn.sparse.kernels import choose_kernels
from spectrim.nn.timing import measure_latency, peak_memory
from spectrim.report.measures import accuracy, counted_macs
from tests.cases import Seen


class Recorder(nn.Module):
    """Writes down each call."""

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls, self.drop = name, calls, nn.Dropout()

    def forward(self, x, scale=1.0):
        self.calls.entries.append(
            (self.name, self.training, self.drop.training, torch.is_inference_mode_enabled(), scale)
        )
        return x * scale


def test_models_take_turns_in_evaluation_and_inference_mode():
    calls = Seen()
    models = {name: Recorder(name, calls) for name in "abc"}
    models["a"].train()
    models["b"].eval()
    models["c"].train()
    models["c"].drop.eval()
    modes = [[m.training for m in model.modules()] for model in models.values()]
    progress = []
    timings = measure_latency(
        models, torch.ones(3), repeats=4, warmup=2, progress=lambda n, total: progress.append((n, total))
    )
    # Each once to see what it writes; then in the other order every second time.
    assert [call[0] for call in calls.entries] == [*"abc", *"abccba" * 3]
    assert all(call[1:4] == (False, False, number > 2) for number, call in enumerate(calls.entries))
    assert [[m.training for m in model.modules()] for model in models.values()] == modes
    assert set(timings) == set("abc")
    assert all(len(t.samples) == len(t.preempted) == 4 and min(t.samples) > 0 for t in timings.values())
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_modes_and_threads_are_restored_after_an_error():
    model = nn.Linear(3, 2).train()
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency({"model": model}, torch.ones(1, 4), threads=1)
    assert model.training
    assert torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("example", [(torch.ones(2), 3.0), [torch.ones(2), 3.0], {"x": torch.ones(2), "scale": 3.0}])
def test_examples_of_all_kinds(example):
    calls = Seen()
    measure_latency({"model": Recorder("m", calls)}, example, repeats=1, warmup=0)
    assert [call[-1] for call in calls.entries] == [3.0, 3.0]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(TypeError, match="str"):
        measure_latency({"model": nn.Identity()}, "text")
    with pytest.raises(ValueError, match="0 models"):
        measure_latency({}, torch.ones(1))
    with pytest.raises(ValueError, match="repeats=0"):
        measure_latency({"model": nn.Identity()}, torch.ones(1), repeats=0)


MEGABYTE = 2**20


@pytest.mark.parametrize(
    ("model", "peak"),
    [
        (nn.Sequential(nn.ReLU()), MEGABYTE),
        (nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True)), MEGABYTE),
        (nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), 2 * MEGABYTE),
        (nn.Sequential(nn.ReLU(), nn.Flatten(0), nn.Unflatten(0, (-1, 2)), nn.ReLU()), 2 * MEGABYTE),
    ],
)
def test_peak_memory_is_what_is_alive_at_once(model, peak):
    assert peak_memory(model, torch.ones(1, MEGABYTE // 4)) == peak


def test_peak_memory_leaves_the_model_as_it_was_and_itself_out(capfd):
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Dropout()).train()
    state = copy.deepcopy(model.state_dict())
    peak = peak_memory(model, torch.ones(1, 1000))
    assert 4000 <= peak < 100_000  # the weight has 4 MB
    assert model.training
    assert model[1].training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert capfd.readouterr() == ("", "")


class Writes(nn.Module):
    """Writes into weights, buffers and attributes in every pass, and keeps what it made in the first one."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 32, max_norm=0.1)
        self.slow = nn.Parameter(torch.ones(32), requires_grad=False)
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("mean", torch.zeros(32))
        self.passes, self.seen, self.made = 0, None, None
        self.lengths = Seen()

    def forward(self, ids):
        self.passes += 1
        x = self.words(ids)
        self.mean.lerp_(x.mean((0, 1)), 0.1)
        self.slow.data.mul_(1.1)
        self.seen = x if self.seen is None else torch.cat([self.seen, x], 1)
        self.lengths.entries.append(self.seen.shape[1])
        if self.made is None:
            self.made = torch.arange(32.0)
        return self.b(torch.relu(self.a(x))) + self.slow + self.made


IDS = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "run",
    [
        lambda model: measure_latency({"model": model, "again": model}, IDS, repeats=2, warmup=1),
        lambda model: peak_memory(model, IDS),
        lambda model: choose_kernels(model, IDS, rounds=1),
        lambda model: counted_macs(model, IDS),
        lambda model: accuracy(model, [(IDS, torch.zeros(4, 5, dtype=torch.long))] * 2),
        lambda model: st.export_program(model, IDS, "program.pt2", dynamic_batch=False, tolerance=1e9),
        lambda model: st.compress(
            model, [IDS], "macs=70%", methods=st.WeightSVD(multiple_of=16), guard=True, sensitivity=False
        ),
    ],
)
def test_what_passes_write_into_a_model_is_gone_after_they_were_timed_or_counted(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Writes().train()
    before = copy.deepcopy(model.state_dict())
    # Nothing is faster here, and exporters may not write into attributes: both are known after passes.
    with contextlib.suppress(st.SlowerError, st.InfeasibleBudgetError, st.ExportError):
        run(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert (model.passes, model.seen, model.made, model.training) == (0, None, None, True)


def test_every_timed_pass_finds_the_same():
    model = Writes()
    measure_latency({"model": model}, IDS, repeats=3, warmup=1)
    # The first makes what stays; what grows is as long in all that are timed.
    assert model.lengths.entries == [5, 10, 10, 10, 10, 10]
