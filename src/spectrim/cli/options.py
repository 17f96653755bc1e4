"""Options that commands share, in groups that a command takes as one value; see :func:`spectrim.cli.common.command`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectrim.cli.common import usage
from spectrim.cli.references import UsageError

if TYPE_CHECKING:
    from spectrim.train import Recipe

SELECTORS = ("exact", "lagrangian", "greedy", "energy", "uniform")

Model = Annotated[
    str,
    typer.Argument(
        help="package.module:factory, file.py:factory, timm:NAME, torchvision:NAME or hf:NAME; options as ?key=value."
    ),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", "-w", help="Weights: .safetensors, or .pt read with weights_only.")
]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", "-c", help="A compressed model that spectrim compress wrote.")
]
Input = Annotated[
    str | None, typer.Option("--input", help="Shape of one random input where there is no data, as 3x224x224.")
]
Batch = Annotated[
    int, typer.Option("--batch", min=1, help="Samples a forward pass where time and memory are measured.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; all that torch would take by default.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ..., or auto.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="auto (the default), weight-svd, activation-svd, joint, joint-svd, low-rank-plus-sparse, "
        "principal-filters, or package.module:Class; learned-ranks in compress. Options after a colon, as "
        "low-rank-plus-sparse:patterns=2:4+rows,share=0.3. Repeatable.",
    ),
]
Costs = Annotated[
    list[str] | None,
    typer.Option("--cost", help="A cost of your own, as joules=package.module:function of layers. Repeatable."),
]


@dataclass(frozen=True)
class NetworkOptions:
    """The model, and how it is run."""

    model: Model
    weights: Weights = None
    batch: Batch = 1
    threads: Threads = None
    device: Device = "cpu"


@dataclass(frozen=True)
class InputOptions:
    """What the model is fed with before it is compressed."""

    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Calibration batches; some of --train where ranks are learned: digits, cifar10:DIR, "
            "fashion-mnist:DIR, imagefolder:DIR, package.module:factory or file.py:factory; options as ?key=value.",
        ),
    ] = None
    input_shape: Input = None
    mask: Annotated[
        str | None,
        typer.Option(
            "--mask", help="Tensor of the batches that is not zero where a token is data; attention_mask by default."
        ),
    ] = None
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="Input patches that a layer's statistics rest on, over all samples."),
    ] = None
    positions: Annotated[
        int | None, typer.Option("--positions", min=1, help="Input patches of every sample, in place of --rows.")
    ] = None


@dataclass(frozen=True)
class LayerOptions:
    """Which layers, and in what steps."""

    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", help="Leave layers alone whose name matches, as 'layer1.*'. Repeatable."),
    ] = None
    only: Annotated[list[str] | None, typer.Option("--only", help="Keep to layers whose name matches. Repeatable.")] = (
        None
    )
    multiple_of: Annotated[
        int | None, typer.Option("--multiple-of", min=1, help="Ranks, and numbers of filters, are multiples of this.")
    ] = None


@dataclass(frozen=True)
class SharingOptions:
    """Which layers may share factors."""

    share: Annotated[
        bool | None,
        typer.Option(
            "--share/--no-share",
            help="Offer that repeated layers, and layers with one input, share factors. By default compress does where "
            "the budget limits parameters or bytes and there is no --method.",
        ),
    ] = None
    groups: Annotated[
        Path | None,
        typer.Option("--groups", help='Layers that may share factors, by hand: a JSON file as {"name": ["a", "b"]}.'),
    ] = None


@dataclass(frozen=True)
class TrainingOptions:
    """Batches to train and to test on."""

    train: Annotated[str | None, typer.Option("--train", help="Training batches: to fine-tune, or to learn ranks.")] = (
        None
    )
    test: Annotated[str | None, typer.Option("--test", help="Labelled batches to measure accuracy on.")] = None
    epochs: Annotated[int, typer.Option("--epochs", min=0, help="Epochs of fine-tuning.")] = 10
    lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate of the fine-tuning.")] = None

    def recipe(self) -> Recipe:
        """That of the fine-tuning.

        Raises
        ------
        UsageError
            For a learning rate that cannot be used.
        """
        from spectrim.train import Recipe

        with usage("--lr"):
            return Recipe(epochs=self.epochs, lr=self.lr)


@dataclass(frozen=True)
class LearningOptions:
    """How ranks are learned."""

    rank_epochs: Annotated[
        int, typer.Option("--rank-epochs", help="Epochs of learning weights and ranks together.")
    ] = 10
    rank_lr: Annotated[float | None, typer.Option("--rank-lr", help="Highest learning rate of these epochs.")] = None
    c_steps: Annotated[int, typer.Option("--c-steps", help="How often ranks are chosen in these epochs.")] = 64
    energy: Annotated[str, typer.Option("--energy", help="weight or output, whose energy errors are shares of.")] = (
        "weight"
    )

    def __post_init__(self) -> None:
        if self.rank_epochs < 0:
            raise UsageError(f"rank_epochs is {self.rank_epochs}; expected 0 or more")
        if self.c_steps < 1:
            raise UsageError(f"c_steps is {self.c_steps}; expected 1 or more")
        if self.energy not in ("weight", "output"):
            raise UsageError(f"energy is {self.energy!r}; expected weight or output")


@dataclass(frozen=True)
class LearnedRanksOptions(LearningOptions):
    """The options of ``--method learned-ranks``.

    Attributes
    ----------
    multiplier
        Loss that one unit of ``cost`` is worth, in place of a budget.
    """

    multiplier: float | None = None
    cost: str = "macs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiplier is not None and not 0 < self.multiplier < float("inf"):
            raise UsageError(f"multiplier is {self.multiplier}; expected a finite number above 0, as 4e-9")


@dataclass(frozen=True)
class GoalOptions:
    """What the compressed model may cost, or which one it is to be."""

    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="macs=50%, parameters=1.2M, bytes=10MiB, latency=3ms. Repeatable."),
    ] = None
    cost: Costs = None
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Principal filters: how many stay, in place of --budget: kl, or energy=0.95 for a share of the "
            "responses' energy.",
        ),
    ] = None
    plan: Annotated[Path | None, typer.Option("--plan", help="Carry out this plan in place of a budget.")] = None
    selector: Annotated[str, typer.Option("--selector", help=", ".join(SELECTORS) + ".")] = "exact"
    guard: Annotated[
        bool, typer.Option("--guard", help="Leave out choices that are measured no faster than dense.")
    ] = False


@dataclass(frozen=True)
class FileOptions:
    """What is written where."""

    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for model.safetensors, plan.json, report.html.")
    ] = Path("compressed")
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html.")] = True
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            help="Learned ranks: folder from which the same call continues after a kill; OUT/unfinished by default, "
            "which goes when all is done.",
        ),
    ] = None
    animate: Annotated[bool, typer.Option("--animate", help="Learned ranks: write ranks.gif too.")] = False
