"""The low-rank step without decompositions against the literal one by singular value decomposition (S1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.run import claim
from spectrim.cost.rounds import Rounds
from spectrim.linalg import bilateral
from spectrim.linalg.additive import Alternation, decompose
from spectrim.linalg.low_rank_steps import Exact, Greedy
from spectrim.linalg.metric import Full
from spectrim.linalg.patterns import pattern
from spectrim.linalg.sparse import Quadratic


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Time the steps at every size and rank, and whole solves at those asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    try:
        rows = [row for size in config["sizes"] for row in _steps(size, config)]
        solves = [_solve(size, share, config) for size in config["solves"] for share in config["solve_shares"]]
    finally:
        torch.set_num_threads(before)
    claims = {}
    if config["claimed"]:
        slowest, worst = min(row["svd_over_greedy"] for row in rows), max(row["objective_ratio"] for row in rows)
        limits = config["at_least"], config["at_most"]
        claims["S1"] = claim(
            slowest,
            "x the time of the step without decompositions, that with an SVD at the least",
            f">= {limits[0]:g} x faster at <= {100 * (limits[1] - 1):g} % larger objective, threads: "
            f"{config['threads']}",
            slowest >= limits[0] and worst <= limits[1],
            f"largest objective {100 * (worst - 1):.2g} % above the optimum; "
            + "; ".join(
                f"{r['outputs']} x {r['inputs']}, rank {r['rank']}: {r['svd_over_greedy']:.3g} x, "
                f"+{100 * (r['objective_ratio'] - 1):.2g} %"
                for r in rows
            ),
        )
    notes = [
        "Weights with singular values that fall as a power of their number "
        f"({config['exponent']:g}), and {100 * config['spikes']:g} % of the entries raised; inputs with a spectrum "
        f"that falls as a power ({config['input_exponent']:g}) in random directions; float64.",
        "svd is SVD_r(T C^1/2) C^-1/2 with both roots given; eigh is the same optimum by one eigendecomposition; "
        "greedy starts from nothing, one turn is one greedy turn from the factors of before, as in the turns of a "
        "whole fit.",
        f"Medians of {config['repeats']} runs; of {config['reference_repeats']} for the SVD and the "
        "eigendecomposition, one for all ranks.",
        "Objectives are those of the step, over the least possible one; those of whole fits, over that with exact "
        "steps.",
    ]
    return {"claims": claims, "rows": rows, "solves": solves, "seeds": [config["seed"]], "notes": notes}


def _steps(size: list[int], config: dict[str, Any]) -> list[dict[str, Any]]:
    outputs, inputs = size
    target, moment, half, inverse = problem(outputs, inputs, config)
    metric = Full(moment.unsqueeze(0))
    held: list[tuple[Tensor, Tensor, Tensor]] = []

    def decomposed() -> None:
        held.append(torch.linalg.svd(target[0] @ half, full_matrices=False))
        del held[:-1]

    # Both decompositions take as long for every rank.
    reference = _seconds(decomposed, config["reference_repeats"])
    solved: list[tuple[Tensor, Tensor]] = []

    def exact() -> None:
        solved.append(bilateral.exact(target, metric, round(max(config["shares"]) * min(size)) or 1))
        del solved[:-1]

    by_eigenvectors = _seconds(exact, config["reference_repeats"])
    optimum = solved[0]
    left, values, right = held[0]
    rows = []
    for share in config["shares"]:
        rank = max(1, round(share * min(size)))
        best = float(values[rank:].square().sum())
        low: list[Tensor] = []

        def product(rank: int = rank, low: list[Tensor] = low) -> None:
            low.append((left[:, :rank] * values[:rank]) @ (right[:rank] @ inverse))
            del low[:-1]

        finish = _seconds(product, 1)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        start = bilateral.greedy(target, metric, rank)[1]

        def greedy(rank: int = rank, found: dict[str, tuple[Tensor, Tensor]] = found) -> None:
            found["greedy"] = bilateral.greedy(target, metric, rank)

        def turn(rank: int = rank, start: Tensor = start) -> None:
            bilateral.greedy(target, metric, rank, start=start, turns=1)

        times = _interleaved([greedy, turn], config["repeats"])
        found["exact"] = optimum[0][..., :rank], optimum[1][:, :rank]
        lost = {key: float(metric.energy(target - a @ b)) for key, (a, b) in found.items()}
        literal = float(metric.energy(target - low[0].unsqueeze(0)))
        rows.append(
            {
                "outputs": outputs,
                "inputs": inputs,
                "rank": rank,
                "share": share,
                "svd_seconds": round(reference + finish, 4),
                "eigh_seconds": round(by_eigenvectors, 4),
                "greedy_seconds": round(times[0], 4),
                "one_turn_seconds": round(times[1], 4),
                "svd_over_greedy": round((reference + finish) / times[0], 2),
                "eigh_over_greedy": round(by_eigenvectors / times[0], 2),
                "svd_over_one_turn": round((reference + finish) / times[1], 2),
                "objective_ratio": round(lost["greedy"] / best, 5),
                "eigh_objective_ratio": round(lost["exact"] / best, 5),
                "svd_objective_ratio": round(literal / best, 5),
                "energy_lost": round(best / float(metric.energy(target)), 4),
            }
        )
    return rows


def _solve(size: list[int], share: float, config: dict[str, Any]) -> dict[str, Any]:
    """A whole fit of both parts with either step."""
    outputs, inputs = size
    target, moment, _, _ = problem(outputs, inputs, config)
    metric = Full(moment.unsqueeze(0))
    rank = max(1, round(share * min(size)))
    found = {}
    for name, step in (("greedy", Greedy(metric)), ("exact", Exact(metric))):
        start = time.perf_counter()
        fit = decompose(
            target,
            Quadratic(metric),
            step,
            rank,
            pattern("unstructured"),
            config["density"],
            (inputs,),
            alternation=Alternation(turns=config["turns"]),
        )
        found[name] = (time.perf_counter() - start, fit)
    (greedy_seconds, greedy), (exact_seconds, exact) = found["greedy"], found["exact"]
    return {
        "outputs": outputs,
        "inputs": inputs,
        "rank": rank,
        "density": config["density"],
        "turns": max(len(greedy.errors), len(exact.errors)),
        "greedy_seconds": round(greedy_seconds, 3),
        "exact_seconds": round(exact_seconds, 3),
        "exact_over_greedy": round(exact_seconds / greedy_seconds, 2),
        "objective_ratio": round(greedy.error / exact.error, 5),
    }


def problem(outputs: int, inputs: int, config: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight ``[1, o, n]``; second moment of the inputs, its square root and the inverse of that, ``[n, n]``."""
    draw = torch.Generator().manual_seed(config["seed"])

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    least = min(outputs, inputs)
    left, right = torch.linalg.qr(random(outputs, least)).Q, torch.linalg.qr(random(inputs, least)).Q
    weight = (left * torch.arange(1, least + 1, dtype=torch.float64) ** -config["exponent"]) @ right.T
    weight = weight / weight.square().mean().sqrt()
    spikes = torch.rand(outputs, inputs, generator=draw) < config["spikes"]
    weight = weight + config["spike_size"] * random(outputs, inputs) * spikes
    turned = torch.linalg.qr(random(inputs, inputs)).Q
    strengths = torch.arange(1, inputs + 1, dtype=torch.float64) ** -config["input_exponent"]
    strengths = strengths + 1e-4 * strengths.mean()
    moment, half, inverse = ((turned * strengths**power) @ turned.T for power in (1.0, 0.5, -0.5))
    return weight.unsqueeze(0), moment, half, inverse


def _seconds(work: Callable[[], None], repeats: int) -> float:
    return _interleaved([work], repeats, warmup=repeats > 1)[0]


def _interleaved(works: list[Callable[[], None]], repeats: int, *, warmup: bool = True) -> list[float]:
    """Median seconds of each, taken by turns."""
    turns = Rounds(repeats, warmup=int(warmup))
    for _ in turns:
        for number, work in enumerate(works):
            turns.begin(number)
            work()
            turns.end(number)
    return [turns[number].p50 / 1e3 for number in range(len(works))]
