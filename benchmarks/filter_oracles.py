"""Principal filter analysis against the published implementation's numbers, and streamed against batch (P1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.run import claim
from spectrim.linalg import principal
from spectrim.linalg.moments import Moments

SHAPES = ((20, 20, 128), (10, 10, 64), (5, 5, 32))


def responses(images: int) -> list[Tensor]:
    """Pooled responses ``[images, units]`` of the three layers of the reference's test data."""
    pooled: list[list[np.ndarray]] = [[] for _ in SHAPES]
    for image in range(images):
        state = np.random.RandomState(image)
        layers = [state.uniform(-1, 1, shape) for shape in SHAPES]
        # The generator starts again for each of the units 1 to 14, which therefore all get the same noise.
        state.seed(image)
        for layer, kept in zip(layers, pooled, strict=True):
            layer[..., 1:15] = (layer[..., 0] + state.normal(0, 0.01, layer.shape[:2]))[..., None]
            kept.append(layer.max((0, 1)))
    return [torch.from_numpy(np.stack(kept)) for kept in pooled]


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Largest differences from the oracles of the experiment, and counts that differ."""
    rows, worst, counts = [], 0.0, 0
    for rows_of_layer, oracle in zip(responses(config["images"]), config["layers"], strict=True):
        spectrum = principal.spectrum(torch.cov(rows_of_layer.T))
        streamed = Moments(1, rows_of_layer.shape[1])
        for part in rows_of_layer.split(config["batch"]):
            streamed.update(part.unsqueeze(0))
        scale = streamed.count / (streamed.count - 1)
        again = principal.spectrum(streamed.covariance[0] * scale)
        kl, ratio = principal.divergence(spectrum)
        width = principal.energy_width(spectrum, 0.98)
        row = {
            "layer": oracle["n"],
            "KL": abs(kl - oracle["KL"]),
            "ratio": abs(ratio - oracle["ratio"]),
            "energy": abs(float(spectrum[:width].sum()) - oracle["energy"]),
            "streamed": float((spectrum - again).abs().max()),
        }
        worst = max(worst, *(value for key, value in row.items() if key != "layer"))
        counts += principal.kl_width(spectrum) != oracle["KL_n"]
        counts += width != oracle["En.98_n"]
        rows.append(row)
    correlation = torch.tensor(config["correlations"], dtype=torch.float64)
    for rule, order in config["orders"].items():
        counts += principal.removal_order(correlation, 1, rule) != order
    note = (
        f"{len(rows)} layers, {len(config['orders'])} rules: {counts} widths or orders differ; streamed spectra differ "
        f"by {max(row['streamed'] for row in rows):.1e}"
    )
    met = worst <= 1e-9 and not counts
    return {
        "claims": {"P1": claim(worst, "largest difference", "<= 1e-9", met, note)},
        "rows": rows,
        "seeds": [config["seed"]],
    }
