"""Preparation: one network found, coupled, calibrated, weighed, grouped and timed for every caller."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import spectrim as st
from spectrim.cli.app import app
from spectrim.errors import CalibrationError
from spectrim.nn.timing import Timing
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.calibrate import calibrated
from spectrim.nn.watch.reconstruct import Split
from spectrim.nn.watch.sampling import Sampling
from spectrim.preparation import Prepared, locate, one_batch, prepare
from spectrim.train import Recipe
from tests.cases import batches_for, settled
from tests.train.learned import fake_latency

# Most of the samples were disturbed: their median is far from what an idle machine shows.
BUSY = Timing((500.0,) * 5 + (9000.0,) * 10, (0,) * 5 + (3,) * 10)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, nn.Module]]:
    """A machine that is busy whenever whole networks are timed, and what was timed."""
    timed: list[Mapping[str, nn.Module]] = []

    def measure(models: Mapping[str, nn.Module], example: Any, **_: object) -> dict[str, Timing]:
        timed.append(models)
        return dict.fromkeys(models, BUSY)

    for caller in ("preparation", "search.measured"):
        monkeypatch.setattr(f"spectrim.{caller}.measure_latency", measure)
    return timed


def by_compress(folder: Path) -> float:
    model, batches = settled("residual"), batches_for("residual")
    return st.compress(model, batches, st.Budget(macs=0.6), latency=fake_latency()).candidates.dense["latency"]


def by_learn_ranks(folder: Path) -> float:
    model, batches = settled("residual"), batches_for("residual")
    still = Recipe(epochs=0)
    result = st.learn_ranks(model, batches, st.Budget(macs=0.6), latency=fake_latency(), learning=still, tuning=still)
    return result.candidates.dense["latency"]


def by_the_command_line(folder: Path) -> float:
    command = ["profile", "tests.cli.nets:tiny", "--data", "tests.cli.nets:batches", "--latency", "--only", "head"]
    return json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["costs"]["latency"]


@pytest.mark.parametrize("caller", [by_compress, by_learn_ranks, by_the_command_line])
def test_every_caller_reads_the_dense_network_s_time_on_an_idle_machine(
    caller: Any, busy: list[Mapping[str, nn.Module]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECTRIM_CACHE", str(tmp_path))
    assert BUSY.quiet != BUSY.p50
    assert caller(tmp_path) == pytest.approx(BUSY.quiet)
    assert list(busy[0]) == ["dense"]


def test_a_time_that_is_known_is_not_measured_again(busy: list[Mapping[str, nn.Module]]) -> None:
    model, batches = settled("residual"), batches_for("residual")
    sites = locate(model, batches)
    known = prepare(model, sites, batches, sensitivity=False, latency=fake_latency(), dense_latency=7.0)
    assert (known.dense_latency, busy) == (7.0, [])
    assert prepare(model, sites, batches, sensitivity=False).dense_latency is None
    assert prepare(model, sites, batches, sensitivity=False, latency=True).dense_latency == BUSY.quiet


def test_the_network_is_timed_in_the_memory_format_of_its_layers(busy: list[Mapping[str, nn.Module]]) -> None:
    model, batches = settled("residual"), batches_for("residual")
    clock = st.Latency(cache=None, memory_format="channels_last", timer=fake_latency().timer)
    prepare(model, locate(model, batches), batches, sensitivity=False, latency=clock)
    (timed,) = busy
    weights = [p for p in timed["dense"].parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert all(p.is_contiguous() for p in model.parameters())


def test_without_statistics_one_batch_teaches_the_shapes_and_no_batches_are_kept() -> None:
    model, batches = settled("residual"), batches_for("residual")
    sites = locate(model, batches)
    shapes = prepare(model, sites, batches, statistics=False, sensitivity=False)
    assert shapes.batches is None
    assert all(site.spec.inputs and not site.statistics for site in shapes.sites)
    full = prepare(model, sites, batches)
    assert full.batches is batches
    assert all(site.statistics.gradient is not None for site in full.sites)
    assert Prepared(sites).example is None


def test_channels_are_found_with_the_first_batch() -> None:
    pytest.importorskip("torch_pruning")
    model, batches = settled("residual"), batches_for("residual")
    assert not locate(model, batches).couplings
    assert locate(model, batches, channels=True).couplings
    with pytest.raises(CalibrationError, match="no calibration batches"):
        locate(model, [], channels=True)


def test_where_channels_are_found_later_all_is_as_if_they_had_been_at_once() -> None:
    """To the bit: statistics of the samples that are fitted, without those that are held out."""
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    # The second convolution has patches too long for a moment of their own.
    layers = [nn.Conv2d(3, 144, 3), nn.ReLU(), nn.Conv2d(144, 12, 3), nn.BatchNorm2d(12), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches = [torch.randn(8, 3, 8, 8) for _ in range(3)]
    plain = prepare(net, locate(net, batches), batches)
    coupled = locate(net, batches, channels=True)
    later = prepare(net, coupled, batches, known=plain).sites
    whole = prepare(net, coupled, batches).sites
    assert [layer.spec for layer in later] == [layer.spec for layer in whole]
    assert later.couplings
    assert [(c.name, c.channels) for c in later.couplings] == [(c.name, c.channels) for c in whole.couplings]
    assert (later.other_macs, later.samples, later.notes) == (whole.other_macs, whole.samples, whole.notes)
    assert any(layer.statistics.channels for layer in whole)
    for one, other in zip(later, whole, strict=True):
        assert one.statistics.names == other.statistics.names
        for name in set(one.statistics.names) - {"slices"}:
            mine, theirs = getattr(one.statistics, name), getattr(other.statistics, name)
            assert torch.equal(mine.second_moment, theirs.second_moment), (one.name, name)
    for name, pooled in later.pooled.items():
        assert torch.equal(pooled.unpooled.second_moment, whole.pooled[name].unpooled.second_moment)


def test_the_example_has_the_batch_that_latency_is_measured_at() -> None:
    model = settled("mlp")
    (inputs,) = one_batch(model, [(torch.ones(3, 12), torch.zeros(3))], 5)
    assert inputs.shape == (5, 12)

    class Named(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens

    held = one_batch(Named(), [{"tokens": torch.ones(3, 12)}], 2)
    assert held["tokens"].shape == (2, 12)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_where_channels_may_go_statistics_rest_on_the_samples_that_are_not_held_out(size: int) -> None:
    """Else what reads the channels that are left would have seen what it is judged by."""
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 8), nn.ReLU()]
    net, images = nn.Sequential(*layers, nn.Linear(8, 4)).eval(), torch.randn(16, 3, 8, 8)
    (held,) = Split.of([images]).held
    assert int(held.sum()) == 4
    coupled, few = locate(net, [images], channels=True), [images[~held]]
    assert coupled.couplings
    found = prepare(net, coupled, list(images.split(size)), sampling=Sampling(None))
    wanted = calibrated(net, coupled, few, Sampling(None), Feed(), progress=lambda *_: None)
    assert found.sampling.apart == Split.of([images]).apart != frozenset()
    for one, other in zip(found.sites, wanted, strict=True):
        mine, theirs = one.statistics.input, other.statistics.input
        assert mine is not None
        assert theirs is not None
        assert mine.count == theirs.count
        assert torch.allclose(mine.second_moment, theirs.second_moment, rtol=1e-4, atol=1e-5)
    for name, pooled in found.sites.pooled.items():
        theirs = wanted.pooled[name].unpooled
        assert torch.allclose(pooled.unpooled.second_moment, theirs.second_moment, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_of_few_samples_what_removals_lose_is_told_and_judged_by_others() -> None:
    """Of 64 samples of a wide network: what was told was a tenth of the truth, and the worse network was taken."""
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)]
    net, mix = nn.Sequential(*layers).eval(), torch.randn(16, 64)
    seen, others = (torch.randn(n, 16) @ mix + 0.3 * torch.randn(n, 64) for n in (64, 2000))

    def missed(result: st.Result) -> float:
        with torch.no_grad():
            return float((result.model(others) - net(others)).norm() / net(others).norm())

    default, filters, auto = (
        st.compress(net, list(seen.split(16)), "macs=50%", methods=methods)
        for methods in (None, st.PrincipalFilters(), "auto")
    )
    told = filters.report.agreement
    assert told is not None
    assert told.held_out
    assert told.error > 0.6 * missed(filters)
    assert missed(auto) < 1.15 * min(missed(default), missed(filters)) < missed(filters)
