"""Learning from the outputs of the uncompressed network (Hinton, Vinyals and Dean, 2015; Ba and Caruana, 2014)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.nn.watch.nesting import output_tensors

IGNORED = -100
"""Label that marks a position to leave out, as in :func:`torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class Distillation:
    """Mix of a task loss with the distance to a teacher's softened outputs.

    ``weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - weight) * task``. The factor ``T^2`` keeps
    the size of the gradients when the temperature changes. Where outputs are maps (four axes or more) and no labels
    tell which axis the classes are on, as of a detector or a network that makes pictures, or complex, or several, the
    distance is the squared error as a share of the teacher's energy, a mean over the outputs.

    Attributes
    ----------
    temperature
        ``T``, above 0. Larger values show more of how the teacher ranks the wrong classes.
    weight
        Share of the teacher, from 0 (task loss only) to 1 (teacher only).

    Examples
    --------
    Teacher outputs that were computed before travel as part of the targets, and no teacher is run::

        batches = [(inputs, (labels, teacher_logits)), ...]
        fine_tune(model, batches, loss=Distillation(temperature=2).loss_on_pairs)
    """

    temperature: float = 4.0
    weight: float = 0.9

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, Real) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature!r} must be above 0")
        if not (isinstance(self.weight, Real) and 0 <= self.weight <= 1):
            raise ValueError(f"weight={self.weight!r} must lie between 0 and 1")

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """``T^2 * KL(teacher || student)`` at temperature ``T``, averaged over positions.

        Parameters
        ----------
        student, teacher
            Logits ``[..., classes]`` of equal shape; gradients flow to both.
        labels
            If it has shape ``[...]``, positions labelled -100 are left out.

        Raises
        ------
        ValueError
            If the two shapes differ.
        """
        if student.shape != teacher.shape:
            raise ValueError(
                f"the student returned logits of shape {tuple(student.shape)} and the teacher {tuple(teacher.shape)}; "
                "distillation needs the same classes in the same order. Pass distillation=None to train without"
            )
        student = F.log_softmax(student.float() / self.temperature, -1)
        teacher = F.log_softmax(teacher.float() / self.temperature, -1)
        positions = (teacher.exp() * (teacher - student)).sum(-1)
        if labels is not None and labels.shape == positions.shape and not labels.is_floating_point():
            counted = labels != IGNORED
            mean = (positions * counted).sum() / counted.sum().clamp(min=1)
        else:
            mean = positions.mean()
        return self.temperature**2 * mean

    def distance(self, student: Any, teacher: Any, labels: Tensor | None = None) -> Tensor:
        """How far outputs of any kind are from the teacher's.

        Parameters
        ----------
        student, teacher
            Scores of classes on the last axis, or on the second where labels have the shape of all others
            (``[n, classes, height, width]`` beside ``[n, height, width]``), for which it is :meth:`divergence`; or
            maps, complex numbers, or several outputs in any structure.
        labels
            Positions labelled -100 are left out.
        """
        if not isinstance(student, Tensor) or student.is_complex():
            return _missed(output_tensors(student), output_tensors(teacher))
        positions = None if labels is None else labels.shape
        if positions == student.shape[:1] + student.shape[2:] != student.shape[:-1]:
            return self.divergence(student.movedim(1, -1), teacher.movedim(1, -1), labels)
        if student.dim() < 4 or student.shape != teacher.shape or positions == student.shape[:-1]:
            return self.divergence(student, teacher, labels)
        return _missed([student], [teacher])

    def mix(self, task: Tensor, student: Any, teacher: Any, labels: Tensor | None = None) -> Tensor:
        """The whole loss, from a task loss that is computed already."""
        return self.weight * self.distance(student, teacher, labels) + (1 - self.weight) * task

    def loss_on_pairs(self, student: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        """Loss for targets ``(labels, teacher_logits)``: cross-entropy as the task, teacher outputs from a cache."""
        labels, teacher = targets
        return self.mix(cross_entropy(student.float(), labels), student, teacher, labels)


def _missed(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """Squared error as a share of the teacher's energy, a mean over outputs that are numbers."""
    if [each.shape for each in students] != [each.shape for each in teachers]:
        raise ValueError(
            f"the student returned outputs of shapes {[tuple(each.shape) for each in students]} and the teacher "
            f"{[tuple(each.shape) for each in teachers]}: pass distillation=None to train without"
        )
    pairs = [(a.float(), b.float()) for a, b in zip(students, teachers, strict=True) if a.is_floating_point()]
    shares = [(a - b).square().sum() / b.square().sum().clamp(min=1e-30) for a, b in pairs]
    return torch.stack(shares).mean() if shares else torch.zeros(())


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """:func:`torch.nn.functional.cross_entropy`, which is 0 in place of NaN where all labels are -100."""
    if labels.is_floating_point():
        return F.cross_entropy(scores, labels)
    counted = labels.to(torch.int64) != IGNORED
    return F.cross_entropy(scores, labels, reduction="sum") / counted.sum().clamp(min=1)
