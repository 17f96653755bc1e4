"""Layers that lose time in the finished network, with a clock that knows what each network takes."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim import preparation
from spectrim.cost.counted import macs
from spectrim.cost.rounds import Timing
from spectrim.errors import InfeasibleBudgetError, SlowerError
from spectrim.nn.modules import Factored
from spectrim.search import measured


class Clock:
    """Layers alone take time in step with their MACs; in a network each factored layer takes what ``takes`` says."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, takes: dict[str, float], spread: float = 0.0, each: float = -1.0
    ) -> None:
        self.takes, self.spread, self.each, self.timed = takes, spread, each, []
        monkeypatch.setattr(preparation, "measure_latency", self.models)
        monkeypatch.setattr(measured, "measure_latency", self.models)

    def latency(self) -> st.Latency:
        def timer(chains, **_: object) -> list[float]:
            return [10 / 2304 * sum(macs([spec]) for spec in chain) for chain in chains]

        return st.Latency(cache=None, timer=timer, batch=4)

    def models(self, models, example, **_: object) -> dict[str, Timing]:
        self.timed.append(set(models))
        return {name: Timing(self.samples(model)) for name, model in models.items()}

    def samples(self, model: nn.Module) -> tuple[float, ...]:
        factored = [name for name, module in model.named_modules() if isinstance(module, Factored)]
        time = 10.0 + sum(self.takes.get(name, self.each) for name in factored)
        return tuple(time + self.spread * (turn % 3 - 1) for turn in range(15))


def network(layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(24, 24) for _ in range(layers))).eval()


def compressed(clock: Clock, budget: object = "macs=45%", layers: int = 4, **options: object) -> st.Result:
    model = network(layers)
    options = {"latency": clock.latency(), "guard": True, "sensitivity": False, **options}
    method = st.WeightSVD(multiple_of=1)
    return st.compress(model, [torch.randn(64, 24)], budget, methods=[method], **options)


def factored(result: st.Result) -> set[str]:
    return {entry.site for entry in result.plan if not entry.choice.is_dense}


def test_a_layer_that_loses_time_is_dense_again_within_the_budget(monkeypatch):
    clock = Clock(monkeypatch, {"1": +1.0})
    result = compressed(clock)
    assert factored(result) == {"0", "2", "3"}
    assert result.plan.costs["macs"] <= 0.45 * result.plan.dense_costs["macs"]
    said = " ".join(result.report.notes)
    assert "dense again, since time was lost in the finished network: 1 (8 networks were timed" in said
    assert not isinstance(result.model[1], Factored)
    assert clock.timed[2] == {"as planned", "0", "1", "2", "3"}


def test_nothing_is_looked_for_where_the_network_gains_what_its_layers_do(monkeypatch):
    clock = Clock(monkeypatch, dict.fromkeys("0123", -1.5))
    result = compressed(clock)
    assert len(clock.timed) == 2
    assert len(factored(result)) == 4
    assert not any("dense again" in note for note in result.report.notes)


def test_what_differs_within_the_spread_is_left(monkeypatch):
    clock = Clock(monkeypatch, {"1": +0.5}, spread=0.5)
    monkeypatch.setattr(Clock, "samples", _noisy)
    assert len(factored(compressed(clock))) == 4
    assert len(clock.timed) == 3


def _noisy(self: Clock, model: nn.Module) -> tuple[float, ...]:
    """Load that hits other rounds of each network."""
    factored = [name for name, module in model.named_modules() if isinstance(module, Factored)]
    time, shift = 10.0 + sum(self.takes.get(name, self.each) for name in factored), 3 * len(factored)
    return tuple(time + self.spread * ((turn * 5 + shift) % 7 - 3) for turn in range(15))


def test_a_layer_that_the_budget_needs_stays_and_is_told(monkeypatch):
    clock = Clock(monkeypatch, {"1": +1.0})
    result = compressed(clock, "macs=10%")
    assert "1" in factored(result)
    assert any(
        "time is lost in the finished network, and the budget needs it: 1 (" in note for note in result.report.notes
    )


def test_many_layers_are_tried_in_groups_and_few_networks_are_timed(monkeypatch):
    clock = Clock(monkeypatch, {"7": +3.0}, each=-0.1)
    result = compressed(clock, layers=14)
    assert "7" not in factored(result)
    assert any("finished network: 7 (" in note for note in result.report.notes)
    built = sum(len(names) for names in clock.timed[2:])
    assert built <= measured._TRIALS + 2 + 2 + 2  # beside themselves: the plan, and what was put back


def test_a_network_slower_than_dense_is_refused_under_guard_alone(monkeypatch):
    clock = Clock(monkeypatch, dict.fromkeys("0123", 2.0))
    with pytest.raises(SlowerError, match=r"macs <= .*10% of dense.* is slower than dense here: 1[0-9.]+ ms for 10 ms, "
                                          r"run by eager at batch 4\. Ask for less") as refused:  # fmt: skip
        compressed(clock, "macs=10%")
    assert isinstance(refused.value, InfeasibleBudgetError)
    again = pickle.loads(pickle.dumps(refused.value))
    assert str(again) == str(refused.value)
    told = compressed(clock, "macs=10%", guard=False).report.notes
    assert any("SLOWER than dense" in note for note in told)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guard": True}, r"no smaller network could be had \(budget macs .*slower than dense here"),
        ({"cost": "latency", "guard": False}, r"no smaller network could be had \(budget latency .*slower than dense"),
    ],
)
def test_why_no_smaller_network_could_be_had_is_told(monkeypatch, options, said):
    """Rather than that none holds the tolerance."""
    result = compressed(Clock(monkeypatch, dict.fromkeys("0123", 2.0)), None, 2, min_agreement=0.01, **options)
    assert not result.plan.changed
    assert any(re.search(said, note) for note in result.report.notes)


def test_the_smallest_by_milliseconds_is_on_time(monkeypatch):
    """A network that misses its limit is none that holds, though it loses no more than it may."""
    result = compressed(Clock(monkeypatch, dict.fromkeys("0123", -0.02)), None, 2, min_agreement=0.01,
                        cost="latency", guard=False)  # fmt: skip
    assert not any("NOT met" in said for said in result.report.sentences)
    assert result.plan.changed or any("ms measured for" in note for note in result.report.notes)


class Noisy(Clock):
    """Noise hides what networks take, unless they are timed for longer."""

    def models(self, models, example, **options: object) -> dict[str, Timing]:
        quiet = options.get("least", 0.0) >= measured._SURELY
        times = super().models(models, example)
        noise = {name: 0.0 if quiet else sign * 5.0 for name, sign in zip(times, (1, -1), strict=False)}
        return {
            name: Timing(tuple(time + noise.get(name, 0.0) * (turn % 3 - 1) for turn, time in enumerate(each.samples)))
            for name, each in times.items()
        }


@pytest.mark.parametrize("takes", [+0.3, -0.3])
def test_a_network_whose_first_times_tell_nothing_is_timed_for_longer(monkeypatch, takes):
    clock = Noisy(monkeypatch, dict.fromkeys("0123", takes))
    if takes > 0:
        with pytest.raises(SlowerError, match=r"11\.2 ms for 10 ms"):
            compressed(clock, "macs=45%")
    else:
        assert compressed(clock, "macs=45%").report.measured["compressed"].samples == pytest.approx((8.8,) * 15)


def test_networks_that_are_timed_on_the_way_are_no_edited_plans(monkeypatch, caplog):
    compressed(Clock(monkeypatch, {"2": +1.0}))
    assert "dense again" in caplog.text
    assert "edited" not in caplog.text


def test_macs_and_milliseconds_that_disagree_are_flagged(monkeypatch):
    slow = Clock(monkeypatch, dict.fromkeys("0123", -0.1))
    notes = compressed(slow, "macs=40%", guard=False).report.notes
    assert any("MACs and milliseconds disagree: 40% of the MACs take 96% of the time in eager" in n for n in notes)
    quick = Clock(monkeypatch, dict.fromkeys("0123", -1.4))
    assert not any("disagree" in note for note in compressed(quick, "macs=40%", guard=False).report.notes)


def test_a_table_without_choices_for_some_sites():
    model = network(3)
    sites = st.group(st.find(model), {"pair": ["0", "1"]})
    table = st.tabulate(sites)
    left = table.dense_at(["1"])
    assert [row.site for row in left] == ["0", "1", "2"]
    assert len(left["1"].options) == 1
    assert left["2"] == table["2"]
    assert left.dense == table.dense
