"""Sets of methods compete: the best finished network is taken, and it is never worse than any single one."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim import tables
from spectrim.errors import InfeasibleBudgetError, PlanError
from spectrim.methods import ActivationSVD, LowRankPlusSparse, PrincipalFilters, WeightSVD
from spectrim.network.choices import ChannelsChoice, LowRankChoice
from spectrim.nn.agreement import Agreement
from spectrim.pipeline import shrinking
from spectrim.search.arms import HOPELESS, Arm, Contest, Tried, usual
from spectrim.search.judge import Verdict
from spectrim.search.standings import Standings
from spectrim.search.stepwise import Judging, TooMuchLostError
from spectrim.selection.plan import Entry, Plan
from spectrim.tables import default_methods, merged, parted

ARMS = [Arm("a"), Arm("b"), Arm("c")]


@dataclass(frozen=True)
class Draft:
    """A plan with one entry and a predicted loss."""

    plan: Plan


def draft(name: str, predicted: float = 1.0) -> Draft:
    """A plan of its own."""
    entry = Entry(name, "linear", LowRankChoice("channel", 1, method="svd"), 0.1, {"macs": 1.0}, {"macs": 2.0})
    return Draft(Plan((entry,), {"macs": 1.0}, {"macs": 2.0}, {}, loss=predicted))


def contest(losses: Mapping[str, float], predicted: Mapping[str, float] = MappingProxyType({}), **more: Any) -> Any:
    """Networks are names; what each loses is known."""
    return Contest(
        planned=lambda arm, trial: draft(arm.name, predicted.get(arm.name, 1.0)),
        made=lambda arm, draft: arm.name,
        judged=lambda name: Verdict(losses[name], 0.0, losses[name]),
        **more,
    )


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)).eval()


BATCHES = list(torch.randn(128, 12, generator=torch.Generator().manual_seed(0)).split(64))


def test_the_least_loss_wins_and_all_are_told() -> None:
    losses = {"a": 0.3, "b": 0.1, "c": 0.2}
    winner, tried = contest(losses).best(ARMS)
    assert winner == "b"
    assert {each.name: each.loss for each in tried} == losses
    assert [each.chosen for each in tried] == [False, True, False]
    assert str(tried[1]).endswith("; chosen")


@pytest.mark.parametrize("seed", range(5))
def test_the_winner_is_never_worse_than_any_network_that_was_made(seed: int) -> None:
    draw = random.Random(seed)
    losses, predicted = ({arm.name: draw.random() for arm in ARMS} for _ in range(2))
    winner, tried = contest(losses, predicted).best(ARMS)
    made = {each.name: each.loss for each in tried if each.loss < math.inf}
    assert losses[winner] == min(made.values())
    # What was not made is what its table calls hopeless.
    assert made.keys() == {name for name in predicted if predicted[name] <= HOPELESS * min(predicted.values())}


def test_a_refused_arm_is_a_note() -> None:
    def planned(arm: Arm, trial: Judging) -> Draft:
        if arm.name == "a":
            raise PlanError("it has no layer")
        return draft(arm.name)

    refusing = replace(contest({"b": 0.3, "c": 0.2}), planned=planned)
    winner, tried = refusing.best(ARMS)
    assert winner == "c"
    assert tried[0].loss == math.inf
    assert str(tried[0]) == "a: refused, it has no layer"
    with pytest.raises(PlanError, match="no layer"):
        refusing.best(ARMS[:1])


def test_an_arm_that_misses_the_budget_is_told_in_one_line() -> None:
    def planned(arm: Arm, most: float) -> Draft:
        if arm.name == "a":
            raise InfeasibleBudgetError("macs", 10.0, 30.0, 100.0, skipped=(("rnn", "LSTM", "recurrent", 0.3),))
        return draft(arm.name)

    _, tried = replace(contest({"b": 0.3, "c": 0.2}), planned=planned).best(ARMS)
    assert tried[0].note == "refused, budget macs <= 10 cannot be met: the lowest reachable is 30 (30.0% of dense 100)"


def test_a_budget_that_no_arm_meets_is_told_by_the_one_that_comes_closest() -> None:
    lowest = {"a": 30.0, "b": 20.0, "c": 25.0}

    def planned(arm: Arm, trial: Judging) -> Draft:
        raise InfeasibleBudgetError("macs", 10.0, lowest[arm.name], 100.0)

    with pytest.raises(InfeasibleBudgetError) as caught:
        replace(contest({}), planned=planned).best(ARMS)
    assert caught.value.lowest == 20.0


def test_what_is_hopeless_or_the_same_is_skipped_and_says_so() -> None:
    losses = {"a": 0.3, "b": 0.1, "c": 0.2}
    _, tried = contest(losses, {"a": 4.0, "b": 2.0, "c": 2.0 * HOPELESS}).best(ARMS)
    assert [each.note for each in tried] == ["skipped: its table predicts 2 times the loss of b", "", ""]
    same = replace(contest(losses), planned=lambda arm, trial: draft("same"))
    _, tried = same.best(ARMS)
    assert [each.note for each in tried] == ["", *2 * ["skipped: the same plan as a"]]

    def planned(arm: Arm, trial: Judging) -> Draft:
        if arm.name == "c":
            raise TooMuchLostError(7.0, trial.most)
        return draft(arm.name, 2.0)

    _, tried = replace(contest(losses), planned=planned).best(ARMS)
    assert tried[2].note == "skipped: its table predicts 3.5 times the loss of a"


def test_after_the_seconds_no_arm_is_begun_and_progress_says_what_is_tried() -> None:
    said: list[str] = []
    winner, tried = contest({"a": 1.0}).best(ARMS, seconds=0, progress=lambda what, done, total: said.append(what))
    assert winner == "a"
    assert [each.note for each in tried] == ["", "not tried, as 0 s were over", "not tried, as 0 s were over"]
    assert said == ["a: plan", "a: carry out"]


def test_what_removals_are_predicted_to_lose_rules_out_no_other_plan() -> None:
    removal = Entry("x:out", "channels", ChannelsChoice((0,), 2, (), method="filters"), 0.1, {}, {}, of_channels=True)

    def planned(arm: Arm, trial: Judging) -> Draft:
        plan = draft(arm.name, {"a": 290.0, "b": 310.0, "c": 1.0}[arm.name]).plan
        return Draft(replace(plan, entries=(*plan.entries, removal)) if arm.name == "c" else plan)

    winner, tried = replace(contest({"a": 0.3, "b": 0.1, "c": 0.2}), planned=planned).best(ARMS)
    assert winner == "b"
    assert all(each.loss < math.inf for each in tried)


def test_seconds_are_shared_by_planning_and_carrying_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("spectrim.search.arms.time.monotonic", lambda: now[0])

    def planned(arm: Arm, trial: Judging) -> Draft:
        now[0] += 2
        return draft(arm.name, {"a": 3.0, "b": 2.5}.get(arm.name, 1.0))

    def made(arm: Arm, draft: Draft) -> str:
        now[0] += 5
        return arm.name

    losses = {"a": 0.3, "b": 0.1, "c": 0.2}
    _, tried = replace(contest(losses), planned=planned, made=made).best(ARMS, seconds=8)
    # Two plans take half of the time, and the better one the rest.
    assert [each.note for each in tried] == ["not tried, as 8 s were over", "", "not tried, as 8 s were over"]
    assert [each.seconds for each in tried] == [2, 7, 0]
    assert now[0] == 9


def test_the_first_that_is_enough_ends_the_search() -> None:
    winner, tried = contest({"a": 0.3, "b": 0.2}, {"a": 1.1}, enough=lambda name: name == "b").best(ARMS[:2])
    assert winner == "b"
    assert tried[0].note == "not needed: another network is good enough"


def judged_on(*parts: float) -> Verdict:
    return Verdict(agreement=Agreement(len(parts), 0.1, 1.0, divergence=sum(parts) / len(parts), parts=parts))


def test_what_lost_no_more_by_chance_goes_to_the_simpler_network() -> None:
    verdicts = {
        "a": judged_on(0.1, 0.5, 0.3, 0.3),
        "b": judged_on(0.3, 0.2, 0.3, 0.3),
        "c": judged_on(0.4, 0.6, 0.4, 0.4),
    }
    size = {"a": 1.0, "b": 2.0, "c": 0.0}
    winner, tried = replace(contest({}, size=size.__getitem__), judged=verdicts.__getitem__).best(ARMS)
    # b lost less than a by chance; c, which is the simplest, lost more on every sample.
    assert winner == "a"
    assert tried[0].outcome == "chosen; b lost less, within the standard error, and is not simpler"
    assert "0.275 \u00b1 0.025" in str(tried[1])


@pytest.mark.parametrize(("seconds", "begun"), [(9, "aaaab"), (2, "aaaa")])
def test_a_plan_is_given_up_where_its_time_ends_but_the_first(
    seconds: int, begun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[str] = []
    monkeypatch.setattr("spectrim.search.arms.time.monotonic", lambda: float(len(layers)))

    def planned(arm: Arm, trial: Judging) -> Draft:
        for done in range(4):
            layers.append(arm.name)
            trial.ending()("tabulate", done + 1, 4)
        return draft(arm.name)

    winner, tried = replace(contest({"a": 1.0}), planned=planned).best(ARMS, seconds=seconds)
    assert winner == "a"
    assert "".join(layers) == begun
    assert [each.note for each in tried] == ["", *2 * [f"not tried, as {seconds} s were over"]]


def test_the_clock_is_looked_at_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers: list[str] = []
    curves = tables._curves

    def counted(site: Any, *args: Any) -> Any:
        layers.append(site.name)
        return curves(site, *args)

    monkeypatch.setattr(tables, "_curves", counted)
    monkeypatch.setattr("spectrim.search.arms.time.monotonic", lambda: float(len(layers)))
    convolutions = [layer for _ in range(3) for layer in (nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())]
    x = torch.randn(16, 6, 4, 4)
    result = st.compress(
        nn.Sequential(*convolutions).eval(), [x], "macs=50%", methods="auto", sensitivity=False, seconds=7
    )
    # Half of the time is over after the first layer's chains.
    assert layers == ["0", "2", "4", "0"]
    assert [arm.note for arm in result.report.arms] == ["", *3 * ["not tried, as 7 s were over"]]


def test_auto_shares_factors_where_parameters_are_limited() -> None:
    result = st.compress(network(), BATCHES, "parameters=50%", methods="auto", sensitivity=False, seconds=0)
    first, *others = result.report.arms
    assert first.name == "low rank, shared factors"
    assert first.loss < math.inf
    assert all("not tried" in arm.note for arm in others)


def test_auto_is_the_best_of_its_arms_and_prints_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrim.search.arms.HOPELESS", math.inf)
    model, budget = network(), "macs=50%"
    result = st.compress(model, BATCHES, budget, methods="auto", sensitivity=False)
    arms, agreement = result.report.arms, result.report.agreement
    assert [arm.name for arm in arms] == [arm.name for arm in usual(["macs"], result.sites)]
    assert agreement is not None
    made = [arm for arm in arms if arm.loss < math.inf]
    chosen = next(arm for arm in made if arm.chosen)
    assert agreement.divergence == chosen.loss
    # Less than the best by no more than chance.
    assert chosen.loss == min(arm.loss for arm in made) or "standard error" in chosen.note
    lines = str(result).splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("methods that competed"))
    assert [line.split("  ")[0] for line in lines[head + 2 : head + 2 + len(arms)]] == [arm.name for arm in arms]
    assert "chosen" in lines[head + 2 + arms.index(chosen)]
    assert result.plan.costs["macs"] <= 0.5 * result.plan.dense_costs["macs"]
    # An arm does what it does alone; without removals that rests on all samples, with them on those that are fitted.
    for arm, methods, close in (
        (arms[0], None, 0.1),
        (arms[-1], [PrincipalFilters(), ActivationSVD(), WeightSVD()], 1e-5),
    ):
        single = st.compress(model, BATCHES, budget, methods=methods, sensitivity=False)
        assert single.plan.loss == pytest.approx(arm.predicted, rel=close)
        if arm in made:
            assert single.report.agreement is not None
            assert single.report.agreement.divergence == pytest.approx(arm.loss, rel=10 * close)


def test_a_table_is_the_sum_of_its_methods() -> None:
    model = network()
    sites = st.calibrate(model, st.couple(model, st.find(model), BATCHES[0]), BATCHES)
    several = [ActivationSVD(), WeightSVD(), PrincipalFilters()]
    whole = st.tabulate(sites, several)
    again = merged([parted(whole, method.name) for method in several])
    assert again.rows == whole.rows
    assert again.fixed == pytest.approx(whole.fixed)
    low_rank = merged([parted(whole, method.name) for method in several[:2]])
    plain = st.tabulate(sites, several[:2])
    assert low_rank.rows == plain.rows
    assert low_rank.fixed == pytest.approx(plain.fixed)
    assert low_rank.methods == plain.methods


@functools.cache
def smallest() -> tuple[st.Result, list[tuple[bool, float]]]:
    """Of any set; and of each network on the way whether its set removes channels, and its multiplications."""
    carried: list[tuple[bool, float]] = []
    whole = shrinking.carried

    def noted(model: Any, prepared: Any, draft: Any) -> Any:
        carried.append((any(method.removes_channels for method in draft.making.methods), draft.plan.costs["macs"]))
        return whole(model, prepared, draft)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrinking, "carried", noted)
        return st.compress(network(), BATCHES, methods="auto", min_agreement=0.9, sensitivity=False), carried


def test_the_smallest_network_of_any_arm_holds_the_tolerance() -> None:
    model, (result, _) = network(), smallest()
    verdict = result.report.verdict
    assert verdict is not None
    assert verdict.agreed is not None
    assert verdict.agreed >= 0.9
    chosen = next(arm for arm in result.report.arms if arm.chosen)
    assert chosen.costs["macs"] == result.plan.costs["macs"] < result.plan.dense_costs["macs"]
    # No larger than what the default methods come to.
    alone = st.compress(model, BATCHES, min_agreement=0.9, sensitivity=False)
    assert result.plan.costs["macs"] <= 1.1 * alone.plan.costs["macs"]
    assert result.plan.costs["macs"] <= alone.plan.costs["macs"]
    over = st.compress(model, BATCHES, methods="auto", min_agreement=0.9, sensitivity=False, seconds=0)
    assert over.report.notes[0].startswith("no smaller network was tried, as 0 s were over")
    assert {arm.note for arm in over.report.arms} == {"not tried, as 0 s were over"}
    assert not any(arm.chosen for arm in over.report.arms)


def test_sets_compete_from_the_size_that_the_first_reached_on() -> None:
    """No other set makes a network that is larger; one that fell short is not asked for a smaller one."""
    result, carried = smallest()
    first = [macs for removes, macs in carried if not removes]
    others = [macs for removes, macs in carried if removes]
    reached = result.report.arms[0].costs["macs"]
    assert reached in first
    assert all(macs < reached for macs in others)
    assert carried == sorted(carried, key=lambda each: each[0])


def test_what_became_of_arms_over_several_sizes() -> None:
    standings = Standings(ARMS)
    standings.take([Tried("a", 0.1, chosen=True)], 50, holds=True)
    standings.take([Tried("b", 0.3, predicted=1.0), Tried("c", 0.2, predicted=1.0, chosen=True)], 40, holds=True)
    assert [arm.name for arm in standings.standing(30)] == ["c"]
    assert [arm.name for arm in standings.standing(45)] == ["b", "c"]
    told = standings.told([Tried("c", 0.2, chosen=True)], "")
    assert [each.outcome for each in told] == [
        "holds; another set holds with less", "does not hold the tolerance at this size", "chosen"
    ]  # fmt: skip


def test_a_row_says_the_seconds_that_were_asked_for() -> None:
    _, tried = contest({"a": 1.0}).best(ARMS, seconds=5, spent=5)
    assert tried[1].note == "not tried, as 5 s were over"


def test_the_arms_are_judged_by_the_metric_where_there_is_one() -> None:
    model = network()

    def few_layers(small: nn.Module) -> float:
        return -float(len(list(small.modules())))

    result = st.compress(model, BATCHES, "macs=50%", methods="auto", evaluate=few_layers, sensitivity=False)
    verdict = result.report.verdict
    assert verdict is not None
    assert verdict.drop == min(arm.loss for arm in result.report.arms)


def test_what_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="takes no groups=True"):
        st.compress(network(), BATCHES, "macs=50%", methods="auto", groups=True)
    with pytest.raises(ValueError, match="seconds is -1"):
        st.compress(network(), BATCHES, "macs=50%", methods="auto", seconds=-1)
    assert any(
        isinstance(method, LowRankPlusSparse) for method in usual(["bytes"], st.find(network()))[1].methods or ()
    )


def test_chains_compete_where_layers_have_kernels_and_time_that_was_not_measured_is_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
    ).eval()
    x = torch.randn(32, 3, 6, 6)
    assert "low rank, chains" not in [arm.name for arm in usual(["macs"], st.find(network()))]
    arms = usual(["macs"], st.find(model))
    assert [arm.name for arm in arms][:2] == ["low rank", "low rank, chains"]
    calibrated = st.calibrate(model, st.find(model), [x])
    default = default_methods(calibrated)
    # What the call offers by default is offered to every set but filters alone, which so cannot do worse for the lack.
    arms = {arm.name: arm.methods or () for arm in usual(["macs"], calibrated)}
    assert arms.pop("filters") == (st.PrincipalFilters(),)
    assert all(set(default) <= set(methods) for methods in arms.values())
    result = st.compress(model, [x], "macs=40%", methods=st.ActivationCP(evaluations=5))
    assert any("became chains of three or more thin layers" in note for note in result.report.notes)


def test_where_no_network_comes_the_simplest_arm_says_why() -> None:
    def planned(arm: Arm, trial: Judging) -> Draft:
        if arm.name == "c":
            raise PlanError("c cannot be planned")
        return draft(arm.name)

    def made(arm: Arm, draft: Draft) -> str:
        raise PlanError(f"{arm.name} cannot be made")

    with pytest.raises(PlanError, match="a cannot be made"):
        Contest(planned=planned, made=made, judged=lambda _: Verdict()).best(ARMS)
