"""Time saved against MACs saved (F6), and a latency budget met end to end (F7).

Time depends on shapes, so the networks hold random weights. What a plan loses on random weights says nothing about
trained ones, and only time is reported.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks import nets
from benchmarks.run import claim
from spectrim.errors import InfeasibleBudgetError
from spectrim.linalg.unfold import Unfolding, unfolding
from spectrim.methods.base import Curve, LowRankMethod, full_rank
from spectrim.network.choices import Choice
from spectrim.network.factors import LowRank
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Site
from spectrim.nn.timing import Timing, measure_latency
from spectrim.selection.candidates import Candidates
from spectrim.selection.plan import Plan

_BISECTIONS = 10
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class WorkKept(LowRankMethod):
    """Low-rank pairs of random numbers whose error is the share of the layer's MACs that they save.

    With it, the least loss within a time is the most work within that time. Ranks below 1/16 of the full rank are not
    offered: such plans would be fast, but no trained network survives them.
    """

    def ranks(self, spec: LayerSpec, how: Unfolding) -> range:
        offered = super().ranks(spec, how)
        return offered[max(0, math.ceil(full_rank(spec, how) / 16 / offered.step) - 1) :]

    def curve(self, site: Site) -> Curve:
        offered = [(how, rank) for how in self.offered(site.spec) for rank in self.ranks(site.spec, how)]
        choices = tuple(self.choice(site, how, rank, bias=site.spec.bias) for how, rank in offered)
        whole = st.macs(site.layers)
        errors = tuple(max(0.0, 1 - st.macs(self.layers(site, choice)) / whole) for choice in choices)
        return Curve(choices, errors, "share of MACs", scale=whole)

    def factorize(self, site: Site, choice: Choice) -> LowRank:
        how, rank = unfolding(site.spec.kernel, choice["unfolding"]), choice["rank"]
        g, o, i, *kernel = site.spec.shape
        rows, columns = how.sizes(kernel)
        left = torch.randn(g, i * rows, rank) / math.sqrt(i * rows)
        right = torch.randn(g, rank, o * columns) / math.sqrt(rank * columns)
        return LowRank(left, right, None, how, site.spec.shape[1:])


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Claim F6 or F7, as the experiment says."""
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    try:
        return (_saved if config["claim"] == "F6" else _budgets)(config)
    finally:
        torch.set_num_threads(before)


def _saved(config: dict[str, Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    interpolation: list[dict[str, Any]] = []
    for case in config["cases"]:
        found, held_out = _case({**config, **case})
        rows += found
        interpolation += held_out
    least = config["at_least"]
    values = [row["saved_ratio"] for row in rows]
    below = [row for row in rows if row["saved_ratio"] < least]
    said = "; ".join(
        f"{r['network']} {r['size']} batch {r['batch']} {r['asked']}: {r['saved_ratio']:.2f}" for r in below
    )
    claims = {
        "F6": claim(
            round(min(values), 3),
            "time saved / MACs saved, at the worst",
            f">= {least:g} in each of {len(rows)} cases",
            not below,
            f"{len(rows) - len(below)} of {len(rows)} cases reach it" + (f"; not {said}" if said else ""),
        )
    }
    notes = [
        "Wall time of whole networks, dense and compressed in turns; medians over the repeats in which the system took "
        "a core away least often.",
        "BatchNorm is folded into the convolutions of dense and compressed networks. Dense is the faster of the two "
        "memory formats; the compressed network is the faster of those planned.",
        "A plan keeps as much work as fits a time: of the measured options of a layer those with the most MACs a "
        f"millisecond, spread over the layers by an exponent of {config['exponent']:g}. Ranks go down to 1/16 of full.",
        "Weights and factors are random numbers; time does not depend on them.",
    ]
    return {"claims": claims, "rows": rows, "interpolation": interpolation, "seeds": [config["seed"]], "notes": notes}


def _case(case: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One network at one size and batch: plans in each format, all measured in turns."""
    model = nets.network(case["network"], case["size"], seed=case["seed"])
    example = torch.randn(case["batch"], 3, case["size"], case["size"])
    sites = st.calibrate(model, st.find(model), [example[:1]], statistics=False)
    method = WorkKept(unfoldings=tuple(case["unfoldings"]))
    models = {f"dense {name}": _laid_out(model, name) for name in _FORMATS}
    dense = _timed(models, example, case)
    plans: dict[str, tuple[str, str, Plan]] = {}
    interpolation: list[dict[str, Any]] = []
    for layout in case["formats"]:
        latency = st.Latency(
            threads=case["threads"], batch=case["batch"], memory_format=layout, cache=None, rounds=case["rounds"],
            budget=case["seconds"],
        )  # fmt: skip
        table = st.tabulate(sites, [method], latency=latency, dense_latency=dense[f"dense {layout}"].quiet)
        for asked, share in case["shares"].items():
            plan = fastest(table, share, case["exponent"])
            name = f"{asked} {layout}"
            plans[name] = asked, layout, plan
            models[name] = _laid_out(st.apply(model, sites, plan, methods=[method]), layout)
        if layout == case["formats"][-1]:
            interpolation = _held_out(case, latency, list(sites), method)
    timings = _timed(models, example, case)
    references = {layout: timings[f"dense {layout}"].quiet for layout in _FORMATS}
    reference = min(references.values())
    rows = []
    for asked in case["shares"]:
        name = min((n for n, (a, _, _) in plans.items() if a == asked), key=lambda n: timings[n].quiet)
        _, layout, plan = plans[name]
        time_saved = 1 - timings[name].quiet / reference
        macs_saved = 1 - 1 / plan.ratio("macs")
        rows.append(
            {
                "network": case["network"],
                "size": case["size"],
                "batch": case["batch"],
                "asked": asked,
                "macs_ratio": round(plan.ratio("macs"), 3),
                "dense_contiguous_ms": _round(references["contiguous"]),
                "dense_channels_last_ms": _round(references["channels_last"]),
                "format": layout,
                "ms": _round(timings[name].quiet),
                "planned_ms": _round(plan.costs["latency"]),
                "time_ratio": round(reference / timings[name].quiet, 3),
                "saved_ratio": round(time_saved / macs_saved, 3),
                "spread": _spread(timings[name]),
                "choices": _choices(plan),
            }
        )
        print(rows[-1], flush=True)
    return rows, interpolation


def fastest(table: Candidates, share: float, exponent: float) -> Plan:
    """The plan with a share of the MACs that takes the least time.

    The time limit is bisected to the largest at which the plan of most work has no more than those MACs. An exponent
    above 1 spreads what is saved over the layers.
    """
    table = table.weighted({row.site: (row.scale, exponent) for row in table})
    best: Plan | None = None
    low, high = 0.0, table.dense["latency"]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        try:
            plan = st.select(table, st.Budget(latency=f"{middle}ms"))
        except InfeasibleBudgetError:
            low = middle
            continue
        if plan.costs["macs"] <= share * table.dense["macs"]:
            low, best = middle, plan
        else:
            high = middle
    # No option may be faster than dense; then MACs alone decide.
    return best or st.select(table, st.Budget(macs=share))


def _held_out(
    case: dict[str, Any], latency: st.Latency, sites: list[Site], method: LowRankMethod
) -> list[dict[str, Any]]:
    """Interpolated against measured time at ranks between the measured ones, for layers spread over the network."""
    wide = [site for site in sites if len(site.spec.kernel) == 2 and max(site.spec.kernel) > 1]
    count = case["held_out_layers"]
    rows = []
    for site in wide[:: max(1, len(wide) // max(count, 1))][:count]:
        for how in method.offered(site.spec)[:2]:
            ranks = method.ranks(site.spec, how)
            if len(ranks) < 4:
                continue
            held = sorted({ranks[round(share * (len(ranks) - 1))] for share in case["held_out_ranks"]})
            for rank, error in latency.interpolation_error(site.spec, how, held).items():
                rows.append(
                    {
                        "network": case["network"],
                        "size": case["size"],
                        "batch": case["batch"],
                        "format": latency.memory_format,
                        "layer": f"{site.spec.in_channels} to {site.spec.out_channels} at {site.spec.inputs[0][0]}",
                        "unfolding": how.name,
                        "rank": rank,
                        "error_percent": round(100 * error, 1),
                    }
                )
    return rows


def _budgets(config: dict[str, Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for case in config["cases"]:
        case = {**config, **case}
        model = nets.network(case["network"], case["size"], seed=case["seed"])
        batches = [nets.images(case["images"], case["size"], seed=case["seed"])]
        latency = st.Latency(
            threads=case["threads"], batch=case["batch"], memory_format=case["format"], cache=None,
            rounds=case["rounds"], budget=case["seconds"],
        )  # fmt: skip
        result = st.compress(
            model,
            batches,
            st.Budget(latency=case["share"]),
            methods=[st.WeightSVD()],
            skip=case.get("skip", []),
            sensitivity=False,
            reconstruct=False,
            latency=latency,
        )
        example = batches[0][:1].repeat(case["batch"], 1, 1, 1)
        models = {f"dense {name}": _laid_out(model, name) for name in _FORMATS}
        timings = _timed({**models, "compressed": _laid_out(result.model, case["format"])}, example, case)
        dense = timings[f"dense {case['format']}"].quiet
        rows.append(
            {
                "network": case["network"],
                "size": case["size"],
                "batch": case["batch"],
                "format": case["format"],
                "dense_ms": _round(dense),
                "dense_other_format_ms": _round(next(timings[n].quiet for n in models if case["format"] not in n)),
                "budget_ms": _round(case["share"] * dense),
                "ms": _round(timings["compressed"].quiet),
                "of_budget": round(timings["compressed"].quiet / (case["share"] * dense), 3),
                "macs_ratio": round(result.plan.ratio("macs"), 3),
                "spread": _spread(timings["compressed"]),
                "choices": _choices(result.plan),
            }
        )
        print(rows[-1], flush=True)
    worst = max((row["of_budget"] for row in rows), key=lambda value: abs(value - 1))
    claims = {
        "F7": claim(
            worst,
            "measured time / budget, farthest from 1",
            f"{100 * config['share']:g} % of dense, within 5 %",
            all(abs(row["of_budget"] - 1) <= 0.05 for row in rows),
            "; ".join(
                f"{r['network']} {r['size']}: {r['ms']:g} ms for a budget of {r['budget_ms']:g} ms" for r in rows
            ),
        )
    }
    notes = [
        "Measured again after compression, dense and compressed in turns; compress plans, measures and corrects.",
        "Dense is measured in the memory format of the budget; its time in the other one is in the rows.",
        "Weights are random, so what the plans lose means nothing. Weight SVD, without reconstruction.",
    ]
    return {"claims": claims, "rows": rows, "seeds": [config["seed"]], "notes": notes}


def _laid_out(model: nn.Module, layout: str) -> nn.Module:
    """A copy of a model in a memory format."""
    return copy.deepcopy(model).to(memory_format=_FORMATS[layout])  # type: ignore[call-overload]


def _timed(models: dict[str, nn.Module], example: Tensor, case: dict[str, Any]) -> dict[str, Timing]:
    return measure_latency(
        models, example, repeats=case["repeats"], warmup=min(3, case["repeats"]), threads=case["threads"]
    )


def _choices(plan: Plan) -> str:
    names = [str(e.choice["unfolding"]) if not e.choice.is_dense else "dense" for e in plan]
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(names).items()))


def _spread(timing: Timing) -> float:
    """(p90 - p50) / p50."""
    return round(timing.p90 / timing.p50 - 1, 3)


def _round(milliseconds: float) -> float:
    return float(f"{milliseconds:.4g}")
