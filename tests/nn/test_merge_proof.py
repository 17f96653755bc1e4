"""A network and what merge makes of it are compared, however dear its layers are to multiply out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import spectrim as st
from spectrim.errors import ProofError
from spectrim.network.choices import Choice
from spectrim.nn import merge_proof, modules
from spectrim.nn.merge_proof import check_merged
from spectrim.nn.modules import Chained, Factored, FactoredTable
from spectrim.nn.shared import Wide
from spectrim.nn.sparse.layers import Cropped, Masked, Slim
from spectrim.nn.surgery import replace_module
from spectrim.nn.watch.batches import Feed
from tests.nn.layers import LAYERS, Wrapped
from tests.nn.nets import compressed, low_rank, sparse
from tests.nn.test_shared import group
from tests.nn.test_tied import Writer, small, texts

Made = tuple[nn.Module, Tensor]


@pytest.fixture
def _all_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_proof, "_SOON", -1.0)
    monkeypatch.setattr(merge_proof, "_MULTIPLIED", 0.0)
    monkeypatch.setattr(merge_proof, "_OUTPUTS", 2)


def alone(choice: Choice, layer: str = "conv2d") -> Made:
    make, shape = LAYERS[layer]
    model = compressed(Wrapped(make()), {"layer": choice}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # so that chains of small numbers do not vanish beside the bias
    return model, torch.randn(shape)


class Beside(nn.Module):
    """Layers that share factors, one after the other on one tensor of them all."""

    def __init__(self, kind: str, share: str) -> None:
        super().__init__()
        made = group(kind, share)
        self.layers = nn.ModuleList(made.layers)
        for number, module in enumerate(made.modules):
            replace_module(self, [f"layers.{number}"], module)
        self.widths = [x.shape[1] for x in made.inputs]
        self.x = torch.cat(made.inputs, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(part) for layer, part in zip(self.layers, x.split(self.widths, 1), strict=True))


def beside(kind: str, share: str) -> Made:
    model = Beside(kind, share).eval()
    return model, model.x


def table() -> Made:
    return compressed(Wrapped(nn.Embedding(40, 12)), {"layer": low_rank(3, bias=True)}), torch.randint(40, (2, 5))


def within(name: str) -> Made:
    """Layers of a pair that are pairs themselves."""
    model, x = alone(low_rank(4, bias=True), "linear")
    return compressed(model, {"layer.0": low_rank(2, bias=True), "layer.1": low_rank(2)}), x


TUCKER = Choice("tucker", "m", {"inputs": 2, "outputs": 3})
CP = Choice("cp", "m", {"rank": 3, "kernel": "axes"})
CASES: dict[str, tuple[Callable[[], Made], type]] = {
    **{name: (lambda name=name: alone(low_rank(2), name), Factored) for name in LAYERS},
    "height-first": (lambda: alone(low_rank(2, "height-first")), Factored),
    "input": (lambda: alone(low_rank(2, "input")), Factored),
    "tucker": (lambda: alone(TUCKER), Chained),
    "cp": (lambda: alone(CP), Chained),
    "masked": (lambda: alone(sparse(2, 0.5, "unstructured")), Masked),
    "slim": (lambda: alone(sparse(2, 0.5, "channels")), Slim),
    "cropped": (lambda: alone(sparse(2, 0.1, "taps-1x2@1x0")), Cropped),
    "table": (table, FactoredTable),
    "tied": (lambda: (small(Writer(bias=True)).model, texts(2)), FactoredTable),
    "within": (lambda: within("linear"), Factored),
    "once": (lambda: beside("linear", "once"), Factored),
    "wide": (lambda: beside("conv2d-grouped", "both"), Wide),
}


def checked(model: nn.Module, x: Tensor) -> list[str]:
    return list(check_merged(model, x, Feed().decide(model, x), 0.0))


def wrong(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """What multiplies out another weight than it should."""

    def of(function: Callable[[Any], tuple[Tensor, Tensor | None]]) -> Any:
        def whole(layer: Any) -> tuple[Tensor, Tensor | None]:
            weight, bias = function(layer)
            return change(weight), bias

        return whole

    return of


@pytest.mark.usefixtures("_all_is_dear")
@pytest.mark.parametrize("name", CASES)
def test_what_merge_makes_of_a_dear_layer_is_proven_and_a_fault_of_it_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    (make, kind) = CASES[name]
    model, x = make()
    assert any(isinstance(module, kind) for module in model.modules())
    before = copy.deepcopy(model.state_dict())
    assert checked(model, x) == []
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    for change in (lambda w: w * 1.1, lambda w: w.flip(2)):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "whole", wrong(change)(kind.whole))
            with pytest.raises(st.ProofError, match=r"merged, layer '[\w.]+' \(.*skip='"):
                checked(model, x)


@pytest.mark.usefixtures("_all_is_dear")
def test_a_bias_that_merge_loses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = alone(low_rank(2))
    monkeypatch.setattr(modules, "make_layer", lambda spec, weight, bias: make_layer(spec, weight, None))
    with pytest.raises(st.ProofError, match="merged, layer 'layer'"):
        checked(model, x)


make_layer = modules.make_layer


class Asks(Wrapped):
    """Does else where its layer is not what it was."""

    def forward(self, x: Tensor) -> Tensor:
        plain = type(self.layer) is nn.Linear and len(self.layer._parameters) == 2 and not list(self.layer.children())
        return self.layer(x) * (2 if plain else 1)


@pytest.mark.usefixtures("_all_is_dear")
def test_layers_merged_in_part_are_plain_to_who_asks() -> None:
    model = compressed(Asks(nn.Linear(7, 5)), {"layer": low_rank(2)})
    seen: list[tuple[int, ...]] = []
    model.layer.register_forward_hook(lambda layer, args, y: seen.append((*layer.weight.shape, *y.shape)))
    with pytest.raises(st.ProofError, match="merged, the compressed Asks computes something else"):
        checked(model, torch.randn(3, 7))
    assert set(seen) == {(5, 7, 1, 5)}


def test_dear_layers_take_few_operations() -> None:
    model = compressed(Wrapped(nn.Linear(512, 2048)), {"layer": low_rank(300)})
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(merge_proof, "_SOON", 1e6)
        assert checked(model, torch.randn(1, 512)) == []
    passed = 2 * (512 + 2048) * 300
    # The network, what stands for the layer in the merged one, eight outputs of it, and multiplying these out.
    assert counter.get_total_flops() <= 2 * passed + 2 * 8 * 512 * (300 + 1)


class Jumps(nn.Module):
    """Rounding of its layer decides what it gives, as it decides which boxes a detector keeps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return (1e9 * self.layer(x)).sin()


def test_where_outputs_jump_layers_are_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = alone(low_rank(2), "linear")
    small = Jumps(model.layer).eval()
    said = list(check_merged(small, x, Feed(), 1e9))
    assert len(said) == 1
    assert "its outputs jump" in said[0]
    right = merge_proof.whole

    def wrong(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        weight, bias = right(layer)
        return 1.5 * weight, bias

    monkeypatch.setattr(merge_proof, "whole", wrong)
    with pytest.raises(ProofError, match="layer 'layer'"):
        list(check_merged(small, x, Feed(), 1e9))
