from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spectrim.nn.timing import measure_latency, peak_memory


class Recorder(nn.Module):
    """Writes down each call."""

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls, self.drop = name, calls, nn.Dropout()

    def forward(self, x, scale=1.0):
        self.calls.append((self.name, self.training, self.drop.training, torch.is_inference_mode_enabled(), scale))
        return x * scale


def test_models_take_turns_in_evaluation_and_inference_mode():
    calls = []
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
    # In the other order every second time.
    assert [call[0] for call in calls] == list("abccba") * 3
    assert all(call[1:4] == (False, False, True) for call in calls)
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
    calls = []
    measure_latency({"model": Recorder("m", calls)}, example, repeats=1, warmup=0)
    assert calls == [("m", False, False, True, 3.0)]


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
