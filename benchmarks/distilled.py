"""Training on CIFAR-10 from a dense network's outputs, with rows that an interrupted run has finished."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as st
from benchmarks import cifar
from benchmarks.vgg import VGG16
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
    data: tuple[cifar.Images, cifar.Images, cifar.Images],
    teacher: cifar.TeacherCache,
    checkpoint: Path,
    *,
    epochs: int,
    seed: int,
) -> dict[str, float]:
    """What a compressed network is worth once it is trained, in place, by the recipe of an experiment."""
    (train, held, test), recipe = data, config["recipe"]
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
    return {
        "held_out": cifar.accuracy(model, held),
        "accuracy": cifar.accuracy(model, test),
        "seconds_train": round(found.seconds, 1),
    }


def every_row(
    config: dict[str, Any],
    paths: dict[str, Any],
    *,
    label: Callable[[dict[str, Any], str, int], str],
    row: Callable[..., dict[str, Any]],
    claims: Mapping[str, Callable[..., dict[str, Any]]],
) -> dict[str, Any]:
    """Make and train every arm; look at the test set once before and once after training.

    Rows that an interrupted run has finished are taken from its folder, by the label of point, arm and seed. ``row``
    makes one of ``(config, arm, point, seed, dense, (train, held, test), cache, work)``; ``claims``, by their kind,
    take ``(rows, accuracy of the dense network, what is asked)``.
    """
    if "threads" in config:
        torch.set_num_threads(config["threads"])
    data = cifar.load(paths["cifar10"])
    dense = dense_network(config, paths, data[0])
    whole = cifar.accuracy(dense, data[2])
    name = network_name(config)
    cache = cifar.TeacherCache(dense, paths["shared"] / f"teacher-{name}")
    rows: list[dict[str, Any]] = []
    for point in config["points"]:
        for arm in point["arms"]:
            for seed in point["seeds"]:
                given = (config, arm, point, seed, dense, data, cache, paths["work"])
                rows.append(kept(paths["work"] / f"{label(point, arm, seed)}.json", functools.partial(row, *given)))
    found = {key: claims[asked["kind"]](rows, whole, asked) for key, asked in config["claims"].items()}
    notes = [f"Dense {name}: {whole:.2f} % on the test images.", *config.get("notes", [])]
    seeds = sorted({seed for point in config["points"] for seed in point["seeds"]})
    return {"claims": found, "rows": rows, "seeds": seeds, "notes": notes}


def dense_network(config: dict[str, Any], paths: dict[str, Any], train: cifar.Images) -> nn.Module:
    """The given network, or VGG-16 trained here; continued if that was interrupted."""
    if "dense" not in config:
        return cifar.network(config["network"], paths["weights"][config["network"]])
    torch.manual_seed(0)
    recipe = {**config["recipe"], **config["dense"]}
    return trained(VGG16(config["width"]), recipe, train, paths["work"] / "dense.safetensors")
