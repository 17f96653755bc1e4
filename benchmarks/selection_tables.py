"""Tables of candidates that look like those of real networks, of any number of sites."""

from __future__ import annotations

import numpy as np

from spectrim.network.choices import DENSE, LowRankChoice
from spectrim.selection.candidates import Candidates, Option, Row

_UNFOLDINGS = ("channel", "input", "height-first", "width-first")


def table(sites: int, *, seed: int = 0, measured: bool = True) -> Candidates:
    """A table of a deep network's convolutions and linear layers.

    Spectra fall like powers with noise, two methods lose different amounts at the same ranks, and widths grow with the
    depth. Each site has about 60 to 200 options. A latency, if it is measured, rises in steps with the rank and has
    noise.
    """
    draw = np.random.default_rng(seed)
    rows = tuple(_row(number, sites, draw, measured) for number in range(sites))
    fixed = {"parameters": 1e5, "macs": 1e7, "bytes": 4e5} | ({"latency": 1.0} if measured else {})
    return Candidates(rows, fixed, "weighted output energy")


def _row(number: int, sites: int, draw: np.random.Generator, measured: bool) -> Row:
    stage = 4 * number // sites
    width = 64 * 2**stage
    outputs, inputs = (int(width * draw.choice([1, 1, 2, 4])) for _ in range(2))
    taps = int(draw.choice([1, 1, 9]))
    positions = 56 * 56 // 4**stage
    dense = _costs(outputs * inputs * taps, positions, draw if measured else None)
    options = [Option(DENSE, 0.0, dense)]
    names = _UNFOLDINGS if taps > 1 else _UNFOLDINGS[:1]
    decays = draw.uniform(0.1, 0.8), draw.uniform(0.7, 1.0)
    per_name = int(draw.integers(60, 200)) // (2 * len(names))
    for offset, name in enumerate(names):
        sides = (inputs, outputs * taps) if name == "input" else (inputs * taps, outputs)
        if name.endswith("first"):
            sides = (inputs * 3, outputs * 3)
        full = min(sides)
        most = outputs * inputs * taps // sum(sides)
        ranks = np.unique(np.linspace(1, max(most, 2), per_name).round().astype(int))
        energy = np.arange(1, full + 1) ** -(2 * decays[0]) * np.exp(0.3 * draw.standard_normal(full))
        energy = np.sort(energy)[::-1]
        left = 1 - np.cumsum(energy) / energy.sum()
        for worse, method in ((1.0, "ActivationSVD"), (1 / decays[1], "WeightSVD")):
            for rank in ranks:
                error = min(1.0, float(left[min(rank, full) - 1]) * worse * (1 + 0.1 * offset) + 1e-9)
                costs = _costs(int(rank) * sum(sides), positions, draw if measured else None, pair=True)
                options.append(Option(LowRankChoice(name, int(rank), method=method), error, costs))
    scale = float(np.exp(draw.normal(0, 0.7)))
    return Row(f"layer{number}", "Conv2d" if taps > 1 else "Linear", tuple(options), scale=scale)


def _costs(numbers: int, positions: int, draw: np.random.Generator | None, *, pair: bool = False) -> dict[str, float]:
    costs = {"parameters": float(numbers), "macs": float(numbers * positions), "bytes": 4.0 * numbers}
    if draw is not None:
        # In blocks of what a processor does at once, and the start of a second kernel.
        blocks = -(-numbers * positions // 2_000_000)
        costs["latency"] = (0.02 * blocks + (0.03 if pair else 0.01)) * float(1 + 0.02 * draw.random())
    return costs
