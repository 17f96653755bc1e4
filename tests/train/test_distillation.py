"""The distillation loss against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.nn.agreement import agreement
from spectrim.train import Distillation
from spectrim.train.distillation import cross_entropy
from spectrim.train.objective import Objective


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_divergence_is_the_definition(temperature: float) -> None:
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (torch.softmax(z / temperature, 1) for z in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    found = Distillation(temperature).divergence(student, teacher)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    library = F.kl_div((student / temperature).log_softmax(1), p, reduction="batchmean") * temperature**2
    torch.testing.assert_close(found.double(), library, rtol=1e-5, atol=1e-6)


def test_mix_weighs_the_task() -> None:
    student, teacher, labels = torch.randn(6, 3), torch.randn(6, 3), torch.randint(3, (6,))
    task = F.cross_entropy(student, labels)
    method = Distillation(3.0, 0.7)
    expected = 0.7 * method.divergence(student, teacher) + 0.3 * task
    torch.testing.assert_close(method.mix(task, student, teacher), expected)
    torch.testing.assert_close(method.loss_on_pairs(student, (labels, teacher)), expected)
    shares = F.one_hot(labels, 3).float()
    torch.testing.assert_close(cross_entropy(student, shares), task)
    assert cross_entropy(student, torch.full_like(labels, -100)) == 0
    assert Distillation(weight=0).mix(task, student, teacher) == task


def test_ignored_positions_do_not_count() -> None:
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    labels = torch.randint(3, (2, 5))
    labels[:, 3:] = -100
    found = Distillation().divergence(student, teacher, labels)
    torch.testing.assert_close(found, Distillation().divergence(student[:, :3], teacher[:, :3]))
    assert Distillation().divergence(student, teacher, torch.full((2, 5), -100)) == 0


def test_maps_are_not_taken_for_scores_along_a_row_of_pixels() -> None:
    teacher = torch.randn(2, 3, 4, 5)
    # One constant a row of pixels: no softmax along the row sees it.
    student = teacher + torch.randn(2, 3, 4, 1)
    expected = (student - teacher).square().sum() / teacher.square().sum()
    torch.testing.assert_close(Distillation().distance(student, teacher), expected)
    dense, small, x = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3), torch.randn(4, 3, 6, 6)
    learned = Objective(None, dense, Distillation(), "float32")(small, x, None)
    found = agreement(dense, small, [x])
    assert found is not None
    assert learned.item() == pytest.approx(found.error**2, rel=1e-5)


def test_several_outputs_and_complex_ones_are_as_far_apart_as_their_energy_that_is_missed() -> None:
    a, b, c, d = torch.randn(2, 5), torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 3)
    shares = [(a - c).square().sum() / c.square().sum(), (b - d).square().sum() / d.square().sum()]
    student, teacher = (
        {"x": a, "y": [b], "ids": a.argmax(-1), "no": None},
        {"x": c, "y": [d], "ids": a.argmin(-1), "no": None},
    )
    found = Distillation().distance(student, teacher)
    torch.testing.assert_close(found, (shares[0] + shares[1]) / 2)
    found = Distillation().distance(torch.complex(a, c), torch.complex(c, -a))
    torch.testing.assert_close(
        found, ((a - c).square().sum() + (a + c).square().sum()) / (a.norm() ** 2 + c.norm() ** 2)
    )
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 3\)"):
        Distillation().distance((a, a), (c, d))


def test_a_network_of_several_outputs_learns_from_a_teacher_alone_and_beside_a_loss() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.box, self.score = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"box": self.box(x), "score": self.score(x)}

    teacher, student, x = Heads(), Heads(), torch.randn(6, 4)
    apart = Distillation().distance(student(x), teacher(x))
    torch.testing.assert_close(Objective(None, teacher, Distillation(), "float32")(student, x, None), apart)

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs["score"], targets)

    labels = torch.randint(3, (6,))
    mixed = Objective(loss, teacher, Distillation(weight=0.25), "float32")(student, x, labels)
    torch.testing.assert_close(mixed, 0.25 * apart + 0.75 * loss(student(x), labels))
    with pytest.raises(TypeError, match="outputs are a dict.*or teacher= with batches of inputs alone"):
        Objective(None, teacher, Distillation(), "float32")(student, x, labels)


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 5)])
def test_classes_are_on_the_axis_that_labels_leave_out(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(2, 3, *shape[1:]), torch.randn(2, 3, *shape[1:])
    labels = torch.randint(3, shape)
    labels[0, 1] = -100
    expected = Distillation().divergence(student.movedim(1, -1), teacher.movedim(1, -1), labels)
    torch.testing.assert_close(Distillation().distance(student, teacher, labels), expected)
    last = Distillation().distance(student.movedim(1, -1), teacher.movedim(1, -1), labels)
    torch.testing.assert_close(last, expected)


def test_equal_outputs_have_no_divergence() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    value = Distillation().divergence(logits, logits.detach())
    value.backward()
    assert value.abs() < 1e-6
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_errors_quote_their_inputs() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        Distillation().divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature=0"):
        Distillation(temperature=0)
    with pytest.raises(ValueError, match=r"weight=1\.5"):
        Distillation(weight=1.5)
