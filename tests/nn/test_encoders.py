"""Encoders of torch give zero at padded positions by their fused kernels, and once they cannot run by them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.nn.agreement import metric_of
from spectrim.nn.encoders import leave_fused_kernels
from spectrim.nn.watch.state import evaluating

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
]
SAMPLES, LENGTH, WIDTH = 16, 6, 8
PADDED = torch.arange(LENGTH) >= torch.tensor([LENGTH, *(1 + n % LENGTH for n in range(SAMPLES - 1))])[:, None]


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


class Inherits(nn.TransformerEncoder):
    pass


class Doubles(nn.TransformerEncoder):
    def forward(self, src: Tensor, **masks: Any) -> Tensor:  # type: ignore[override]
        return 2 * super().forward(src, **masks)


class Pooled(nn.Module):
    """Reads all positions of an encoder, padded ones too."""

    def __init__(self, kind: Any = nn.TransformerEncoder, *, normed: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, **{"batch_first": True, **options})
        norm = nn.LayerNorm(WIDTH) if normed else None
        self.encoder = kind(layer, 2, norm)
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.1 * torch.randn(p.shape))

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=pad).mean(1))


class Translated(nn.Module):
    """Memory of padded positions is attended to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both = nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.both(x, x, src_key_padding_mask=pad)


def _inputs() -> Tensor:
    return torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _gap(dense: nn.Module, other: nn.Module, *given: Tensor) -> float:
    wanted = dense(*given)
    return float((wanted - other(*given)).norm() / wanted.norm())


def test_the_report_tells_how_far_the_networks_are_apart_as_they_are_run() -> None:
    dense, x = Pooled().eval(), _inputs()
    result = st.compress(dense, [(x, PADDED)], "macs=90%")
    told = result.report.agreement
    assert told is not None
    agreed = st.agreement(dense, result.model, [(x, PADDED)])
    assert agreed is not None
    assert agreed.error == pytest.approx(true := _gap(dense, result.model, x, PADDED), rel=1e-3)
    assert told.error < 0.2
    assert true < 0.2
    assert type(dense.encoder) is nn.TransformerEncoder


@pytest.mark.parametrize(
    "make",
    [
        Pooled, Translated, lambda: Pooled(Inherits), lambda: Pooled(Doubles), lambda: Pooled(normed=True),
        lambda: Pooled(norm_first=True), lambda: Pooled(activation="gelu"),
    ],
    ids=["plain", "transformer", "inherits", "doubles", "normed", "norm_first", "gelu"],
)  # fmt: skip
@pytest.mark.parametrize("fused", [True, False])
def test_layers_of_linear_attention_give_zero_where_the_fused_kernels_do(make: Any, fused: bool) -> None:
    dense, x = make().eval(), _inputs()
    linear = st.with_linear_layers(dense)
    torch.backends.mha.set_fastpath_enabled(fused)
    for given in (PADDED, torch.zeros(PADDED.shape).masked_fill(PADDED, -torch.inf), PADDED.flip(1), PADDED & False):
        if not bool(given.all(1).any()):
            assert _gap(dense, linear, x, given) < 1e-5
    assert _gap(dense, copy.deepcopy(linear), x, PADDED) < 1e-5
    # Gradients, and training, have torch leave its fused kernels.
    torch.testing.assert_close(linear(x, PADDED), dense(x, PADDED))


def test_other_masks_of_an_encoder() -> None:
    encoder, x = Pooled().encoder.eval(), _inputs()
    other = copy.deepcopy(encoder)
    leave_fused_kernels(other)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    wholly = PADDED.clone()
    wholly[3] = True
    with torch.no_grad():
        for given in (
            {"mask": causal, "src_key_padding_mask": torch.zeros(PADDED.shape).masked_fill(PADDED, -torch.inf)},
            {"mask": causal, "is_causal": True},
            {"src_key_padding_mask": wholly},
            {"src_key_padding_mask": -1.5 * PADDED.float()},
            {},
        ):
            torch.testing.assert_close(other(x, **given), encoder(x, **given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.TransformerEncoder, Inherits, Doubles])
def test_a_watched_encoder_answers_as_it_does_unwatched(kind: Any) -> None:
    dense, x = Pooled(kind).eval(), _inputs()
    with torch.no_grad():
        wanted = dense(x, PADDED)
    with evaluating(dense), torch.enable_grad():
        torch.testing.assert_close(dense(x, PADDED), wanted)
        copied = copy.deepcopy(dense)
    assert type(dense.encoder) is kind
    assert _gap(dense, copied, x, PADDED) < 1e-5


def test_what_is_loaded_merged_and_pickled_gives_the_same(tmp_path: Path) -> None:
    dense, x = Pooled(Inherits).eval(), _inputs()
    result = st.compress(dense, [(x, PADDED)], "macs=80%")
    st.save(result, tmp_path / "small.safetensors")
    others = {
        "loaded": st.load(Pooled(Inherits).eval(), tmp_path / "small.safetensors"),
        "merged": st.merge(result.model),
        "pickled": pickle.loads(pickle.dumps(result.model)),
    }
    for name, other in others.items():
        assert _gap(result.model, other, x, PADDED) < 1e-4, name


def test_a_metric_that_runs_another_network_finds_the_dense_one_alike() -> None:
    dense, x = Pooled().eval(), _inputs()
    assert metric_of(lambda model: _gap(dense, model, x, PADDED), st.with_linear_layers(dense), "a copy") < 1e-5


@pytest.mark.slow
def test_compiled_networks_compute_at_padded_positions_as_torch_has_them() -> None:
    made: Any = torch.compile(Pooled().eval(), backend="eager")
    dense, x = made, _inputs()
    result = st.compress(dense, [(x, PADDED)], "macs=90%")
    agreed = st.agreement(dense, result.model, [(x, PADDED)])
    assert agreed is not None
    assert agreed.error == pytest.approx(true := _gap(dense, result.model, x, PADDED), rel=1e-3)
    assert true < 0.2


@pytest.mark.slow
def test_what_is_exported_gives_zero_too(tmp_path: Path) -> None:
    dense, x = Pooled().eval(), _inputs()
    for model in (dense, st.with_linear_layers(dense)):
        st.export_program(model, (x, PADDED), tmp_path / "model.pt2")
        assert _gap(model, torch.export.load(tmp_path / "model.pt2").module(), x, PADDED) < 1e-4


def test_widths_of_encoders_with_nested_tensors_can_be_removed() -> None:
    pytest.importorskip("torch_pruning")
    model = Pooled().eval()
    sites = st.couple(model, st.find(model), (torch.randn(SAMPLES, LENGTH, WIDTH), PADDED))
    assert [c.name for c in sites.couplings] == [f"encoder.layers.{n}.linear1:out" for n in (0, 1)]
