"""What a batch is: how models are called with batches as people make them, and what the samples are."""

from __future__ import annotations

import os
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import spectrim as st
from spectrim.nn.watch.batches import Feed, arguments
from spectrim.nn.watch.layout import Layout
from spectrim.nn.watch.samples import Samples

X, Z, LABELS = torch.randn(4, 3), torch.randn(4, 2), torch.arange(4)


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Two(One):
    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.fc(x) + z


class Star(Two):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x, z = inputs
        return super().forward(x, z)


class HandsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Two()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner(*args, **kwargs)


class Masked(One):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.fc(x) if mask is None else self.fc(x) * mask.unsqueeze(-1)


class Detector(nn.Module):
    """Takes a list of images, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, images: list[torch.Tensor], targets: Any = None) -> list[dict[str, torch.Tensor]]:
        assert isinstance(images, list), type(images)
        return [{"f": f} for f in self.d(F.relu(self.c(torch.stack(images))))]


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.l, self.o = nn.Linear(6, 8), nn.LSTM(8, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.l(F.relu(self.a(x)))[0][-1])


def images(n: int) -> list[torch.Tensor]:
    return [torch.randn(3, 16, 16) for _ in range(n)]


@pytest.mark.table
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("form", ["with targets", "tuples", "alone"])
def test_macs_of_an_image_do_not_depend_on_how_many_are_in_a_list(n: int, form: str) -> None:
    if form == "alone" and n == 1:
        n = 5
    batch: Any = {"with targets": (images(n), [{}] * n), "tuples": [images(n), ({},) * n], "alone": images(n)}[form]
    model = Detector()
    sites = st.calibrate(model, st.find(model), [batch, batch])
    assert st.tabulate(sites).dense["macs"] == 2_580_480
    assert sites.samples == 2 * n
    assert any("list" in note for note in sites.notes)


def test_a_list_of_images_is_compressed() -> None:
    batches = [(images(3), [{"boxes": torch.zeros(k, 4)} for k in range(3)]) for _ in range(2)]
    result = st.compress(Detector(), batches, "macs=60%")
    assert result.plan.ratio("macs") >= 1 / 0.6
    assert result.report.samples == 6


def test_samples_of_a_list_are_known_by_their_contents_in_any_order_and_size() -> None:
    layout = Layout(listed=True)
    parts = [torch.randn(3, size, 8) for size in (8, 6, 9)]
    keys = Samples.of((parts, [0, 1, 2]), layout=layout).keys
    assert torch.equal(Samples.of((parts[::-1], [2, 1, 0]), layout=layout).keys.flip(0), keys)
    assert len(set(keys.tolist())) == 3
    picked = layout.picked((parts, ["a", "b", "c"]), torch.tensor([2, 0]))
    assert picked[0][0] is parts[2]
    assert picked[1] == ["c", "a"]


@pytest.mark.parametrize(
    "wrapped", [nn.DataParallel(Two()), Star(), HandsOn(), torch.nn.Sequential()], ids=lambda m: type(m).__name__
)
def test_several_inputs_behind_what_takes_any(wrapped: nn.Module) -> None:
    if isinstance(wrapped, nn.Sequential):
        wrapped = torch.compile(Two(), backend="eager")  # type: ignore[assignment]
    inner = next(m for m in wrapped.modules() if isinstance(m, Two))
    feed = Feed()
    assert torch.equal(feed(wrapped, (X, Z, LABELS)), inner.fc(X) + Z)
    assert feed.layout.size((X, Z, LABELS)) == 4


@pytest.fixture
def distributed() -> Iterator[Callable[[nn.Module], nn.Module]]:
    if torch.distributed.is_initialized():
        pytest.skip("this process is part of another group")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        yield nn.parallel.DistributedDataParallel
    finally:
        torch.distributed.destroy_process_group()


def test_a_distributed_model_is_compressed(distributed: Callable[[nn.Module], nn.Module]) -> None:
    model = distributed(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)))
    result = st.compress(model, [torch.randn(32, 16)] * 2, "macs=60%")
    assert all(site.statistics.gradient is not None for site in result.sites)


@pytest.mark.parametrize(
    ("budget", "methods"),
    [("macs=60%", None), ("bytes=80%", st.LowRankPlusSparse(densities=(0.0, 0.1, 0.3), ranks=2, turns=4))],
)
def test_a_distributed_part_knows_what_took_its_layers_place(
    distributed: Callable[[nn.Module], nn.Module], budget: str, methods: st.Method | None
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(distributed(nn.Linear(16, 48)), nn.ReLU(), nn.Linear(48, 16))
    small = st.compress(model, [torch.randn(64, 16) for _ in range(2)], budget, methods=methods).model.train()
    small(torch.randn(8, 16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    whole = st.merge(small)
    x = torch.randn(8, 16)
    assert torch.allclose(whole(x), small(x), atol=1e-4)


def test_what_a_mapping_holds_too_much_is_left_out_and_told() -> None:
    feed = Feed()
    batch = {"x": X, "row": LABELS, "attention_mask": torch.ones(4, 1)}
    model = One()
    assert torch.equal(feed(model, batch), model(X))
    (note,) = feed.notes
    assert "'row'" in note
    assert "mask 'attention_mask'" in note
    assert not Feed().decide(model, {"x": X}).notes


@pytest.mark.parametrize("name", ["image", "pixel_values"])
def test_the_only_input_of_a_mapping_goes_by_any_name(name: str) -> None:
    feed, model = Feed(), One()
    assert torch.equal(feed(model, {"label": LABELS, name: X, "pixel_mask": torch.ones(4, 3)}), model(X))
    assert repr(name) in feed.notes[0]
    assert "the mask 'pixel_mask'" in feed.notes[0]


def test_a_mapping_that_lacks_an_input_is_refused_with_the_names() -> None:
    with pytest.raises(st.CalibrationError, match=r"needs 'x', 'z', and the batch holds 'x', 'y'.*forward="):
        arguments(Two(), {"x": X, "y": Z})
    with pytest.raises(st.CalibrationError, match=r"needs 2 inputs \(x, z\), and the batch has 1.*forward="):
        arguments(Two(), X)


def test_a_mask_in_a_tuple_is_passed_and_told() -> None:
    x, mask, feed, model = torch.randn(4, 5, 3), torch.rand(4, 5) > 0.5, Feed(), Masked()
    assert torch.equal(feed(model, (x, mask, LABELS)), model(x, mask))
    assert "'mask'" in feed.notes[0]
    plain = Feed()
    assert torch.equal(plain(model, (x, torch.randn(4, 2))), model(x))
    assert not plain.notes


@pytest.mark.parametrize(("second", "told"), [(True, True), (5, True), (0.5, True), ("flip", True), (LABELS, False)])
def test_what_can_be_no_labels_is_told_where_forward_takes_more(second: Any, told: bool) -> None:
    class More(One):
        def forward(self, x: torch.Tensor, how: Any = None) -> torch.Tensor:
            return self.fc(x if how is None else -x)

    feed = Feed()
    feed(More(), (X, second))
    assert [note for note in feed.notes if "though forward takes 'how' too" in note] == list(feed.notes)
    assert bool(feed.notes) is told


def test_what_fails_is_told_with_all_that_was_tried() -> None:
    class Picky(One):
        def forward(self, *inputs: Any) -> torch.Tensor:
            raise KeyError("never")

    with pytest.raises(st.CalibrationError, match=r"the first element it raises KeyError.*first 2 elements.*forward="):
        Feed().decide(Picky(), (X, Z))


def test_a_model_s_own_error_names_the_batch() -> None:
    model = One()
    with pytest.raises(st.ForwardError, match=r"RuntimeError on calibration batch 1.*the first element") as caught:
        st.calibrate(model, st.find(model), [(X, LABELS), (torch.randn(4, 5), LABELS)])
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("how", ["axis", "count", "targets", "square", "forward"])
def test_time_may_come_first(how: str) -> None:
    time, size = (7, 7) if how == "square" else (9, 4)
    model, x = TimeFirst(), torch.randn(time, size, 6)
    given: dict[str, Any] = {
        "axis": {"samples": 1},
        "square": {"samples": 1},
        "count": {"samples": lambda batch: batch.shape[1]},
        "forward": {"forward": lambda m, b: m(b.transpose(0, 1))},
        "targets": {},
    }[how]
    batch: Any = {"targets": (x, torch.zeros(size)), "forward": x.transpose(0, 1)}.get(how, x)
    sites = st.calibrate(model, st.find(model), [batch], rows=None, **given)
    assert sites.samples == size
    # A sample has one row a step at the first layer, and one at the last.
    assert [layer.spec.inputs for layer in sites] == [((time,),), ((1,),)]
    assert sites["a"].statistics.input.count == time * size
    told = any("second axis" in note for note in sites.notes)
    assert told == (how == "targets")


def test_what_is_taken_for_samples_is_told_where_layers_take_time_first() -> None:
    model = TimeFirst()
    sites = st.calibrate(model, st.find(model), [torch.randn(9, 4, 6)])
    assert sites.samples == 9
    assert any("pass samples=1" in note for note in sites.notes)


def test_the_cut_of_time_first_batches_makes_no_difference() -> None:
    model, x = TimeFirst(), torch.randn(9, 6, 6)
    whole, cut = (
        st.calibrate(model, st.find(model), parts, rows=24, samples=1) for parts in ([x], [x[:, :2], x[:, 2:]])
    )
    for layer in whole:
        other = cut[layer.name].statistics.input
        assert layer.statistics.input.count == other.count
        assert torch.allclose(layer.statistics.input.mean, other.mean)


@pytest.mark.parametrize(
    ("samples", "kind", "message"),
    [
        ("first", TypeError, "samples is 'first': expected the axis"),
        (True, TypeError, "samples is True"),
        (-1, ValueError, "counted from the front"),
        (3, st.CalibrationError, "no tensor with an axis 3"),
        (lambda batch: None, st.CalibrationError, "samples= counted None"),
    ],
)
def test_what_says_nothing_of_samples_is_refused(samples: Any, kind: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(kind, match=message):
        st.compress(model, [X], "macs=90%", samples=samples)


def test_packed_sequences_are_inputs_of_so_many_samples() -> None:
    packed = pack_padded_sequence(torch.randn(3, 5, 6), torch.tensor([5, 4, 2]), batch_first=True)
    lstm = nn.LSTM(6, 5, batch_first=True)
    feed = Feed()
    assert torch.equal(feed(lstm, packed)[0].data, lstm(packed)[0].data)
    assert feed.layout.size(packed) == 3


def test_mappings_and_records_keep_their_type_for_functions_of_a_user() -> None:
    class Tokens(UserDict):
        @property
        def x(self) -> torch.Tensor:
            return self["x"]

    @dataclass(frozen=True)
    class Record:
        x: torch.Tensor

    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3))
    for batch in (Tokens(x=X), Record(X)):
        sites = st.calibrate(model, st.find(model), [batch], forward=lambda m, b: m(b.x.mul_(2)))
        assert sites.samples == 4
        assert torch.equal(batch.x, X)


def test_loaders_that_fill_one_tensor_again_and_again() -> None:
    parts = [torch.randn(32, 16) for _ in range(3)]

    class Reusing:
        def __init__(self) -> None:
            self.held = torch.empty(32, 16)

        def __len__(self) -> int:
            return len(parts)

        def __iter__(self) -> Any:
            for part in parts:
                yield self.held.copy_(part)

    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    small, other = (st.compress(model, batches, "macs=60%").model for batches in (Reusing(), parts))
    assert torch.allclose(small(parts[0]), other(parts[0]), atol=1e-5)


def test_what_can_be_read_once_is_read_into_a_list_or_refused_with_the_cure() -> None:
    parts = [torch.randn(32, 16) for _ in range(2)]
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))

    class Same:
        def __init__(self) -> None:
            self.left = iter(parts)

        def __iter__(self) -> Any:
            return self.left

    class Spent:
        def __init__(self) -> None:
            self.left = list(parts)

        def __iter__(self) -> Any:
            while self.left:
                yield self.left.pop()

    assert st.compress(model, Same(), "macs=60%").report.samples == 64
    with pytest.raises(st.CalibrationError, match=r"does not start over; pass a list"):
        st.compress(model, Spent(), "macs=60%", reconstruct=False)
    assert st.compress(model, Spent(), "macs=60%").report.samples == 64
    assert st.calibrate(model, st.find(model), (part for part in parts)).samples == 64


def test_an_empty_batch_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    class Loader:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            return iter([X, X[:0]])

    for batches in ([X, X[:0]], Loader()):
        with pytest.raises(st.CalibrationError, match="calibration batch 1 is empty"):
            st.compress(model, batches, "macs=90%")


class Rows(nn.Module):
    """Two layers, and what a case does with them."""

    def __init__(self, run: Callable[..., torch.Tensor], parameters: str) -> None:
        super().__init__()
        self.a, self.b, self.e = nn.Linear(8, 6), nn.Linear(6, 5), nn.EmbeddingBag(9, 8)
        self.run = run
        forward: dict[str, Any] = {}
        exec(f"def forward({parameters}): return run({parameters})", {"run": lambda *args: run(self, *args)}, forward)
        self.forward = forward["forward"]

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x)))


def neighbours(x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    return x.index_add(0, edges[1], x[edges[0]])


NODES, STEP, EDGES = torch.randn(12, 8), torch.rand(1), torch.randint(0, 12, (2, 30))
COUNTED_BY_OUTPUTS: dict[str, tuple[Callable[..., torch.Tensor], str, Any]] = {
    "a time step first": (lambda m, t, x: m.mlp(x) * t, "t, x", (STEP, NODES)),
    "and labels": (lambda m, t, x: m.mlp(x) * t, "t, x", (STEP, NODES, torch.zeros(12))),
    "in one element": (lambda m, t, x: m.mlp(x) * t, "t, x", ((STEP, NODES), torch.zeros(12))),
    "by name": (lambda m, t, x: m.mlp(x) * t, "t, x", {"t": STEP, "x": NODES}),
    "edges first": (lambda m, e, x: m.mlp(neighbours(x, e)), "e, x", (EDGES, NODES)),
    "a state first": (
        lambda m, h, x: m.mlp(x + h.squeeze(0)[:, None])[:, -1], "h, x", (torch.zeros(1, 12, 8), torch.randn(12, 4, 8)),
    ),
    "bags": (lambda m, t, o: m.mlp(m.e(t, o)), "t, o", (torch.randint(0, 9, (60,)), torch.arange(0, 60, 5))),
    "a pair": (lambda m, p: m.mlp(p[0]) + p[1], "p", ((NODES, torch.randn(12, 5)),)),
}  # fmt: skip


@pytest.mark.parametrize("form", COUNTED_BY_OUTPUTS)
def test_samples_are_as_many_as_outputs_where_the_first_input_is_none(form: str) -> None:
    run, parameters, batch = COUNTED_BY_OUTPUTS[form]
    feed = Feed().decide(Rows(run, parameters), batch)
    assert feed.layout.size(batch) == 12
    assert "12 samples were counted" in " ".join(feed.notes)
    assert Samples.of(batch, feed.layout).size == 12
    assert feed.layout.size(feed.resized(batch, 5)) == 5


COUNTED_AS_BEFORE: dict[str, tuple[Callable[..., torch.Tensor], str, Any, int, bool]] = {
    "nodes of graphs": (
        lambda m, x, e: m.mlp(neighbours(x, e)).reshape(3, 4, 5).sum(1), "x, e", (NODES, EDGES), 12, True,
    ),
    "two graphs": (lambda m, x, e: m.mlp(x).reshape(2, 6, 5).sum(1), "x, e", (NODES, EDGES), 12, True),
    "boxes of an image": (
        lambda m, x, r: m.mlp(x)[0][r], "x, r", (torch.randn(1, 12, 8), torch.arange(7)), 1, True,
    ),
    "boxes of images": (lambda m, x, r: m.mlp(x)[r], "x, r", (NODES[:3], torch.arange(7) % 3), 3, True),
    "one sample less an axis": (
        lambda m, x, a: (a @ m.mlp(x))[0], "x, a", (torch.randn(1, 12, 8), torch.ones(12, 12)), 1, True,
    ),
    "tokens in one row": (lambda m, x: m.mlp(x).reshape(-1, 5), "x", (torch.randn(3, 4, 8),), 3, False),
    "positions in front": (
        lambda m, x, a: (a @ m.mlp(x)).transpose(0, 1), "x, a", (torch.randn(3, 12, 8), torch.ones(12, 12)), 3, False,
    ),
    "a loss": (lambda m, t, x: (m.mlp(x) * t).mean(), "t, x", (STEP, NODES), 1, False),
    "samples behind positions": (lambda m, x: m.mlp(x).mean(0), "x", (torch.randn(3, 12, 8),), 3, True),
    "clouds of points": (lambda m, p: torch.cat([m.mlp(x) for x in p]), "p", ([NODES, NODES],), 2, False),
}  # fmt: skip


@pytest.mark.parametrize("form", COUNTED_AS_BEFORE)
def test_samples_are_counted_by_the_first_input_where_outputs_tell_nothing_else(form: str) -> None:
    run, parameters, batch, samples, told = COUNTED_AS_BEFORE[form]
    model, feed = Rows(run, parameters), Feed()
    with torch.no_grad():
        feed(model, batch)
    assert feed.layout.size(batch) == samples
    assert any(f"{samples} samples were counted in a batch whose outputs" in note for note in feed.notes) == told


class Timed(One):
    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.fc(x) * t


def test_costs_are_those_of_one_sample_where_a_time_step_comes_first() -> None:
    result = st.compress(Timed().eval(), [(STEP, torch.randn(12, 3)) for _ in range(2)], "macs=100%", sensitivity=False)
    assert result.sites.samples == 24
    assert result.plan.dense_costs["macs"] == 3 * 2
