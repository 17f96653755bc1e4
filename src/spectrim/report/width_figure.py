"""The figure of recommended widths: how many of its channels every group needs, by several recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spectrim.network.printing import tail
from spectrim.report.figures import blank_figure
from spectrim.selection.figures import DENSE, PLANNED, gridded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recommended_widths(channels: Mapping[str, int], widths: Mapping[str, Mapping[str, int]]) -> Figure:
    """A bar a group of channels, with what recipes recommend in it.

    Parameters
    ----------
    channels
        How many there are now, by the group.
    widths
        Recommended widths by recipe and group. The first recipe is a bar within the grey one, the others are marks, the
        darker the later.

    Raises
    ------
    ValueError
        If a recipe lacks a group, or there is no recipe.
    """
    names = list(channels)
    for recipe, sizes in widths.items():
        if missing := [name for name in names if name not in sizes]:
            raise ValueError(f"recipe {recipe!r} has no width for {missing[0]!r}; it has {', '.join(sizes) or 'none'}")
    if not widths:
        raise ValueError("no widths to draw; give those of one recipe at least")
    import matplotlib

    (first, bars), *marks = widths.items()
    colours = matplotlib.colormaps["Oranges"](np.linspace(0.3, 0.95, len(marks)))
    at = np.arange(len(names))
    with blank_figure(7.2, max(1.8, 0.21 * len(names) + 0.95)) as figure:
        axes = figure.subplots()
        drawn: list[Any] = [
            axes.barh(at, [channels[name] for name in names], height=0.78, color=DENSE, label="now"),
            axes.barh(at, [bars[name] for name in names], height=0.46, color=PLANNED, label=first),
        ]
        for (recipe, sizes), colour in zip(marks, colours, strict=True):
            drawn += axes.plot(
                [sizes[name] for name in names], at, "D", ms=4.2, color=colour, mec="white", mew=0.5, ls="none",
                label=recipe, zorder=3,
            )  # fmt: skip
        axes.set_yticks(at, [tail(name, 38) for name in names], fontsize=7 if len(names) <= 40 else 6.2)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.03 * max(channels.values(), default=1))
        axes.set_xlabel("channels")
        gridded(axes.xaxis)
        axes.tick_params(axis="y", length=0)
        figure.legend(handles=drawn, loc="outside upper left", ncols=len(marks) + 2, columnspacing=1.2)
    return figure
