"""Tensors and texts in one file, each with a digest."""

from __future__ import annotations

from pathlib import Path

import torch

from spectrim.network import tensor_files


def test_a_digest_tells_names_types_and_shapes_of_the_same_bytes() -> None:
    numbers = torch.arange(6, dtype=torch.float32)
    states = [
        {"a": numbers}, {"b": numbers}, {"a": numbers.reshape(2, 3)}, {"a": numbers.view(torch.int32)},
        {"a": numbers[:3], "b": numbers[3:]}, {"a": numbers[3:], "b": numbers[:3]},
    ]  # fmt: skip
    assert len({tensor_files.digest_of_tensors(state) for state in states}) == len(states)
    turned = dict(reversed(states[4].items()))
    assert tensor_files.digest_of_tensors(turned) == tensor_files.digest_of_tensors(states[4])


def test_texts_are_read_without_the_weights(tmp_path: Path) -> None:
    path, tensors = tmp_path / "w.safetensors", {"a": torch.arange(3.0)}
    tensor_files.write(path, tensors, {"plan": "{}"})
    without, texts = tensor_files.read(path, weights=False)
    assert (without, texts["plan"]) == ({}, "{}")
    whole, again = tensor_files.read(path)
    assert torch.equal(whole["a"], tensors["a"])
    assert again == texts
