"""Training on CIFAR-10 from a dense network's outputs, with rows that an interrupted run has finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as st
from benchmarks import cifar
from spectrim.train import Distillation, Recipe

# Training alone moves there; accuracies are those of the CPU.
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network_name(config: dict[str, Any]) -> str:
    """The network and, if it is not the published one, its width."""
    return f"{config['network']}-{config['width']}" if "width" in config else config["network"]


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row in a file, made first if there is none."""
    if not path.exists():
        row = make()
        path.write_text(json.dumps(row))
        print(row, flush=True)
    return json.loads(path.read_text())


def trained(model: nn.Module, recipe: dict[str, Any], train: cifar.Images, checkpoint: Path) -> nn.Module:
    """A dense network trained from its labels; continued if that was interrupted."""
    st.fine_tune(
        model.to(_DEVICE),
        cifar.Batches(train, batch_size=recipe["batch_size"], seed=0),
        epochs=recipe["epochs"],
        lr=recipe["lr"],
        weight_decay=recipe["weight_decay"],
        precision=recipe["precision"],
        memory_format="channels_last",
        distillation=None,
        checkpoint=checkpoint,
        seed=0,
        accelerate=False,
    )
    return model.cpu().eval()


def tuned(
    model: nn.Module,
    config: dict[str, Any],
    train: cifar.Images,
    teacher: cifar.TeacherCache,
    checkpoint: Path,
    *,
    epochs: int,
    seed: int,
) -> float:
    """Train a compressed network in place by the recipe of an experiment; seconds."""
    recipe = config["recipe"]
    found = st.fine_tune(
        model.to(_DEVICE),
        cifar.Batches(train, batch_size=recipe["batch_size"], seed=seed, teacher=teacher, views=config.get("views")),
        recipe=Recipe(
            epochs=epochs,
            lr=recipe["lr"],
            weight_decay=recipe["weight_decay"],
            schedule=recipe["schedule"],
            clip=recipe.get("clip"),
            precision=recipe["precision"],
            memory_format="channels_last",
            distillation=None,
            seed=seed,
        ),
        loss=Distillation(recipe["temperature"], recipe["teacher_weight"]).loss_on_pairs,
        checkpoint=checkpoint,
        accelerate=False,
    )
    model.cpu()
    return round(found.seconds, 1)
