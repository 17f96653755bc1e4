"""Situations of kinds 3, 4, 6 and 13: gradients that cannot be had, what a batch is, inputs that are written into."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.situation_table import (
    EITHER,
    REFUSED,
    Two,
    TwoConvolutions,
    drawn,
    images,
    sequences,
    situation,
    vectors,
)

UNWEIGHED = "compressed, where gradients cannot be had with errors that are not weighed"
SAMPLES = "compressed: one place decides what the samples of a batch are"


def _nothing_kept(dense: nn.Module, result: Any) -> str | None:
    for model in (dense, result.model):
        for name, value in vars(model).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                return f"{name} holds a graph"
    return None


@situation(3, UNWEIGHED)
class HeadThatWritesInPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x))).sigmoid()
        y[:, :2] = y[:, :2] * 2 - 0.5
        return y


@situation(3, UNWEIGHED, images)
class DetectionHead(TwoConvolutions):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = self.features(x)
        n, c, h, w = found.shape
        y = found.view(n, 4, c // 4, h, w).permute(0, 1, 3, 4, 2).sigmoid()
        y[..., 0:2] = (y[..., 0:2] * 2.0 - 0.5) * 8
        return y.reshape(n, -1, c // 4), [found]


@situation(3, "compressed: nothing with a graph stays on the model", fault=_nothing_kept)
class KeepsAnActivation(Two):
    def forward(self, x: Tensor) -> Tensor:
        self.last = F.relu(self.a(x))
        return self.b(self.last)


class Rounds(torch.autograd.Function):
    """Has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


@situation(3, UNWEIGHED, counted=False)
class FunctionWithoutGradient(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Rounds.apply(F.relu(self.a(x))))


@situation(3, UNWEIGHED)
class InferenceModeInside(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.b(F.relu(self.a(x)))


@situation(3, UNWEIGHED)
class FrozenBackbone(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.a(x))
        return self.b(x)


@situation(3, UNWEIGHED)
class GivesClasses(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))).argmax(1)


@situation(3, UNWEIGHED)
class GivesArrays(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.b(F.relu(self.a(x))).detach().numpy())


@situation(3, "compressed: the loss that a training model gives is an output too")
class GivesALoss(Two):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.b(F.relu(self.a(x)))
        return {"loss": (y - x).square().mean(), "logits": y}


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


@situation(3, "compressed, or refused: give model.module", outcome=EITHER, around=process_group)
def distributed() -> nn.Module:
    return nn.parallel.DistributedDataParallel(Two())


@situation(4, SAMPLES)
def data_parallel() -> nn.Module:
    return nn.DataParallel(Two())


@situation(4, "compressed, or refused: give the module that was compiled", outcome=EITHER)
def compiled() -> nn.Module:
    return torch.compile(Two())  # type: ignore[return-value]


def image_lists() -> list[list[Tensor]]:
    return [list(drawn(4, 3, 12, 12, seed=n)) for n in range(3)]


@situation(4, SAMPLES, image_lists, counted=False)
class ListOfImages(TwoConvolutions):
    def forward(self, x: list[Tensor]) -> list[Tensor]:
        assert isinstance(x, list)
        return list(super().forward(torch.stack(x)))


def detections() -> list[Any]:
    return [(list(drawn(4, 3, 12, 12, seed=n)), [{"boxes": torch.ones(2, 4)}] * 4) for n in range(3)]


@situation(4, SAMPLES, detections, counted=False)
class ImagesAndTargets(TwoConvolutions):
    def forward(self, x: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        return [{"scores": each} for each in super().forward(torch.stack(x))]


def times_first() -> list[Tensor]:
    return [each.transpose(0, 1).contiguous() for each in sequences()]


@situation(4, SAMPLES, times_first, options={"samples": 1})
class TimeFirst(Two):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 10
        return self.b(F.relu(self.a(x))).mean(0)


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(drawn(32, 32, seed=n), drawn(32, 32, seed=9 + n)) for n in range(3)]


@situation(4, SAMPLES, pairs)
class TwoInputs(Two):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x) + self.a(y)))


@situation(4, SAMPLES, pairs, name="star arguments")
class StarArguments(TwoInputs):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs)


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.arange(len(x)) % 10) for x in vectors()]


situation(4, "compressed: labels are not fed", labelled, name="labelled batches")(Two)


def loader() -> Any:
    return DataLoader(TensorDataset(torch.cat(vectors())), batch_size=40)


situation(4, "compressed: the last batch is smaller", loader, name="data loader with a rest")(Two)
situation(4, "compressed: read into a list", lambda: iter(vectors()), name="one shot loader")(Two)
situation(4, "compressed: read into a list", lambda: (x for x in vectors()), name="generator of batches")(Two)
situation(11, "refused: a batch holds no samples", lambda: [torch.zeros(0, 32)], name="empty batch", outcome=REFUSED)(
    Two
)
situation(11, "refused: there are no batches", list, name="no batches", outcome=REFUSED)(Two)
situation(11, "compressed, with a note", lambda: [drawn(1, 32)], name="one sample", outcome=EITHER)(Two)
situation(
    4, "compressed: numbers are cast to the type of the weights", lambda: [x.double() for x in vectors()],
    name="other dtype",
)(Two)  # fmt: skip
situation(
    4, "refused: the batches do not fit", lambda: [drawn(16, 31)], name="batches that do not fit", outcome=REFUSED
)(Two)
situation(
    11, "refused: batches hold NaN", lambda: [torch.full((16, 32), float("nan"))], name="NaN in the data",
    outcome=REFUSED,
)(Two)  # fmt: skip


def named() -> list[dict[str, Tensor]]:
    return [{"x": x, "scale": torch.full((len(x), 1), 0.5), "label": torch.zeros(len(x))} for x in vectors()]


@situation(4, "compressed: what the model takes is fed by name, the rest is left out and told", named)
class NamedInputs(Two):
    def forward(self, *, x: Tensor, scale: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        y = self.b(F.relu(self.a(x)))
        return y if scale is None else y * scale


def masked() -> list[dict[str, Tensor]]:
    return [{"x": x, "attention_mask": torch.arange(10).expand(8, 10) < 7} for x in sequences()]


@situation(4, "compressed: padding is no data", masked)
class Masked(Two):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x))) * attention_mask[..., None]
        return y.sum(1) / attention_mask.sum(1, keepdim=True)


def without() -> list[tuple[Tensor, None]]:
    return [(x, None) for x in vectors()]


@situation(4, SAMPLES, without)
class NoneAsInput(Two):
    def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:
        return super().forward(x if memory is None else x + memory)


@dataclasses.dataclass
class Record:
    x: Tensor
    weights: Tensor


def records() -> list[Record]:
    return [Record(x, torch.ones(len(x), 1)) for x in vectors()]


@situation(
    4, "compressed with forward=", records,
    options={"forward": lambda model, batch: model(batch.x, batch.weights), "samples": lambda batch: len(batch.x)},
    outcome=EITHER,
)  # fmt: skip
class Records(Two):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x) * weights


def nested() -> list[tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:
    return [
        ((drawn(32, 32, seed=n), drawn(32, 32, seed=9 + n)), torch.ones(32, 1), torch.zeros(32, 1)) for n in range(3)
    ]


@situation(4, SAMPLES, nested)
class NestedInputs(Two):
    def forward(self, two: tuple[Tensor, Tensor], scale: Tensor, shift: Tensor) -> Tensor:
        return super().forward(two[0] - two[1]) * scale + shift


@situation(6, "compressed: calibration does not see what a pass has written")
class WritesIntoItsInput(Two):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).mul_(2.0))


@situation(6, "compressed: calibration does not see what a pass has written", images)
class ActsInPlaceOnItsInput(TwoConvolutions):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x, inplace=True))


@situation(6, "compressed: every pass finds the whole batch", named)
class TakesFromItsBatch(Two):
    def forward(self, x: Tensor, **rest: Any) -> Tensor:
        return super().forward(x.mul_(rest.pop("scale")))


@situation(13, "compressed, outputs not compared, or refused", images, outcome=EITHER, counted=False, varies=True)
class Suppresses(TwoConvolutions):
    """Gives as many boxes as are likely enough."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).flatten(2).transpose(1, 2).flatten(0, 1)
        return y[y[:, 0] > 0.05]


@situation(13, "refused: lazy layers have no weights before they run", outcome=REFUSED)
def lazy_layers() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.LazyLinear(32))


@situation(13, "refused, or compressed: a lock cannot be copied", outcome=EITHER)
class Locked(Two):
    def begin(self) -> None:
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


@situation(13, "refused, or compressed: a tensor with a graph cannot be copied", outcome=EITHER)
class HoldsAGraph(Two):
    def begin(self) -> None:
        self.scale = self.a.weight.mean() * 0 + 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale.detach()


@situation(13, "refused, or compressed: an open file cannot be copied", outcome=EITHER)
class Logs(Two):
    def begin(self) -> None:
        self.log = open(os.devnull, "w")  # noqa: SIM115

    def forward(self, x: Tensor) -> Tensor:
        self.log.write(f"{len(x)}\n")
        return super().forward(x)
