"""Modes of torch and settings of the user's: what is returned can be trained, what is given stays as it is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.nn.agreement import metric_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)).eval()


def is_trainable(model: nn.Module, x: torch.Tensor) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    model(x).square().sum().backward()
    return not any(t.is_inference() for t in tensors) and all(p.grad is not None for p in model.parameters())


def test_what_is_made_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    model, x = network(), torch.randn(64, 12)
    fresh = network()
    with torch.inference_mode():
        small = st.compress(model, [x + 1], "macs=50%")
        again = st.apply(model, small.sites, small.plan, [x])
        merged = st.merge(small.model)
        st.save(small, tmp_path / "small.st")
        loaded = st.load(fresh, tmp_path / "small.st")
        assert torch.is_inference_mode_enabled()
    assert all(is_trainable(each, x) for each in (small.model, again, merged, loaded))


def test_what_evaluate_sets_on_a_model_does_not_stay() -> None:
    model = network()
    first = model[0].register_forward_hook(lambda *_: None)
    model[2].weight.requires_grad_(False)

    def evaluate(model: Any) -> float:
        model.requires_grad_(False)
        model.train()
        first.remove()
        model[2].register_forward_hook(lambda *_: None, with_kwargs=True)
        model.register_full_backward_hook(lambda *_: None)
        return 1.0

    assert metric_of(evaluate, model, "a network") == 1
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, True]
    assert not any(module.training for module in model.modules())
    assert len(model[0]._forward_hooks) == 1
    assert not model[2]._forward_hooks
    assert not model[2]._forward_hooks_with_kwargs
    assert not model._backward_hooks


SPARSE = st.LowRankPlusSparse(densities=(0.0, 0.3), ranks=2, turns=4)


@pytest.mark.table
@pytest.mark.parametrize(
    "around",
    [lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: torch.device("meta")],
    ids=["cast", "device"],
)
@pytest.mark.parametrize("methods", [None, st.PrincipalFilters(), SPARSE], ids=["rank", "cut", "sparse"])
def test_casting_and_a_default_device_around_a_call_change_nothing(around: Any, methods: Any) -> None:
    model, x = network(), torch.randn(64, 12)
    wanted = st.compress(model, [x], "parameters=70%", methods=methods)
    with around():
        given = st.compress(model, [x], "parameters=70%", methods=methods)
        now = torch.is_autocast_enabled("cpu"), torch.get_default_device().type
    with around():
        assert now == (torch.is_autocast_enabled("cpu"), torch.get_default_device().type)
    assert torch.equal(wanted.model(x), given.model(x))


def test_another_thread_may_use_a_model_meanwhile() -> None:
    model, x = network(), torch.randn(64, 12)
    wanted, began, over = st.compress(model, [x], "macs=50%"), threading.Event(), threading.Event()

    def use() -> None:
        while not over.is_set():
            model(100 * x[:7])
            began.set()

    thread = threading.Thread(target=use)
    thread.start()
    try:
        began.wait(10)
        given = st.compress(model, [x], "macs=50%")
    finally:
        over.set()
        thread.join()
    assert wanted.plan == given.plan
    assert torch.equal(wanted.model(x), given.model(x))
