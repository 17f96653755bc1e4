from __future__ import annotations

import base64
from xml.etree import ElementTree

import pytest

from spectrim.report import Score, figures
from spectrim.report.figures import Measured
from spectrim.selection.candidates import Candidates, Row
from tests.report.cases import plan, shared, sums, table

HOSTILE = ["<script>alert(1)</script>", "a $\\frac{x$ & 'b' \"c\"", "layer.{{ 7 * 7 }}.$_^"]


@pytest.mark.table(every=2)
@pytest.mark.parametrize("count", [1, 3, 5, 40])
def test_spectra_have_a_panel_a_site(count: int):
    candidates = table([f"layer{i}.conv" for i in range(count)])
    figure = figures.spectra(candidates, plan(candidates))
    assert len(figure.axes) == count
    assert [axes.get_title(loc="left") for axes in figure.axes] == [row.site for row in candidates]


def test_spectra_mark_the_rank_the_plan_chose():
    candidates = table(["conv", "other"])
    chosen = plan(candidates)
    figure = figures.spectra(candidates, chosen)
    for axes, entry in zip(figure.axes, chosen, strict=True):
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_color() == figures.CHOSEN]
        words = [text.get_text() for text in axes.texts]
        if entry.choice.is_dense:
            assert marks == []
            assert words == ["dense"]
        else:
            assert marks == [entry.choice["rank"]]
            assert words == [str(entry.choice).replace(", ", "\n")]
    without = figures.spectra(candidates)
    assert not any(axes.texts for axes in without.axes)


def test_sites_without_spectra_are_left_out():
    (row,) = table(["conv"]).rows
    bare = Row("bare", row.kind, row.options)
    figure = figures.spectra(Candidates((row, bare), {"macs": 0.0, "parameters": 0.0}, ""))
    assert len(figure.axes) == 1
    assert figures.spectra(Candidates((bare,), {"macs": 0.0, "parameters": 0.0}, "")).texts


def test_layers_that_share_have_one_panel_and_one_bar():
    candidates = shared(["a", "b", "c"])
    chosen = plan(candidates)
    assert chosen["a"].members == ("a", "b")
    figure = figures.spectra(candidates, chosen)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["group of a", "c"]
    first = figure.axes[0]
    assert [text.get_text() for text in first.texts] == [str(chosen["a"].choice).replace(", ", "\n")]
    # Separate plans have a panel for each layer, and none for the group that they do not use.
    separate = plan(table(["a", "b", "c"]))
    assert [axes.get_title(loc="left") for axes in figures.spectra(candidates, separate).axes] == ["a", "b", "c"]
    assert len(figures.spectra(candidates).axes) == 4

    (axes,) = figures.costs(chosen, "parameters").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["group of a", "c", "(all else)"]
    dense, _ = axes.containers
    assert sum(bar.get_width() for bar in dense) == candidates.dense["parameters"]


def test_the_predicted_curve_reaches_the_lowest_cost_with_groups_too():
    candidates = shared(["a", "b", "c"])
    points = figures.predicted(candidates)
    lowest = 500.0 + sum(min(o.costs["macs"] for o in row.options) for row in candidates.singles)
    assert points[0][0] == pytest.approx(lowest)
    assert points[-1][0] == candidates.dense["macs"]


def test_spectra_say_what_is_sparse_and_cut_nothing_at_rank_0():
    candidates, chosen = sums([(4, 0.05, "unstructured"), (0, 0.5, "2:4"), (3, 0.0, "rows")])
    figure = figures.spectra(candidates, chosen)
    words = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert words == [["channel\nrank 4\n+ 5 % unstructured"], ["50 % 2:4"], ["channel\nrank 3"]]
    marks = [[line for line in axes.lines if line.get_color() == figures.CHOSEN] for axes in figure.axes]
    assert [len(found) for found in marks] == [1, 0, 1]
    # A spectrum that nothing is taken of is pale.
    colours = [axes.lines[0].get_color() for axes in figure.axes]
    assert colours == [figures.PLANNED, figures.PALE, figures.PLANNED]
    alone = figures.spectra(*sums([(0, 0.2, "unstructured")]))
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["candidates"]


def test_cost_bars_show_each_site_and_the_rest():
    candidates = table(["a", "b", "c"])
    chosen = plan(candidates)
    (axes,) = figures.costs(chosen, "parameters").axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["a", "b", "c", "(all else)"]
    dense, now = axes.containers
    assert [bar.get_width() for bar in dense] == [*(e.dense_costs["parameters"] for e in chosen), 50.0]
    assert [bar.get_width() for bar in now] == [*(e.costs["parameters"] for e in chosen), 50.0]
    with pytest.raises(ValueError, match="no cost 'latency'"):
        figures.costs(chosen, "latency")


def test_predicted_loss_falls_as_the_budget_grows():
    candidates = table(["a", "b", "c"])
    points = figures.predicted(candidates)
    cost, loss = zip(*points, strict=True)
    assert len(points) > 10
    assert list(loss) == sorted(loss, reverse=True)
    assert (cost[-1], loss[-1]) == (candidates.dense["macs"], 0.0)
    # The cheapest point is where every site takes its cheapest option.
    assert cost[0] == 500 + sum(row.options[1].costs["macs"] for row in candidates)


def test_tradeoff_has_a_panel_more_for_measured_scores():
    candidates = table(["a", "b"])
    chosen = plan(candidates)
    assert len(figures.tradeoff(candidates, chosen).axes) == 1
    points = [Measured("dense", candidates.dense["macs"], 90.0), Measured("tuned", chosen.costs["macs"], 89.5)]
    above, _ = figures.tradeoff(candidates, chosen, measured=points).axes
    assert [text.get_text() for text in above.texts] == ["dense: 90.00 %", "tuned: 89.50 %"]
    assert above.lines[0].get_xdata()[0] == 100
    assert not above.collections
    # Scores that know their samples have error bars.
    points = [Measured("dense", candidates.dense["macs"], Score(90.0, 100))]
    (bar,) = figures.tradeoff(candidates, chosen, measured=points).axes[0].collections
    (ends,) = bar.get_segments()
    assert ends[:, 1].tolist() == [90.0 - 3.0, 90.0 + 3.0]


def test_no_tick_is_a_formula():
    candidates = table(["a", "b"])
    for figure in (figures.tradeoff(candidates), figures.spectra(candidates), figures.costs(plan(candidates))):
        figures.to_svg(figure)
        ticks = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels(which="both")]
        assert any(ticks)
        assert not any("$" in tick for tick in ticks)


def test_hostile_names_are_drawn_as_they_are():
    candidates = table(HOSTILE)
    chosen = plan(candidates)
    for figure in (
        figures.spectra(candidates, chosen),
        figures.costs(chosen),
        figures.tradeoff(candidates, chosen, measured=[Measured(HOSTILE[1], 100.0, 5.0)]),
    ):
        raw = figures.to_svg(figure)
        root = ElementTree.fromstring(raw)
        assert root.tag.endswith("svg")
        assert b"<script" not in raw
    assert base64.b64decode(figures.to_data_uri(figure).partition(",")[2]).startswith(b"<?xml")


def test_the_same_figure_gives_the_same_bytes():
    candidates = table(["a", "b"])
    assert figures.to_svg(figures.costs(plan(candidates))) == figures.to_svg(figures.costs(plan(candidates)))
