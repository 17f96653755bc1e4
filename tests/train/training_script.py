"""Run by tests as a program: trains the small network and writes its weights.

python training_script.py OUT [checkpoint=FILE] [kind=exact|plain] [epochs=N] [mortal=yes]

mortal: one run for each line of standard input, as tests.train.mortal says.
"""

from __future__ import annotations

import functools
import os
import sys

import torch
from safetensors.torch import save_file
from torch import nn

from spectrim.train import fine_tune
from tests.train import mortal
from tests.train.small import Net, accuracy, fixed_batches, loader


def train(checkpoint: str | None = None, kind: str = "exact", epochs: int = 16) -> nn.Module:
    """``exact`` has all that is random: shuffling, augmentation, dropout. ``plain`` can be cut between processes."""
    torch.set_num_threads(1)
    if kind == "plain":
        model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-0.3, 0.4, parameter.numel()).sin().reshape(parameter.shape))
        batches = fixed_batches(44)
        fine_tune(model, batches, epochs=epochs, lr=0.1, evaluate=accuracy, keep="best", checkpoint=checkpoint)
        return model
    model = Net()
    fine_tune(
        model,
        loader(),
        teacher=Net(seed=1),
        epochs=epochs,
        lr=0.05,
        clip=1.0,
        evaluate=accuracy,
        keep="best",
        checkpoint=checkpoint,
        checkpoint_every=2,
    )
    return model


def write(out: str, options: dict[str, str]) -> None:
    trained = train(options.get("checkpoint"), options.get("kind", "exact"), int(options.get("epochs", "16")))
    target = out + os.environ.get("RANK", "")  # one file a process
    save_file({name: t.contiguous() for name, t in trained.state_dict().items()}, target)
    if torch.distributed.is_initialized():
        # Threads of the backend that are left running make the process abort now and then when it ends.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    out, options = sys.argv[1], dict(word.split("=", 1) for word in sys.argv[2:])
    if options.pop("mortal", None):
        mortal.serve(functools.partial(write, out, options))
    else:
        write(out, options)
