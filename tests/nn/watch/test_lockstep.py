"""Both networks run once, side by side; whatever happens, they are left as they were found."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import graph
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import spectrim as st
from spectrim.nn.copying import copy_model
from spectrim.nn.watch.lockstep import lockstep
from spectrim.nn.watch.probe import Probe, probe
from tests.cases import Seen


class Repeated(nn.Module):
    """A layer that is called several times, its answers overwritten in place."""

    def __init__(self, calls: int = 3) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.calls = calls

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.calls):
            x = torch.relu_(self.again(x))
        return self.last(x)


class Experts(nn.Module):
    """Every batch takes one of two ways, which meet again."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.low(x) if x.mean() < 0 else self.high(x)
        return self.last(x) if x.shape[0] > 1 else x


class Modes(nn.Module):
    """Enters and leaves modes that belong to the thread, around its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.seen = Seen()

    def note(self):
        self.seen.entries.append(
            (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
        )

    def forward(self, x):
        with torch.inference_mode():
            x = self.one(x)
            self.note()
        x = x.clone()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.two(x)
            self.note()
        with torch.enable_grad():
            x = self.three(x.float())
            self.note()
        self.note()
        return x


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return super().forward(x)


def untouched(*models: nn.Module) -> bool:
    layers = [module for model in models for module in model.modules()]
    return not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in layers)


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model.double(), copy_model(model)


def batches(count: int = 3, size: int = 5) -> list[torch.Tensor]:
    return [torch.randn(size, 4, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("depth", [2, 12, 40])
def test_each_network_is_run_once_whatever_its_depth(depth):
    dense = nn.Sequential(*[Counted(4, 4) for _ in range(depth)])
    small, data = copy.deepcopy(dense), [torch.randn(5, 4) for _ in range(2)]
    Counted.calls = 0
    with lockstep(dense, small, {str(n): 1 for n in range(depth)}, data) as hub:
        for n in range(depth):
            assert len(hub.reach(str(n))) == 2
            small[n] = copy.deepcopy(dense[n])
    # The last compressed layer is put in place and has not been run by then.
    assert Counted.calls == 2 * (2 * depth - 1)


def test_a_layer_is_given_what_the_layers_before_it_deliver_by_then():
    dense, small = twins(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.Linear(3, 2)))
    data = batches()
    with lockstep(dense, small, {"0": 1, "2": 1, "3": 1}, data) as hub:
        for name in ("0", "2", "3"):
            seen = hub.reach(name)
            for each in seen:
                before = small[: int(name)](data[each.batch])
                torch.testing.assert_close(each.inputs[0], before)
                torch.testing.assert_close(each.targets[0].answer, dense[: int(name) + 1](data[each.batch]))
            layer = nn.Linear(*reversed(small[int(name)].weight.shape)).double()
            small[int(name)] = layer
    assert untouched(dense, small)


def test_a_layer_that_is_called_again_is_fitted_at_the_last_call():
    dense, small = twins(Repeated())
    data = batches()
    expected = []
    with torch.no_grad():
        for x in data:
            x = dense.first(x)
            calls = []
            for _ in range(3):
                calls.append(x)
                x = torch.relu(dense.again(x))
            expected.append(calls)
    layers = probe(dense, ["first", "again", "last"], data[0]).calls
    assert layers == {"first": 1, "again": 3, "last": 1}
    with lockstep(dense, small, layers, data) as hub:
        hub.reach("first")
        for each in hub.reach("again"):
            assert len(each.inputs) == len(each.targets) == 3
            for x, wanted in zip(each.inputs, expected[each.batch], strict=True):
                torch.testing.assert_close(x, wanted)
        fresh = small.again = nn.Linear(4, 4).double()
        for each in hub.reach("last"):
            wanted = torch.relu(fresh(expected[each.batch][2]))
            torch.testing.assert_close(each.inputs[0], wanted)


def test_passes_may_end_early_and_take_different_ways():
    dense, small = twins(Experts())
    one = torch.ones(1, 4, dtype=torch.float64)
    data = [-one.expand(3, 4), one.expand(3, 4), -one, one]
    with lockstep(dense, small, {"low": 1, "high": 1, "last": 1}, data) as hub:
        assert [each.batch for each in hub.reach("low")] == [0, 2]
        assert [each.batch for each in hub.reach("high")] == [1, 3]
        assert [each.batch for each in hub.reach("last")] == [0, 1]


def test_a_layer_that_is_never_called_shows_nothing():
    dense, small = twins(nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)}))
    with lockstep(
        dense, small, {"idle": 1, "used": 1}, batches(2), forward=lambda model, batch: model["used"](batch)
    ) as hub:
        assert hub.reach("idle") == []
        assert len(hub.reach("used")) == 2


def test_modes_of_the_thread_belong_to_each_pass():
    dense, small = Modes(), Modes()
    with torch.autocast("cpu", enabled=False), lockstep(dense, small, {"one": 1, "two": 1, "three": 1}, [
        torch.randn(2, 4) for _ in range(3)
    ]) as hub:  # fmt: skip
        for name in ("one", "two", "three"):
            assert len(hub.reach(name)) == 3
            state = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
            assert state == (False, False, False)
    wanted = [(True, False, False), (False, True, False)]
    assert [each for each in small.seen.entries if each in wanted] == wanted[:1] * 3 + wanted[1:] * 3
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


class Counts(nn.Module):
    """Watches its own operations, and gives how many products they take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        with FlopCounterMode(display=False) as work:
            y = self.last(self.first(x))
        return y, torch.tensor(work.get_total_flops())


def test_modes_that_a_pass_enters_see_nothing_of_others():
    dense, changed = twins(Counts())
    every = batches()
    with lockstep(dense, changed, {"first": 1, "last": 1}, every) as hub:
        for name in ("first", "last"):
            hub.reach(name)
            assert torch._C._len_torch_dispatch_stack() == 0
            torch.ones(8, 8) @ torch.ones(8, 8)
        ends = hub.ends(0)
    assert [int(end.output[1]) for end in ends] == [int(dense(every[0])[1])] * 2


class Awaits(nn.Module):
    """Runs an event loop of its own, of which a thread has one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    async def steps(self, x):
        for layer in (self.first, self.last):
            await asyncio.sleep(0)
            x = layer(x)
        return x

    def forward(self, x):
        return asyncio.run(self.steps(x))


def test_event_loops_belong_to_each_pass():
    dense, changed = twins(Awaits())
    every = batches()
    with lockstep(dense, changed, {"first": 1, "last": 1}, every) as hub:
        for name in ("first", "last"):
            assert len(hub.reach(name)) == len(every)
            assert asyncio.run(asyncio.sleep(0, "another")) == "another"
        ends = [hub.ends(number)[0].output for number in range(len(every))]
    assert all(torch.equal(end, dense(batch)) for end, batch in zip(ends, every, strict=True))


class Within(nn.Module):
    """Calls its layers inside of something that belongs to the thread or the process."""

    def __init__(self, around):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.around = around

    def forward(self, x):
        with self.around():
            return self.last(torch.relu(self.first(x))).double()


class Scales(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 1.5 if func is torch.relu else out


SETTING = contextvars.ContextVar("SETTING", default=1.0)


@contextlib.contextmanager
def doubles():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def set_outside():
    assert SETTING.get() == 2.0
    token = SETTING.set(3.0)
    yield
    SETTING.reset(token)


@pytest.mark.parametrize(
    "around",
    [
        Scales,
        doubles,
        set_outside,
        lambda: sdpa_kernel(SDPBackend.MATH),
        lambda: torch.device("cpu"),
        lambda: torch.backends.mkldnn.flags(enabled=False),
        warnings.catch_warnings,
        graph.allow_mutation_on_saved_tensors,
        graph.save_on_cpu,
        lambda: graph.disable_saved_tensors_hooks("none here"),
        lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
        lambda: torch.autograd.set_multithreading_enabled(False),
        lambda: torch.backends.cudnn.flags(deterministic=True, benchmark=True),
    ],
)
def test_switches_and_modes_that_a_pass_turns_are_its_own_and_as_they_were_afterwards(around):
    def seen():
        flash, modes = torch.backends.cuda.flash_sdp_enabled(), torch._C._len_torch_function_stack()
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        gradients = (hooks, torch._C._autograd._saved_tensors_hooks_get_disabled_error_message())
        gradients += (torch.is_anomaly_enabled(), torch._C._is_multithreading_enabled(), torch.backends.cudnn.benchmark)
        return torch.get_default_dtype(), flash, torch.backends.mkldnn.enabled, warnings.filters, modes, gradients

    SETTING.set(2.0)
    dense, changed = twins(Within(around))
    every, before = batches(), seen()
    with lockstep(dense, changed, {"first": 1, "last": 1}, every) as hub:
        for name in ("first", "last"):
            assert len(hub.reach(name)) == len(every)
            assert seen() == before
        ends = [hub.ends(number)[0].output for number in range(len(every))]
    assert seen() == before
    assert all(torch.equal(end, dense(batch)) for end, batch in zip(ends, every, strict=True))


class Skips(nn.Module):
    """A skip that goes by something else than an argument; what is between its ends is gone when the pass is over."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.begin()

    def begin(self):
        """What holds it."""

    def forward(self, x):
        self.leave(x)
        return self.last(torch.relu(self.first(x))) + self.take()


KEPT = {}
DEPTH = 0
OF_THREAD = threading.local()


class Store:
    x = None


class ByGlobal(Skips):
    def leave(self, x):
        global DEPTH
        assert DEPTH == 0, "entered again"
        DEPTH += 1
        KEPT["x"] = x

    def take(self):
        global DEPTH
        DEPTH -= 1
        return KEPT.pop("x")


class ByClass(Skips):
    def leave(self, x):
        Store.x = x

    def take(self):
        return Store.x


class ByThread(Skips):
    def leave(self, x):
        vars(OF_THREAD).setdefault("stack", []).append(x)

    def take(self):
        return OF_THREAD.stack.pop()


class ByHook(Skips):
    def begin(self):
        features = {}
        self.first.register_forward_hook(lambda module, args, output: features.update(x=args[0]))
        self.leave = lambda x: None
        self.take = self.given = lambda: features["x"]


def leave_on_the_model(module, args, output):
    OF_MODEL.given = args[0]


class ByModel(Skips):
    """Its hook means the copy there; its methods go on meaning the model that the copy was made of."""

    def begin(self):
        global OF_MODEL
        OF_MODEL = self
        self.first.register_forward_hook(leave_on_the_model)

    def leave(self, x):
        OF_MODEL.last.kept = x

    def take(self):
        assert torch.equal(OF_MODEL.last.kept, self.given)
        return self.given


class ByStack(Skips):
    def begin(self):
        self.stack = []

    def leave(self, x):
        self.stack.append(x)

    def take(self):
        return self.stack.pop()


class ByAttribute(Skips):
    def begin(self):
        self.busy = False

    def leave(self, x):
        assert not self.busy, "entered again"
        self.busy, self.x = True, x

    def take(self):
        x, self.busy = self.x, False
        del self.x
        return x


class Leaves(nn.Module):
    def __init__(self, box, layer):
        super().__init__()
        self.box, self.layer = box, layer

    def forward(self, x):
        self.box["x"] = x
        return torch.relu(self.layer(x))


class Takes(Leaves):
    def forward(self, x):
        return self.layer(x) + self.box["x"]


class ByBox(nn.Sequential):
    def __init__(self):
        box = {}
        super().__init__()
        self.first, self.last = Leaves(box, nn.Linear(4, 4)), Takes(box, nn.Linear(4, 4))


@pytest.mark.parametrize("kind", [ByGlobal, ByClass, ByThread, ByHook, ByModel, ByStack, ByAttribute, ByBox])
def test_what_a_pass_keeps_anywhere_until_it_is_taken_is_its_own(kind):
    dense, changed = twins(kind())
    every = batches()
    calls = {name: 1 for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    with lockstep(dense, changed, calls, every, places=probe(dense, calls, every[0]).places) as hub:
        for name in calls:
            assert len(hub.reach(name)) == len(every)
        ends = [hub.ends(number)[1].output for number in range(len(every))]
    assert (KEPT, DEPTH, Store.x) == ({}, 0, None), "something of a pass is left"
    assert all(torch.equal(end, dense(batch)) for end, batch in zip(ends, every, strict=True))
    Store.x = None


def test_what_is_gone_at_the_end_of_a_pass_is_seen_by_calibration():
    model = ByAttribute()
    inputs = [torch.randn(40, 4) for _ in range(2)]
    sites = st.calibrate(model, st.find(model), inputs)
    assert sites.keeps_state
    plain = Repeated()
    assert not st.calibrate(plain, st.find(plain), inputs).keeps_state
    st.compress(model, inputs, "parameters=90%")
    assert not hasattr(model, "x")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["in the middle", "in a pass"])
def test_whatever_happens_nothing_is_left_hanging(error, where):
    dense, small = twins(Repeated())
    small.train()
    own = small.first.forward = lambda x: nn.Linear.forward(small.first, x)

    def run(model, batch):
        model(batch)
        if where == "in a pass":
            raise error("stop")

    def work():
        with lockstep(dense, small, {"first": 1, "last": 1}, batches(), forward=run) as hub:
            hub.reach("first")
            hub.reach("last")
            if where == "in the middle":
                raise error("stop")
            # The passes go on, to their ends.
            hub.reach("first")

    with pytest.raises(error):
        work()
    assert small.first.__dict__.pop("forward") is own
    assert untouched(dense, small)
    assert small.training
    assert torch.is_grad_enabled()


def test_parents_see_the_layer_itself_and_lists_come_to_the_same_slot():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.__dict__["held"] = [self.layer]

        def forward(self, x):
            return self.held[0](x.to(self.layer.weight.dtype)) + self.layer.bias

    dense = Parent()
    small = copy.deepcopy(dense)
    data = batches(2)
    with lockstep(dense, small, {"layer": 1}, data) as hub:
        assert len(hub.reach("layer")) == 2
    assert untouched(dense, small)


def test_what_waits_is_measured_a_sample():
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    found = probe(model, ["0", "2"], torch.randn(6, 2, 10, 10))
    # At the second layer: what goes in and what comes out.
    assert found.nbytes == pytest.approx((8 + 4) * 100 * 4)


def test_a_model_that_refuses_a_single_sample_is_watched_with_the_whole_batch():
    def picky(model, batch):
        if batch.shape[0] < 3:
            raise ValueError("too few")
        return model(batch)

    model = nn.Sequential(nn.Linear(4, 4))
    assert probe(model, ["0"], torch.randn(6, 4), forward=picky).calls == {"0": 1}
    with pytest.raises(ValueError, match="too few"):
        probe(model, ["0"], torch.randn(2, 4), forward=picky)


@pytest.mark.parametrize(
    ("order", "ends"),
    [
        ("abc", ""),
        ("abbc", "b"),
        ("abcabc", "c"),
        ("abacdd", "ad"),
        ("abcbdbef", "b"),
    ],
)
def test_where_passes_have_to_start_again(order, ends):
    assert Probe(list(order)).ends() == set(ends)


def test_behind_a_layer_that_is_called_again_passes_start_again():
    """What comes behind sees the fitted layer at all its calls."""
    dense, small = twins(Repeated())
    data = batches()
    with lockstep(dense, small, {"again": 3, "last": 1}, data) as hub:
        hub.reach("again")
        fresh = small.again = nn.Linear(4, 4).double()
        hub.restart()
        for each in hub.reach("last"):
            x = small.first(data[each.batch])
            for _ in range(3):
                x = torch.relu(fresh(x))
            torch.testing.assert_close(each.inputs[0], x)
    assert untouched(dense, small)
