"""Hooks see every call, and are gone whatever happens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectrim.nn.watch.observe import Hook, hooked, observe


def made() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).train()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_see_inputs_and_outputs() -> None:
    model, seen = made(), []
    hooks = [
        Hook(model[0], lambda module, args, kwargs: seen.append(("in", args[0].shape)), before=True),
        Hook(model[2], lambda module, args, kwargs, output: seen.append(("out", output.shape))),
    ]
    with observe(model, hooks) as run:
        assert hooks_of(model) == 2
        assert not model[1].training
        output = run(torch.ones(5, 3))
    assert seen == [("in", (5, 3)), ("out", (5, 2))]
    assert not output.requires_grad
    assert hooks_of(model) == 0
    assert model[1].training


def test_gradients_are_recorded_where_they_are_asked_for() -> None:
    with torch.no_grad(), observe(made(), gradients=True) as run:
        assert run(torch.ones(5, 3)).requires_grad
    with observe(made(), forward=lambda model, batch: model(2 * batch)) as run:
        assert not run(torch.ones(5, 3)).requires_grad


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_model_as_it_was(fault: type[BaseException]) -> None:
    model = made()

    def fail(module: nn.Module, args: object, kwargs: object, output: object) -> None:
        raise fault

    with pytest.raises(fault), observe(model, [Hook(model[0], fail)]) as run:
        run(torch.ones(5, 3))
    assert hooks_of(model) == 0
    assert model[1].training


def test_hooks_that_cannot_all_be_put_leave_none() -> None:
    model = made()

    def some() -> object:
        yield Hook(model[0], print)
        raise LookupError("the second layer is not there")

    with pytest.raises(LookupError), hooked(some()):
        raise AssertionError("the body must not run")
    assert hooks_of(model) == 0
