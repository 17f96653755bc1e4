"""The small network with sparse layers in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectrim.network.choices import Choice
from spectrim.nn.build import skeleton
from spectrim.nn.find import find
from spectrim.nn.sparse.layers import Masked, laid_out
from spectrim.nn.surgery import replace_module


def choice(rank: int, density: float, pattern: str = "unstructured", unfolding: str = "channel") -> Choice:
    settings = {"unfolding": unfolding, "rank": rank, "density": density, "pattern": pattern}
    return Choice("low_rank_plus_sparse", "some-method", settings)  # type: ignore[arg-type]


class Net(nn.Module):
    """Three layers of which the first two are sparse, one of them beside a pair, and the last is thinner."""

    def __init__(self, seed: int = 0, patterns: tuple[str, str] = ("unstructured", "rows")) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(1, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.body = nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.drop = nn.Dropout(0.2)
            self.head = nn.Linear(8, 4)
            choices = {
                "stem": choice(0, 0.5, "rows"),
                "body": choice(2, 0.3, patterns[0], "height-first"),
                "head": choice(0, 0.5, patterns[1]),
            }
            compress(self, choices)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.stem(inputs)))
        return self.head(self.drop(torch.relu(self.body(hidden)).mean((2, 3))))


def compress(model: nn.Module, choices: dict[str, Choice]) -> nn.Module:
    """Put skeletons with random weights and random masks in place, in the model itself."""
    sites = find(model)
    for name, made in choices.items():
        (module,) = skeleton(made, [sites[name].spec])
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        for inner in module.modules():
            if isinstance(inner, Masked):
                density = made["density"]
                mask = inner.pattern.keep(torch.rand(inner.original.shape), density)
                inner.mask.copy_(laid_out(mask, inner.original))
                inner.settle()
        replace_module(model, sites[name].spec.names, module)
    return model


def masked(model: nn.Module) -> dict[str, Masked]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Masked)}


def linear(density: float, pattern: str = "unstructured", *, inputs: int = 24, outputs: int = 16) -> nn.Sequential:
    """One sparse layer without a bias."""
    return compress(nn.Sequential(nn.Linear(inputs, outputs, bias=False)), {"0": choice(0, density, pattern)})  # type: ignore[return-value]


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()
