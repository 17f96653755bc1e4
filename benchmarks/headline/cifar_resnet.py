"""The CIFAR ResNets of He et al., with the weights of Y. Idelbayev."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks import cifar
from benchmarks.headline.network import Figure, Metric, Network, run_on


class CifarResNet(Network):
    """Paths: ``cifar10``, the folder with the binary files; ``weights``, the folder with ``NAME.safetensors``."""

    metric = Metric("test accuracy", "%")
    needs = ("cifar10", "weights")

    @cached_property
    def data(self) -> tuple[cifar.Images, cifar.Images, cifar.Images]:
        return cifar.load(self.paths["cifar10"])

    def build(self) -> nn.Module:
        return cifar.network(self.name, self.paths["weights"] / f"{self.name}.safetensors")

    def calibration(self, count: int) -> list[Tensor]:
        return [cifar.normalise(part) for part in self.data[0].images[:count].split(128)]

    def held_out(self, model: nn.Module) -> float:
        # The dense network was trained on these images, too: good for comparing, some points too high.
        return cifar.accuracy(model, self.data[1])

    def test(self, model: nn.Module) -> dict[str, Figure]:
        test = self.data[2]
        parts = zip(test.images.split(500), test.labels.split(500), strict=True)
        right = [run_on(model, cifar.normalise(images)).argmax(1) == labels for images, labels in parts]
        return {"test accuracy": Figure.mean(100.0 * torch.cat(right))}

    def kept_whole(self, model: nn.Module) -> list[nn.Module]:
        # The option-A shortcuts tie the outer channels of all blocks.
        outer = [m.conv2 for m in model.modules() if isinstance(m, cifar.Block)]
        assert isinstance(model, cifar.ResNet)
        return [model.conv1, model.linear, *outer]
