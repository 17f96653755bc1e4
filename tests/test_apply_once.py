"""The verb apply runs both networks once, holds samples out, and keeps to its memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st
from spectrim.application import carry_out
from spectrim.nn.watch import watchers
from spectrim.nn.watch.batches import Feed, one_by_one
from spectrim.nn.watch.reconstruct import Joint


def network(depth: int = 6, width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def data(samples: int = 96, width: int = 12, *, seed: int = 1) -> torch.Tensor:
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed)) @ mix


def planned(model: nn.Module, batches, budget: float = 0.6):
    sites = st.calibrate(model, st.find(model), batches)
    return sites, st.select(st.tabulate(sites, st.ActivationSVD(multiple_of=1)), st.Budget(parameters=budget))


def missed(model: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = model(x)
        return float((small(x) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("depth", [3, 12])
def test_layers_are_called_twice_a_batch_whatever_the_depth(depth, monkeypatch):
    model, x = network(depth), data()
    sites, plan = planned(model, list(x.split(32)))
    calls, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append((self, len(x))) or forward(self, x))
    st.apply(model, sites, plan, list(x.split(32)))
    shares = [(1 if module.in_features == module.out_features else 1 / 2, size) for module, size in calls]
    # Three batches in both networks, which the proof takes part in. It runs one sample through a copy, the merged
    # network and thrice the small one; sums behind layers are looked for with one sample.
    # Only the first batch is answered by what takes the last layer's place.
    assert sum(share for share, size in shares if size == 32) == 2 * depth * 3 - 2
    assert sum(share for share, size in shares if size == 1) <= 6 * depth
    assert len(shares) == sum(size in (1, 32) for _, size in shares)


class PerImage(nn.Module):
    """Runs its layers once for each sample, or for some at a time."""

    def __init__(self, inner: nn.Module, at_once: int) -> None:
        super().__init__()
        self.inner, self.at_once = inner, at_once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.inner(part) for part in x.split(self.at_once)])


@pytest.mark.table(every=2)
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_model_that_loops_over_its_samples_is_fitted_to_all_of_them(at_once):
    x = data()
    made = []
    for net in (PerImage(network(3), 96), PerImage(network(3), at_once)):
        sites, plan = planned(net, list(x.split(16)))
        assert sites.loops is (net.at_once < 16)
        made.append(carry_out(net, sites, plan, list(x.split(16))))
    assert [each.shape for each in made[1].held] == [each.shape for each in made[0].held]
    assert made[1].held_out == made[0].held_out
    assert missed(made[0].model, made[1].model, x) < 1e-8


class Centred(PerImage):
    """What it gives for a sample depends on the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x - x.mean(0)


def test_samples_that_depend_on_each_other_are_not_parted():
    net, batches = Centred(network(3), 1), list(data().split(16))
    alone = one_by_one(PerImage(network(3), 1), batches, Feed().decide(net, batches[0]))
    assert [len(each) for each in alone] == [1] * 96
    assert all(a is b for a, b in zip(one_by_one(net, batches, Feed().decide(net, batches[0])), batches, strict=True))


def test_batches_that_do_not_fit_go_in_waves_and_lose_little_by_it():
    model, x = network(), data(192)
    batches = list(x.split(32))
    sites, plan = planned(model, batches)
    told: list[tuple[str, int, int]] = []
    whole = st.apply(model, sites, plan, batches)
    waves = st.apply(model, sites, plan, batches, memory=1, progress=lambda *a: told.append(a))
    assert told[-1][1] == told[-1][2] > len(plan.entries)
    fresh = data(256, seed=2)
    assert missed(model, waves, fresh) <= 1.2 * missed(model, whole, fresh)


def test_order_and_cut_of_the_batches_change_nothing_but_rounding():
    model, x = network(), data()
    sites, plan = planned(model, [x])
    mixed = x[torch.randperm(len(x))]
    answers = [st.apply(model, sites, plan, cut)(x) for cut in ([x], list(x.split(7)), list(mixed.split(32)))]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_with_too_few_samples_it_is_not_worse_than_without_reconstruction():
    gains = []
    for seed in range(12):
        model, few, fresh = network(), data(24, seed=10 + seed), data(512, seed=100 + seed)
        sites, plan = planned(model, [few])
        fitted = st.apply(model, sites, plan, [few])
        alone = st.apply(model, sites, plan, [few], reconstruct=False)
        gains.append(missed(model, fitted, fresh) / missed(model, alone, fresh))
    assert sum(gains) / len(gains) <= 1.02


def test_with_fewer_samples_than_were_calibrated_on_it_is_hardly_worse_than_without():
    model, fresh = network(), data(512, seed=100)
    sites, plan = planned(model, [data(512)])
    alone = missed(model, st.apply(model, sites, plan), fresh)
    for batch in (data(1, seed=7), data(2, seed=7), data(3, seed=7), data(1).repeat(40, 1)):
        assert missed(model, st.apply(model, sites, plan, [batch]), fresh) <= 1.2 * alone


def test_samples_of_another_kind_than_were_calibrated_do_little_harm():
    model, fresh, x = network(), data(512, seed=100), data(40, seed=7)
    sites, plan = planned(model, [data(512)])
    alone = missed(model, st.apply(model, sites, plan), fresh)
    for other in (10 * x, x + 3, x[:, :1].expand_as(x).clone(), torch.zeros_like(x)):
        assert missed(model, st.apply(model, sites, plan, [other]), fresh) <= 1.3 * alone


@pytest.mark.parametrize("times", [0, 10])
def test_the_same_where_no_moment_of_whole_patches_is_kept(times, monkeypatch):
    monkeypatch.setattr(watchers, "FULL_PATCH", 20)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()  # fmt: skip
    x, fresh = torch.randn(96, 3, 6, 6), torch.randn(128, 3, 6, 6)
    sites = st.calibrate(model, st.find(model), [x])
    plan = st.select(st.tabulate(sites, st.ActivationSVD()), "macs=50%")
    alone = missed(model, st.apply(model, sites, plan), fresh)
    assert missed(model, st.apply(model, sites, plan, [times * torch.randn(24, 3, 6, 6)]), fresh) <= 1.3 * alone


def test_errors_are_told_for_samples_that_were_not_fitted():
    model, x = network(), data(64)
    sites, plan = planned(model, [x])
    done = carry_out(model, sites, plan, [x])
    assert done.held_out == 8
    changed = [entry.site for entry in plan if not entry.choice.is_dense]
    assert set(changed) <= set(done.errors)
    assert done.unseen == ()
    # Nothing before the first changed layer has moved: what it misses is what its factors leave out.
    first = changed[0]
    layer = done.model.get_submodule(first)
    with torch.no_grad():
        given = model[: int(first)](x)
        wanted, answer = model[int(first)](given), layer(given)
        true = float((wanted - answer).square().sum() / (wanted - wanted.mean(0)).square().sum())
    both = done.errors[first]
    assert both.fitted <= true * 1.1 <= both.held_out * 1.3
    assert (both.fitted * 56 + both.held_out * 8) / 64 == pytest.approx(true, rel=0.1)


def test_a_single_sample_is_fitted_whole():
    model = network(3)
    x = data(1)
    sites, plan = planned(model, [data(64)])
    done = carry_out(model, sites, plan, [x])
    assert done.held_out == 0
    assert torch.isfinite(done.model(x)).all()


def test_modes_are_those_of_the_dense_layers():
    model, x = network(3), data()
    sites, plan = planned(model, [x])
    model.train()
    small = st.apply(model, sites, plan, [x])
    assert all(module.training for module in small.modules())
    assert not any("forward" in module.__dict__ for module in small.modules())
    assert torch.equal(copy.deepcopy(small)(x), small(x))


def test_a_layer_in_a_thread_of_its_own_is_fitted_as_it_was_calibrated():
    from concurrent.futures import ThreadPoolExecutor

    model, x = network(3), data()
    sites, plan = planned(model, [x])

    def apart(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            return net[4:](pool.submit(lambda: torch.no_grad()(net[:4])(batch)).result())

    done = carry_out(model, sites, plan, [x], forward=apart)
    hidden = [entry.site for entry in plan if not entry.choice.is_dense and int(entry.site) < 4]
    assert hidden
    assert done.unseen == tuple(hidden)
    assert missed(model, done.model, x) < 1.0


def test_a_layer_that_one_wave_passes_by_was_seen_by_another():
    model, x = network(3), data()
    sites, plan = planned(model, [x])
    short = lambda net, batch: net[:2](batch) if len(batch) == 31 else net(batch)  # noqa: E731
    done = carry_out(model, sites, plan, [x[:31], x[31:]], memory=1, forward=short)
    assert done.unseen == ()
    assert carry_out(model, sites, plan, [x[:31]], forward=short).unseen != ()


def test_whole_batches_are_run_twice_and_single_samples_five_times():
    sizes: list[int] = []

    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(16, 16), nn.ReLU()))).eval()
    batches = list(torch.randn(64, 16).split(32))
    sites = st.calibrate(model, st.find(model), batches)
    plan = st.select(st.tabulate(sites, st.ActivationSVD(multiple_of=1)), st.Budget(parameters=0.5))
    forward = nn.ReLU.forward

    def counted(self: nn.ReLU, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", counted)
        st.apply(model, sites, plan, batches)
    # The networks side by side; the model twice, to see that it repeats itself, and its copy, the finished network and
    # what merge makes of it.
    assert sizes.count(32) <= 2 * 2 * 3
    assert sizes.count(1) == 5 * 3


def test_positions_are_those_that_layers_are_fitted_at_too() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(32, 3, 9, 9)
    sites = st.calibrate(model, st.find(model), [x], positions=3)
    plan = st.select(st.tabulate(sites, st.ActivationSVD(multiple_of=1)), st.Budget(parameters=0.6))
    counts: list[int] = []
    layer = Joint.layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Joint, "layer", lambda self, site: counts.append(self.fitted.count) or layer(self, site))
        st.apply(model, sites, plan, [x], positions=3)
    assert set(counts) == {28 * 3}


@pytest.mark.slow
def test_a_loader_that_shuffles_gives_what_a_list_gives() -> None:
    """Samples that are held out are known by their place in a batch."""
    model, x = network(), data(400)
    loader = DataLoader(TensorDataset(x), batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(3))
    one, two = (st.compress(model, each, "parameters=60%") for each in (list(x.split(50)), loader))
    assert one.report.agreement is not None
    assert two.report.agreement is not None
    assert two.report.agreement.samples == one.report.agreement.samples == 50
    assert two.report.agreement.error == pytest.approx(one.report.agreement.error, rel=1e-3)
