"""Where training runs: the model's own device, or what accelerate assigns to this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Devices:
    """The device of this process and its place among all processes."""

    device: torch.device  # where model and batches go
    # Number of this process and of all. All processes go through the same batches and each does its part, so that the
    # number of processes changes the speed and not the data.
    index: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.index == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training: it averages gradients over processes."""
        if self.count == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over processes."""
        if self.count > 1:
            value = value.to(self.device, copy=True)
            dist.all_reduce(value)
        return value.item() / self.count

    def from_main(self, value: float) -> float:
        """The main process's number, on every process."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the running statistics of the main one."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def assign(model: nn.Module, accelerate: bool | None) -> Devices:
    """Choose the device.

    Parameters
    ----------
    model
        Its first tensor says where it is now.
    accelerate
        True uses accelerate, False stays on the model's device. None uses it when the script was started as several
        processes or by ``accelerate launch``, or when it is installed and there is a GPU.

    Raises
    ------
    ModuleNotFoundError
        If accelerate is needed and not installed.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    launched = several or "ACCELERATE_MIXED_PRECISION" in os.environ
    installed = find_spec("accelerate") is not None
    if accelerate is None:
        accelerate = several or (installed and (launched or torch.cuda.is_available()))
    if not accelerate:
        first = next(iter(model.parameters()), None)
        return Devices(torch.device("cpu") if first is None else first.device)
    if not installed:
        reason = f"WORLD_SIZE={os.environ['WORLD_SIZE']} processes" if several else "accelerate=True"
        raise ModuleNotFoundError(f"{reason} needs the package accelerate: pip install 'spectrim[train]'")
    from accelerate import PartialState

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    state = PartialState(cpu=on_cpu)
    return Devices(torch.device(state.device or "cpu"), state.process_index, state.num_processes)
