"""How long principal filter analysis takes: one wide layer, and the plan of a whole network (P7); its oracles (P1)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import spectrim as st
from benchmarks import nets
from benchmarks.run import claim
from spectrim.linalg import principal, subset
from spectrim.search.stepwise import select_in_steps


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Median seconds over repeats, each after a warm-up."""
    torch.set_num_threads(config["threads"])
    rows = [_layer(config, rule) for rule in ("reconstruction", "l1-max", "abs-max")]
    plan = _network(config)
    worst = max(row["milliseconds"] for row in rows)
    said = ", ".join(f"{row['rule']} {row['milliseconds']:.1f} ms" for row in rows)
    whole = plan["seconds_graph"] + plan["seconds_plan"]
    note = (
        f"{config['channels']} channels to half, {config['at_a_time']} at a time by reconstruction, one by one by "
        f"the rules: {said}. {config['network']} at {config['size']} pixels: graph {plan['seconds_graph']:.1f} s, "
        f"table and plan {plan['seconds_plan']:.1f} s; calibration on {config['images']} images "
        f"{plan['seconds_calibration']:.1f} s beside it; {plan['groups']} groups, {plan['steps']} steps"
    )
    met = worst <= 50 and whole <= 20
    return {
        "claims": {
            "P7": claim(round(whole, 2), "s for the plan", "layer <= 50 ms, ResNet-50 <= 20 s", met, note),
        },
        "rows": [*rows, plan],
        "seeds": [config["seed"]],
        "notes": config.get("notes", []),
    }


def _layer(config: dict[str, Any], rule: str) -> dict[str, Any]:
    n = config["channels"]
    draw = torch.Generator().manual_seed(config["seed"])
    scales = torch.logspace(0, -3, n, dtype=torch.float64)
    rows = torch.randn(8 * n, n, dtype=torch.float64, generator=draw) * scales
    mixing = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=draw)).Q
    covariance = (rows @ mixing).T @ (rows @ mixing) / (8 * n)
    weight = torch.randn(n, n, dtype=torch.float64, generator=draw)
    reader = subset.Reader(covariance, weight.T @ weight, torch.arange(n), torch.arange(n).unsqueeze(1))

    def choose() -> object:
        if rule == "reconstruction":
            return subset.elimination([reader], n, at_a_time=config["at_a_time"], until=n // 2)
        return principal.removal_order(principal.correlations(covariance), n // 2, rule, principal.inactive(covariance))

    return {"rule": rule, "channels": n, "milliseconds": round(1000 * _median(choose, config["repeats"]), 2)}


def _median(action: Callable[[], object], repeats: int) -> float:
    action()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _network(config: dict[str, Any]) -> dict[str, Any]:
    model = nets.network(config["network"], config["size"], seed=config["seed"])
    batches = list(nets.images(config["images"], config["size"], seed=config["seed"]).split(config["batch"]))
    st.couple(model, st.find(model), batches[0])  # the first call imports the graph's library
    start = time.perf_counter()
    sites = st.couple(model, st.find(model), batches[0])
    graph = time.perf_counter()
    sites = st.calibrate(model, sites, batches)
    calibrated = time.perf_counter()
    plan, _ = select_in_steps(sites, [st.PrincipalFilters()], st.Budget(macs=config["macs"]))
    end = time.perf_counter()
    return {
        "network": config["network"],
        "groups": len(sites.couplings),
        "seconds_graph": round(graph - start, 2),
        "seconds_calibration": round(calibrated - graph, 2),
        "seconds_plan": round(end - calibrated, 2),
        "steps": plan.facts["steps"],
        "macs_over_budget": plan.costs["macs"] / plan.budget["macs"],
    }
