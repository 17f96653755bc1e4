"""Models that keep things on themselves, write into their inputs, cut gradients, or are watched by two threads."""

from __future__ import annotations

import functools
import os
import threading
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spectrim as st
from spectrim.nn.channels.narrow import narrow
from spectrim.nn.copying import copy_model
from spectrim.nn.watch.sensitivity import weighed
from spectrim.nn.watch.state import ALONE, State, evaluating, kept
from spectrim.selection import integer

X = [torch.randn(48, 16, generator=torch.Generator().manual_seed(n)) for n in range(2)]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = F.relu(self.a(x))
        return self.c(F.relu(self.b(skip)) + skip)


class KeepsSkip(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.skip = F.relu(self.a(x))
        h = F.relu(self.b(self.skip))
        return self.c(h + self.skip)


class KeepsList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.features.clear()
        self.features.append(F.relu(self.a(x)))
        self.features.append(F.relu(self.b(self.features[0])))
        return self.c(self.features[0] + self.features[1])


class KeepsBuffer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = F.relu(self.a(x))
        self.mean.mul_(0.9).add_(skip.mean(0))
        return self.c(F.relu(self.b(skip)) + skip + 0 * self.mean)


class WritesInput(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.sub_(0.5).mul_(2.0))


class WritesNothing(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.sub(0.5).mul(2.0))


class WritesHead(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x).sigmoid()
        y[:, :2] = y[:, :2] * 2 - 0.5
        return y


class WritesHeadNot(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x).sigmoid()
        return torch.cat([y[:, :2] * 2 - 0.5, y[:, 2:]], 1)


class CutsGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:  # type: ignore[override]
        return None


class Cut(Plain):
    """No gradient comes through to the first layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "function":
            skip = CutsGradients.apply(F.relu(self.a(x)))
        elif self.how == "inference":
            with torch.inference_mode():
                skip = F.relu(self.a(x))
        else:
            skip = F.relu(self.a(x)).detach()
        return self.c(F.relu(self.b(skip)) + skip)


def twin(kind: type[Plain], like: Plain) -> Plain:
    model = kind()
    model.load_state_dict(like.state_dict(), strict=False)
    return model.eval()


def graphs(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        for value in (*vars(module).values(), *module._buffers.values())
        for tensor in (value if isinstance(value, list | tuple) else [value])
        if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None
    ]


@functools.cache
def compressed(methods: Any = None) -> tuple[Plain, st.Result]:
    """A plain network, and what becomes of it."""
    torch.manual_seed(0)
    plain = Plain().eval()
    return plain, st.compress(plain, X, "macs=60%", methods=methods)


@pytest.mark.parametrize("kind", [KeepsSkip, KeepsList, KeepsBuffer])
def test_what_passes_keep_on_the_model_is_each_pass_s_own(kind: type[Plain]) -> None:
    plain, wanted = compressed()
    model = twin(kind, plain)
    before = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    result = st.compress(model, X, "macs=60%")
    assert torch.allclose(result.model(X[0].clone()), wanted.model(X[0]), atol=1e-5)
    assert [entry.choice for entry in result.plan] == [entry.choice for entry in wanted.plan]
    assert not graphs(model)
    assert {key: value for key, value in vars(model).items() if not key.startswith("_")} == before
    assert all(float(buffer.abs().sum()) == 0 for buffer in model.buffers())


def test_a_model_that_comes_with_a_graph_is_copied_without_it() -> None:
    model = KeepsSkip()
    model(X[0])
    model.a.register_forward_hook(functools.partial(lambda kept, *_: None, model.skip * 2))
    small = st.compress(model, X, "macs=60%").model
    assert not graphs(small)
    assert model.skip.grad_fn is not None
    assert torch.equal(copy_model(model).skip, model.skip)


@pytest.mark.parametrize("forward", [None, lambda model, batch: model(batch)])
def test_a_model_that_writes_into_its_input_is_compressed_like_one_that_does_not(forward: Any) -> None:
    data = [torch.rand(48, 16) for _ in range(3)]
    held = [part.clone() for part in data]
    quiet = WritesNothing().eval()
    small, other = (
        st.compress(each, data, "macs=60%", forward=forward).model for each in (twin(WritesInput, quiet), quiet)
    )
    assert all(torch.equal(a, b) for a, b in zip(data, held, strict=True))
    assert torch.equal(small(held[0].clone()), other(held[0]))


def test_timing_gives_every_run_its_own_input() -> None:
    from spectrim.nn.timing import measure_latency

    x = torch.rand(4, 16)
    held = x.clone()
    measure_latency({"one": WritesInput(), "two": WritesInput()}, x, repeats=2, warmup=1)
    assert torch.equal(x, held)


def test_training_leaves_the_batches_as_they_are() -> None:
    data = [(part.clone(), torch.zeros(48, dtype=torch.long)) for part in X]
    st.fine_tune(WritesInput(), data, teacher=WritesInput(), epochs=1)
    assert all(torch.equal(part, held) for (part, _), held in zip(data, X, strict=True))


def test_a_head_that_writes_in_place_has_the_gradients_of_one_that_does_not() -> None:
    quiet = WritesHeadNot().eval()
    model = twin(WritesHead, quiet)
    found, wanted = (st.sensitivity(each, st.find(each), X) for each in (model, quiet))
    for layer in wanted:
        there = found[layer.name].statistics.gradient
        assert torch.allclose(there.second_moment, layer.statistics.gradient.second_moment, rtol=1e-4)
    assert st.compress(model, X, "macs=60%").plan.ratio("macs") >= 1 / 0.6


@pytest.mark.parametrize("how", ["function", "inference", "detach"])
def test_layers_that_no_gradient_reaches_count_as_the_others_do(how: str) -> None:
    model = Cut(how).eval()
    result = st.compress(model, X, "macs=60%")
    assert any("'a'" in note and "not weighed by gradients" in note for note in result.report.notes)
    gradient = result.sites["a"].statistics.gradient.second_moment[0]
    assert torch.allclose(gradient, gradient[0, 0] * torch.eye(len(gradient)).double())

    def loss(name: str) -> float:
        layer = result.sites[name]
        weight = layer.weight.double()[0]
        covariance = weight @ layer.statistics.input.covariance[0] @ weight.T
        return float((covariance * layer.statistics.gradient.second_moment[0]).sum())

    # Losing the whole of it matters as much as at the others, in the median.
    assert loss("a") == pytest.approx((loss("b") + loss("c")) / 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["raises", "argmax", "zero", "inference"])
def test_without_any_gradient_errors_are_not_weighed_and_the_report_says_why(kind: str) -> None:
    class Raising(CutsGradients):
        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> None:  # type: ignore[override]
            raise NotImplementedError("no way back")

    class Model(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if kind == "inference":
                with torch.inference_mode():
                    return super().forward(x)
            y = super().forward(x)
            return {"raises": Raising.apply, "argmax": lambda y: y.argmax(-1), "zero": lambda y: y[y[:, 0] > 1e3]}[
                kind
            ](y)

    result = st.compress(Model(), X, "macs=60%")
    assert all(layer.statistics.gradient is None for layer in result.sites)
    assert any("not weighed by what they do" in note for note in result.report.notes)
    assert not graphs(result.model)


def test_strict_sensitivity_still_raises() -> None:
    model = Cut("detach")
    with pytest.raises(st.CalibrationError, match="no gradient reached layer 'a'"):
        st.sensitivity(model, st.find(model), X)
    assert weighed(model, st.calibrate(model, st.find(model), X), X).notes


class Built(Plain):
    """Makes a table in the first pass, and notes down that it has, in a mark, a number or a shape."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.built = before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.built:
            self.table = torch.ones(1)
            self.built = {bool: True, int: 8, tuple: tuple(x.shape)}[type(self.built)]
        return super().forward(x) * self.table


@pytest.mark.parametrize("before", [False, 0, ()])
def test_a_table_and_the_mark_that_it_is_there_come_and_go_together(before: Any) -> None:
    model = Built(before)
    result = st.compress(model, X, "macs=60%")
    assert model.built == before
    assert not hasattr(model, "table")
    plain = Plain()
    plain.load_state_dict(model.state_dict())
    assert result.plan == st.compress(plain, X, "macs=60%").plan


class Halves(Plain):
    """Halves a weight the first time that it runs, and its inputs from then on, as RWKV does."""

    halved = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.halved:
            with torch.no_grad():
                self.b.weight.mul_(0.5)  # type: ignore[operator, union-attr]
            self.halved = True
        return super().forward(x) * 2


def test_a_weight_that_is_rescaled_once_is_so_in_every_pass() -> None:
    model = Halves().eval()
    result = st.compress(model, X, "macs=80%")
    assert not model.halved
    assert not any("each time" in note for note in result.report.notes)
    with torch.no_grad():
        wanted, given = (torch.cat([net(x) for x in X]) for net in (model, result.model))
    assert result.report.agreement is not None
    assert result.report.agreement.error == pytest.approx(float((wanted - given).norm() / wanted.norm()), rel=0.5)


def test_state_is_put_back() -> None:
    model = Plain()
    model.log, model.count, model.cache = [], 0, torch.zeros(2)  # type: ignore[assignment]
    with kept(model):
        model.log.append("seen")  # type: ignore[operator]
        model.count += 1  # type: ignore[operator]
        model.cache.add_(1)  # type: ignore[operator]
        model.extra = torch.ones(1)
        assert {place.key for place in State(model).changed()} == set()
    assert model.log == []
    assert model.count == 0
    assert torch.equal(model.cache, torch.zeros(2))
    assert not hasattr(model, "extra")


def test_what_is_written_on_parameters_stays() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5))
    for parameter in model.parameters():
        parameter._no_weight_decay = True  # type: ignore[attr-defined]
    model[0].weight.of = model[1]  # type: ignore[assignment, union-attr]
    copied = copy_model(model)
    assert all(parameter._no_weight_decay for parameter in copied.parameters())  # type: ignore[attr-defined]
    assert copied[0].weight.of is copied[1]  # type: ignore[index, union-attr]
    narrow(copied, {(n, axis): torch.arange(6) for n, axis in (("0", "out"), ("1", "through"), ("3", "in"))})
    assert all(parameter._no_weight_decay for parameter in copied.parameters())  # type: ignore[attr-defined]


class Unanswering(types.ModuleType):
    """A module of Python that loads something where it is asked for what it lacks, as torch's of CUDA do."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"nothing to load for {name}")


@pytest.mark.parametrize(
    ("what", "word"),
    [
        (threading.Lock(), "lock"),
        ((n for n in range(2)), "generator"),
        (functools, "module"),
        (Unanswering("unanswering"), "Unanswering"),
    ],
)
def test_what_cannot_be_copied_is_named_before_any_work(what: Any, word: str) -> None:
    class Locked(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the model has run")

    model = Locked()
    model.b.held = what
    with pytest.raises(st.UnsupportedLayerError, match=rf"cannot be copied: attribute 'held' \({word}\) of module 'b'"):
        st.compress(model, X, "macs=60%")


@pytest.mark.parametrize("verb", ["compress", "calibrate"])
def test_lazy_layers_that_never_ran_are_named_before_any_work(verb: str) -> None:
    model = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 16))
    with pytest.raises(st.CalibrationError, match=r"layer '0' \(LazyLinear\) has no weights yet: run the model once"):
        st.compress(model, X, "macs=60%") if verb == "compress" else st.calibrate(model, st.find(model), X)
    assert isinstance(model[0], nn.LazyLinear)


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_named_with_and_without_data(what: str, bad: float) -> None:
    model = Plain()
    with torch.no_grad():
        getattr(model.c, what).view(-1)[0] = bad
    message = rf"layer 'c' \(Linear\) holds NaN or Inf in its {what}"
    with pytest.raises(st.CalibrationError, match=message):
        st.compress(model, X, "macs=60%")
    with pytest.raises(st.CalibrationError, match=message):
        st.tabulate(st.find(model), st.WeightSVD())
    assert len(st.tabulate(st.find(model, skip="c"), st.WeightSVD()).rows) == 2


def test_nan_behind_the_last_layer_is_found() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16))
    with torch.no_grad():
        model[3].weight[0] = float("nan")
    with pytest.raises(st.CalibrationError, match="output holds NaN in calibration batch 0"):
        st.compress(model, X, "macs=60%")


@pytest.mark.parametrize("shape", [(0, 32), (32, 0)])
def test_layers_without_inputs_or_outputs_are_skipped(shape: tuple[int, int]) -> None:
    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Linear(*shape)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = F.relu(self.a(x))
            z = self.z(h[:, : shape[0]])
            return self.c(F.relu(self.b(h)) + (0 if z.shape[1] == 0 else z))

    result = st.compress(Model(), X, "macs=60%")
    assert ("z", "Linear", "empty: it has no inputs or no outputs") in result.report.skipped


def test_one_sample_is_told_and_no_worse_than_without_reconstruction() -> None:
    model, one, fresh = Plain().eval(), [X[0][:1]], torch.cat(X)
    errors = []
    for reconstruct in (True, False):
        result = st.compress(model, one, "macs=60%", reconstruct=reconstruct)
        assert any("too few rows" in note for note in result.report.notes)
        errors.append(float((result.model(fresh) - model(fresh)).detach().norm()))
    assert errors[0] <= 1.05 * errors[1]


def test_shapes_that_depend_on_values_are_refused_before_plans_are_compared() -> None:
    class Selects(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y[y[:, 0] > 0]

    with pytest.raises(st.CalibrationError, match=r"depend on values.*forward="):
        st.compress(Selects(), X, "macs=60%", methods=[st.PrincipalFilters(), st.ActivationSVD()])
    assert st.compress(Selects(), X, "macs=60%").plan.ratio("macs") >= 1 / 0.6


def test_calls_in_several_threads_give_what_one_gives() -> None:
    model = Plain().train()
    wanted = st.compress(model, X, "macs=60%").model(X[0])
    before = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()
    found: list[torch.Tensor | BaseException] = []

    def run() -> None:
        try:
            found.append(st.compress(model, X, "macs=60%").model(X[0]))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [isinstance(each, torch.Tensor) and torch.equal(each, wanted) for each in found] == [True] * 3
    assert (torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()) == before
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_another_thread_waits_while_a_model_is_watched() -> None:
    entered, order = threading.Event(), []

    def other() -> None:
        entered.set()
        with evaluating(Plain()):
            order.append("other")

    with evaluating(Plain()):
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]
    assert ALONE.acquire(blocking=False)
    ALONE.release()


def test_standard_output_is_what_it_was_whatever_order_solvers_end_in() -> None:
    before = os.fstat(1)
    inside = threading.Event()

    def other() -> None:
        inside.set()
        integer.milp([1.0])

    with integer._ONE_AT_A_TIME, integer._quiet():
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait()
        thread.join(0.05)
    thread.join()
    assert (os.fstat(1).st_dev, os.fstat(1).st_ino) == (before.st_dev, before.st_ino)


COLLECTED: list[list[torch.Tensor]] = []


class Collects(nn.Module):
    """Sets up hooks of its own at its first pass, as models of transformers do to collect hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        COLLECTED.append([])
        if not getattr(self, "ready", False):
            self.a.register_forward_hook(lambda module, args, output: COLLECTED[-1].append(output))
            self.ready = True
        h = self.a(x)
        (only,) = COLLECTED.pop()
        return self.b(h) + only


def test_a_model_that_sets_up_hooks_of_its_own_does_so_once() -> None:
    torch.manual_seed(0)
    model, batches = Collects().eval(), [torch.randn(16, 8) for _ in range(3)]
    result = st.compress(model, batches, st.Budget(macs=0.8))
    assert result.report.agreement is not None
    assert len(model.a._forward_hooks) <= 1
    with torch.no_grad():
        assert float((model(batches[0]) - result.model(batches[0])).norm()) < float(model(batches[0]).norm())


class MovingAverage(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.data.lerp_(x.mean(0), 0.1)
        return super().forward(x - 0 * self.mean)


class Swapped(MovingAverage):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = nn.Parameter(self.mean.detach() + 1, requires_grad=False)
        self.mean.data = self.mean.data + x.mean(0)
        return Plain.forward(self, x - 0 * self.mean)


class OfWholeBatches(MovingAverage):
    """Cannot be tried on one sample: such a first pass raises before it writes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.zeros(len(X[0])).copy_(x[:, 0] if len(x) > 1 else x.flatten())
        return super().forward(x)


class Looked(Plain):
    """Rows of a table are cut to a norm when they are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16, max_norm=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0 * self.table(x[:, 0].gt(0).long()))


class ClampsBias(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.b.bias.data.clamp_(-0.01, 0.01)
        return super().forward(x)


@pytest.mark.table
@pytest.mark.parametrize("kind", [MovingAverage, Swapped, OfWholeBatches, Looked])
@pytest.mark.parametrize("methods", [None, st.PrincipalFilters()])
def test_what_passes_write_into_parameters_is_gone_afterwards(kind: type[Plain], methods: Any) -> None:
    (plain, wanted), model = compressed(methods), kind().eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    held = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in held.items()}
    result = st.compress(model, X, "macs=60%", methods=methods)
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in held.items())
    small = dict(result.model.named_parameters())
    assert all(torch.equal(small[name], before[name]) for name in ("mean", "table.weight") if name in before)
    assert torch.allclose(result.model(X[0].clone()), wanted.model(X[0]), atol=1e-5)


class Quantising(Plain):
    """Its observer resizes and writes its buffers in an operation that counts no writes."""

    def __init__(self) -> None:
        super().__init__()
        config = torch.ao.quantization.get_default_qat_qconfig("x86")
        self.watcher = config.weight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.watcher(x.t()).t())


def test_observers_of_quantisation_are_as_they_were() -> None:
    model = Quantising().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = st.compress(model, X, "macs=60%", sensitivity=False)
    for each in (model, result.model):
        after = each.state_dict()
        assert all(torch.equal(after[name], t) for name, t in before.items() if "watcher" in name)


class MadeWhileRunning(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "made"):
            self.made = nn.Linear(16, 16)
        return super().forward(self.made(x))


@pytest.mark.parametrize("methods", [None, st.PrincipalFilters()])
def test_modules_that_a_pass_makes_are_told(methods: Any) -> None:
    with pytest.raises(st.CalibrationError, match="forward makes the module 'made' while it runs"):
        st.compress(MadeWhileRunning().eval(), X, "macs=60%", methods=methods)


def test_a_layer_whose_bias_a_pass_writes_is_left_alone() -> None:
    model = ClampsBias().eval()
    bias = model.b.bias.detach().clone()
    result = st.compress(model, X, "macs=80%")
    assert [(name, "writes into its weight or bias" in reason) for name, _, reason in result.report.skipped] == [
        ("b", True)
    ]
    assert torch.equal(model.b.bias, bias)
    assert torch.equal(result.model.b.bias, bias)  # type: ignore[union-attr]


def test_writing_is_seen_once_and_costs_no_further_pass() -> None:
    model, calls = MovingAverage().eval(), []
    model.a.register_forward_hook(lambda *_: calls.append(1))
    st.calibrate(model, st.find(model), X)
    assert len(calls) == len(X)
