"""Training with shared factors (J3, J4): joint against separate decompositions, at equal parameters and epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import spectrim as st
from benchmarks import cifar
from benchmarks.paper_resnets import PaperResNet


def trained(config: dict[str, Any], data: cifar.Images, work: Path, seed: int = 0) -> nn.Module:
    """The dense network that the experiment starts from, trained here; continued if it was interrupted."""
    import torch

    torch.manual_seed(seed)
    model = PaperResNet(config["network"], width=config["width"])
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    recipe = config["dense"]
    st.fine_tune(
        model,
        cifar.Batches(data, batch_size=recipe["batch_size"], seed=seed),
        epochs=recipe["epochs"],
        lr=recipe["lr"],
        weight_decay=recipe["weight_decay"],
        precision=recipe["precision"],
        memory_format="channels_last",
        checkpoint=work / "dense.safetensors",
        seed=seed,
        accelerate=False,
    )
    return model.eval()
