"""The numbers behind the charts of a page: places in percent, error bars, bars that begin at zero."""

from __future__ import annotations

import math

import pytest

from spectrim.report import Comparison, Measure, Measured, Origin, Page, Score, charts, not_measured
from spectrim.report.charts import Axis
from spectrim.report.rank_charts import rank_charts, rank_rows
from spectrim.report.summary import rows, tiles
from spectrim.report.words import glossary
from tests.report.cases import plan, shared, table
from tests.report.test_ranks import run


@pytest.mark.parametrize(("value", "place"), [(1.0, 0), (100.0, 100), (10.0, 50), (1e9, 100), (0.1, 0)])
def test_a_logarithmic_axis_puts_equal_ratios_equally_far(value: float, place: float):
    assert Axis(1.0, 100.0, logarithmic=True).at(value) == place


@pytest.mark.parametrize(
    ("axis", "texts"),
    [
        (Axis(0, 100), ["0", "20", "40", "60", "80", "100"]),
        (Axis(89.3, 92.1), ["89.5", "90", "90.5", "91", "91.5", "92"]),
        (Axis(1e-6, 1.0, logarithmic=True), ["1e-6", "1e-4", "0.01", "1"]),
    ],
)
def test_ticks_are_round(axis: Axis, texts: list[str]):
    found = axis.ticks()
    assert [text for _, text in found] == texts
    assert all(axis.at(float(text)) == at for at, text in found)


def test_a_score_knows_its_standard_error():
    assert Score(90.0, 10_000).standard_error == pytest.approx(0.3)
    assert 0 < Score(100.0, 100).standard_error < 1  # a test of a hundred does not show that there is no error
    assert math.isnan(Score(90.0).standard_error)
    assert Score(Score(50.0, 7)).samples == 7


def test_noise_is_said_to_be_noise_and_a_loss_is_not():
    small, large = (Measure("accuracy", "%", Score(91.0, n), Score(90.0, n), "higher") for n in (500, 100_000))
    assert small.is_noise
    assert not large.is_noise
    assert small.spread.startswith(" (within noise, standard error 1.8")
    assert large.spread == " (standard error 0.13)"
    unknown = Measure("accuracy", "%", 91.0, 90.0, "higher")
    assert (unknown.is_noise, unknown.spread) == (False, "")
    for row, value in ((small, "within noise"), (large, "-1.00 points")):
        first, *_ = tiles(plan(table(["a"])), Comparison((row,)), None, stored=False)
        assert (first.name, first.value) == ("accuracy", value)
        assert first.detail.endswith(f" ({row.uncertainty})")


def test_gains_never_stand_alone():
    chosen = plan(table(["a", "b"]))
    first, *_ = tiles(chosen, None, None, stored=False)
    assert (first.name, first.value) == ("accuracy", "not measured")
    quick = Comparison((Measure("latency p50", "ms", 2.0, 1.0), Measure("MACs", "MAC", 2.0, 1.0)))
    assert next(iter(tiles(chosen, quick, None, stored=False))).value == "not measured"
    assert [row[0] for row in rows(chosen, quick, None)] == ["latency p50", "MACs"]
    assert next(iter(not_measured(quick, None))).startswith("Accuracy")


def test_scores_have_error_bars_within_the_axis():
    points = [Measured("dense", 100.0, Score(91.0, 400)), Measured("small", 40.0, Score(90.8, 400))]
    chart = charts.score_chart(points, 100.0, "macs", "accuracy")
    error = Score(points[0].score).standard_error
    assert chart.y.high - chart.y.low > 6 * error  # two equal networks look equal
    for dot in chart.dots:
        assert dot.barred
        assert 0 < dot.low < dot.y < dot.high < 100
        assert "on 400 samples" in dot.text
    tuned = charts.score_chart([*points, Measured("tuned", 40.0, 91.0)], 100.0, "macs", "")
    assert [dot.aside for dot in tuned.dots] == [0, 0, 9]
    bare = charts.score_chart([Measured("dense", 100.0, 91.0)], 100.0, "macs", "accuracy")
    assert not bare.dots[0].barred


@pytest.mark.parametrize("count", [1, 3, 300])
def test_the_network_has_a_bar_a_layer_from_zero(count: int):
    chosen = plan(table([f"layer{n}" for n in range(count)]), 0.8)
    bars = charts.network(chosen, "macs")
    assert [bar.name for bar in bars] == [*(entry.site for entry in chosen), "everything else"]
    assert max(bar.dense for bar in bars) == 100
    widest = max(500.0, *(entry.dense_costs["macs"] for entry in chosen))
    for bar, entry in zip(bars, chosen, strict=False):
        assert bar.kept == pytest.approx(100 * entry.costs["macs"] / widest, abs=0.01)
        assert bar.changed == (not entry.choice.is_dense)


def test_a_group_has_one_bar_and_one_panel():
    candidates = shared(["a", "b", "c"])
    chosen = plan(candidates)
    assert [bar.name for bar in charts.network(chosen, "macs")] == ["group of a", "c", "everything else"]
    panels = charts.spectra(candidates, chosen)
    assert [panel.name for panel in panels] == ["group of a", "c"]
    assert panels[0].cut is not None
    assert panels[0].curves[-1].tone == "height-first"


def test_ranks_that_stay_are_one_run():
    rows_ = rank_rows(run(4))
    assert [row.last for row in rows_] == ["16 of 16", "dense", "9 of 96"]
    assert [run_.steps for run_ in rows_[2].runs] == [3, 1]
    assert [run_.strength for run_ in rows_[2].runs] == [0, pytest.approx(math.sqrt(9 / 96), abs=0.01)]
    assert rows_[1].runs[-1].dense
    assert [chart.y_label for chart in rank_charts(run(4))] == [
        "cost, % of dense", "distance of weights to low rank", "metric of the low-rank copies",
    ]  # fmt: skip
    assert len(rank_charts(run(1, metric=False))) == 2


def test_words_are_those_that_occur():
    choices = ["width-first, rank 3", "channel, rank 4 + 5 % unstructured"]
    found = [word for word, _ in glossary("weighted output energy; 3 M MACs", choices, "exact")]
    assert found[:2] == ["MACs", "weighted output energy"]
    assert found[-1] == "exact"
    assert {"width-first", "rank r", "channel", "unstructured"} < set(found)
    assert not {"input", "output energy", "height-first", "greedy"} & set(found)
    assert [word for word, _ in glossary("output energy")] == ["output energy"]


def test_a_page_says_where_it_comes_from_and_escapes_it():
    origin = Origin(command="spectrim '<b>'", seeds={"training": 5}, load="model = '</pre>'")
    page = Page("Net", plan(table(["a"])), origin=origin).html()
    for words in (origin.date, "spectrim &#39;&lt;b&gt;&#39;", "training: 5", "&lt;/pre&gt;", "Not measured"):
        assert words in page
    assert page.index("The plan, layer by layer") < page.index("MACs by layer") < page.index("The plan as JSON")
    assert 'role="img" aria-label="' not in page  # no chart without a table


def test_every_dot_says_its_values_without_a_pointer():
    candidates = table(["a", "b"])
    page = Page("Net", plan(candidates), candidates).html()
    assert page.count('tabindex="0" role="img" aria-label="') == page.count('class="tip"') > 5


def test_the_predicted_curve_reaches_the_lowest_cost_with_groups_too():
    candidates = shared(["a", "b", "c"])
    points = charts.predicted(candidates)
    lowest = 500.0 + sum(min(o.costs["macs"] for o in row.options) for row in candidates.singles)
    assert points[0][0] == pytest.approx(lowest)
    assert points[-1][0] == candidates.dense["macs"]


def test_predicted_loss_falls_as_the_budget_grows():
    candidates = table(["a", "b", "c"])
    points = charts.predicted(candidates)
    cost, loss = zip(*points, strict=True)
    assert len(points) > 10
    assert list(loss) == sorted(loss, reverse=True)
    assert (cost[-1], loss[-1]) == (candidates.dense["macs"], 0.0)
    # The cheapest point is where every site takes its cheapest option.
    assert cost[0] == 500 + sum(row.options[1].costs["macs"] for row in candidates)


def test_cost_bars_show_each_site_and_the_rest():
    chosen = plan(table(["a", "b", "c"]))
    axes = chosen.plot("parameters")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c", "(all else)"]
    dense, now = axes.containers
    assert [bar.get_width() for bar in dense] == [*(e.dense_costs["parameters"] for e in chosen), 50.0]
    assert [bar.get_width() for bar in now] == [*(e.costs["parameters"] for e in chosen), 50.0]
    of_group = plan(shared(["a", "b", "c"])).plot("parameters")
    assert [label.get_text() for label in of_group.get_yticklabels()] == ["group of a", "c", "(all else)"]
    with pytest.raises(ValueError, match="no cost 'latency'"):
        chosen.plot("latency")
