"""Training checkpoints: one safetensors file, replaced as a whole, readable after a kill at any moment.

What is damaged, or belongs to another model, optimizer or run, raises CheckpointError, which says what differs. A file
that cannot be written raises OSError.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from spectrim.errors import CheckpointError, first_few
from spectrim.network import files, tensor_files
from spectrim.network.file_kinds import check_weights_name
from spectrim.train.result import EpochRecord

FORMAT = 1
_KEY = "spectrim_training"
_PARTS = {"model", "optimizer", "best", "random", "epoch_random", "loss", "penalty", "after_step"}
Count = Annotated[int, msgspec.Meta(ge=0)]
# State of each weight in the optimizers that recipes name, all but the number of steps of the weight's shape.
_STATE: Mapping[type[Optimizer], frozenset[str]] = {
    SGD: frozenset({"momentum_buffer"}),
    AdamW: frozenset({"step", "exp_avg", "exp_avg_sq"}),
}


class OptimizerRecord(msgspec.Struct, forbid_unknown_fields=True):
    """What an optimizer keeps beside tensors."""

    values: dict[str, bool | int | float | str | None]
    groups: list[dict[str, bool | int | float]]


class CheckpointRecord(msgspec.Struct, forbid_unknown_fields=True):
    """What a training checkpoint says beside its tensors."""

    run: dict[str, Any]  # what makes it this run
    # What is done: epochs, batches of the one after them, and steps in all.
    epoch: Count
    batch: Count
    step: Count
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    history: tuple[EpochRecord, ...]
    best: tuple[float | None, int | None]  # the highest metric and its epoch
    optimizer: OptimizerRecord
    # What :func:`magnitudes` says of what it began with; empty of earlier versions.
    start: dict[str, float] = {}
    uneven: bool = False  # whether epochs have had more or fewer batches than the data said

    def problem(self, epochs: int, per_epoch: int | None) -> str:
        """What cannot be so in a run of so many epochs of so many batches; empty if there is nothing."""
        if self.epoch > epochs:
            return f"{self.epoch} epochs are done of {epochs}"
        if [each.epoch for each in self.history] != list(range(1, self.epoch + 1)):
            return f"{self.epoch} epochs are done, and the history is of {len(self.history)} others"
        if not all(math.isfinite(each.loss) and math.isfinite(each.lr) for each in self.history):
            return "the history has a loss or a learning rate that is not finite"
        metrics = {each.epoch: each.metric for each in self.history}
        metric, epoch = self.best
        if (metric is None) != (epoch is None) or not _same(metric, metrics.get(epoch or 0)):
            return f"the best metric is {metric} of epoch {epoch}, which the history does not say"
        if per_epoch is not None and not self.uneven and self.step != self.epoch * per_epoch + self.batch:
            return f"{self.step} steps are not {self.epoch} epochs of {per_epoch} batches and {self.batch} more"
        # All of them, if the process died between the last batch and the end of the epoch.
        if per_epoch is not None and not self.uneven and self.batch > per_epoch:
            return f"{self.batch} batches are done of an epoch that has {per_epoch}"
        return ""


def _same(first: float | None, second: float | None) -> bool:
    return first == second or (first is not None and second is not None and math.isnan(first) and math.isnan(second))


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Replace the checkpoint at ``path``.

    The file is written beside it, flushed to the disk, and renamed. Whenever the process dies, ``path`` is the old
    checkpoint or the new one, whole.
    """
    files.make_parents(path)
    flat = {name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()}
    tensor_files.write(path, flat, {_KEY: json.dumps({"format": FORMAT, **record})})


def check_checkpoint_place(path: Path) -> None:
    """See that a checkpoint can be written, before there is a training to be lost; makes the folder it will lie in."""
    check_weights_name(path)
    files.make_parents(path)
    files.check_place(path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a checkpoint."""
    files.remove_abandoned(path.parent)
    try:
        tensors, metadata = tensor_files.read(path)
    except tensor_files.NoFileError as error:
        raise CheckpointError(f"{path}: {error}: give checkpoint the name of a file") from error
    except (tensor_files.DamagedFileError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{path}: the training checkpoint cannot be read ({error}). It is truncated or damaged; "
            "delete it to start from the beginning"
        ) from error
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file, but not a training checkpoint (no {_KEY!r} in its metadata). "
            "Give fine_tune another path for checkpoint"
        )
    try:
        record = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the record of the training cannot be read: {error}") from error
    version = record.pop("format", None) if isinstance(record, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"{path}: training checkpoint of format {version!r:.60}, expected {FORMAT}")
    return tensors, record


def read_record(record: Mapping[str, Any], source: str) -> CheckpointRecord:
    """The record of a checkpoint as values of their types."""
    try:
        return msgspec.convert(record, CheckpointRecord)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{source}: the record of the training is damaged: {error}") from error


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix/``, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + "/")}


def damage(parts: Mapping[str, Mapping[str, Tensor]], told: str, best: bool) -> str:
    """What cannot be so in the parts of a checkpoint, or is told of its record; empty if there is nothing.

    ``best`` says whether the best weights are to be there.
    """
    total = parts.get("loss", {}).get("sum")
    if unknown := parts.keys() - _PARTS:
        return f"it holds {min(unknown)!r}, which is no part of a checkpoint"
    if told:
        return told
    if total is None or total.shape != () or total.dtype != torch.float64 or not math.isfinite(float(total)):
        return "the sum of losses is no finite number"
    return "" if bool(parts.get("best")) == best else "the best weights are missing, or should not be there"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def spoiled(model: nn.Module, before: Mapping[str, Tensor]) -> str | None:
    """The name of a parameter or buffer that was finite and holds a number that is not."""
    tensors = model_tensors(model).items()
    return next((name for name, tensor in tensors if not _finite(tensor) and _finite(before[name])), None)


def check_tensors(model: nn.Module, stored: Mapping[str, Tensor], source: str) -> None:
    """See that stored tensors are those of a model."""
    tensors = model_tensors(model)
    wrong = [f"{n} is missing in it" for n in tensors if n not in stored]
    wrong += [f"{n} is not in the model" for n in stored if n not in tensors]
    for told in (lambda tensor: tuple(tensor.shape), lambda tensor: tensor.dtype):
        both = {n: (told(stored[n]), told(tensors[n])) for n in tensors if n in stored}
        wrong += [f"{n} is {then} in it and {now} in the model" for n, (then, now) in both.items() if then != now]
    if wrong:
        why = first_few(wrong, between="; ")
        raise CheckpointError(f"{source}: belongs to another model than this {type(model).__name__}: {why}")
    for name, tensor in tensors.items():
        # Masks of minus infinity are buffers of many models.
        if not _finite(stored[name]) and _finite(tensor):
            raise CheckpointError(f"{source}: {name} holds numbers that are not finite")


def magnitudes(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Sums of the absolute values of floating-point tensors: what differs between networks alike in form.

    They do not depend on the signs that factors come with, nor on the last bits of a decomposition.
    """
    kept = {name: each for name, each in tensors.items() if each.is_floating_point() and not each.is_meta}
    return {name: float(each.detach().abs().sum(dtype=torch.float64)) for name, each in kept.items()}


def apart(now: Mapping[str, float], then: Mapping[str, float]) -> str:
    """A tensor of which two networks have other magnitudes, as far as both are known; empty where there is none."""
    return next((n for n, s in now.items() if not math.isclose(s, then.get(n, s), rel_tol=1e-3, abs_tol=1e-12)), "")


def copy_tensors(model: nn.Module, stored: Mapping[str, Tensor], source: str) -> None:
    """Copy stored tensors into a model."""
    check_tensors(model, stored, source)
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            tensor.copy_(stored[name])


def _finite(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], OptimizerRecord]:
    """State of an optimizer as tensors ``index/name``, and what it keeps beside them.

    Raises TypeError if the state holds anything else, which no checkpoint could restore.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value
            elif value is None or isinstance(value, bool | int | float | str):
                values[f"{index}/{name}"] = value
            else:
                raise TypeError(
                    f"{type(optimizer).__name__} keeps {name!r} as {type(value).__name__}; a training checkpoint "
                    "holds tensors, numbers and text. Train without checkpoint or with another optimizer"
                )
    groups = [{k: v for k, v in g.items() if isinstance(v, bool | int | float)} for g in state["param_groups"]]
    return tensors, OptimizerRecord(values, groups)


def _place(key: str, weights: int, source: str) -> tuple[int, str]:
    """Which of so many weights a value of an optimizer is of, and what it is called."""
    index, _, name = key.partition("/")
    if not (index.isascii() and index.isdigit() and len(index) < 10 and int(index) < weights):
        raise CheckpointError(f"{source}: the optimizer's {key!r} is of none of its {weights} weights")
    return int(index), name


def optimizer_state(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], record: OptimizerRecord, source: str
) -> dict[str, Any]:
    """What ``load_state_dict`` of an optimizer takes, from what :func:`optimizer_tensors` returned.

    In the memory format of the parameters; the optimizer is left as it is.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = _STATE.get(type(optimizer))
    state: dict[int, dict[str, Any]] = {}
    for key, value in itertools.chain(tensors.items(), record.values.items()):
        index, name = _place(key, len(parameters), source)
        parameter = parameters[index]
        if names is not None and not _fits(name, value, parameter, names):
            raise CheckpointError(f"{source}: the optimizer's {key!r} is not what {type(optimizer).__name__} keeps")
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(index, {})[name] = value
    if names is not None and any(entries.keys() != names for entries in state.values()):
        raise CheckpointError(f"{source}: the state of the optimizer is not whole: it keeps {', '.join(sorted(names))}")
    current = optimizer.state_dict()["param_groups"]
    if len(current) != len(record.groups):
        raise CheckpointError(f"{source}: the optimizer has {len(record.groups)} groups of weights in it")
    groups = [_group(*pair, names is not None, source) for pair in zip(current, record.groups, strict=True)]
    return {"state": state, "param_groups": groups}


def _group(present: Mapping[str, Any], stored: Mapping[str, Any], known: bool, source: str) -> dict[str, Any]:
    """The options of a group of weights as they are stored, which those of a known optimizer do not change."""
    # The learning rate is set at every step.
    changed = [k for k, v in stored.items() if known and k != "lr" and present.get(k, present) != v]
    if changed or "params" in stored or not 0 <= stored.get("lr", 0.0) < math.inf:
        what = (changed or ["lr"])[0]
        raise CheckpointError(f"{source}: {what} of the optimizer is {stored[what]!r:.60} in it")
    return {**present, **stored}


def _fits(name: str, value: object, parameter: Tensor, names: frozenset[str]) -> bool:
    """Whether an optimizer that is known may keep this of a weight."""
    if name not in names or not isinstance(value, Tensor):
        return name in names and value is None
    if name == "step":
        return value.dtype == torch.float32 and value.ndim == 0 and _finite(value) and float(value) >= 0
    return value.shape == parameter.shape and value.dtype == parameter.dtype and _finite(value)
