"""The loss of one batch: the task, the teacher, and the precision they are computed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.nn.parameters import modes_kept
from spectrim.nn.watch.chance import Chance
from spectrim.nn.watch.nesting import tensors
from spectrim.nn.watch.state import kept
from spectrim.train import batches as batching
from spectrim.train.distillation import IGNORED, Distillation, cross_entropy

Loss = Callable[[Any, Any], Tensor]


def check_teacher(teacher: object) -> None:
    """Raise TypeError for what cannot be asked as a model is."""
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher is a {type(teacher).__name__}: expected a Module, such as the dense model; of a result, its "
            ".model"
        )


def _checked(loss: object) -> Tensor:
    """What a user's loss returned, if gradients can go back from it."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and (loss.requires_grad or not torch.is_grad_enabled()):
        return loss.reshape(())
    what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    flat = isinstance(loss, Tensor) and loss.numel() == 1
    raise TypeError(
        f"loss= returned {what}{', cut off from the outputs' if flat else ''}: expected a tensor of one number that is "
        "computed from the outputs, as with reduction='mean'"
    )


class Objective:
    """Loss of a model on inputs and targets.

    Parameters
    ----------
    loss
        Function of ``(logits, targets)``; None takes the loss that the model returned, or cross-entropy.
    distillation
        How to mix them in; None ignores the teacher.
    precision
        ``"bfloat16"`` computes the outputs under autocast; losses are computed in float32 always.
    """

    def __init__(
        self, loss: Loss | None, teacher: nn.Module | None, distillation: Distillation | None, precision: str
    ) -> None:
        self.loss, self.distillation, self.precision = loss, distillation, precision
        self.teacher = teacher if distillation is not None else None
        self._student_called, self._teacher_called = batching.Calls(), batching.Calls()

    def __call__(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        device = next((t.device.type for t in tensors(inputs)), "cpu")
        goal = None
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            drawn = Chance.now() if self.teacher is not None else None
            output = self._student_called(model, inputs)
            if self.teacher is not None and drawn is not None:
                with torch.no_grad(), drawn.again():
                    goal = batching.scores_of(self._teacher_called(self.teacher, inputs))
        student = batching.scores_of(output)
        if isinstance(student, Tensor) and student.is_floating_point():
            student = student.float()
        taught = targets is None and goal is not None
        if self.loss is None and _loss(output) is None and not isinstance(student, Tensor) and not taught:
            raise TypeError(
                f"the model's outputs are a {type(student).__name__}, and no tensor of scores that a loss could be "
                "taken of: pass loss=, a function of these outputs and the targets, or teacher= with batches of "
                "inputs alone"
            )
        if taught and self.loss is None and _loss(output) is None:
            assert self.distillation is not None
            return self.distillation.distance(student, goal)
        task = self._task(output, student, targets)
        if self.distillation is None or goal is None:
            return task
        return self.distillation.mix(task, student, goal, targets if isinstance(targets, Tensor) else None)

    def _task(self, output: Any, student: Any, targets: Any) -> Tensor:
        if self.loss is not None:
            return _checked(self.loss(student, targets))
        loss = _loss(output)
        if loss is not None:
            return loss.float()
        if targets is None:
            raise ValueError(
                "the batch has no 'labels' and the model returned no loss: pass teacher= or loss= to fine_tune"
            )
        if not isinstance(targets, Tensor):
            raise TypeError(
                f"targets are a {type(targets).__name__}, not a tensor of labels: convert them or pass loss="
            )
        try:
            return cross_entropy(student, targets)
        except IndexError as error:
            labels, classes = targets.long(), student.shape[1]
            labels = labels[labels != IGNORED]
            raise ValueError(
                f"a batch of {len(targets)} has labels from {int(labels.min())} to {int(labels.max())}, and the model "
                f"answers with {classes} numbers, for classes 0 to {classes - 1}: give it an output for each class, or "
                f"other labels ({IGNORED} is ignored; loss=torch.nn.CrossEntropyLoss(ignore_index=...) ignores another)"
            ) from error
        except (RuntimeError, ValueError) as error:
            cure = _cure(student, targets)
            if cure is None:
                raise
            raise ValueError(
                f"labels of shape {tuple(targets.shape)} and {targets.dtype} do not belong to outputs of shape "
                f"{tuple(student.shape)}, classes on the second axis: {cure}, or pass loss="
            ) from error

    @contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        """The teacher on a device in evaluation mode; as before on leaving."""
        if not isinstance(self.teacher, nn.Module):
            yield
            return
        home = next((p.device for p in self.teacher.parameters()), device)
        with modes_kept(self.teacher):
            self.teacher.to(device).eval()
            try:
                with kept(self.teacher):
                    yield
            finally:
                self.teacher.to(home)


def _cure(scores: Any, labels: Any) -> str | None:
    """What makes labels fit for cross-entropy; None where they fit, or are no tensor."""
    if not isinstance(scores, Tensor) or not isinstance(labels, Tensor):
        return None
    if scores.dim() < 2:
        return "let the model answer with a score for each class"
    fit = scores.shape[:1] + scores.shape[2:]
    if labels.dim() == scores.dim() and labels.shape[1] == 1:
        return "write labels.squeeze(1)"
    if labels.shape == fit:
        return None if labels.dtype == torch.int64 else "write labels.long()"
    if labels.dim() == len(fit) > 1 and len(labels) == len(scores):
        return f"resize the labels (by nearest neighbours) to {tuple(fit)}, or the outputs to the labels"
    return f"give labels of shape {tuple(fit)}"


def _loss(output: Any) -> Any:
    """The loss that a model has computed itself."""
    return output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
