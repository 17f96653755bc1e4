"""Situations of all kinds as they are in other people's repositories: detectors, backbones, speech, diffusion."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict, namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

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
)  # fmt: skip

RUNS = "compressed: every holder of a layer comes to what stands in its place"
ANSWERS = "compressed: what stands for a layer answers for it"
COUNTED = "compressed: the work of every operation is counted"
CHANNELS = "compressed: channels go, or are kept with the reason"

# --- 1: reached by another way --------------------------------------------------------------------------------------


@situation(1, "refused: what is run past __call__ is not seen", outcome=REFUSED)
class ForwardCalledDirectly(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b.forward(F.relu(self.a.forward(x)))


@situation(1, RUNS + ", or refused", outcome=EITHER)
class ForwardOfTheClass(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(nn.Linear.forward(self.a, x)))


@situation(1, RUNS, images)
class StagesAsTuples(TwoConvolutions):
    def begin(self) -> None:
        self.stages = [("a", self.a, None), ("b", self.b, "a")]

    def features(self, x: Tensor) -> Tensor:
        for _, layer, _ in self.stages:
            x = F.relu(layer(x))
        return x


@situation(1, RUNS)
class CachedLayers(Two):
    @functools.cached_property
    def steps(self) -> list[nn.Module]:
        return [self.a, nn.ReLU(), self.b]

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda value, step: step(value), self.steps, x)


@situation(1, RUNS + ", or refused", outcome=EITHER)
class FunctionalCall(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(torch.func.functional_call(self.a, dict(self.a.named_parameters()), (x,))))


@situation(1, RUNS + ", or refused", outcome=EITHER)
class HookThatCallsALayer(Two):
    def begin(self) -> None:
        self.side = nn.Linear(32, 64)
        self.a.register_forward_hook(lambda layer, args, y: y + self.side(args[0]))


@situation(1, RUNS + ", or refused", outcome=EITHER)
class MethodOfAnother(nn.Module):
    """A detector's head is called by a method of a part that holds no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Two(), nn.Linear(32, 16)
        self.trunk.extract = lambda x: torch.relu(self.trunk(x))  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk.extract(x))  # type: ignore[operator]


_TABLE: dict[str, nn.Module] = {}


@situation(1, RUNS + ", or refused", outcome=EITHER)
class GlobalTable(Two):
    def begin(self) -> None:
        _TABLE["a"] = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(_TABLE["a"](x)))


@situation(1, RUNS)
class PropertyWithASetter(Two):
    @property
    def first(self) -> nn.Module:
        return self._modules["a"]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.b.__call__(F.relu(self.first(x)))


# --- 2: read by the parent -------------------------------------------------------------------------------------------


class Equalised(nn.Linear):
    """A linear layer of a StyleGAN: the weight is scaled when it runs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


@situation(2, "compressed without the layers that compute in their own way, which are told", budget=0.9)
class EqualisedLayers(Two):
    def begin(self) -> None:
        self.a = Equalised(32, 64)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


@situation(2, "compressed without the layers that compute in their own way, which are told", images, budget=0.9)
class StandardisedWeights(TwoConvolutions):
    def begin(self) -> None:
        self.a = Standardised(3, 24, 3, padding=1)


class Wrapped(nn.Conv2d):
    """A convolution of a detector's library, with norm and activation as its attributes."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


@situation(2, "compressed without the layers that compute in their own way, which are told", images, budget=0.9)
class WrappedConvolutions(TwoConvolutions):
    def begin(self) -> None:
        self.a = Wrapped(3, 24, 3, padding=1, bias=False, norm=nn.BatchNorm2d(24), activation=F.relu)


class Same(nn.Conv2d):
    """Pads by the size of its input, as layers from TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


@situation(2, "compressed without the layers that compute in their own way, which are told", images, budget=0.9)
class PadsByItself(TwoConvolutions):
    def begin(self) -> None:
        self.b = Same(24, 32, 3, stride=2)


@situation(2, ANSWERS)
class ReadsParametersOfItsLayers(Two):
    def forward(self, x: Tensor) -> Tensor:
        kind = next(self.a.parameters()).dtype
        x = x.to(self.a.weight.device, kind)
        assert self.a.weight.shape == (64, 32)
        assert not self.a.weight.is_cuda
        return self.b(F.relu(self.a(x))) * (self.b.bias is not None)


@situation(2, "refused: the budget is in a layer whose weight the parent computes with", images, outcome=REFUSED)
class CallsConvForward(TwoConvolutions):
    def features(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return F.relu(self.b._conv_forward(y, self.b.weight, self.b.bias))


@situation(2, ANSWERS, sequences, counted=False)
class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.wide, self.narrow = nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return x + self.narrow(F.gelu(self.wide(x)))


def translated() -> list[tuple[Tensor, Tensor]]:
    return [(x, y[:, :6]) for x, y in zip(sequences(), reversed(sequences()), strict=True)]


@situation(2, ANSWERS, translated, name="transformer of torch", counted=False, budget=0.9)
class WholeTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(32, 4, 1, 1, 96, batch_first=True, dropout=0.0)
        self.head = nn.Linear(32, 40)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(source, target))


class Projection(nn.Module):
    """Distribution focal loss: a convolution with weights that are set and not learned."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins).float().view(1, bins, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, anchors = x.shape
        return self.conv(x.view(b, 4, -1, anchors).transpose(2, 1).softmax(1)).view(b, 4, anchors)


@situation(2, "compressed: boxes from distributions", images)
class BoxHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.boxes = nn.Sequential(nn.Conv2d(24, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 1))
        self.classes = nn.Sequential(nn.Conv2d(24, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 5, 1))
        self.project = Projection(8)

    def forward(self, x: Tensor) -> Any:
        x = F.silu(self.stem(x))
        raw = torch.cat([self.boxes(x), self.classes(x)], 1).flatten(2)
        box, scores = raw.split((32, 5), 1)
        return torch.cat([self.project(box), scores.sigmoid()], 1), raw


# --- 3: gradients ----------------------------------------------------------------------------------------------------


@situation(3, "compressed: errors are not weighed, with a note")
class DecoratedWithoutGradients(Two):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@situation(3, "compressed: gradients are taken of parts", counted=False)
class Spectrum(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(self.b(F.relu(self.a(x))))


@situation(3, "compressed: what a pass leaves in a list is taken away")
class GathersFeatures(Two):
    def begin(self) -> None:
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(F.relu(self.a(x)))
        return self.b(self.seen[-1])


@situation(3, "compressed: the best of several codes is taken", counted=False)
class VectorQuantised(Two):
    def begin(self) -> None:
        self.register_buffer("codes", torch.randn(20, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        nearest = self.codes[torch.cdist(z, self.codes).argmin(1)]  # type: ignore[index]
        return self.b(z + (nearest - z).detach())


@situation(3, "compressed: a number of the data decides", counted=False, varies=True)
class EarlyExit(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        if hidden.mean().item() > 100:
            return hidden[:, :32]
        return self.b(hidden)


@situation(3, "compressed: nothing is trained", vectors)
class AllFrozen(Two):
    def begin(self) -> None:
        self.requires_grad_(False)


@situation(3, "compressed: gradients of a part are reversed and clipped")
class GradientHook(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda g: g.clamp(-1, 1))
        return self.b(hidden)


# --- 4: what a batch is ----------------------------------------------------------------------------------------------


def detectron() -> list[list[dict[str, Any]]]:
    return [
        [{"image": x, "file_name": f"{n}.jpg", "height": 12} for n, x in enumerate(drawn(4, 3, 12, 12, seed=s))]
        for s in range(3)
    ]


@situation(4, "compressed: a dictionary a sample", detectron, counted=False)
class DictionariesOfImages(TwoConvolutions):
    def forward(self, batched: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        x = torch.stack([each["image"] for each in batched])
        return [{"scores": each} for each in super().forward(x)]


def spoken() -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.tensor([10, 9, 8, 8, 7, 6, 5, 3])) for x in sequences()]


@situation(4, "compressed: lengths are an input", spoken, counted=False)
class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(32, 96), nn.GRU(96, 16, batch_first=True), nn.Linear(16, 12)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(F.relu(self.a(x)), lengths, batch_first=True)
        return self.b(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


Example = namedtuple("Example", "x y")


@situation(4, "compressed: the fields of a named tuple", lambda: [Example(x, x[:, 0]) for x in vectors()])
class NamedTuples(Two):
    pass


@situation(
    4, "compressed: bytes of pictures are scaled by the model", counted=False,
    data=lambda: [(x.abs() * 60).clamp(0, 255).to(torch.uint8) for x in images()],
)  # fmt: skip
class BytesOfPictures(TwoConvolutions):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255)


def graphs() -> list[tuple[Tensor, Tensor]]:
    edges = torch.stack([torch.arange(48), (torch.arange(48) + 1) % 48])
    return [(x, edges) for x in vectors()]


@situation(4, "compressed, or refused: nodes and edges", graphs, outcome=EITHER)
class Graph(Two):
    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        summed = torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
        return self.b(hidden + summed)


def nested() -> list[dict[str, Any]]:
    return [{"inputs": {"x": x, "y": x.flip(1)}, "meta": ["a"] * len(x)} for x in vectors()]


@situation(4, "compressed: a dictionary in a dictionary", nested)
class DictionaryInADictionary(Two):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return super().forward(inputs["x"] + inputs["y"])


def waves() -> list[list[Tensor]]:
    return [[drawn(n + 20, seed=n + s) for n in (4, 9, 0, 13)] for s in range(3)]


@situation(4, "compressed, or refused: waves of several lengths", waves, outcome=EITHER, counted=False)
class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 24, 5, padding=2), nn.Conv1d(24, 24, 5, padding=2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: list[Tensor]) -> Tensor:
        return self.head(torch.cat([F.relu(self.b(F.relu(self.a(w[None, None])))).mean(2) for w in x]))


@situation(4, "compressed: what is no tensor goes along", lambda: [{"x": x, "size": (4, 8)} for x in vectors()])
class SizesAlong(Two):
    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return super().forward(x).view(-1, *size)


# --- 5: counted work -------------------------------------------------------------------------------------------------


@situation(5, COUNTED, sequences, counted=False)
class CellInALoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.b = nn.Linear(32, 64), nn.LSTMCell(64, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(F.relu(self.a(step)), state)
        assert state is not None
        return self.b(state[0])


@situation(5, COUNTED, tokens, counted=False)
class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.a, self.b = nn.EmbeddingBag(40, 32), nn.Linear(32, 64), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(self.bag(x))))


@situation(5, COUNTED, sequences, counted=False)
class GroupedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 8).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, 2, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


@situation(5, COUNTED, sequences)
class AttentionByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
        weights = torch.einsum("bhid,bhjd->bhij", q, k).div(math.sqrt(8)).softmax(-1)
        return self.o(torch.baddbmm(torch.zeros(()), weights.flatten(0, 1), v.flatten(0, 1)).view(b, 4, n, 8)
                      .transpose(1, 2).flatten(2))  # fmt: skip


@situation(5, COUNTED, images, counted=False)
class GridSampled(TwoConvolutions):
    def features(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), [len(x), 24, 12, 12], align_corners=False)
        return F.relu(self.b(F.grid_sample(F.relu(self.a(x)), grid, align_corners=False)))


@situation(5, "refused: the budget is in a layer whose weight the parent computes with", images, outcome=REFUSED)
class Unfolded(TwoConvolutions):
    def features(self, x: Tensor) -> Tensor:
        y = F.unfold(F.relu(self.a(x)), 3, padding=1)
        w = self.b.weight.flatten(1)
        return F.relu((w @ y).view(len(x), 32, 12, 12))


# --- 6: in place -----------------------------------------------------------------------------------------------------


@situation(6, "compressed: batches stay as they are")
class FirstActsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@situation(6, "compressed: batches stay as they are")
class AddsOntoItsInput(Two):
    def forward(self, x: Tensor) -> Tensor:
        x += 0.5 * self.b(F.relu(self.a(x)))
        x[:, 0] = 0
        return x


@situation(6, "compressed: batches stay as they are", lambda: [{"x": x, "labels": x[:, 0]} for x in vectors()])
class TakesLabelsOut(Two):
    def forward(self, **batch: Tensor) -> Tensor:
        batch.pop("labels", None)
        return super().forward(batch.pop("x"))


@situation(6, "compressed: a layer's output is written into")
class WritesIntoOutputs(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.clamp_(min=0).mul_(0.5)
        z = self.b(y)
        z.add_(x)
        y.zero_()
        return z


@situation(6, "compressed: two layers read a tensor that is then written into")
class WrittenBetweenReaders(Two):
    def begin(self) -> None:
        self.c = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        first = self.a(x)
        x.mul_(-1)
        return self.b(F.relu(first) + F.relu(self.c(x)))


# --- 7: what layers are besides --------------------------------------------------------------------------------------


@situation(7, "compressed: in double precision", name="double precision")
def in_double() -> nn.Module:
    return Two().double()


@situation(7, "compressed: in few bits", name="borrowed bfloat16", rounding=0.1)
def in_few_bits() -> nn.Module:
    return Two().bfloat16()


@situation(7, "compressed: parts of other precision", rounding=0.05, counted=False)
class MixedPrecision(Two):
    def begin(self) -> None:
        self.a = self.a.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.bfloat16())).float())


@situation(7, "compressed: buffers that are not saved")
class BufferThatIsNotSaved(Two):
    def begin(self) -> None:
        self.register_buffer("mask", torch.ones(64), persistent=False)
        self.scale = torch.tensor(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) * self.mask * self.scale)


@situation(7, "compressed: what a module does with its state dict stays")
class OldNames(Two):
    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        for key in [key for key in state if key.startswith(prefix + "old_a")]:
            state[key.replace("old_a", "a")] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *args)


# --- 9: channels -----------------------------------------------------------------------------------------------------


@situation(9, CHANNELS, images)
class Focus(TwoConvolutions):
    def begin(self) -> None:
        self.a = nn.Conv2d(12, 24, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        return super().features(x)


@situation(9, CHANNELS, images)
class LayerScale(TwoConvolutions):
    def begin(self) -> None:
        self.gamma = nn.Parameter(torch.rand(24) + 0.5)
        self.norm = nn.LayerNorm(24)

    def features(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x).permute(0, 2, 3, 1)) * self.gamma
        return F.relu(self.b(F.gelu(y.permute(0, 3, 1, 2))))


@situation(9, CHANNELS, images)
class EfficientChannelAttention(TwoConvolutions):
    def begin(self) -> None:
        self.eca = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def features(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        gate = self.eca(y.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None]
        return F.relu(self.b(y * gate))


@situation(9, CHANNELS, images)
class SqueezeExcite(TwoConvolutions):
    def begin(self) -> None:
        self.down, self.up = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.norm = nn.GroupNorm(4, 24)

    def features(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.a(x)))
        return F.relu(self.b(y * self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))).sigmoid()))


@situation(9, CHANNELS, images)
class CrossStage(nn.Module):
    """C3k2 of YOLO11: halves by split, a block with a shortcut inside of another."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 12
        self.first, self.last = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(36, 24, 1)
        self.one, self.two = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        y = list(F.silu(self.norm(self.first(x))).split((self.c, self.c), 1))
        y.extend([y[-1] + self.two(F.silu(self.one(y[-1])))])
        return self.last(torch.cat(y, 1))


@situation(9, CHANNELS, images)
class LinearAttention(nn.Module):
    """The block of a diffusion U-Net: heads from a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.out = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 96, 1), nn.Conv2d(32, 32, 1)
        self.norm, self.last = nn.GroupNorm(8, 32), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        q, k, v = (each.reshape(b, 4, c // 4, h * w) for each in self.qkv(self.norm(x)).chunk(3, 1))
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
        y = torch.einsum("bhde,bhdn->bhen", context, q.softmax(-2)).reshape(b, c, h, w)
        return self.last(F.silu(x + self.out(y)))


@situation(9, CHANNELS, lambda: [(x, torch.arange(len(x))) for x in images()])
class TimeConditioned(nn.Module):
    """A residual block of a diffusion U-Net: scale and shift by the time step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.time = nn.Conv2d(3, 24, 3, padding=1), nn.Sequential(nn.Linear(16, 32), nn.SiLU())
        self.scale, self.norm = nn.Linear(32, 48), nn.GroupNorm(6, 24)
        self.a, self.b, self.out = (nn.Conv2d(24, n, 3, padding=1) for n in (24, 24, 3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] * torch.exp(-torch.arange(8) / 4)
        emb = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        x = self.stem(sample)
        scale, shift = self.scale(emb)[..., None, None].chunk(2, 1)
        h = self.b(F.silu(self.norm(self.a(F.silu(x))) * (1 + scale) + shift))
        return self.out(x + h)


@situation(9, CHANNELS, images)
class MaxOverChannels(TwoConvolutions):
    """Spatial attention of CBAM: mean and maximum over channels."""

    def begin(self) -> None:
        self.gate = nn.Conv2d(2, 1, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        z = torch.stack([y.mean(1), y.amax(1)], 1)
        return F.relu(self.b(y * self.gate(z).sigmoid()))


@situation(9, CHANNELS, images)
class NormalisedOverChannels(TwoConvolutions):
    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.normalize(self.a(x), dim=1)))


@situation(9, CHANNELS, images)
class GroupsByReshape(TwoConvolutions):
    """Selective kernels: branches are weighed and summed."""

    def begin(self) -> None:
        self.other, self.gate = nn.Conv2d(3, 24, 5, padding=2), nn.Linear(24, 48)

    def features(self, x: Tensor) -> Tensor:
        y = torch.stack([self.a(x), self.other(x)], 1)
        gate = self.gate(y.sum(1).mean((2, 3))).view(-1, 2, 24).softmax(1)[..., None, None]
        return F.relu(self.b((y * gate).sum(1)))


@situation(9, CHANNELS, images)
class FlattenedAtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(inplace=True),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True),
            nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.PReLU(32),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32 * 9, 40), nn.ReLU(True), nn.Linear(40, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 3), 1))


# --- 11, 13 ----------------------------------------------------------------------------------------------------------


@situation(13, "compressed: a number of detections that varies", images, varies=True, counted=False, exact=False)
class SelectsByScore(TwoConvolutions):
    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x).sigmoid()
        keep = scores.amax(1) > 0.5
        return scores[keep], keep.nonzero()


@situation(13, "compressed: detections a picture, in dictionaries", images, varies=True, counted=False, exact=False)
class DetectionsOfAPicture(TwoConvolutions):
    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x).sigmoid()
        return [{"scores": s[s > 0.5], "labels": (s > 0.5).nonzero()[:, 0]} for s in scores]


@situation(13, "compressed: a generator of random numbers is copied or told", outcome=EITHER, exact=False)
class OwnGenerator(Two):
    def begin(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.randn(x.shape, generator=self.generator))


@situation(13, "refused before the work: it says itself that it cannot be copied", outcome=REFUSED)
class RefusesCopies(Two):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")


@situation(11, "compressed, or told: all weights of a layer are zero", outcome=EITHER)
class ZeroHead(Two):
    def begin(self) -> None:
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)


@situation(11, "compressed, or told: every sample is the same", lambda: [torch.ones(48, 32)] * 2, outcome=EITHER)
class SameSamples(Two):
    pass


@situation(11, "compressed, or told: data of zeros", lambda: [torch.zeros(48, 32)] * 2, outcome=EITHER)
class ZeroSamples(Two):
    pass


@situation(11, "compressed: layers of one unit", budget=0.9)
class OneUnit(Two):
    def begin(self) -> None:
        self.c, self.d = nn.Linear(32, 1), nn.Linear(1, 32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.d(self.c(x)))


# --- neighbours ------------------------------------------------------------------------------------------------------


@situation(0, "compressed: two trunks that share their layers", lambda: [(x, x.flip(0)) for x in images()])
class Siamese(TwoConvolutions):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one, two = (F.normalize(super(Siamese, self).forward(each)) for each in (x, y))
        return (one * two).sum(1)


@situation(0, "compressed: blocks by names with dots and numbers", images)
def named_blocks() -> nn.Module:
    return nn.Sequential(OrderedDict([
        ("0_stem", nn.Conv2d(3, 24, 3, padding=1)), ("act-0", nn.ReLU()), ("weight", nn.Conv2d(24, 24, 3, padding=1)),
        ("first", nn.Conv2d(24, 24, 1)), ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()),
        ("second", nn.Linear(24, 10)),
    ]))  # fmt: skip


@situation(0, "compressed: windows of a picture are samples of the inner layers", images)
class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 32, 1), nn.Linear(32, 96), nn.Linear(32, 32)
        self.table = nn.Parameter(torch.zeros(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, *_ = x.shape
        x = x.view(b, c, 3, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(b * 9, 16, c)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj((q @ k.transpose(1, 2) / 6 + self.table).softmax(-1) @ v)
        return x.view(b, 9, 16, c).mean((1, 2))


@situation(0, "compressed: a network inside of a network's list of outputs", images)
class Pyramid(nn.Module):
    """Feature pyramid: lateral and output convolutions, a head that all levels share."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 2, 1)])
        self.lateral = nn.ModuleDict({"p2": nn.Conv2d(16, 20, 1), "p3": nn.Conv2d(24, 20, 1)})
        self.head = nn.Sequential(nn.Conv2d(20, 20, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(20, 6, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = []
        for stage in self.stages:
            x = F.relu(stage(x), inplace=True)
            levels.append(x)
        top = self.lateral["p3"](levels[1])
        low = self.lateral["p2"](levels[0]) + F.interpolate(top, scale_factor=2.0)
        return OrderedDict(p2=self.head(low), p3=self.head(top))
