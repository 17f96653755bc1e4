"""What samples add to what is lost: their mean is the loss, and its spread the standard error."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.nn.agreement import Agreement, DenseOutputs, agreement
from spectrim.nn.watch.nesting import compared, tensors


class Shifted(nn.Module):
    """Outputs of a linear layer, with something added."""

    def __init__(self, shift: float, scores: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(0))
        self.shift, self.scores = shift, scores

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + self.shift * x[:, :3]
        return y if self.scores else y.unsqueeze(2).expand(-1, -1, 2)


BATCHES = list(torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).split(20))


def found(shift: float, *, scores: bool = True) -> Agreement:
    dense, small = Shifted(0.0, scores), Shifted(shift, scores)
    small.load_state_dict(dense.state_dict())
    told = agreement(dense, small, BATCHES)
    assert told is not None
    return told


@pytest.mark.parametrize("scores", [True, False])
def test_the_mean_of_what_samples_add_is_what_is_lost(scores: bool) -> None:
    told = found(0.1, scores=scores)
    mean = sum(told.parts) / len(told.parts)
    assert len(told.parts) == told.samples == 50
    assert mean == pytest.approx(told.divergence if scores else told.error**2)
    spread = torch.tensor(told.parts, dtype=torch.float64).std().item() / math.sqrt(50)
    assert told.standard_error == pytest.approx(spread if scores else spread / (2 * told.error))
    assert "parts" not in repr(told)


def test_networks_are_told_apart_sample_by_sample() -> None:
    small, larger = found(0.1), found(0.13)
    assert small.like(small)
    # Half of the samples lose more, and half less.
    signs = [1 if number % 2 else -1 for number in range(50)]
    parts = tuple(part + 0.01 * sign for part, sign in zip(small.parts, signs, strict=True))
    assert small.like(dataclasses.replace(small, parts=parts))
    # The difference is beyond chance, though each loss alone is known less well.
    assert small.divergence is not None
    assert larger.divergence is not None
    assert not small.like(larger)
    assert not Agreement(0, 0.1).like(small)
    assert Agreement(1, 0.1, parts=(0.1,)).standard_error is None


class Best(Shifted):
    """The two best of three scores; the third has no chance."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.masked_fill(y == y.amin(-1, keepdim=True), -torch.inf)


@pytest.mark.parametrize("scores", [True, False])
def test_what_is_infinite_in_one_network_alone_misses_one_entry(scores: bool) -> None:
    dense, small, far = Best(0.0, True), Best(0.5, True), Best(2.0, True)
    for other in (small, far):
        other.load_state_dict(dense.state_dict())
    told = [agreement(dense, each, BATCHES, forward=None if scores else out) for each in (dense, small, far)]
    assert all(each is not None for each in told)
    errors = [each.error for each in told if each]
    assert 0 == errors[0] < errors[1] < errors[2] < 2
    if scores:
        assert all(math.isfinite(each.divergence or 0.0) for each in told if each)


def out(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).unsqueeze(2)


@pytest.mark.parametrize("remembered", [1 << 27, 100, 0])
def test_the_dense_network_runs_once_where_its_outputs_take_little_memory(
    remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectrim.nn.agreement._REMEMBERED", remembered)
    dense, *others = (nn.Linear(6, 3).eval() for _ in range(3))
    batches = list(torch.randn(40, 6).split(8))
    calls: list[int] = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    outputs = DenseOutputs(dense, batches, samples=40)
    found = [outputs.missed(other) for other in others]
    # Five batches of 96 bytes each.
    assert len(calls) == {1 << 27: 5, 100: 9, 0: 11}[remembered]
    x = torch.cat(batches).double()
    for missed, other in zip(found, others, strict=True):
        wanted, given = (copy.deepcopy(net).double()(x).detach() for net in (dense, other))
        energy = (wanted - wanted.mean(0)).square().sum()
        assert missed == pytest.approx(float((wanted - given).square().sum() / energy), rel=1e-4)


def of_classes(samples: int = 1500) -> Tensor:
    """Samples in the order of their classes, which lie far apart."""
    drawn = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    return drawn + torch.arange(samples).unsqueeze(1) // 150


def cuts(x: Tensor) -> list[list[Tensor]]:
    mixed = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(2))]
    ones = [*mixed[:150].split(1), mixed[150:]]
    return [[x], list(x.split(64)), list(x.split([1000, 1, 499])), list(mixed.split(37)), ones]


def test_outputs_are_compared_on_samples_of_the_whole_run_in_any_order_and_cut() -> None:
    x, dense, small = of_classes(), Shifted(0.0, True), Shifted(0.2, True)
    small.load_state_dict(dense.state_dict())
    told = [agreement(dense, small, cut) for cut in cuts(x)]
    missed = [DenseOutputs(dense, cut, samples=128).missed(small) for cut in cuts(x)]
    for one, error in zip(told, missed, strict=True):
        assert one is not None
        assert told[0] is not None
        assert one.samples == 512
        assert one.error == pytest.approx(told[0].error, rel=1e-5)
        assert one.top1 == told[0].top1
        assert error == pytest.approx(missed[0], rel=1e-5)
    whole = DenseOutputs(dense, [x], samples=len(x)).missed(small)
    assert missed[0] == pytest.approx(whole, rel=0.2)


def test_held_out_samples_are_chosen_from_in_any_order_too() -> None:
    x, dense, small = of_classes(), Shifted(0.0, True), Shifted(0.2, True)
    small.load_state_dict(dense.state_dict())
    held = [torch.arange(len(x)) % 2 == 0]
    part = agreement(dense, small, [x], held)
    alone = agreement(dense, small, [x[::2].flip(0)])
    assert part is not None
    assert alone is not None
    assert (part.held_out, part.samples) == (True, 512)
    assert part.error == pytest.approx(alone.error, rel=1e-5)
    # Those of batches that nothing was said of are none.
    few = agreement(dense, small, list(x.split(100)), [torch.arange(100) < 3])
    assert few is not None
    assert few.samples == 3


class Whole(Shifted):
    """Takes batches of one size alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(100, 4))


def test_whole_batches_are_compared_where_a_part_is_refused() -> None:
    x, dense, small = of_classes(), Whole(0.0, True), Whole(0.2, True)
    small.load_state_dict(dense.state_dict())
    told = agreement(dense, small, list(x.split(100)))
    assert told is not None
    assert told.samples == 600
    assert DenseOutputs(dense, list(x.split(100)), samples=128).missed(small) > 0


class BySize(Shifted):
    """Answers for few samples as no large batch is answered for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) > 30 else self.layer(-x)


@pytest.mark.parametrize("kind", [BySize, Whole])
def test_held_out_samples_are_compared_in_batches_as_the_model_is_given_them(kind: type[Shifted]) -> None:
    x, dense, small = of_classes()[:200], kind(0.0, True), kind(0.2, True)
    small.load_state_dict(dense.state_dict())
    told = agreement(dense, small, list(x.split(100)), [torch.arange(100) < 7] * 2)
    assert told is not None
    assert (told.held_out, told.samples, len(told.parts)) == (True, 14, 14)
    held = torch.cat([x[:7], x[100:107]])
    assert told.error == pytest.approx(float((0.2 * held[:, :3]).norm() / dense.layer(held).detach().norm()), rel=1e-5)
    few = DenseOutputs(dense, list(x.split(100)), samples=20).missed(small)
    y = dense.layer(x[:100]).detach()
    assert few == pytest.approx(float((0.2 * x[:100, :3]).square().sum() / (y - y.mean(0)).square().sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("turn", "top1", "error"),
    [
        (lambda y: y.argmax(-1), True, None),
        (lambda y: y > 0, True, None),
        (lambda y: {"labels": y.argmax(-1), "none": None}, True, None),
        (lambda y: torch.complex(y, -y), False, 1.0),
        (lambda y: (y * 100).round().clamp(0, 255).to(torch.uint8), False, None),
        (lambda y: {"labels": y.argmax(-1), "y": y}, False, 1.0),
    ],
)
def test_labels_are_counted_and_complex_numbers_and_bytes_are_amounts(turn: Any, top1: bool, error: float | None):
    def forward(model: nn.Module, batch: Tensor) -> Any:
        return turn(model(batch))

    dense, small = Shifted(0.0, True), Shifted(0.3, True)
    small.load_state_dict(dense.state_dict())
    told, plain = (agreement(dense, small, BATCHES, forward=each) for each in (forward, None))
    assert told is not None
    assert plain is not None
    assert (told.top1 is not None) == top1
    assert told.divergence is None
    assert sum(told.parts) / len(told.parts) == pytest.approx(told.error**2)
    if error is not None:
        assert told.error == pytest.approx(plain.error)
    x = torch.cat(BATCHES)
    outputs = [next(tensors(forward(each, x))) for each in (dense, small)]
    if top1:
        equal = float((outputs[0] == outputs[1]).double().mean())
        assert 0 < equal < 1
        assert told.top1 == pytest.approx(equal)
        assert told.error == pytest.approx(math.sqrt(2 * (1 - equal)))
    elif error is None:
        wide, other = (each.double() for each in outputs)
        assert told.error == pytest.approx(float((wide - other).norm() / wide.norm()))


def test_complex_numbers_are_compared_by_both_parts() -> None:
    a = torch.complex(torch.ones(3), torch.zeros(3))
    b = torch.complex(torch.ones(3), torch.ones(3))
    assert float((compared(a, b)[0] - compared(a, b)[1]).norm()) == pytest.approx(math.sqrt(3))
