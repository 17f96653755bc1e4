"""A linear layer as low rank + sparse: its time by kernel and density, and whether the kernel is chosen well (S6)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.run import claim
from spectrim.cost.counted import macs
from spectrim.cost.rounds import Rounds, Timing, torch_threads
from spectrim.linalg.patterns import Unstructured
from spectrim.linalg.unfold import unfolding
from spectrim.network.factors import AdditiveFactors
from spectrim.network.layer import LayerSpec
from spectrim.nn.build import build
from spectrim.nn.sparse.kernels import choose_kernels
from spectrim.nn.sparse.layers import Summed

_REST = 64 * 2**20  # bytes read between two calls


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Choose on one measurement, judge on a second one: every density, batch and number of threads."""
    torch.manual_seed(config["seed"])
    rows = []
    for density in (*config["densities"], *config["beyond"]):
        dense, total = layers(config["size"], config["rank"], density)
        for batch in config["batches"]:
            for threads in config["threads"]:
                row = {"density": density, "batch": batch, "threads": threads}
                rows.append({**row, **_case(dense, total, batch, threads, config["repeats"])})
                print(rows[-1], flush=True)
    worst, limit = max(row["chosen_to_best"] for row in rows), config["at_most"]
    asked = [row for row in rows if row["density"] in config["densities"]]
    claims = {
        "S6": claim(
            worst,
            "time with the chosen kernel / time with the fastest one, at the worst",
            f"<= {limit:g} in each of {len(rows)} cases",
            worst <= limit,
            "time / dense (time / low rank alone): "
            + "; ".join(
                f"{r['density']:.0%}, batch {r['batch']}, threads: {r['threads']}: "
                f"{r['to_dense']:.2f} ({r['to_low_rank']:.1f})"
                for r in asked
            ),
        )
    }
    notes = [
        f"A linear layer of {config['size']} x {config['size']} in float32 with bias, as a pair of rank "
        f"{config['rank']} plus a sparse weight with entries at random positions. The other densities of the table are "
        "there because the kernels come close to each other and change places.",
        "All ways to run the layer take turns in each repeat, and 64 MiB are read before each call, so that weights "
        "come from memory as they do within a network. Medians of the repeats in which the system took a core away "
        "least often.",
        "The kernel is chosen by choose_kernels in a network that reads as much before the layer. chosen_to_best is "
        "taken from the second measurement, which the choice knows nothing of.",
        "Weights are random numbers; time does not depend on them.",
    ]
    return {"claims": claims, "rows": rows, "seeds": [config["seed"]], "notes": notes}


def layers(size: int, rank: int, density: float) -> tuple[nn.Linear, Summed]:
    """A dense layer, and a low-rank pair plus a sparse layer of random numbers in its place."""
    dense = nn.Linear(size, size).eval().requires_grad_(False)
    spec = LayerSpec(("layer",), size, size)
    mask = Unstructured().keep(torch.rand(1, size, size), density)
    left, right = (torch.randn(1, size, rank) / size for _ in range(2))
    parts = AdditiveFactors(
        left,
        right.mT.contiguous(),
        torch.randn(1, size, size) * mask,
        mask,
        Unstructured(),
        None,
        unfolding((), "channel"),
    )
    (total,) = build(parts, (spec,), (dense.bias.detach(),))
    assert isinstance(total, Summed)
    return dense, total.eval().requires_grad_(False)


class Rest(nn.Module):
    """Stands for the rest of a network: reads so much that the layer's weights leave the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.zeros(_REST // 4))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("numbers").sum()
        return x


def _case(dense: nn.Linear, total: Summed, batch: int, threads: int, repeats: int) -> dict[str, Any]:
    x, rest = torch.randn(batch, dense.in_features), Rest()
    (chosen,) = choose_kernels(nn.Sequential(rest, total), x, threads=threads)
    models = {"dense": dense, "low rank": total.pair}
    names = {kernel: f"sum, {kernel.value}" for kernel in chosen.milliseconds}
    for kernel, name in names.items():
        sparse = copy.copy(total.sparse)  # the same weight, which can be packed beside the other's
        sparse.kernel = kernel  # type: ignore[assignment]
        models[name] = Summed(total.pair, sparse, total.original).eval()
    timings = _measured(models, rest, x, threads, repeats)
    times = {name: timing.quiet for name, timing in timings.items()}
    best = min(names, key=lambda kernel: times[names[kernel]])
    taken = times[names[chosen.kernel]]
    spec = total.original.at(((1,),))
    sparse = spec.sparse(Unstructured(), float(total.sparse.mask.double().mean()))  # type: ignore[operator, union-attr]
    parts = [*spec.factor(unfolding((), "channel"), total.pair.rank), sparse]
    return {
        "macs_to_dense": round(macs(parts) / macs([spec]), 4),
        **{f"{name} ms": float(f"{value:.4g}") for name, value in times.items()},
        "chosen": chosen.kernel.value,
        "best": best.value,
        "chosen_to_best": round(taken / times[names[best]], 3),
        "to_dense": round(taken / times["dense"], 3),
        "to_low_rank": round(taken / times["low rank"], 2),
        "spread": round(max(t.p90 / t.p50 for t in timings.values()) - 1, 3),
    }


def _measured(models: Mapping[str, nn.Module], rest: Rest, x: Tensor, threads: int, repeats: int) -> dict[str, Timing]:
    """Each model once in each repeat, with cold weights, forwards and backwards in turn."""
    turns = Rounds(repeats, warmup=2)
    with torch_threads(threads), torch.inference_mode():
        for turn in turns:
            for name in models if turn % 2 else reversed(models):
                rest(x)
                turns.begin(name)
                models[name](x)
                turns.end(name)
    return {name: turns[name] for name in models}
