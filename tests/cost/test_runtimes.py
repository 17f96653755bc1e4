from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.cost import chains, runtimes
from spectrim.cost.chains import calls, describe
from spectrim.cost.latency import Latency
from spectrim.cost.runtimes import RUNTIMES, Runtime, register, runtime_of
from spectrim.errors import ExportError
from spectrim.linalg.unfold import unfolding
from spectrim.network.layer import LayerSpec
from spectrim.network.structure import Addend, Chain
from spectrim.nn.timing import measure_latency, ready

CONV = LayerSpec(("conv",), 6, 4, (3, 3), padding=(1, 1), stride=(1, 1), dilation=(1, 1), output_padding=(0, 0),
                 padding_mode="zeros", inputs=((5, 5),))  # fmt: skip
LINEAR = LayerSpec(("head",), 6, 4, inputs=((3,),))


class Twice(Runtime):
    """Runs a module two times over, and counts what it was asked to run."""

    name = "twice"
    asked: list[nn.Module] = []  # noqa: RUF012 (shared on purpose)

    def ready(self, module, args, kwargs):
        self.asked.append(module)
        assert not module.training
        assert torch.is_inference_mode_enabled()

        def run(*args, **kwargs):
            module(*args, **kwargs)
            return module(*args, **kwargs)

        return run


class Nameless(Runtime):
    def ready(self, module, args, kwargs):
        return module


@pytest.fixture
def twice():
    Twice.asked.clear()
    return Twice()


def fake(chains, **options):
    return [float(len(describe(chain))) for chain in chains]


def latency(**options):
    return Latency(**{"cache": None, "threads": 1, "timer": fake, **options})


def test_eager_times_are_kept_where_they_were_before_there_were_others(tmp_path):
    facts = latency(cache=tmp_path).facts()
    assert "runtime" not in facts
    assert latency(cache=tmp_path, runtime="eager").path == latency(cache=tmp_path).path


def test_each_runtime_has_times_of_its_own(tmp_path, twice):
    times = {name: latency(cache=tmp_path, runtime=name) for name in (*RUNTIMES, twice)}
    assert len({each.path for each in times.values()}) == len(times) == 4
    for name, each in times.items():
        each([CONV])
        facts = json.loads(each.path.read_text())["facts"]
        assert facts == each.facts()
        assert facts.get("runtime", "eager") == runtime_of(name).name


def test_a_runtime_is_meant_by_its_name_once_it_is_registered(twice, monkeypatch):
    monkeypatch.setattr(runtimes, "RUNTIMES", dict(RUNTIMES))
    with pytest.raises(ValueError, match="runtime 'twice' is not known: give one of eager, compile, onnxruntime"):
        latency(runtime="twice")
    assert register(twice) is twice
    assert latency(runtime="twice").runs is twice

    class Other(Twice):
        pass

    with pytest.raises(ValueError, match="'twice' already"):
        register(Other())


def test_what_is_no_runtime_is_quoted():
    with pytest.raises(TypeError, match="runtime is 3: expected one of eager"):
        latency(runtime=3)
    for take in (register, lambda runtime: latency(runtime=runtime)):
        with pytest.raises(TypeError, match=r"runtime is the class Twice.*: write Twice\(\)"):
            take(Twice)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="the runtime Nameless has no name .*: write name = 'mine' in the class"):
            take(Nameless())


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (None, "ready of the runtime 'twice' returned None: return a function that is called with the inputs"),
        (lambda: 0, r"returned a function of \(\), which does not take the inputs \(too many positional arguments\)"),
    ],
)
def test_what_cannot_be_called_with_the_inputs_is_refused(twice, monkeypatch, run, said):
    monkeypatch.setattr(Twice, "ready", lambda self, module, args, kwargs: run)
    with pytest.raises(TypeError, match=said):
        measure_latency({"dense": nn.Linear(2, 2)}, torch.zeros(1, 2), runtime=twice)
    (chain,) = calls([LINEAR])
    with pytest.raises(TypeError, match=said):
        twice.ways(chain, chains.number_pool([chain], torch.float32, "cpu", 1), 1, False)


@pytest.mark.parametrize("missing", ["onnxruntime", "onnx", "onnxscript"])
def test_a_missing_package_is_said_at_the_door_with_its_cure(monkeypatch, missing):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ImportError, match=rf"needs {missing}: pip install 'spectrim\[export\]'"):
        latency(runtime="onnxruntime")


def test_a_missing_compiler_is_said_at_the_door_with_its_cure(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(runtimes.sys, "platform", "linux")
    with pytest.raises(ImportError, match=r"needs a C\+\+ compiler, and there is no no-such-compiler: install one"):
        latency(runtime="compile")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"device": "cuda"}, "device is 'cuda': write device='cpu'"),
        ({"dtype": torch.bfloat16}, "takes no torch.bfloat16: convert the model"),
        ({"memory_format": "channels_last"}, "leave memory_format out"),
    ],
)
def test_what_onnx_runtime_cannot_run_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        latency(runtime="onnxruntime", **wrong)


def test_layers_are_run_by_the_runtime_and_a_sum_is_added(twice):
    (pair,) = calls(LINEAR.factor(unfolding((), "channel"), 2))
    pool = chains.number_pool([pair], torch.float32, "cpu", 2)
    with torch.inference_mode():
        for chain in (pair, Addend(pair.specs)):
            (run,) = twice.ways(chain, pool, 2, False)
            torch.testing.assert_close(run(), chains.dense_run(pair, pool, 2, False)())
            assert run.chill is not None
            assert run.chill().shape == ()
    assert len(twice.asked) == 2
    assert latency(runtime=twice, timer=chains.measure, rounds=1)([LINEAR]) > 0
    assert len(twice.asked) == 3


def test_compiled_layers_are_timed_by_the_dense_kernels_alone():
    sparse = dataclasses.replace(LINEAR, density=0.1)
    pool = chains.number_pool([Chain((sparse,))], torch.float32, "cpu", 1)
    with torch.inference_mode():
        assert len(RUNTIMES["eager"].ways(Chain((sparse,)), pool, 1, False)) == 2
        assert len(RUNTIMES["compile"].ways(Chain((sparse,)), pool, 1, False)) == 1


@pytest.mark.table
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("spec", [CONV, dataclasses.replace(CONV, kernel=(3, 4), padding="same"), LINEAR])
def test_onnx_runtime_computes_what_torch_does(spec, mode):
    pytest.importorskip("onnxruntime")
    spec = spec if spec.is_linear else dataclasses.replace(spec, padding_mode=mode)
    chain = Addend((spec,)) if mode == "reflect" else Chain((spec,))
    pool = chains.number_pool([chain], torch.float32, "cpu", 2)
    with torch.inference_mode():
        layers, inputs = chains.random_layers(chain, pool, 2, False)
        (run,) = RUNTIMES["onnxruntime"].ways(chain, pool, 2, False)
        torch.testing.assert_close(torch.from_numpy(run()[0]), layers(*inputs))


# --- networks


def test_networks_are_timed_by_the_runtime(twice):
    model = nn.Linear(3, 2).train()
    timings = measure_latency({"a": model, "b": nn.Identity()}, torch.ones(1, 3), repeats=2, warmup=0, runtime=twice)
    assert twice.asked[0] is model
    assert len(twice.asked) == 2
    assert model.training
    assert set(timings) == {"a", "b"}


class Refuses(Twice):
    name = "refuses"

    def ready(self, module, args, kwargs):
        raise RuntimeError("this graph has a loop.\n  and a long trace\n")


def test_a_network_that_does_not_compile_is_refused_in_a_sentence_before_the_work(monkeypatch):
    said = "Linear cannot be run by refuses .RuntimeError: this graph has a loop.: choose another runtime"
    with pytest.raises(ExportError, match=said) as refused:
        ready(nn.Linear(3, 2), torch.ones(1, 3), Refuses())
    assert "\n" not in str(refused.value)
    monkeypatch.setattr("spectrim.preparation.calibrated_and_weighed", lambda *_, **__: pytest.fail("calibrated"))
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(ExportError, match="Sequential cannot be run by refuses"):
        st.compress(model, [torch.randn(8, 6)], "macs=50%", latency=latency(runtime=Refuses()), guard=True)


def test_the_report_names_what_ran_beside_the_milliseconds(twice):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    result = st.compress(model, [torch.randn(32, 16)], "macs=80%", latency=latency(runtime=twice))
    assert result.report.runtime == "twice"
    assert "measured ms, twice" in str(result.report)
    assert result.plan.facts["runtime"] == "twice"
    plain = st.compress(model, [torch.randn(32, 16)], "macs=80%", latency=latency())
    assert "measured ms, eager" in str(plain.report)
    compared = st.compare(model, result.model, torch.ones(1, 16), repeats=1, runtime=twice)
    assert compared.facts["runtime"] == "twice"
    assert "latency p50, twice" in str(compared)
    assert "latency p50" in compared


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNTIMES)
def test_the_real_thing(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x, scale=None):
            y = self.second(self.first(x).relu().mean((2, 3)))
            return {"y": y if scale is None else y * scale}

    model, x = Net().eval(), {"x": torch.randn(2, 3, 8, 8), "scale": torch.ones(1)}
    run = ready(model, x, name)
    with torch.inference_mode():
        given = run(**x)
    value = given["y"] if isinstance(given, dict) else torch.from_numpy(given[0])
    torch.testing.assert_close(value, model(**x)["y"], rtol=1e-4, atol=1e-5)
    # More of one class than torch keeps compiled at a time.
    timings = measure_latency({str(n): Net() for n in range(3)}, x, repeats=3, threads=1, runtime=name)
    assert all(timing.p50 > 0 for timing in timings.values())
