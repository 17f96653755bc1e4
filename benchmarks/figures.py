"""Figures of the result files, as SVG."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.curves import LEARNED, PUBLISHED, Point, Result, curves, networks


@dataclass(frozen=True)
class Scheme:
    """Colours of a light or a dark page: of text, of lines that stand back, and of the series."""

    name: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, ...]


LIGHT = Scheme("", "#1d2733", "#6b7683", "#d5dae0", ("#2563c9", "#0f8a6d", "#8a3ffc", "#b5127d", "#c2410c"))
DARK = Scheme("-dark", "#e6e9ee", "#97a3b0", "#3d4650", ("#7db1ff", "#4fd1ae", "#c4a1ff", "#ff8bc8", "#ffa066"))

Draw = Callable[[Any, Scheme], None]


def figures(results: Sequence[Result]) -> dict[str, bytes]:
    """SVG files by name; those that stand on the page's own colour for light and for dark pages."""
    drawn: dict[str, tuple[Draw, tuple[float, float]]] = {}
    for name in networks(results):
        drawn[f"accuracy-{name}"] = (_accuracy(results, name), _ONE)
    timed = [row for result in results for row in result.get("rows", []) if "saved_ratio" in row]
    if timed:
        drawn["time-against-macs"] = (_times(timed), (4.8, 4.6))
    found: dict[str, bytes] = {}
    for result in results:
        rows = result.get("rows", [])
        if rows and {"arm", "batch_norm"} <= rows[0].keys():
            drawn["front-resnet20"] = (_neighbours(rows), _ONE)
        if rows and {"samples", "seen"} <= rows[0].keys():
            drawn["error-against-samples"] = (_samples(rows), (4.8, 7.2))
        if rows and "svd_over_greedy" in rows[0] and result["config"]["claimed"]:
            drawn["low-rank-step-speed"] = (_speed(rows), _ONE)
        if "trajectory" in result:
            found[f"{result['experiment'].replace('_', '-')}.svg"] = _rank_paths(result["trajectory"])
    for name, (draw, size) in drawn.items():
        for scheme in (LIGHT, DARK):
            found[f"{name}{scheme.name}.svg"] = _drawn(draw, size, scheme)
    if results:
        found |= {f"how-it-works{scheme.name}.svg": how_it_works(scheme) for scheme in (LIGHT, DARK)}
    return dict(sorted(found.items()))


def _neighbours(rows: Sequence[Mapping[str, Any]]) -> Draw:
    """Accuracy without training against MACs; of arms with several treatments of BatchNorm the best one."""
    best: dict[str, dict[float, float]] = {}
    for row in rows:
        arm = best.setdefault(row["arm"], {})
        arm[row["macs"]] = max(row["test_accuracy"], arm.get(row["macs"], 0.0))
    (_, dense), *_ = best.pop("dense").items()

    def draw(figure: Any, scheme: Scheme) -> None:
        axes = figure.subplots()
        axes.axhline(dense, color=scheme.faint, linewidth=1)
        axes.annotate(f"dense network, {dense:.1f} %", (8, dense), xytext=(0, 3), textcoords="offset points",
                      color=scheme.faint, fontsize=8)  # fmt: skip
        for (arm, points), colour, marker in zip(best.items(), scheme.series, "osv^D", strict=False):
            ours = arm == "Spectrim"
            xs, ys = zip(*sorted((x / 1e6, y) for x, y in points.items()), strict=True)
            axes.plot(xs, ys, marker=marker, color=colour, linewidth=2.4 if ours else 1.3,
                      markersize=6 if ours else 4.5, label=arm)  # fmt: skip
        axes.set_xlabel("work of one image, million multiply-accumulates")
        axes.set_ylabel("test accuracy, %")
        axes.legend(fontsize=8.5, frameon=False, loc="lower right")

    return draw


def _accuracy(results: Sequence[Result], network: str) -> Draw:
    def draw(figure: Any, scheme: Scheme) -> None:
        axes = figure.subplots()
        styles = zip(scheme.series, "os^v", strict=False)
        for label, points in curves(results, network).items():
            xs, ys = zip(*points, strict=True)
            if label == "dense":
                axes.axhline(ys[0], color=scheme.faint, linewidth=1, label=f"dense ({xs[0]:.1f} MMAC)")
            else:
                colour, marker = next(styles, (scheme.ink, "D"))
                axes.errorbar(xs, ys, yerr=[_standard_error(y) for y in ys], marker=marker, color=colour,
                              linewidth=1.2, elinewidth=0.8, markersize=4, label=label)  # fmt: skip
        xs, ys = zip(*PUBLISHED[network], strict=True)
        axes.plot(xs, ys, marker="x", color=scheme.series[4], linewidth=1, linestyle="--", markersize=5, label=LEARNED)
        axes.set_xlabel("MACs, million")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(f"{network.replace('resnet', 'ResNet-')}, CIFAR-10", fontsize=9)
        axes.legend(fontsize=7, frameon=False)

    return draw


def _standard_error(accuracy: float, images: int = 10_000) -> float:
    """Of an accuracy in percent on so many test images, in points."""
    return (accuracy * (100 - accuracy) / images) ** 0.5


def _times(rows: Sequence[Mapping[str, Any]]) -> Draw:
    def draw(figure: Any, scheme: Scheme) -> None:
        axes = figure.subplots()
        groups: dict[str, list[Point]] = {}
        for row in rows:
            name = f"{row['network']}, {row['size']} x {row['size']}, batch {row['batch']}"
            groups.setdefault(name, []).append((1 - 1 / row["macs_ratio"], 1 - 1 / row["time_ratio"]))
        for index, (name, points) in enumerate(sorted(groups.items())):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, marker="osv^D<>p"[index % 8], linewidth=0.8, markersize=4, label=name,
                      color=scheme.series[index % 5])  # fmt: skip
        axes.plot((0, 1), (0, 1), color=scheme.faint, linewidth=0.8)
        axes.plot((0, 1), (0, 0.8), color=scheme.faint, linewidth=0.8, linestyle="--", label="0.8 of the MACs saved")
        axes.set_xlim(0.3, 0.9)
        axes.set_ylim(0.1, 1.0)
        axes.set_xlabel("share of the MACs saved")
        axes.set_ylabel("share of the time saved")
        figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=2)

    return draw


def _samples(rows: Sequence[Mapping[str, Any]]) -> Draw:
    """Held-out error of the layers' responses against samples: a panel a layer, one below the other as on a phone."""
    methods = ("low rank + sparse", "sparse", "low rank", "GoDec")
    layers = list(dict.fromkeys(row["layer"] for row in rows))

    def draw(figure: Any, scheme: Scheme) -> None:
        panels = figure.subplots(len(layers), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, layer in zip(panels, layers, strict=True):
            mine = [row for row in rows if row["layer"] == layer]
            for method, colour in zip(methods, scheme.series, strict=False):
                points = sorted((r["samples"], r["error"]) for r in mine if r["method"] == method)
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.2,
                              label=method)  # fmt: skip
            axes.axvline(mine[0]["features"], color=scheme.faint, linewidth=0.8, linestyle="--")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{layer}, {mine[0]['features']} inputs (dashed)", fontsize=8)
        figure.axes[-1].set_xlabel("samples")
        figure.supylabel("share of the response energy lost, held out", fontsize=8.5)
        figure.axes[0].legend(fontsize=7, frameon=False)

    return draw


def _speed(rows: Sequence[Mapping[str, Any]]) -> Draw:
    def draw(figure: Any, scheme: Scheme) -> None:
        axes = figure.subplots()
        sizes = dict.fromkeys((row["outputs"], row["inputs"]) for row in rows)
        for (outputs, inputs), marker, colour in zip(sizes, "osv^", scheme.series, strict=False):
            mine = [row for row in rows if (row["outputs"], row["inputs"]) == (outputs, inputs)]
            for key, style in (("svd_over_greedy", "-"), ("eigh_over_greedy", ":")):
                what = "SVD" if key.startswith("svd") else "eigenvectors"
                axes.plot([100 * row["share"] for row in mine], [row[key] for row in mine], style, marker=marker,
                          color=colour, markersize=4, linewidth=1.2,
                          label=f"{outputs} x {inputs}, against {what}")  # fmt: skip
        axes.axhline(5, color=scheme.faint, linewidth=0.8, linestyle="--")
        axes.set_yscale("log")
        axes.set_xlabel("rank, % of the full one")
        axes.set_ylabel("times faster")
        axes.legend(fontsize=6, frameon=False)

    return draw


def _rank_paths(trajectory: Mapping[str, Any]) -> bytes:
    """The library's own figure: one for both schemes, on white."""
    from spectrim.report.ranks import rank_paths
    from spectrim.selection.trajectory import Trajectory

    return _saved(rank_paths(Trajectory.from_json(json.dumps(trajectory))))


_ONE = (4.8, 3.3)  # inches: as wide as a phone, where one point is a pixel


def _drawn(draw: Draw, size: tuple[float, float], scheme: Scheme) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor"), scheme.ink
    )
    with matplotlib.rc_context({"font.size": 8.5, "axes.edgecolor": scheme.faint, **colours}):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        FigureCanvasAgg(figure)
        draw(figure, scheme)
        for axes in figure.axes:
            axes.set_facecolor("none")
            axes.grid(color=scheme.grid, linewidth=0.5)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        return _saved(figure)


def _saved(figure: Any) -> bytes:
    """A figure as SVG; the same figure gives the same bytes."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "spectrim", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


# How it works: the five verbs, and what goes from one to the next.

_STEPS = (
    ("find", "which layers", "can change"),
    ("calibrate", "what they see", "on your data"),
    ("tabulate", "each option:", "error and cost"),
    ("select", "the best mix", "in the budget"),
    ("apply", "thinner layers,", "fitted in order"),
)


def how_it_works(scheme: Scheme) -> bytes:
    """Five boxes in a row, an arrow from each to the next."""
    width, gap, height = 132, 22, 96
    parts = []
    for index, (verb, *lines) in enumerate(_STEPS):
        x = index * (width + gap) + 1
        middle = x + width / 2
        parts.append(
            f'<rect x="{x}" y="1" width="{width}" height="{height}" rx="10" fill="none" stroke="{scheme.series[0]}" '
            f'stroke-width="2"/><text x="{middle}" y="31" font-size="19" font-weight="600">{verb}</text>'
            + "".join(
                f'<text x="{middle}" y="{56 + 21 * n}" font-size="16">{line}</text>' for n, line in enumerate(lines)
            )
        )
        if index + 1 < len(_STEPS):
            parts.append(
                f'<path d="M{x + width + 3} {height / 2} h{gap - 9} m-5 -5 l6 5 l-6 5" fill="none" '
                f'stroke="{scheme.faint}" stroke-width="2"/>'
            )
    whole = len(_STEPS) * (width + gap) - gap + 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {height + 2}" width="{whole}" '
        f'height="{height + 2}" role="img"><title>find, calibrate, tabulate, select, apply</title>'
        f'<g fill="{scheme.ink}" text-anchor="middle" font-family="system-ui, sans-serif">{"".join(parts)}</g></svg>\n'
    ).encode()
