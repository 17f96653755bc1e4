"""Plans and tables as people read them: short, in words, and true."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator

import pytest

from spectrim.network.choices import DENSE, LowRankChoice
from spectrim.network.skipped import Skipped
from spectrim.selection.candidates import Candidates, Option, Row, TableRows
from spectrim.selection.plan import Plan, make_plan
from spectrim.selection.trajectory import Record, Trajectory


def table(layers: int = 3) -> Candidates:
    """Layers of 2,000 MACs and 1,000 parameters that rank 4 halves, losing 1 %, and rank 2 quarters, losing 5 %."""
    rows = []
    for number in range(layers):
        options = [Option(DENSE, 0.0, {"macs": 2000.0, "parameters": 1000.0})]
        for rank, lost, share in ((4, 0.01, 0.5), (2, 0.05, 0.25), (3, 0.06, 0.4)):
            choice = LowRankChoice("width-first", rank, method="svd")
            options.append(Option(choice, lost, {"macs": 2000 * share, "parameters": 1000 * share}))
        rows.append(Row(f"block.{number}.conv", "Conv2d 3x3", tuple(options)))
    skipped = (Skipped("head", "Linear", "skipped on request", {"macs": 100.0}),)
    return Candidates(tuple(rows), {"macs": 100.0, "parameters": 60.0}, "output energy", skipped=skipped)


def plan(layers: int = 3) -> Plan:
    return make_plan(table(layers), [0] + [1] * (layers - 1), budget={"macs": 4500.0}, selector="exact", bound=0.01)


def lines(value: object) -> list[str]:
    return str(value).splitlines()


def words(value: object) -> list[str]:
    """Its lines, with one space between words."""
    return [" ".join(line.split()) for line in lines(value)]


def test_a_plan_prints_layers_choices_losses_costs_totals_and_what_is_left_alone() -> None:
    text = lines(plan())
    assert text[0] == "2 of 3 layers changed; 6.10 k -> 4.10 k MACs (67.2 %)"
    spoken = words(plan())
    changed = "width-first, rank 4 1.00 % 2.00 k -> 1.00 k 1.00 k -> 500"
    assert [line for line in spoken if line.startswith("block")] == [
        "block.0.conv dense 2.00 k 1.00 k", f"block.1.conv {changed}", f"block.2.conv {changed}",
    ]  # fmt: skip
    assert "whole network 6.10 k -> 4.10 k 3.06 k -> 2.06 k" in spoken
    assert "(all else) 100 60" in spoken
    assert "left alone: head (Linear): skipped on request" in text
    assert any(line.startswith("budget: MACs <= 4.50 k; chosen by exact: proven that no other choice") for line in text)
    assert any(line.startswith("width-first  ") for line in text)
    assert not any(line.startswith("channel  ") for line in text)
    assert max(map(len, text)) <= 96


def test_a_long_plan_is_folded_in_the_middle_and_adds_up() -> None:
    text = lines(plan(200))
    assert len(text) < 50
    assert "... 173 more see plan.rows() 346 k -> 173 k 173 k -> 86.5 k" in words(plan(200))
    assert any(line.startswith("block.199.conv") for line in text)


@pytest.mark.parametrize("value", [plan(200), table(200), table(200).rows[0], plan().entries[1], table().rows[0].dense])
def test_repr_is_one_short_line(value: object) -> None:
    assert "\n" not in repr(value)
    assert len(repr(value)) < 100


def test_plans_and_tables_are_read_by_name_and_have_a_length() -> None:
    chosen, candidates = plan(), table()
    assert len(chosen) == len(candidates) == 3
    assert [entry.site for entry in chosen] == [row.site for row in candidates]
    assert chosen["block.1.conv"].choice == LowRankChoice("width-first", 4, method="svd")
    assert "block.1.conv" in chosen
    assert "block.1.conv" in candidates
    assert "block.9.conv" not in chosen
    assert "block.9.conv" not in candidates


def test_rows_of_a_plan_are_plain_values() -> None:
    rows = plan().rows()
    assert rows[1] == {
        "layer": "block.1.conv", "kind": "Conv2d 3x3", "choice": "width-first, rank 4", "method": "svd", "lost": 0.01,
        "members": [], "macs": 1000.0, "macs_dense": 2000.0, "parameters": 500.0, "parameters_dense": 1000.0,
        "skipped": "",
    }  # fmt: skip
    assert rows[-1]["layer"] == "head"
    assert rows[-1]["skipped"] == "skipped on request"
    assert len({tuple(row) for row in rows}) == 1, "one set of keys, as a data frame needs"


def test_rows_of_a_table_are_a_tuple_and_called_plain_values() -> None:
    candidates = table()
    assert isinstance(candidates.rows, tuple)
    rows = candidates.rows()
    assert len(rows) == 12
    assert rows[1] == {
        "layer": "block.0.conv", "kind": "Conv2d 3x3", "choice": "width-first, rank 4", "method": "svd", "lost": 0.01,
        "members": [], "macs": 1000.0, "macs_dense": 2000.0, "parameters": 500.0, "parameters_dense": 1000.0,
    }  # fmt: skip
    again = pickle.loads(pickle.dumps(candidates))
    assert isinstance(again.rows, TableRows)
    assert again == candidates


def test_a_table_prints_what_remains_at_a_loss_and_a_row_what_is_worth_choosing() -> None:
    text = lines(table())
    assert text[0] == "9 choices for 3 layers"
    assert words(table())[4] == "block.0.conv Conv2d 3x3 3 2.00 k 1.00 k 50.0 % 25.0 %"
    row = str(table()["block.0.conv"])
    assert "rank 2" in row
    assert "rank 3" not in row, "rank 2 costs less and loses less"
    assert "not shown: 1 choice that others beat both in what is lost and in MACs" in row


def test_what_was_left_alone_is_not_in_a_plans_file() -> None:
    chosen = plan()
    again = Plan.from_json(chosen.to_json())
    assert again == chosen
    assert not again.skipped
    assert "skipped on request" not in chosen.to_json()


def test_a_trajectory_prints_a_line_a_step() -> None:
    records = tuple(
        Record(0.1 * n, {}, (n, 2), (f"rank {n}", "rank 2"), {"macs": 50.0 * n}, 1 / n, metric=90.0) for n in (1, 2, 3)
    )
    run = Trajectory(("a", "b"), (4, 4), {"macs": 200.0}, records=records)
    text = lines(run)
    assert text[0] == "3 C steps of 2 layers, the last 0 without a change"
    assert words(run)[4:6] == ["1 0.1 1 3 200 -> 50 90", "2 0.2 0.5 4 1 200 -> 100 90"]
    assert [row["changed"] for row in run.rows()] == [0, 1, 1]
    assert len(repr(run)) < 100


@pytest.fixture
def _closed() -> Iterator[None]:
    from matplotlib import pyplot

    yield
    pyplot.close("all")


@pytest.mark.usefixtures("_closed")
def test_plots_draw_on_given_axes_or_new_ones() -> None:
    from matplotlib.figure import Figure

    axes = plan().plot()
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "(all else)"
    mine = Figure().subplots()
    assert plan().plot("parameters", ax=mine) is mine
    assert mine.get_xlabel() == "parameters [k]"
    drawn = table().plot()
    assert len(drawn.lines) == 3
    assert list(drawn.lines[0].get_xdata()) == [50.0, 25.0], "the choices that no other one beats, dense left out"
    assert len(table(30).plot(layers=["block.1.conv", "block.2.conv"]).lines) == 2
    assert len(table(30).plot().lines) == 30
    with pytest.raises(ValueError, match="no cost 'joules' here; there are macs, parameters"):
        plan().plot("joules")
    with pytest.raises(KeyError, match="no site 'nothing' in the table"):
        table().plot(layers="nothing")


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for value in (plan(), table()):
        with pytest.raises(ModuleNotFoundError, match=r"plot\(\) needs matplotlib, which is not installed:"):
            value.plot()
