"""Small networks in which channels of several layers belong together, in every way that the tests know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Linear


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **options})


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


relu = torch.relu


def _chain(m: Any, x: Tensor) -> Tensor:
    return m.c(mean(relu(m.b(relu(m.a(x))))))


def _mlp(m: Any, x: Tensor) -> Tensor:
    return m.c(relu(m.b(relu(m.a(x)))))


def _residual(m: Any, x: Tensor) -> Tensor:
    x = relu(m.n0(m.stem(x)))
    return m.head(mean(relu(x + m.n2(m.c2(relu(m.n1(m.c1(x))))))))


def _projection(m: Any, x: Tensor) -> Tensor:
    x = relu(m.stem(x))
    return m.head(mean(relu(m.p(x) + m.c2(relu(m.c1(x))))))


def _concat(m: Any, x: Tensor) -> Tensor:
    return m.head(mean(relu(m.c(m.n(torch.cat([relu(m.a(x)), relu(m.b(x))], 1))))))


def _dense(m: Any, x: Tensor) -> Tensor:
    x = relu(m.a(x))
    return m.head(mean(torch.cat([x, relu(m.b(x))], 1)))


def _doubled(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.b(mean(relu(torch.cat([x, -x], 1))))


def _depthwise(m: Any, x: Tensor) -> Tensor:
    return m.head(mean(relu(m.c(relu(m.n(m.dw(relu(m.a(x)))))))))


def _grouped(m: Any, x: Tensor) -> Tensor:
    return m.head(mean(relu(m.c(relu(m.n(m.g(relu(m.a(x)))))))))


def _transposed(m: Any, x: Tensor) -> Tensor:
    return m.out(relu(m.u(relu(m.n(m.t(relu(m.a(x))))))))


def _flatten(m: Any, x: Tensor) -> Tensor:
    return m.d(relu(m.c(F.max_pool2d(relu(m.b(relu(m.a(x)))), 2).flatten(1))))


def _chunk(m: Any, x: Tensor) -> Tensor:
    gate, value = m.a(x).chunk(2, 1)
    return m.c(relu(m.b(torch.sigmoid(gate) * value)))


def _normed(m: Any, x: Tensor) -> Tensor:
    return m.head(mean(relu(m.b(relu(m.n(m.a(x)))))))


def _squeeze(m: Any, x: Tensor) -> Tensor:
    x = relu(m.n(m.a(x)))
    scale = torch.sigmoid(m.up(relu(m.down(mean(x)))))
    return m.head(mean(relu(m.b(x * scale[:, :, None, None]))))


def _option_a(m: Any, x: Tensor) -> Tensor:
    x = relu(m.a(x))
    y = m.c(relu(m.b(x)))
    return m.head(mean(relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + y)))


def _shuffled(m: Any, x: Tensor) -> Tensor:
    x = relu(m.a(x))
    b, c, h, w = x.shape
    return m.head(mean(relu(m.b(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)))))


def _twice(m: Any, x: Tensor) -> Tensor:
    return m.head(mean(relu(m.b(relu(m.b(relu(m.a(x))))))))


def _multihead(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.c(relu(m.b(x + m.att(x, x, x, need_weights=False)[0])))


class FrozenNorm(nn.Module):
    """As detectors have it: all of it are buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Sized(nn.Module):
    """Holds its number of channels: to reshape what a linear layer gives, and to split it."""

    def __init__(self, split: bool = False) -> None:
        super().__init__()
        self.channels, self.split = 5, split
        self.a, self.b = Linear(6, 90 if split else 45), conv(10 if split else 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.a(x)).view(len(x), -1, 3, 3) if self.split else relu(self.a(x)).view(-1, self.channels, 3, 3)
        return self.b(torch.cat(x.split((self.channels, self.channels), 1)[::-1], 1) if self.split else x)


def _split(m: Any, x: Tensor, add: bool = True) -> Tensor:
    parts = list(relu(m.stem(x)).chunk(2, 1))
    inner = m.c2(relu(m.c1(parts[-1])))
    parts.append(parts[-1] + inner if add else inner)
    return m.head(mean(relu(m.c(torch.cat(parts, 1)))))


def _recurrent(m: Any, x: Tensor) -> Tensor:
    return m.c(relu(m.b(m.r(m.a(x))[0])))


def _two_readers(m: Any, x: Tensor) -> Tensor:
    x = relu(m.a(x))
    return m.b(x) + m.d(relu(m.c(x)))


def _embedded(m: Any, x: Tensor) -> Tensor:
    x = m.e(x.long().abs() % 7) + m.pos
    return m.d(x + m.c(relu(m.b(x))))


class Attention(nn.Module):
    """A block of a transformer, its heads made by hand."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.up, self.down = Linear(width, 16), Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.norm1(x)
        b, t, _ = inputs.shape
        q, k, v = (f(inputs).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Width(nn.Module):
    """Reads a width of its own in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.a, self.b, self.c = Linear(4, 8), Linear(8, 12), Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(relu(self.b(relu(self.a(x)).view(-1, self.width))))


def _tied() -> nn.Module:
    net = Net(
        lambda m, x: m.e(relu(m.d(relu(m.c(relu(m.b(relu(m.a(x))))))))),
        a=Linear(6, 8), b=Linear(8, 8), c=Linear(8, 8), d=Linear(8, 10), e=Linear(10, 3),
    )  # fmt: skip
    net.c.weight = net.b.weight
    return net


IMAGE, ROW, ROWS = (3, 6, 6), (6,), (5, 6)

# (maker, shape of one input sample); LayerNorm and GroupNorm mix the channels, by their statistics.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain": (lambda: Net(_chain, a=conv(3, 8), b=conv(8, 12), c=Linear(12, 5)), IMAGE),
    "mlp": (lambda: Net(_mlp, a=Linear(6, 16, bias=False), b=Linear(16, 8), c=Linear(8, 3, bias=False)), ROW),
    "conv1d": (
        lambda: Net(_mlp, a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 6, 3, dilation=2), c=nn.Conv1d(6, 2, 1)), (3, 12),
    ),
    "conv3d": (
        lambda: Net(
            lambda m, x: m.c(relu(m.b(relu(m.a(x)))).flatten(1)),
            a=nn.Conv3d(3, 8, 3), b=nn.Conv3d(8, 4, 2), c=Linear(32, 3),
        ), (3, 5, 5, 5),
    ),
    "residual": (
        lambda: Net(
            _residual, stem=conv(3, 8, bias=False), n0=BatchNorm2d(8), c1=conv(8, 10, bias=False), n1=BatchNorm2d(10),
            c2=conv(10, 8, bias=False), n2=BatchNorm2d(8), head=Linear(8, 5),
        ), IMAGE,
    ),
    "projection": (
        lambda: Net(
            _projection, stem=conv(3, 6), p=conv(6, 8, 1, stride=2, bias=False), c1=conv(6, 10, stride=2),
            c2=conv(10, 8), head=Linear(8, 5),
        ), IMAGE,
    ),
    "concat": (
        lambda: Net(
            _concat, a=conv(3, 6), b=conv(3, 10, 1), n=BatchNorm2d(16), c=conv(16, 8), head=Linear(8, 4)
        ), IMAGE,
    ),
    "dense": (lambda: Net(_dense, a=conv(3, 6), b=conv(6, 4), head=Linear(10, 4)), IMAGE),
    "doubled": (lambda: Net(_doubled, a=conv(3, 6), b=Linear(12, 2)), IMAGE),
    "depthwise": (
        lambda: Net(
            _depthwise, a=conv(3, 8, 1), dw=conv(8, 8, groups=8, stride=2), n=BatchNorm2d(8), c=conv(8, 12, 1),
            head=Linear(12, 4),
        ), IMAGE,
    ),
    "grouped": (
        lambda: Net(
            _grouped, a=conv(3, 8), g=conv(8, 12, groups=4), n=BatchNorm2d(12), c=conv(12, 8, 1), head=Linear(8, 4)
        ), IMAGE,
    ),
    "transposed": (
        lambda: Net(
            _transposed, a=conv(3, 8, stride=2), t=nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), n=BatchNorm2d(6),
            u=nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2), out=conv(8, 2),
        ), IMAGE,
    ),
    "flatten": (lambda: Net(_flatten, a=conv(3, 8), b=conv(8, 6), c=Linear(54, 12), d=Linear(12, 4)), IMAGE),
    "chunk": (lambda: Net(_chunk, a=Linear(6, 16), b=Linear(8, 10), c=Linear(10, 3)), ROW),
    "groupnorm": (lambda: Net(_normed, a=conv(3, 8), n=nn.GroupNorm(2, 8), b=conv(8, 6), head=Linear(6, 4)), IMAGE),
    "instancenorm": (
        lambda: Net(_normed, a=conv(3, 8), n=nn.InstanceNorm2d(8, affine=True), b=conv(8, 6), head=Linear(6, 4)), IMAGE,
    ),
    "layernorm": (
        lambda: Net(
            lambda m, x: m.c(m.n(relu(m.b(F.gelu(m.a(x)))))),
            a=Linear(6, 16), b=Linear(16, 8), n=nn.LayerNorm(8), c=Linear(8, 3),
        ), ROWS,
    ),
    "prelu": (
        lambda: Net(
            lambda m, x: m.head(mean(m.q(m.b(m.p(m.a(x)))))),
            a=conv(3, 8), p=nn.PReLU(8), b=conv(8, 6), q=nn.PReLU(), head=Linear(6, 4),
        ), IMAGE,
    ),
    "squeeze": (
        lambda: Net(
            _squeeze, a=conv(3, 8, bias=False), n=BatchNorm2d(8), down=Linear(8, 4), up=Linear(4, 8), b=conv(8, 6),
            head=Linear(6, 4),
        ), IMAGE,
    ),
    "attention": (lambda: nn.Sequential(Linear(6, 8), Attention(), Linear(8, 3)), ROWS),
    "twice": (lambda: Net(_twice, a=conv(3, 8), b=conv(8, 8), head=Linear(8, 4)), IMAGE),
    "two readers": (lambda: Net(_two_readers, a=Linear(6, 8), b=Linear(8, 4), c=Linear(8, 10), d=Linear(10, 4)), ROW),
    "product": (
        lambda: Net(lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(x))), a=Linear(6, 8), b=Linear(6, 8), c=Linear(8, 3)),
        ROW,
    ),
    "parameter": (
        lambda: Net(
            lambda m, x: m.b(relu(m.a(x) + m.pos)), a=Linear(6, 8), pos=nn.Parameter(torch.randn(5, 8)), b=Linear(8, 3)
        ), ROWS,
    ),
    "embedding": (
        lambda: Net(
            _embedded, e=nn.Embedding(7, 8), pos=nn.Parameter(torch.randn(1, 5, 8)), b=Linear(8, 12), c=Linear(12, 8),
            d=Linear(8, 3),
        ), (5,),
    ),
    "option a": (
        lambda: Net(_option_a, a=conv(3, 8), b=conv(8, 16, stride=2), c=conv(16, 16), head=Linear(16, 4)), IMAGE,
    ),
    "shuffle": (lambda: Net(_shuffled, a=conv(3, 8), b=conv(8, 6), head=Linear(6, 4)), IMAGE),
    "flip": (lambda: Net(lambda m, x: m.b(relu(m.a(x)).flip(1)), a=Linear(6, 8), b=Linear(8, 3)), ROW),
    "softmax": (lambda: Net(lambda m, x: m.b(torch.softmax(m.a(x), -1)), a=Linear(6, 8), b=Linear(8, 3)), ROW),
    "glu": (
        lambda: Net(lambda m, x: m.c(relu(m.b(F.glu(m.a(x))))), a=Linear(6, 16), b=Linear(8, 10), c=Linear(10, 3)), ROW,
    ),
    "pixel shuffle": (
        lambda: Net(lambda m, x: m.b(F.pixel_shuffle(relu(m.a(x)), 2)), a=conv(3, 16), b=conv(4, 2)), IMAGE,
    ),
    "norm over two axes": (
        lambda: Net(lambda m, x: m.b(m.n(m.a(x))), a=Linear(6, 8), n=nn.LayerNorm((5, 8)), b=Linear(8, 3)), ROWS,
    ),
    "multihead": (
        lambda: Net(
            _multihead, a=Linear(6, 8), att=nn.MultiheadAttention(8, 2, batch_first=True), b=Linear(8, 12),
            c=Linear(12, 3),
        ), ROWS,
    ),
    "recurrent": (
        lambda: Net(
            _recurrent, a=Linear(6, 8), r=nn.LSTM(8, 8, batch_first=True), b=Linear(8, 12), c=Linear(12, 3)
        ), ROWS,
    ),
    "c2f": (
        lambda: Net(_split, stem=conv(3, 12), c1=conv(6, 6), c2=conv(6, 6), c=conv(18, 8), head=Linear(8, 4)), IMAGE,
    ),
    "c2f without a sum": (
        lambda: Net(
            lambda m, x: _split(m, x, add=False),
            stem=conv(3, 12), c1=conv(6, 6), c2=conv(6, 6), c=conv(18, 8), head=Linear(8, 4),
        ), IMAGE,
    ),
    "pixel unshuffle": (
        lambda: Net(lambda m, x: m.b(F.pixel_unshuffle(relu(m.a(x)), 2)), a=conv(3, 4), b=conv(16, 2)), IMAGE,
    ),
    "generator": (
        lambda: Net(
            lambda m, x: m.t(relu(m.n(m.a(x).view(len(x), -1, 3, 3)))),
            a=Linear(6, 45), n=BatchNorm2d(5), t=nn.ConvTranspose2d(5, 2, 3),
        ), ROW,
    ),
    "unflatten": (
        lambda: Net(
            lambda m, x: m.t(relu(m.u(m.a(x)))),
            a=Linear(6, 45), u=nn.Unflatten(1, (5, 3, 3)), t=nn.ConvTranspose2d(5, 2, 3),
        ), ROW,
    ),
    "frozen norm": (
        lambda: Net(lambda m, x: m.b(relu(m.n(m.a(x)))), a=conv(3, 8), n=FrozenNorm(8), b=conv(8, 2)), IMAGE,
    ),
    "own number": (Sized, ROW),
    "split by a number": (lambda: Sized(split=True), ROW),
    "literal": (
        lambda: Net(lambda m, x: m.t(relu(m.a(x).view(-1, 5, 3, 3))), a=Linear(6, 45), t=conv(5, 2)), ROW,
    ),
    "width": (Width, (4,)),
    "tied": (_tied, ROW),
}  # fmt: skip


def made(name: str, *, samples: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode, its normalisations with scales of their own, and an input."""
    torch.manual_seed(0)
    maker, shape = NETS[name]
    model, x = maker().to(dtype), torch.randn(samples, *shape, dtype=dtype)
    settle(model, torch.randn(64, *shape, dtype=dtype))
    return model.eval(), x * 3 if name == "embedding" else x


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Give normalisations other scales than ones, and BatchNorm the statistics of some inputs."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(x)
