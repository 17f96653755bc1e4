"""A model of your own and a folder of images: compress it to half of its multiply-accumulates, measure, save.

    python examples/own_model.py [FOLDER]

FOLDER has one folder of images a class. Without it the digits of scikit-learn are written as such.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import spectrim as st
from spectrim.report import accuracy


class Images(Dataset):
    def __init__(self, folder: Path) -> None:
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.files = [(file, n) for n, name in enumerate(classes) for file in sorted((folder / name).iterdir())]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file, label = self.files[index]
        return torch.from_numpy(np.array(Image.open(file).convert("L"))).float().div(255).unsqueeze(0), label


def digits(folder: Path) -> Path:
    from sklearn.datasets import load_digits

    for n, (image, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15).astype("uint8")).save(folder / str(label) / f"{n}.png")
    return folder


def make_model() -> nn.Module:  # yours, with its weights
    first = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(64 * 16, 10))


torch.manual_seed(0)
folder = Path(sys.argv[1]) if len(sys.argv) > 1 else digits(Path("images"))
batches = list(DataLoader(Images(folder), batch_size=50, shuffle=True))
train, test = batches[4:], batches[:4]

model = make_model()
st.fine_tune(model, train, epochs=3, lr=0.05)  # stands for the training that yours has behind it
result = st.compress(model, calibration=train, budget="macs=50%")
st.fine_tune(result.model, train, teacher=model, epochs=1, lr=0.02)
print(st.compare(model, result.model, test[0], evaluate=lambda network: accuracy(network, test), repeats=5))
st.save(result.model, result.plan, "small.safetensors")
again = st.load(make_model(), "small.safetensors")
