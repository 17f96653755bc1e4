"""The ranks that a C step of learned ranks chooses (L1), against brute force and against the official code."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks.run import claim
from spectrim.train import Schedule

_KERNELS = ((1, 1), (3, 3), (3, 3), (1, 3), (3, 1), (5, 5))


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Choose ranks for all cases."""
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    try:
        return _chosen(config)
    finally:
        torch.set_num_threads(before)


class _Layers(nn.Module):
    """Layers that do not feed each other, each with an input of its own size."""

    def __init__(self, layers: list[nn.Module], sizes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.sizes = sizes

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x.new_zeros(1, *size)) for layer, size in zip(self.layers, self.sizes, strict=True)]


@dataclass(frozen=True)
class _Group:
    """Layers whose ranks one object chooses, and what they are chosen by."""

    model: _Layers
    alpha: float
    mu: float
    normalize: bool
    cost: str
    kind: str

    def chosen(self) -> list[int]:
        sites = st.calibrate(self.model, st.find(self.model), [torch.zeros(1, 1)], statistics=False)
        found = st.LearnedRanks(
            self.model, sites, multiplier=self.alpha, cost=self.cost, schedule=Schedule(self.mu, 1, 1),
            normalize=self.normalize, dense=False,
        ).trajectory  # fmt: skip
        ranks = dict(zip(found.sites, found.records[-1].ranks, strict=True))
        return [ranks[f"layers.{index}"] for index in range(len(self.model.layers))]

    @torch.no_grad()
    def expected(self) -> list[tuple[int, bool]]:
        """Rank by brute force, and whether another rank is exactly as good, of every layer."""
        outputs = self.model(torch.zeros(1, 1))
        cases = zip(self.model.layers, outputs, strict=True)
        return [self._brute_force(layer.weight, self.price(layer.weight, output)) for layer, output in cases]

    def price(self, weight: Tensor, output: Tensor) -> int:
        """What one rank costs: ``(m + n) mult``."""
        rows, columns = weight.shape[0], weight[0].numel()
        return (rows + columns) * (output[0, 0].numel() if self.cost == "macs" else 1)

    def _brute_force(self, weight: Tensor, price: int) -> tuple[int, bool]:
        """The first minimum of ``alpha price r + mu/2 sum_{i > r} s_i^2 / f`` over ``r = 0 .. R``."""
        matrix = weight.flatten(1).double().numpy()
        if self.kind == "integer diagonal":
            # Singular values are known, so everything can be exact, ties included.
            alpha, mu = Fraction(self.alpha), Fraction(self.mu)
            squares = sorted((Fraction(float(x)) ** 2 for x in np.diagonal(matrix)), reverse=True)
        else:
            alpha, mu = self.alpha, self.mu  # type: ignore[assignment]
            squares = (np.linalg.svd(matrix, compute_uv=False) ** 2).tolist()
        whole = sum(squares) if self.normalize else 1
        totals = [alpha * price * r + mu / 2 * (sum(squares[r:]) / whole) for r in range(len(squares) + 1)]
        return totals.index(min(totals)), totals.count(min(totals)) > 1


def _random_group(draw: np.random.Generator, count: int) -> _Group:
    """Gaussian matrices of decaying spectrum, and a multiplier at which some rank of the first is worth keeping."""
    layers, sizes = [], []
    for _ in range(count):
        layer, size = _random_layer(draw)
        rows, columns = layer.weight.shape[0], layer.weight[0].numel()
        decay = np.arange(1, columns + 1) ** -draw.uniform(0, 2)
        matrix = draw.standard_normal((rows, columns)) * decay * 10 ** draw.uniform(-1, 1)
        layer.weight.data = torch.tensor(matrix, dtype=torch.float32).reshape(layer.weight.shape)
        layers.append(layer)
        sizes.append(size)
    cost, normalize = str(draw.choice(["parameters", "macs"])), bool(draw.integers(2))
    mu = 10 ** draw.uniform(-4, 3)
    group = _Group(_Layers(layers, sizes), 0.0, mu, normalize, cost, "random")
    first = layers[0].weight.detach()
    with torch.no_grad():
        price = group.price(first, layers[0](torch.zeros(1, *sizes[0])))
    energies = np.linalg.svd(first.flatten(1).double().numpy(), compute_uv=False) ** 2
    threshold = mu / 2 * energies[0] / (energies.sum() if normalize else 1) / price
    return _Group(group.model, threshold * 10 ** draw.uniform(-3.5, 0.5), mu, normalize, cost, "random")


def _random_layer(draw: np.random.Generator) -> tuple[Any, tuple[int, ...]]:
    bias = bool(draw.integers(2))
    if draw.random() < 0.5:
        inputs, outputs = (int(n) for n in draw.integers(2, 41, 2))
        return nn.Linear(inputs, outputs, bias=bias), (inputs,)
    inputs, outputs = (int(n) for n in draw.integers(1, 17, 2))
    kernel = _KERNELS[draw.integers(len(_KERNELS))]
    padding = (kernel[0] // 2, kernel[1] // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, stride=int(draw.integers(1, 3)), padding=padding, bias=bias)
    side = int(draw.integers(5, 13))
    return layer, (inputs, side, side)


def _tied_group(draw: np.random.Generator, count: int) -> _Group:
    """Integer diagonal matrices and a multiplier that is exactly the worth of one of their singular values.

    Sizes and sums of squares are powers of two, so that nothing is rounded on the way.
    """
    normalize, cost = bool(draw.integers(2)), str(draw.choice(["parameters", "macs"]))
    # Channels whose matrix has a power of two of rows and columns together.
    linear = draw.random() < 0.5
    shape = ((4, 4), (8, 8), (16, 16))[draw.integers(3)] if linear else ((3, 5), (1, 7), (3, 37))[draw.integers(3)]
    full = min(shape[0] * (1 if linear else 9), shape[1])
    entries = draw.integers(0, 7, full)
    while not entries.any() or (normalize and (total := int((entries**2).sum())) & (total - 1)):
        entries = draw.integers(0, 7, full)
    layers, sizes = [], []
    for _ in range(count):
        layer: Any = nn.Linear(*shape) if linear else nn.Conv2d(*shape, 3, padding=1)
        scale = 2.0 ** int(draw.integers(-3, 4)) if normalize else 1.0
        matrix = torch.zeros(layer.weight.shape[0], layer.weight[0].numel())
        signs = draw.choice([-1, 1], full)
        matrix.diagonal().copy_(torch.tensor(draw.permutation(entries) * signs * scale, dtype=torch.float32))
        layer.weight.data = matrix.reshape(layer.weight.shape)
        layers.append(layer)
        sizes.append((shape[0],) if linear else (shape[0], 8, 8))
    mu = 2.0 ** int(draw.integers(-8, 8))
    model = _Layers(layers, sizes)
    group = _Group(model, 0.0, mu, normalize, cost, "integer diagonal")
    with torch.no_grad():
        price = group.price(layers[0].weight, layers[0](torch.zeros(1, *sizes[0])))
    tied = int(draw.choice(entries[entries > 0])) ** 2
    alpha = mu / 2 * tied / (int((entries**2).sum()) if normalize else 1) / price
    return _Group(model, alpha, mu, normalize, cost, "integer diagonal")


def _chosen(config: dict[str, Any]) -> dict[str, Any]:
    draw = np.random.default_rng(config["seed"])
    size, groups = config["layers_a_group"], -(-config["cases"] // config["layers_a_group"])
    tied = round(config["share_of_ties"] * groups)
    counts: dict[tuple[str, ...], Counter[str]] = {}
    alphas: list[float] = []
    for number in range(groups):
        group = (_tied_group if number < tied else _random_group)(draw, size)
        alphas.append(group.alpha)
        key = (group.kind, group.cost, "normalised" if group.normalize else "plain")
        count = counts.setdefault(key, Counter())
        for layer, rank, (expected, tie) in zip(group.model.layers, group.chosen(), group.expected(), strict=True):
            full = min(layer.weight.shape[0], layer.weight[0].numel())
            count.update(
                {
                    "cases": 1, "linear": isinstance(layer, nn.Linear), "exact_ties": tie, "rank_0": expected == 0,
                    "full_rank": expected == full, "different": rank != expected,
                }
            )  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"matrices": kind, "cost": cost, "error": error, **counts[kind, cost, error]}
        for kind, cost, error in sorted(counts)
    ]
    oracle = _oracle(config["oracle"])
    wrong, official = (sum(row[key] for row in oracle) for key in ("different", "entries"))
    cases, different = (sum(row[key] for row in rows) for key in ("cases", "different"))
    ties = sum(row["exact_ties"] for row in rows)
    claims = {
        "L1": claim(
            different + wrong,
            "ranks that differ",
            f"0 of {cases:,} random cases and {official} of the official code",
            different + wrong == 0,
            f"{different} of {cases:,} random cases ({ties:,} exact ties); {wrong} of {official} official ones",
        )
    }
    notes = [
        f"mu from 1e-4 to 1e3, alpha from {min(alphas):.0e} to {max(alphas):.0e}, linear layers up to 40 x 40 and "
        "convolutions up to 16 channels, with and without stride.",
        "Brute force: singular values by numpy's SVD in float64, every rank from 0 to full, the first minimum. For "
        "integer diagonal matrices in exact fractions.",
        "The official figures are those that RankSelection.compress of the authors' toolkit gave.",
    ]
    return {"claims": claims, "rows": rows, "oracle": oracle, "seeds": [config["seed"]], "notes": notes}


def _oracle(entries: dict[str, Any]) -> list[dict[str, Any]]:
    """The ranks of the official code, and ours; a line for the four strengths of each multiplier."""
    rows: list[dict[str, Any]] = []
    diagonal, matrix = entries["diagonal"], np.diag([4.0, 3.0, 2.0, 1.0])
    for normalize, table in ((False, diagonal["plain"]), (True, diagonal["normalised"])):
        for alpha, ranks in zip(diagonal["alpha"], table, strict=True):
            found = [_official(matrix, alpha, mu, normalize)[0] for mu in diagonal["mu"]]
            rows.append(_compared("diag(4, 3, 2, 1)", normalize, alpha, diagonal["mu"], ranks, found))
    for asked in entries["random"]:
        matrix = np.random.RandomState(asked["seed"]).randn(*asked["shape"])
        rank, err2 = _official(matrix, asked["alpha"], asked["mu"], asked["normalize"])
        name = f"{asked['shape'][0]} x {asked['shape'][1]}, seed {asked['seed']}"
        row = _compared(name, asked["normalize"], asked["alpha"], [asked["mu"]], [asked["rank"]], [rank])
        if "err2" in asked:
            row |= {"expected_err2": asked["err2"], "err2": round(err2, 8)}
            row["different"] += abs(err2 - asked["err2"]) > 1e-7
        rows.append(row)
    return rows


def _compared(
    matrix: str, normalize: bool, alpha: float, mu: list[float], expected: list[int], found: list[int]
) -> dict[str, Any]:
    return {
        "matrix": matrix,
        "error": "normalised" if normalize else "plain",
        "alpha": alpha,
        "mu": " ".join(f"{value:g}" for value in mu),
        "expected": " ".join(map(str, expected)),
        "rank": " ".join(map(str, found)),
        "entries": len(mu),
        "different": sum(a != b for a, b in zip(expected, found, strict=True)),
    }


def _official(matrix: np.ndarray, alpha: float, mu: float, normalize: bool) -> tuple[int, float]:
    """Rank and squared error that the C step gives for one matrix, by storage."""
    model: Any = nn.Sequential(nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)).double()
    model.requires_grad_(False)[0].weight.copy_(torch.from_numpy(matrix))
    ranks = st.LearnedRanks(
        model, st.find(model), multiplier=alpha, cost="parameters", schedule=Schedule(mu, 1, 1), normalize=normalize,
        dense=False,
    )  # fmt: skip
    low: Any = ranks.nested()
    return ranks.trajectory.records[-1].ranks[0], float((model[0].weight - low[0].weight).square().sum())
