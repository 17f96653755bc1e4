"""Situations of kinds 9 to 14 and neighbours: channels, outputs, degenerate weights, threads, states, other tools."""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spectrim as st
from benchmarks.situation_table import (
    EITHER,
    REFUSED,
    Two,
    TwoConvolutions,
    drawn,
    images,
    sequences,
    situation,
    tokens,
    vectors,
)


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


@situation(8, "compressed: outputs of a dataclass are compared")
class DataclassOutput(Two):
    def forward(self, x: Tensor) -> Output:
        hidden = F.relu(self.a(x))
        return Output(self.b(hidden), (hidden,))


situation(8, "refused: what is scripted cannot be changed", name="scripted", outcome=REFUSED)(
    lambda: torch.jit.script(Two())  # type: ignore[return-value]
)


@situation(8, "compressed: the scripted part is left alone")
class ScriptedPart(Two):
    def begin(self) -> None:
        self.c = torch.jit.script(nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.c(x))


@situation(9, "compressed: channels through a chunk", images)
class C2f(nn.Module):
    """YOLOv8's block: half of the channels go on, all are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(64, 24, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(F.silu(self.first(x)).chunk(2, 1))
        for block in self.blocks:
            parts.append(F.silu(block(parts[-1])))
        return self.last(torch.cat(parts, 1))


@situation(9, "compressed: channels that become pixels", images)
class PixelShuffle(TwoConvolutions):
    def begin(self) -> None:
        self.head = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.pixel_shuffle(self.features(x), 2))


@situation(9, "compressed: inputs of a map are blocks of channels")
class LinearBeforeView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 384), nn.Conv2d(24, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)).view(-1, 24, 4, 4))))


class Scale(nn.Module):
    """A number a channel, a module that nobody knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(1, width, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Registered(Scale):
    """The same, with a rule."""


st.register_channels(Registered, {"factor": 1})


def _loses_channels(dense: nn.Module, result: Any) -> str | None:
    removed = any(entry.of_channels and not entry.choice.is_dense for entry in result.plan)
    filters = any(entry.of_channels for entry in result.plan)
    return "no channel is removed" if filters and not removed else None


@situation(9, "compressed: channels through a module by its rule", images, fault=_loses_channels)
class CustomModuleWithRule(TwoConvolutions):
    def begin(self) -> None:
        self.scale = Registered(24)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.scale(self.a(x)))))


@situation(9, "compressed, channels through the module found by trial, or the reason", images)
class CustomModuleWithoutRule(TwoConvolutions):
    def begin(self) -> None:
        self.scale = Scale(24)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.scale(self.a(x)))))


@situation(9, "compressed: a number of channels in the code keeps them", images)
class NumberOfChannelsInTheCode(TwoConvolutions):
    def features(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return F.relu(self.b(y.reshape(-1, 24, 12, 12) + y.mean(dim=(2, 3)).view(-1, 24, 1, 1)))


@situation(9, "compressed: channels that are summed with others go together", images)
class Residual(TwoConvolutions):
    def begin(self) -> None:
        self.shortcut, self.again = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x) + self.shortcut(x)
        return F.relu(y + self.again(y))


situation(5, "compressed", lambda: [drawn(8, 4, 40, seed=n) for n in range(3)], name="one dimension, dilated")(
    lambda: nn.Sequential(
        nn.Conv1d(4, 24, 5, padding=4, dilation=2), nn.ReLU(), nn.Conv1d(24, 32, 3, 2), nn.ReLU(), nn.Conv1d(32, 8, 1)
    )
)
situation(5, "compressed", lambda: [drawn(4, 1, 6, 8, 8, seed=n) for n in range(3)], name="three dimensions")(
    lambda: nn.Sequential(
        nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 24, 3), nn.ReLU(), nn.Conv3d(24, 8, 1)
    )
)
situation(5, "compressed", images, name="transposed and grouped")(
    lambda: nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(24, 32, 4, 2, 1, groups=2), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 3, 1),
    )
)  # fmt: skip
situation(5, "compressed", images, name="padding of other kinds")(
    lambda: nn.Sequential(
        nn.Conv2d(3, 24, 3, padding="same", padding_mode="circular"), nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(32, 8, 1),
    )
)  # fmt: skip


def _spoilt(value: float, where: str, name: str = "weight") -> nn.Module:
    model = Two()
    with torch.no_grad():
        getattr(model.get_submodule(where), name)[0] = value
    return model


NAMED = "refused: the layer is named"
situation(11, NAMED, name="NaN in a weight", outcome=REFUSED)(lambda: _spoilt(float("nan"), "a"))
situation(11, NAMED, name="Inf in a bias", outcome=REFUSED)(lambda: _spoilt(float("inf"), "b", "bias"))


@situation(11, "compressed: a layer of no size is left alone")
class LayerOfNoSize(Two):
    def begin(self) -> None:
        self.empty = nn.Linear(32, 0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.empty(x)], 1)


@situation(11, "compressed: units that never answer are no matter")
def dead_units() -> nn.Module:
    first = nn.Linear(32, 64)
    with torch.no_grad():
        first.weight[:40] = 0
        first.bias[:40] = -1
    return nn.Sequential(first, nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


situation(11, "compressed: a layer of zeros costs nothing to lose", name="weights of zero")(lambda: _spoilt(0.0, "a"))
situation(11, "compressed, or refused", lambda: [torch.ones(32, 32)], name="constant data", outcome=EITHER)(Two)
situation(11, "compressed", lambda: [1e6 * x for x in vectors()], name="huge data")(Two)
situation(11, "compressed: a layer that never runs is told", name="layer that never runs")(
    type("Unused", (Two,), {"begin": lambda self: setattr(self, "c", nn.Linear(32, 32))})
)


def _twice(dense: nn.Module, result: Any) -> str | None:
    """Two calls on one model at once: each gives what one alone gives, or is refused."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(st.compress(dense, vectors(), st.Budget(macs=0.7)))
        except Exception as error:
            found.append(error)

    alone = st.compress(dense, vectors(), st.Budget(macs=0.7))
    threads = [threading.Thread(target=call) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    strange = [each for each in found if isinstance(each, Exception) and not isinstance(each, st.SpectrimError)]
    if strange:
        return f"a thread raised {strange[0]!r}"
    same = [each.plan.costs == alone.plan.costs for each in found if not isinstance(each, Exception)]
    return None if all(same) else "a thread gives another plan"


situation(12, "compressed, the same in every thread", name="two threads", fault=_twice)(type("Threaded", (Two,), {}))


@situation(13, "compressed: states that a stream leaves are put back", sequences)
class Streaming(Two):
    def begin(self) -> None:
        self.register_buffer("past", torch.zeros(1, 1, 32))

    def forward(self, x: Tensor) -> Tensor:
        self.past = 0.5 * self.past + x.detach().mean((0, 1), keepdim=True)
        return super().forward(x + self.past)


@situation(13, "compressed: a cache that grows is put back")
class GrowingCache(Two):
    def begin(self) -> None:
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.mean(0, keepdim=True))
        return super().forward(x - torch.cat(self.seen[-1:]).mean(0))


@situation(3, "compressed: gradients come through checkpoints")
class Checkpointed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda y: F.relu(self.a(y)), x, use_reentrant=False))


class LoRA(nn.Module):
    """A layer with an adapter beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@situation(2, "compressed: the layer inside an adapter is one")
class Adapted(Two):
    def begin(self) -> None:
        self.a = LoRA(self.a)  # type: ignore[assignment, arg-type]


@situation(1, "compressed: experts are called for some samples", counted=False, varies=True)
class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 3), nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = self.gate(x).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if bool(mine.any()):
                y[mine] = expert(x[mine])
        return self.out(y)


@situation(7, "compressed: casts of the network are its own", counted=False, rounding=0.05)
class AutocastInside(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


@situation(0, "compressed: random numbers are drawn again", exact=False)
class DrawsNoise(Two):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.randn_like(x))


@situation(0, "compressed: a hundred layers in a row", budget=0.7)
def deep_sequential() -> nn.Module:
    layers = [each for _ in range(60) for each in (nn.Linear(32, 32), nn.Tanh())]
    return nn.Sequential(*layers)


@situation(0, "compressed: outputs may be nested")
class NestedOutputs(Two):
    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = F.relu(self.a(x))
        return {"logits": self.b(hidden), "hidden": [(hidden, None), {"sum": hidden.sum(1)}], "name": "two"}


@situation(0, "compressed: a model that goes through its samples", images)
class LoopsOverSamples(TwoConvolutions):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(LoopsOverSamples, self).forward(each[None])[0] for each in x])


@situation(0, "compressed: what extra state a module saves is saved too")
class ExtraState(Two):
    def begin(self) -> None:
        self.version = 3

    def get_extra_state(self) -> Any:
        return torch.tensor(self.version)

    def set_extra_state(self, state: Any) -> None:
        self.version = int(state)


situation(13, "refused: weights on meta have no numbers", name="meta device", outcome=REFUSED)(lambda: Two().to("meta"))
situation(0, "refused: expected a module", name="no module", outcome=REFUSED)(lambda: torch.relu)  # type: ignore[arg-type, return-value]
situation(0, "refused: there is nothing to compress", name="no layers", outcome=REFUSED)(
    lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(32))
)
situation(0, "compressed", tokens, name="bag of words")(
    lambda: nn.Sequential(nn.EmbeddingBag(40, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
)
situation(0, "compressed: averages of weights are another model", name="averaged model")(
    lambda: torch.optim.swa_utils.AveragedModel(Two())
)
situation(1, "compressed: both copies are one", name="copied before")(lambda: copy.deepcopy(Two()))


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 32)).eval()


def _compressed_before() -> nn.Module:
    return st.compress(_perceptron(), vectors(), st.Budget(macs=0.8)).model


situation(
    0, "compressed once more; the file is the dense network's, with both plans", name="compressed before",
    outcome=EITHER, architecture=_perceptron,
)(_compressed_before)  # fmt: skip
