"""Run by tests as a program: gradients of strided 1x1 convolutions of few channels in channels-last order.

Says first whether the library's are right, then whether torch's are, unless it has died of them.
"""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

from spectrim.nn.contiguity import contiguous_where_needed
from spectrim.train import fine_tune


def layers() -> list[nn.Module]:
    """As low rank makes them of down-sampling shortcuts."""
    narrow = [nn.Conv2d(c, 8, 1, stride=2, bias=False) for c in (4, 1, 2, 6, 7, 8, 15)]
    return [*narrow, nn.Conv2d(4, 8, 1, stride=(1, 2)), nn.ConvTranspose2d(8, 4, 1, stride=2, output_padding=1)]


def gradient(layer: nn.Module, x: Tensor) -> Tensor:
    for _ in range(10):
        layer.zero_grad()
        layer(x).square().mean().backward()
    return layer.weight.grad  # type: ignore[return-value]


def gradients_agree(layer: nn.Module, careful: contextlib.AbstractContextManager) -> bool:
    x = torch.randn(8, layer.in_channels, 64, 64)  # type: ignore[arg-type]
    expected = gradient(copy.deepcopy(layer), x)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with careful:
        given = gradient(layer, x.to(memory_format=torch.channels_last))
    return bool((given - expected).abs().max() <= 1e-5 * expected.abs().max())


def trained(memory_format: str) -> Tensor:
    """The weight of such a layer after two epochs of the recipe."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 32 * 32, 4),
    )  # fmt: skip
    batches = [(torch.randn(8, 3, 64, 64), torch.arange(8) % 4) for _ in range(5)]
    fine_tune(model, batches, epochs=2, lr=1e-3, memory_format=memory_format, progress=False)
    return model[1].weight.detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sound = all(gradients_agree(layer, contiguous_where_needed(layer)) for layer in layers())
    sound &= torch.allclose(trained("channels_last"), trained("preserve"), atol=1e-5)
    print("library:", "right" if sound else "wrong", flush=True)
    sound = all(gradients_agree(layer, contextlib.nullcontext()) for layer in layers())
    print("torch:", "right" if sound else "wrong", flush=True)
