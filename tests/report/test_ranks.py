from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from PIL import Image, ImageSequence

from spectrim.report import Measured, animate_ranks, cost_curve, figures, rank_paths
from spectrim.selection.figures import DENSE, PLANNED
from spectrim.selection.trajectory import Record, Trajectory
from tests.report.cases import HOSTILE

FULL = (16, 48, 96)


def run(steps: int, names: tuple[str, ...] = ("conv1", "conv2", "conv3"), *, metric: bool = True) -> Trajectory:
    """Ranks that grow from 0, alternate, and end at 16 of 16, dense, and 9 of 96."""
    records = []
    for step in range(steps):
        last = step == steps - 1
        ranks = (16, 48, 9) if last else (min(step, 16), 4 + step % 2, 0)
        choices = ("channel 16", "dense", "channel 9") if last else tuple(f"channel {rank}" for rank in ranks)
        repeat = -(-len(names) // 3)
        records.append(
            Record(
                mu=0.01 * 1.6**step,
                multipliers={"macs": 1e-6},
                ranks=(ranks * repeat)[: len(names)],
                choices=(choices * repeat)[: len(names)],
                costs={"parameters": 30.0 + step, "bytes": 120.0, "macs": 400.0 + 10 * step},
                distance=0.9**step,
                metric=50.0 + step if metric else None,
            )
        )
    full = (FULL * -(-len(names) // 3))[: len(names)]
    return Trajectory(names, full, {"parameters": 100.0, "bytes": 400.0, "macs": 1000.0}, {}, tuple(records))


def _mesh(figure):
    return figure.axes[0].collections[0]


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_the_map_holds_rank_by_full_rank(steps: int):
    learned = run(steps)
    shares = np.asarray(_mesh(rank_paths(learned)).get_array())
    assert shares.shape == (3, steps)
    for step, record in enumerate(learned.records):
        assert shares[:, step] == pytest.approx([r / full for r, full in zip(record.ranks, FULL, strict=True)])


def test_dense_and_zero_have_colours_of_their_own():
    figure = rank_paths(run(4))
    mesh, dense = figure.axes[0].collections[:2]
    for cells in (mesh, dense):
        cells.update_scalarmappable()
    colours = mesh.get_facecolors().reshape(3, 4, 4)
    left = dense.get_facecolors().reshape(3, 4, 4)
    assert to_hex(colours[2, 0]) == "#ffffff"
    assert to_hex(colours[2, 3]) != "#ffffff"
    # Grey covers the one cell left dense, and not the site at its full rank.
    assert to_hex(left[1, 3]) == DENSE
    assert (left[..., 3] > 0).sum() == 1
    # Higher is darker.
    light = [sum(mesh.cmap(mesh.norm(share))[:3]) for share in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)]
    assert light == sorted(light, reverse=True)
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert (words[0], words[-1]) == ("rank 0", "left dense")
    assert figure.axes[0].child_axes[0].get_yticklabels()[1].get_text() == "dense"
    assert figure.axes[0].child_axes[0].get_yticklabels()[2].get_text() == "9 / 96"


def test_the_panels_below_show_costs_distance_and_metric():
    learned = run(5)
    _, costs, distance, metric = rank_paths(learned).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in costs.lines}
    assert drawn["MACs"] == pytest.approx([100 * record.costs["macs"] / 1000 for record in learned.records])
    assert drawn["parameters"] == pytest.approx([record.costs["parameters"] for record in learned.records])
    assert "size" not in drawn
    assert distance.get_yscale() == "log"
    assert list(distance.lines[0].get_ydata()) == [record.distance for record in learned.records]
    assert list(distance.lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert list(metric.lines[0].get_ydata()) == [50, 51, 52, 53, 54]
    assert len(rank_paths(run(5, metric=False)).axes) == 3


def test_a_budget_is_a_dashed_line_and_the_only_cost():
    learned = dataclasses.replace(run(5), budget={"bytes": 160.0})
    costs = rank_paths(learned).axes[1]
    labels = {line.get_label(): list(line.get_ydata()) for line in costs.lines}
    assert labels["size (budget 40 %)"] == [30.0] * 5
    assert "MACs" not in labels
    (limit,) = (line for line in costs.lines if line.is_dashed())
    assert list(limit.get_ydata()) == [40.0, 40.0]


def test_a_cost_with_a_multiplier_is_shown_and_one_that_dense_does_not_have_is_not():
    learned = run(2)
    records = tuple(
        dataclasses.replace(r, multipliers={"latency": 0.1}, costs={**r.costs, "latency": 1.5}) for r in learned.records
    )
    measured = dataclasses.replace(
        learned, records=records, dense_costs={"parameters": 100.0, "macs": 0.0, "latency": 2.0}
    )
    labels = [line.get_label() for line in rank_paths(measured).axes[1].lines]
    assert labels[1:] == ["latency", "parameters"]


def test_mu_is_written_above_the_c_steps():
    learned = run(50)
    figure = rank_paths(learned)
    figure.draw_without_rendering()
    above = figure.axes[0].child_axes[1]
    steps = [int(label.get_text()) for label in figure.axes[-1].get_xticklabels()]
    assert steps == [1, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50]
    words = [label.get_text() for label in above.get_xticklabels()]
    assert words == [f"{learned.records[step - 1].mu:.2g}" for step in steps]


@pytest.mark.parametrize(("steps", "ticks"), [(1, 1), (2, 2), (10, 10), (11, 6), (60, 7), (1000, 11)])
def test_ticks_are_few(steps: int, ticks: int):
    from spectrim.report.rank_panels import step_ticks

    found = step_ticks(steps)
    assert len(found) == ticks
    assert found[0] == 1
    assert found[-1] <= steps


def test_a_network_left_dense_throughout_has_no_distance_to_draw():
    learned = run(3)
    still = dataclasses.replace(learned.records[0], distance=0.0, ranks=FULL, choices=("dense",) * 3)
    figure = rank_paths(dataclasses.replace(learned, records=(still, still)))
    assert [text.get_text() for text in figure.axes[2].texts] == ["0 at every C step"]
    assert figures.to_svg(figure)


def test_many_sites_make_a_picture_of_moderate_size_without_formulas():
    figure = rank_paths(run(20, tuple(f"layer{n // 8}.{n}.conv" for n in range(30))))
    assert len(figures.to_svg(figure)) < 250_000
    ticks = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels(which="both")]
    assert "layer3.29.conv" in ticks
    assert not any("$" in tick for tick in ticks)


def test_the_same_trajectory_gives_the_same_bytes():
    assert figures.to_svg(rank_paths(run(2))) == figures.to_svg(rank_paths(run(2)))


def test_hostile_names_are_drawn_as_they_are(tmp_path: Path):
    learned = run(2, tuple(HOSTILE))
    assert b"<script" not in figures.to_svg(rank_paths(learned))
    assert animate_ranks(learned, tmp_path / "r.gif").stat().st_size > 1000


def test_a_trajectory_without_a_c_step_is_refused(tmp_path: Path):
    empty = dataclasses.replace(run(1), records=())
    with pytest.raises(ValueError, match="no C step to draw"):
        rank_paths(empty)
    with pytest.raises(ValueError, match="no C step to draw"):
        animate_ranks(empty, tmp_path / "r.gif")
    assert not list(tmp_path.iterdir())


def _gif(path: Path) -> tuple[list[np.ndarray], list[int]]:
    with Image.open(path) as image:
        found = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    return [pixels for pixels, _ in found], [duration for _, duration in found]


def _share_of(pixels: np.ndarray, colour: str) -> float:
    return float((pixels == np.round(255 * np.array(to_rgb(colour)))).all(axis=-1).mean())


def test_the_animation_has_a_frame_a_c_step(tmp_path: Path):
    path = animate_ranks(run(12), tmp_path / "r.gif", seconds=3.0)
    frames, durations = _gif(path)
    assert path == tmp_path / "r.gif"
    assert len(frames) == 12
    assert durations == [200] * 11 + [800]
    # The first site grows by a rank a step, so more and more is blue; the last step has a site left dense.
    blue = [_share_of(frame, PLANNED) for frame in frames]
    assert blue[1] < blue[5] < blue[10]
    grey = [_share_of(frame, DENSE) for frame in frames]
    assert grey[-1] > 5 * grey[0] > 0
    # The ground is white: a palette that is not made for the picture would tint it.
    assert all((frame[0, 0] == 255).all() for frame in frames)


def test_bars_reach_the_ranks_of_their_step(tmp_path: Path):
    frames, _ = _gif(animate_ranks(run(12), tmp_path / "r.gif"))
    height = [(frame == np.round(255 * np.array(to_rgb(PLANNED)))).all(axis=-1) for frame in frames]
    # Columns of the first site lie where only it is blue, within the left third; rank 10 is twice as high as rank 5.
    third = frames[0].shape[1] // 3
    tall = [mask[:, :third].sum(axis=0).max() for mask in height]
    assert tall[0] <= 1
    assert tall[10] == pytest.approx(2 * tall[5], abs=2)


@pytest.mark.slow
def test_a_long_run_of_many_sites_stays_small(tmp_path: Path):
    names = tuple(f"layer{n // 8}.{n}.conv" for n in range(20))
    path = animate_ranks(run(90, names), tmp_path / "r.gif")
    frames, _ = _gif(path)
    assert len(frames) == 80
    assert path.stat().st_size < 400_000


def test_one_c_step_is_a_still_picture(tmp_path: Path):
    with Image.open(animate_ranks(run(1), tmp_path / "r.gif")) as image:
        assert image.format == "GIF"
        assert getattr(image, "n_frames", 1) == 1


def test_animations_are_gifs_of_a_positive_duration(tmp_path: Path):
    with pytest.raises(ValueError, match="ends in .gif, not 'r.mp4'"):
        animate_ranks(run(2), tmp_path / "r.mp4")
    with pytest.raises(ValueError, match="seconds=0 must be positive"):
        animate_ranks(run(2), tmp_path / "r.gif", seconds=0)


def test_the_curve_shows_points_in_rising_cost_and_dense_in_grey():
    points = [Measured("43 %", 17.4e6, 91.5), Measured("22 %", 9e6, 88.0), Measured("65 %", 26.4e6, 91.9)]
    figure = cost_curve(points, Measured("dense", 40.6e6, 91.7))
    (axes,) = figure.axes
    line, level, dense = axes.lines
    assert list(line.get_xdata()) == pytest.approx([9.0, 17.4, 26.4])
    assert list(line.get_ydata()) == [88.0, 91.5, 91.9]
    assert dense.get_xdata()[0] == pytest.approx(40.6)
    assert {level.get_color(), dense.get_color()} == {DENSE}
    assert axes.get_xlabel() == "MACs [M]"
    words = [text.get_text() for text in axes.texts]
    assert words == ["22 %\n88.00 %", "43 %\n91.50 %", "65 %\n91.90 %", "dense\n91.70 %"]
    assert not any("$" in tick.get_text() for tick in axes.get_xticklabels(which="both"))
    assert figures.to_svg(figure)


def test_a_curve_needs_points_of_positive_cost():
    (axes,) = cost_curve([Measured("fast", 2.5, 90.0)], cost="latency").axes
    assert len(axes.lines) == 1
    assert axes.get_xlabel() == "latency [ms]"
    with pytest.raises(ValueError, match="no points"):
        cost_curve([])
    with pytest.raises(ValueError, match="cost 0 of 'gone' must be positive"):
        cost_curve([Measured("gone", 0, 10.0)])


@pytest.mark.parametrize("costs", [(5.1e6, 5.3e6), (1e5, 9e6), (3e6,)])
def test_a_curve_has_round_ticks_whatever_it_spans(costs: tuple[float, ...]):
    (axes,) = cost_curve([Measured("m", cost, 90.0) for cost in costs]).axes
    low, high = axes.get_xlim()
    ticks = axes.get_xticks()
    assert len(ticks) >= 3
    assert all(low <= tick <= high for tick in ticks)
    assert all(len(label.get_text()) <= 5 for label in axes.get_xticklabels())
