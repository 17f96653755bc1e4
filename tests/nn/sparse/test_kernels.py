from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spectrim.cost import rounds
from spectrim.linalg import csr
from spectrim.linalg.patterns import NofM, WholeChannels
from spectrim.nn.sparse import kernels
from spectrim.nn.sparse.kernels import ChosenKernel, Kernel, choose_kernels
from spectrim.nn.sparse.products import semi_structured
from tests.cases import Seen
from tests.nn.layers import close
from tests.nn.sparse.test_layers import masked, summed

pytestmark = pytest.mark.skipif(not csr.is_available(), reason="this torch has no fast CSR products")


class Net(nn.Module):
    """Layers with a choice, without one, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.conv = masked(nn.Conv2d(3, 8, 3, padding=1))
        self.grouped = masked(nn.Conv2d(8, 8, 3, padding=1, groups=2))
        self.slim = masked(nn.Conv2d(8, 8, 1), 0.5, WholeChannels())
        self.total = summed(nn.Linear(8, 5))
        self.unused = masked(nn.Linear(8, 5))
        self.modes = Seen()

    def forward(self, x, scale=1.0):
        self.modes.entries.append((self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        x = torch.relu(self.slim(torch.relu(self.grouped(torch.relu(self.conv(x))))))
        return self.total(torch.relu(self.total.pair(x.mean((2, 3))).repeat(1, 2)[:, :8]) * scale)


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves while a kernel runs: so much for each kernel, whatever the layer."""
    now, milliseconds = [0.0], {Kernel.DENSE: 10.0, Kernel.CSR: 4.0}

    class Time:
        @staticmethod
        def perf_counter():
            return now[0]

    monkeypatch.setattr(rounds, "time", Time)
    monkeypatch.setattr(rounds, "preemptions", lambda: 0)

    def attach(model):
        for module in model.modules():
            if isinstance(module, kernels.Masked):
                # After the watch has begun, before it stops.
                forward = module.forward

                def slow(*args, module=module, forward=forward):
                    now[0] += milliseconds[module.kernel] / 1e3
                    return forward(*args)

                module.forward = slow
        return milliseconds

    return attach


def test_the_fastest_is_chosen_and_reported(clock):
    net = Net()
    clock(net)
    chosen = choose_kernels(net, torch.randn(2, 3, 6, 6), rounds=3)
    assert [c.name for c in chosen] == ["conv", "total.sparse"]
    for c in chosen:
        assert c.kernel is Kernel.CSR
        assert dict(c.milliseconds) == pytest.approx({Kernel.DENSE: 10.0, Kernel.CSR: 4.0})
        assert c.ratio == pytest.approx(0.4)
    assert net.conv.kernel is net.total.sparse.kernel is Kernel.CSR
    assert net.unused.kernel is net.grouped.kernel is Kernel.DENSE


@pytest.mark.parametrize(("time", "kernel"), [(9.8, Kernel.DENSE), (9.6, Kernel.CSR), (12.0, Kernel.DENSE)])
def test_dense_wins_what_is_nearly_a_tie(clock, time, kernel):
    net = Net()
    clock(net)[Kernel.CSR] = time
    net.conv.kernel = Kernel.CSR
    chosen = choose_kernels(net, torch.randn(2, 3, 6, 6), rounds=3)
    assert {c.kernel for c in chosen} == {kernel}
    assert net.conv.kernel is kernel


def test_a_layer_that_is_called_twice_is_timed_as_a_whole(clock):
    layer = masked(nn.Linear(8, 8))
    clock(layer)
    (chosen,) = choose_kernels(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 8), rounds=2)
    assert chosen.milliseconds[Kernel.DENSE] == pytest.approx(20.0)


def test_results_stay_and_so_do_modes_threads_and_hooks():
    net = Net().train()
    net.conv.eval()
    x = torch.randn(2, 3, 6, 6)
    twin = copy.deepcopy(net).eval()
    with torch.no_grad():
        wanted = twin(x)
    before, modes = torch.get_num_threads(), [m.training for m in net.modules()]
    chosen = choose_kernels(net, (x, torch.zeros(2)), threads=1, rounds=2)
    assert all(isinstance(c, ChosenKernel) and c.milliseconds[c.kernel] > 0 for c in chosen)
    assert set(net.modes.entries) == {(False, False, 1)}
    assert torch.get_num_threads() == before
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with torch.no_grad():
        for kernel in Kernel.DENSE, Kernel.CSR:
            net.conv.kernel = net.total.sparse.kernel = kernel
            assert close(net.eval()(x), wanted, 1e-5)


def test_types_without_a_packed_kernel_have_no_choice():
    net = Net().bfloat16()
    assert choose_kernels(net, torch.randn(2, 3, 6, 6), rounds=2) == ()
    assert len(net.modes.entries) <= 3
    assert choose_kernels(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)) == ()


def test_a_failure_leaves_the_model_as_it_was():
    net = Net()
    net.total.sparse.kernel = Kernel.CSR
    with pytest.raises(RuntimeError):
        choose_kernels(net, torch.randn(2, 4, 6, 6))
    assert net.conv.kernel is Kernel.DENSE
    assert net.total.sparse.kernel is Kernel.CSR
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_budget_ends_the_rounds_but_three_are_taken():
    net = Net()
    choose_kernels(net, torch.randn(2, 3, 6, 6), rounds=50, budget=0.0)
    assert len(net.modes.entries) == 1 + 2 * (kernels._WARM_UP + 3)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"margin": -0.1}, {"margin": 1.0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        choose_kernels(Net(), torch.randn(2, 3, 6, 6), **options)


def test_a_kernel_that_does_not_work_is_not_on_offer(monkeypatch):
    layer = masked(nn.Linear(64, 32), pattern=NofM(2, 4))
    monkeypatch.setattr(kernels, "takes", lambda kernel, *_: kernel is Kernel.SEMI_STRUCTURED)
    # Without a GPU there is no semi-structured form.
    assert choose_kernels(nn.Sequential(layer), torch.randn(2, 64), rounds=2) == ()
    assert layer.kernel is Kernel.DENSE


def test_the_semi_structured_product_on_a_plain_matrix():
    weight, bias, x = torch.randn(5, 8), torch.randn(5), torch.randn(2, 3, 8)
    wanted = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(semi_structured(weight, x, bias), wanted)
    onto = torch.ones_like(wanted)
    assert semi_structured(weight, x, bias, onto) is onto
    torch.testing.assert_close(onto, wanted + 1)


def test_load_does_not_decide(clock, monkeypatch):
    layer = masked(nn.Linear(8, 8))
    times = clock(layer)
    calls, disturbed = [0], [0]
    forward = layer.forward

    def loaded(*args):
        # Two of three calls of the faster kernel meet with load, which the system reports for half of them only.
        if layer.kernel is Kernel.CSR:
            calls[0] += 1
            times[Kernel.CSR] = 4.0 if calls[0] % 3 == 0 else 50.0
            disturbed[0] += calls[0] % 3 == 1
        return forward(*args)

    layer.forward = loaded
    monkeypatch.setattr(rounds, "preemptions", lambda: disturbed[0])
    (chosen,) = choose_kernels(nn.Sequential(layer), torch.randn(2, 8))
    assert chosen.kernel is Kernel.CSR
    assert dict(chosen.milliseconds) == pytest.approx({Kernel.DENSE: 10.0, Kernel.CSR: 4.0})


def test_more_rounds_are_taken_while_all_are_disturbed(monkeypatch):
    net, count = Net(), iter(range(10**6))
    monkeypatch.setattr(rounds, "preemptions", lambda: next(count))
    choose_kernels(net, torch.randn(2, 3, 6, 6), rounds=4)
    assert len(net.modes.entries) == 1 + 2 * (kernels._WARM_UP + 12)
