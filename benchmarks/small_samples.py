"""How many samples a fit to responses needs (S3): error on held-out images against the number of samples.

A sample is one input patch of a layer, each from another image. All methods store the same share of the layer's
numbers; what they choose, they choose on their samples.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks import cifar
from benchmarks.run import claim
from spectrim.linalg.moments import Moments
from spectrim.methods import Method
from spectrim.network.sites import Layer, Statistics
from spectrim.nn.watch.patches import patches_at
from spectrim.nn.watch.samples import Samples
from spectrim.nn.watch.sampling import choose


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Held-out error of every layer, method, number of samples and seed."""
    if "threads" in config:
        torch.set_num_threads(config["threads"])
    train, held, _ = cifar.load(paths["cifar10"])
    name = config["network"]
    model = cifar.network(name, paths["weights"][name])
    sites = st.calibrate(model, st.find(model), [cifar.normalise(held.images[:8])], statistics=False)
    most = max(config["samples"])
    rows: list[dict[str, Any]] = []
    for layer in config["layers"]:
        site = sites[layer]
        unseen = patches(model, site, held.images, seed=len(train))
        for seed in config["seeds"]:
            draw = torch.Generator().manual_seed(seed)
            images = train.images[torch.randperm(len(train), generator=draw)[:most]]
            seen = patches(model, site, images, seed=seed)
            for count in config["samples"]:
                known = _with(site, seen[:, :count])
                for label, method in _methods().items():
                    at = site if label == "GoDec" else known
                    rows.append(
                        {
                            "layer": layer,
                            "features": site.spec.features,
                            "method": label,
                            "samples": count,
                            "seed": seed,
                            **_fitted(site, at, method, config["stored"], seen[:, :count], unseen),
                        }
                    )
                print(layer, seed, count, flush=True)
    notes = [
        f"Every method stores {config['stored']:.0%} of the layer's numbers. error is the share of the energy of the "
        "layer's centred responses lost on images that were not used for the fit, seen on those used for it.",
        "Data-free methods do not depend on the samples but for the bias, which here is none.",
    ]
    return {"claims": {"S3": _claim(rows, config)}, "rows": _means(rows), "seeds": config["seeds"], "notes": notes}


def _methods() -> dict[str, Method]:
    return {
        "low rank + sparse": st.LowRankPlusSparse(),
        "low rank": st.ActivationSVD(multiple_of=1),
        "sparse": st.LowRankPlusSparse(ranks=0),
        "GoDec": st.LowRankPlusSparse(),
    }


@torch.inference_mode()
def patches(model: nn.Module, site: Layer, images: Tensor, *, seed: int) -> Tensor:
    """One input patch ``[g, n, d]`` of the layer from each image, in the images' order."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].contiguous()
        index = choose(site.spec, tuple(inputs.shape), 1, Samples.of(inputs), seed).index
        found.append(patches_at(site.spec, inputs, index).flatten(2))

    handle = model.get_submodule(site.name).register_forward_pre_hook(hook)
    try:
        for part in images.split(500):
            model(cifar.normalise(part))
    finally:
        handle.remove()
    return torch.cat(found, dim=1)


def _with(site: Layer, rows: Tensor) -> Layer:
    moments = Moments(rows.shape[0], rows.shape[2])
    moments.update(rows)
    return dataclasses.replace(site, statistics=Statistics(input=moments))


def _fitted(site: Layer, at: Layer, method: Method, share: float, seen: Tensor, unseen: Tensor) -> dict[str, Any]:
    """The choice of least error on the samples that stores few enough numbers, and what it loses."""
    curve = method.curve(at)
    limit = share * site.weight.numel()
    fitting = [
        (error, choice)
        for error, choice in zip(curve.errors, curve.choices, strict=True)
        if st.parameters([dataclasses.replace(s, bias=False) for s in method.layers(at, choice)]) <= limit
    ]
    _, choice = min(fitting, key=lambda pair: pair[0])
    (weight,) = method.factorize(at, choice).dense()
    return {
        "rank": choice["rank"],
        "density": choice.settings.get("density", 0.0),
        "error": _lost(site, weight, unseen),
        "seen": _lost(site, weight, seen),
    }


def _lost(site: Layer, weight: Tensor, rows: Tensor) -> float:
    """Share of the energy of the centred responses that a weight loses on given patches."""
    g, o = site.spec.shape[:2]
    centred = rows.double() - rows.double().mean(dim=1, keepdim=True)
    wanted = site.weight.double().reshape(g, o, -1)
    missing = wanted - weight.double().reshape(g, o, -1)
    return float((missing @ centred.mT).square().sum() / (wanted @ centred.mT).square().sum())


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows averaged over the seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["features"], row["method"], row["samples"]), []).append(row)
    return [
        {
            "layer": layer,
            "features": features,
            "method": method,
            "samples": samples,
            "error": round(statistics.mean(row["error"] for row in found), 5),
            "spread": round(statistics.stdev(row["error"] for row in found), 5) if len(found) > 1 else 0.0,
            "seen": round(statistics.mean(row["seen"] for row in found), 5),
            "ranks": sorted({row["rank"] for row in found}),
            "densities": sorted({round(row["density"], 3) for row in found}),
        }
        for (layer, features, method, samples), found in groups.items()
    ]


def enough(points: Sequence[tuple[int, float]], slack: float) -> int:
    """The least number of samples from which on the error is within ``slack`` (relative) of that with the most."""
    ordered = sorted(points)
    limit = ordered[-1][1] * (1 + slack)
    count = ordered[-1][0]
    for samples, error in reversed(ordered):
        if error > limit:
            break
        count = samples
    return count


def _claim(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    means = [row for row in _means(rows) if row["method"] == "low rank + sparse"]
    counts, said = [], []
    for layer in config["layers"]:
        points = [(row["samples"], row["error"]) for row in means if row["layer"] == layer]
        features = next(row["features"] for row in means if row["layer"] == layer)
        counts.append(enough(points, config["slack"]))
        ends = sorted(points)
        said.append(
            f"{layer} ({features} inputs): {ends[0][1]:.3f} with {ends[0][0]}, {ends[-1][1]:.3f} with {ends[-1][0]:,} "
            f"samples; within {config['slack']:.0%} of that from {counts[-1]:,} on"
        )
    # The figure is what is asked for; it says something only if the error has come to rest within the range.
    met = max(counts) < max(config["samples"])
    return claim(max(counts), "samples after which nothing improves", "a figure", met, "; ".join(said))
