"""Calibrated on a part of the classes, filter removal keeps what that part needs (P5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import spectrim as st
from benchmarks import cifar
from benchmarks.run import claim

DOMAINS = {"animals": (2, 3, 4, 5, 6, 7), "vehicles": (0, 1, 8, 9)}


def part(images: cifar.Images, classes: tuple[int, ...], count: int | None = None) -> cifar.Images:
    """The images of some classes, the first so many of them."""
    chosen = torch.isin(images.labels, torch.tensor(classes)).nonzero().flatten()[:count]
    return cifar.Images(images.images[chosen], images.labels[chosen])


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """One network for each domain at equal MACs, looked at in both; all ten classes stay possible answers."""
    torch.set_num_threads(config["threads"])
    train, _, test = cifar.load(paths["cifar10"])
    dense = cifar.network(config["network"], paths["weights"][config["network"]])
    tests = {name: part(test, classes) for name, classes in DOMAINS.items()}
    rows: list[dict[str, Any]] = [_row("dense", dense, tests, {})]
    plans: dict[str, st.Plan] = {}
    for name, classes in {**DOMAINS, "both": (*DOMAINS["animals"], *DOMAINS["vehicles"])}.items():
        given = part(train, classes, config["images"])
        batches = [cifar.normalise(piece) for piece in given.images.split(250)]
        result = st.compress(dense, batches, st.Budget(macs=config["macs"]), methods=[st.PrincipalFilters()])
        plans[name] = result.plan
        rows.append(_row(name, result.model, tests, {"macs": result.plan.costs["macs"]}))
    found = {row["calibrated on"]: row for row in rows}
    leads = {
        domain: round(found[domain][domain] - found[other][domain], 2)
        for domain, other in (("animals", "vehicles"), ("vehicles", "animals"))
    }
    groups = [entry.site for entry in plans["animals"] if ":" in entry.site]
    differing = sum(
        plans["animals"][name].choice.settings.get("kept") != plans["vehicles"][name].choice.settings.get("kept")
        for name in groups
    )
    said = "; ".join(
        f"calibrated on {name}: animals {row['animals']:.2f} %, vehicles {row['vehicles']:.2f} %"
        for name, row in found.items()
        if name != "dense"
    )
    note = (
        f"{config['network']}, {config['macs']:.0%} of the MACs, no training; {differing} of {len(groups)} groups "
        f"differ. {said}; dense: animals {found['dense']['animals']:.2f} %, vehicles {found['dense']['vehicles']:.2f} %"
    )
    worst = min(leads.values())
    met = worst > 0 and differing > 0
    return {
        "claims": {"P5": claim(worst, "points ahead on its own domain, at the worse", "> 0, plans differ", met, note)},
        "rows": rows,
        "seeds": [config["seed"]],
        "notes": config.get("notes", []),
    }


def _row(name: str, model: nn.Module, tests: dict[str, cifar.Images], more: dict[str, Any]) -> dict[str, Any]:
    return {"calibrated on": name, **more, **{key: cifar.accuracy(model, images) for key, images in tests.items()}}
