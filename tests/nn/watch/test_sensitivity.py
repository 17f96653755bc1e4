from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from spectrim.errors import CalibrationError
from spectrim.nn.find import find
from spectrim.nn.watch.calibrate import calibrate
from spectrim.nn.watch.samples import Samples
from spectrim.nn.watch.sampling import directions
from spectrim.nn.watch.sensitivity import sensitivity
from tests.nn.layers import ConvNet, close


class Small(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)
        self.act = nn.ReLU(inplace=inplace)
        self.mid = nn.Linear(16, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.act(self.mid(self.act(self.conv(x)).flatten(1))))


def probe(model, **kw):
    return sensitivity(model, find(model), **kw)


@pytest.mark.parametrize("inplace", [False, True])
def test_second_moments_equal_autograd_along_the_same_directions(inplace):
    model = Small(inplace).double()
    batches = [torch.randn(n, 4, 4, 4, dtype=torch.float64) for n in (3, 5)]
    sites = probe(model, batches=batches, seed=7)
    gradients = {"conv": [], "mid": [], "out": []}
    twin = copy.deepcopy(model)
    twin.act.inplace = False
    for x in batches:
        conv = twin.conv(x)
        mid = twin.mid(torch.relu(conv).flatten(1))
        out = twin.out(torch.relu(mid))
        direction = directions(out, Samples.of(x), 7)
        found = torch.autograd.grad((out * direction).sum(), [conv, mid, out])
        gradients["conv"].append(found[0].movedim(1, -1).reshape(-1, 2, 2).transpose(0, 1))
        gradients["mid"].append(found[1][None])
        gradients["out"].append(found[2][None])
    for name, parts in gradients.items():
        rows = torch.cat(parts, 1)
        moments = sites[name].statistics.gradient
        assert moments.count == rows.shape[1]
        assert close(moments.second_moment, rows.transpose(1, 2) @ rows / rows.shape[1], 1e-10)


def test_in_expectation_it_is_the_second_moment_of_the_jacobian():
    model = Small().double()
    # What tells samples apart, and reaches nothing: equal ones would be given equal directions.
    model.conv.weight.data[:, 0] = 0
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64).repeat(2000, 1, 1, 1)
    x[:, ::2] = torch.randn(2000, 2, 4, 4)
    rows = torch.relu(model.conv(x[:1])).flatten(1).detach()
    jacobian = torch.autograd.functional.jacobian(lambda y: model.out(torch.relu(y)), model.mid(rows).detach())
    wanted = torch.einsum("bzci,bzcj->ij", jacobian.squeeze(2).unsqueeze(2), jacobian.squeeze(2).unsqueeze(2))
    sites = probe(model, batches=[x], samples=2000)
    assert close(sites["mid"].statistics.gradient.second_moment[0], wanted, 0.15)
    # The last layer's Jacobian is the identity.
    assert close(sites["out"].statistics.gradient.second_moment[0], torch.eye(3).double(), 0.15)


def test_gradients_modes_and_hooks_are_left_as_found():
    model = ConvNet().train()
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    held = model.head.weight.grad
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())

    def check():
        assert [m.training for m in model.modules()] == modes
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
        assert model.head.weight.grad is held
        assert torch.equal(held, torch.ones_like(held))
        assert model.up.weight.grad is None
        assert not any(m._forward_hooks for m in model.modules())
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    sites = probe(model, batches=[torch.randn(2, 3, 6, 6)])
    assert all(site.statistics.gradient is not None for site in sites)
    check()
    with pytest.raises(RuntimeError):
        probe(model, batches=[torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)])
    check()
    with pytest.raises(CalibrationError, match="no layer 'zzz'. Find and calibrate the sites"):
        sensitivity(model, find(nn.ModuleDict({"stem": model.stem, "zzz": nn.Linear(2, 2)})), [torch.randn(2, 3, 6, 6)])
    check()


def test_moments_of_calibration_are_kept():
    model, x = ConvNet(), torch.randn(2, 3, 6, 6)
    sites = calibrate(model, find(model), [x])
    both = sensitivity(model, sites, [x])
    assert [set(s.statistics.names) for s in both] == [{"input", "gradient"}] * 4
    assert [s.spec for s in both] == [s.spec for s in sites]


def test_batches_are_read_until_there_are_enough_samples():
    model, seen = ConvNet(), []

    def batches():
        for i in range(5):
            seen.append(i)
            yield torch.randn(4, 3, 6, 6)

    sites = probe(model, batches=batches(), samples=10, rows=3 * 64)
    assert seen == [0, 1, 2]
    # Nothing tells how many samples there are: three rows of each of 12.
    assert sites["stem"].statistics.gradient.count == 3 * 12


def test_neither_cut_nor_order_changes_which_samples_are_taken():
    model, x = Small(), torch.randn(48, 4, 4, 4)
    wanted = probe(model, batches=[x], samples=20)
    for batches in (x.split(1), x.split(5), x.flip(0).split(16)):
        found = probe(model, batches=list(batches), samples=20)
        for one, two in zip(found, wanted, strict=True):
            assert one.statistics.gradient.count == two.statistics.gradient.count
            moments = one.statistics.gradient.second_moment, two.statistics.gradient.second_moment
            torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-7)


def test_a_model_that_refuses_parts_of_batches_gives_gradients_of_whole_ones():
    class Fixed(Small):
        def forward(self, x):
            return super().forward(x.view(8, 4, 4, 4))

    sites = probe(Fixed(), batches=list(torch.randn(48, 4, 4, 4).split(8)), samples=20)
    assert sites["out"].statistics.gradient.count == 24


def test_data_in_the_order_of_their_classes_are_seen_from_all_of_them():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
    # Samples of a class reach one unit of the first layer each.
    batches = list((torch.eye(6).repeat_interleave(20, 0) * (1 + torch.rand(120, 1))).split(10))
    for size in (30, 60):
        found = sensitivity(model, calibrate(model, find(model), batches), batches, samples=size)
        reached = found["0"].statistics.gradient.second_moment[0].diagonal()
        assert (reached > 0).sum() >= min(6, size // 10)
        whole = sensitivity(model, calibrate(model, find(model), batches), iter(batches), samples=size)
        assert (whole["0"].statistics.gradient.second_moment[0].diagonal() > 0).sum() == size // 20 + (size % 20 > 0)


@dataclass
class Answer:
    logits: torch.Tensor


@pytest.mark.parametrize("wrap", [Answer, lambda y: (y,), lambda y: {"scores": y}])
def test_outputs_of_any_structure(wrap):
    model = Small()
    forward = lambda m, b: wrap(m(b))  # noqa: E731
    sites = probe(model, batches=[torch.randn(2, 4, 4, 4)], forward=forward)
    assert sites["out"].statistics.gradient.count == 2


def test_all_outputs_of_a_tuple_count():
    class TwoHeads(Small):
        def forward(self, x):
            hidden = self.mid(self.conv(x).flatten(1))
            return self.out(hidden.detach()), hidden

    sites = probe(TwoHeads(), batches=[torch.randn(2, 4, 4, 4)])
    assert all(site.statistics.gradient.count for site in sites)


def test_a_site_that_no_gradient_reaches_is_named():
    class Partly(Small):
        def forward(self, x):
            return self.out(self.mid(self.conv(x).flatten(1)).detach())

    with pytest.raises(CalibrationError, match="no gradient reached layer 'conv'"):
        probe(Partly(), batches=[torch.randn(2, 4, 4, 4)])


@pytest.mark.parametrize("cut", [torch.detach, lambda y: y.argmax(1)])
def test_outputs_without_gradients_are_an_error(cut):
    with pytest.raises(CalibrationError, match="no gradient reaches"):
        probe(Small(), batches=[torch.randn(2, 4, 4, 4)], forward=lambda m, b: cut(m(b)))


def test_no_batches_and_broken_gradients_are_errors():
    with pytest.raises(CalibrationError, match="no gradient"):
        probe(Small(), batches=[])
    with pytest.raises(CalibrationError, match="layer '.*' hold NaN or Inf"):
        probe(Small(), batches=[torch.randn(2, 4, 4, 4)], forward=lambda m, b: m(b) / 0)
