"""Figures of the result files, as SVG."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.curves import LEARNED, PUBLISHED, Point, Result, curves, networks


def figures(results: Sequence[Result]) -> dict[str, bytes]:
    """SVG files by name."""
    found = {f"accuracy-{name}.svg": _accuracy(results, name) for name in networks(results)}
    timed = [row for result in results for row in result.get("rows", []) if "saved_ratio" in row]
    if timed:
        found["time-against-macs.svg"] = _times(timed)
    for result in results:
        rows = result.get("rows", [])
        if rows and {"samples", "seen"} <= rows[0].keys():
            found["error-against-samples.svg"] = _samples(rows)
        if rows and "svd_over_greedy" in rows[0] and result["config"]["claimed"]:
            found["low-rank-step-speed.svg"] = _speed(rows)
        if "trajectory" in result:
            found[f"{result['experiment'].replace('_', '-')}.svg"] = _rank_paths(result["trajectory"])
    return found


def _accuracy(results: Sequence[Result], network: str) -> bytes:
    def draw(axes: Any) -> None:
        styles = iter((("#2563c9", "o"), ("#0f8a6d", "s"), ("#8a3ffc", "^"), ("#b5127d", "v")))
        for label, points in curves(results, network).items():
            xs, ys = zip(*points, strict=True)
            if label == "dense":
                axes.axhline(ys[0], color="#a3adb8", linewidth=1, label=f"dense ({xs[0]:.1f} MMAC)")
            else:
                colour, marker = next(styles, ("#1d2733", "D"))
                axes.plot(xs, ys, marker=marker, color=colour, linewidth=1.2, markersize=4, label=label)
        xs, ys = zip(*PUBLISHED[network], strict=True)
        axes.plot(xs, ys, marker="x", color="#d9480f", linewidth=1, linestyle="--", markersize=5, label=LEARNED)
        axes.set_xlabel("MACs, million")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(f"{network.replace('resnet', 'ResNet-')}, CIFAR-10", fontsize=9)
        axes.legend(fontsize=7, frameon=False)

    return _svg(draw)


def _times(rows: Sequence[Mapping[str, Any]]) -> bytes:
    def draw(axes: Any) -> None:
        groups: dict[str, list[Point]] = {}
        for row in rows:
            name = f"{row['network']}, {row['size']} x {row['size']}, batch {row['batch']}"
            groups.setdefault(name, []).append((1 - 1 / row["macs_ratio"], 1 - 1 / row["time_ratio"]))
        for index, (name, points) in enumerate(sorted(groups.items())):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, marker="osv^D<>p"[index % 8], linewidth=0.8, markersize=4, label=name)
        axes.plot((0, 1), (0, 1), color="#a3adb8", linewidth=0.8)
        axes.plot((0, 1), (0, 0.8), color="#a3adb8", linewidth=0.8, linestyle="--", label="0.8 of the MACs saved")
        axes.set_xlim(0.3, 0.9)
        axes.set_ylim(0.1, 1.0)
        axes.set_xlabel("share of the MACs saved")
        axes.set_ylabel("share of the time saved")
        axes.legend(fontsize=6, frameon=False, loc="lower right")

    return _svg(draw)


def _samples(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Held-out error of the layers' responses against samples: a panel a layer."""
    colours = {"low rank + sparse": "#2563c9", "sparse": "#0f8a6d", "low rank": "#8a3ffc", "GoDec": "#d9480f"}
    layers = list(dict.fromkeys(row["layer"] for row in rows))

    def draw(figure: Any) -> None:
        for axes, layer in zip(figure.subplots(1, len(layers), sharey=True, squeeze=False)[0], layers, strict=True):
            mine = [row for row in rows if row["layer"] == layer]
            for method, colour in colours.items():
                points = sorted((r["samples"], r["error"]) for r in mine if r["method"] == method)
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.2,
                              label=method)  # fmt: skip
            axes.axvline(mine[0]["features"], color="#a3adb8", linewidth=0.8, linestyle="--")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{layer}, {mine[0]['features']} inputs (dashed)", fontsize=8)
            axes.set_xlabel("samples")
        figure.axes[0].set_ylabel("share of the response energy lost, held out")
        figure.axes[-1].legend(fontsize=7, frameon=False)

    return _drawn(draw, (8.4, 3.2))


def _speed(rows: Sequence[Mapping[str, Any]]) -> bytes:
    def draw(axes: Any) -> None:
        sizes = dict.fromkeys((row["outputs"], row["inputs"]) for row in rows)
        for (outputs, inputs), marker in zip(sizes, "osv^", strict=False):
            mine = [row for row in rows if (row["outputs"], row["inputs"]) == (outputs, inputs)]
            for key, style in (("svd_over_greedy", "-"), ("eigh_over_greedy", ":")):
                what = "SVD" if key.startswith("svd") else "eigenvectors"
                axes.plot([100 * row["share"] for row in mine], [row[key] for row in mine], style, marker=marker,
                          markersize=4, linewidth=1.2, label=f"{outputs} x {inputs}, against {what}")  # fmt: skip
        axes.axhline(5, color="#a3adb8", linewidth=0.8, linestyle="--")
        axes.set_yscale("log")
        axes.set_xlabel("rank, % of the full one")
        axes.set_ylabel("times faster")
        axes.legend(fontsize=6, frameon=False)

    return _svg(draw)


def _rank_paths(trajectory: Mapping[str, Any]) -> bytes:
    from spectrim.report.ranks import rank_paths
    from spectrim.selection.trajectory import Trajectory

    return _saved(rank_paths(Trajectory.from_json(json.dumps(trajectory))))


def _svg(draw: Any) -> bytes:
    """A figure of one panel."""

    def one(figure: Any) -> None:
        draw(figure.subplots())

    return _drawn(one, (5.4, 3.4))


def _drawn(draw: Any, size: tuple[float, float]) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        draw(figure)
        for axes in figure.axes:
            axes.grid(color="#d5dae0", linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
        return _saved(figure)


def _saved(figure: Any) -> bytes:
    """A figure as SVG; the same figure gives the same bytes."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "spectrim", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
