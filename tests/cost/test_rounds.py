from __future__ import annotations

import pytest
import torch

from spectrim.cost import rounds
from spectrim.cost.rounds import Rounds, Speed, Timing, torch_threads


class Machine:
    """A clock and a count of preemptions that a test moves."""

    def __init__(self) -> None:
        self.seconds, self.preempted = 0.0, 0

    def perf_counter(self) -> float:
        return self.seconds

    def work(self, milliseconds: float, preempted: int = 0) -> None:
        self.seconds += milliseconds / 1e3
        self.preempted += preempted


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(rounds, "time", machine)
    monkeypatch.setattr(rounds, "preemptions", lambda: machine.preempted)
    return machine


def test_undisturbed_samples_are_preferred() -> None:
    assert Timing((1, 2, 9, 3), (0, 0, 5, 0)).undisturbed() == [1, 2, 3]
    assert Timing((1, 2, 9, 8), (0, 0, 5, 6)).undisturbed() == [1, 2, 9]
    assert Timing((1, 2, 3, 4), (1, 1, 1, 1)).undisturbed() == [1, 2, 3, 4]
    assert Timing((4, 5), (3, 0)).undisturbed() == [4, 5]
    assert Timing((4, 5, 6, 7)).undisturbed() == [4, 5, 6, 7]


def test_quantiles() -> None:
    timing = Timing(tuple(float(n) for n in range(10, 0, -1)))
    assert timing.p50 == 5.5
    assert timing.p90 == 9.0
    assert timing.quiet == 5.5
    assert Timing((2.0,)).p90 == Timing((2.0,)).p50 == 2.0
    assert Timing((1.0,) * 5 + (9.0,) * 6, (0,) * 5 + (3,) * 6).quiet == 1.0


def test_times_are_taken_by_round_and_those_of_the_warm_up_are_forgotten(machine: Machine) -> None:
    turns, seen = Rounds(2, warmup=2), []
    for turn in turns:
        seen.append(turn)
        for key in ("a", "b"):
            turns.begin(key)
            machine.work(10 * (turn + 3) + (key == "b"), preempted=turn if key == "b" else 0)
            turns.end(key)
            machine.work(100)
    assert seen == [-2, -1, 0, 1]
    assert turns["a"].samples == pytest.approx((30, 40))
    assert turns["b"].samples == pytest.approx((31, 41))
    assert (turns["a"].preempted, turns["b"].preempted) == ((0, 0), (0, 1))
    assert "a" in turns
    assert "c" not in turns


def test_what_is_timed_twice_in_a_round_adds_up(machine: Machine) -> None:
    turns = Rounds(2)
    for turn in turns:
        for _ in range(2):
            turns.begin("layer")
            machine.work(5 + turn, preempted=1)
            turns.end("layer")
    assert turns["layer"].samples == pytest.approx((10, 12))
    assert turns["layer"].preempted == (2, 2)


def test_a_time_that_was_measured_otherwise_is_taken_as_it_is(machine: Machine) -> None:
    turns = Rounds(1)
    for _ in turns:
        turns.begin("block")
        machine.work(50, preempted=3)
        turns.end("block", 2.5)
    assert turns["block"] == Timing((2.5,), (3,))


@pytest.mark.parametrize(("disturbed", "taken"), [(0, 4), (2, 5), (4, 7), (100, 12)])
def test_more_rounds_are_taken_until_enough_are_undisturbed(machine: Machine, disturbed: int, taken: int) -> None:
    turns = Rounds(4, most=12)
    for turn in turns:
        turns.begin("one")
        machine.work(1, preempted=turn < disturbed)
        turns.end("one")
    assert len(turns["one"].samples) == taken
    assert turns.is_settled("one") == (disturbed < 100)
    assert not turns.is_settled("another")


@pytest.mark.parametrize(("budget", "taken"), [(0.0, 3), (2.5, 3), (4.5, 5), (100.0, 9)])
def test_no_round_is_begun_beyond_the_budget_but_the_first_three(machine: Machine, budget: float, taken: int) -> None:
    assert sum(machine.work(1000) is None for _ in Rounds(9, budget=budget)) == taken


@pytest.mark.parametrize(("least", "taken"), [(0.0, 4), (2.5, 4), (6.0, 6), (100.0, 12)])
def test_rounds_go_on_for_the_least_seconds(machine: Machine, least: float, taken: int) -> None:
    assert sum(machine.work(1000) is None for _ in Rounds(4, most=12, least=least)) == taken


def test_the_number_of_threads_is_set_and_restored() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with torch_threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def drawn(generator: torch.Generator, factor: float, noise: float, count: int = 30) -> tuple[Timing, Timing]:
    """Times of two things of which the first takes so many times as long, under load that both see and their own."""
    load = torch.randn(count, generator=generator).mul(noise).exp()
    own = torch.randn(2, count, generator=generator).mul(noise / 3).exp() * load
    return Timing(tuple((factor * own[0]).tolist())), Timing(tuple(own[1].tolist()))


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_things_that_take_the_same_time_do_not_differ(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    found = [Speed.of(*drawn(generator, 1.0, noise)) for _ in range(400)]
    # One in a hundred may, by the interval alone.
    assert sum(speed.differs for speed in found) <= 10
    assert all(speed.low <= speed.ratio <= speed.high for speed in found)
    assert str(next(speed for speed in found if not speed.differs)).startswith("no difference (")


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (Speed(1.0, 0.9, 1.1), "no difference"),
        (Speed(1.5, 1.2, 1.8), "1.50x"),
        (Speed(3.0, 0.3, 7.0), "too noisy to tell"),
        (Speed(3.0, 0.3, 7.0, equal=True), "no difference"),
    ],
)
def test_a_wide_interval_is_no_sign_that_there_is_no_difference(speed: Speed, words: str) -> None:
    assert speed.words == words


@pytest.mark.parametrize(("ratio", "words"), [(1.4, "1.40x"), (53.4, "too noisy to tell"), (0.02, "too noisy to tell")])
def test_a_quantile_that_a_busy_machine_moved_is_no_gain(ratio: float, words: str) -> None:
    assert Speed(1.19, 1.15, 1.24).words_of(ratio) == words
    assert Speed(1.0, 0.9, 1.1).words_of(ratio) == "no difference"


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_what_takes_twice_as_long_differs(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    found = [Speed.of(*drawn(generator, factor, 0.1)) for _ in range(50)]
    assert all(speed.differs and speed.low <= factor <= speed.high for speed in found[:20])
    assert str(found[0]).startswith(f"{found[0].ratio:.2f}x (")
    assert not Speed.of_equals(*drawn(generator, factor, 0.1)).differs


def test_rounds_in_which_either_was_disturbed_are_left_out_while_there_are_enough() -> None:
    first = Timing((2.0,) * 20 + (90.0,) * 5, (0,) * 20 + (4,) * 5)
    second = Timing((1.0,) * 18 + (70.0,) * 7, (0,) * 18 + (9,) * 7)
    assert Speed.of(first, second) == Speed(2.0, 2.0, 2.0)


def test_one_round_is_its_own_spread() -> None:
    assert Speed.of(Timing((3.0,)), Timing((2.0,))) == Speed(1.5, 1.5, 1.5)
