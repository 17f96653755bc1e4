"""The network of the demo."""

from __future__ import annotations

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Five convolutions with BatchNorm and a classifier, for 8 x 8 images of one channel."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        self.stem = nn.Sequential(block(1, width), block(width, width), nn.MaxPool2d(2))
        self.body = nn.Sequential(block(width, 2 * width), block(2 * width, 2 * width), block(2 * width, 2 * width))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))
