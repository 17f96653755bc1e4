"""Options that commands share, in groups that a command takes as one value; see :func:`spectrim.cli.common.command`.

A group's first line is its heading in the help. It refuses values that cannot be used when it is made, without torch:
by the function behind the option of a field, and where fields must go together by its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.cli import completion
from spectrim.cli.common import Checked, usage
from spectrim.cli.data import check_data
from spectrim.cli.models import check_model, load_compressed, load_model
from spectrim.cli.references import UsageError
from spectrim.cli.values import (
    check_device,
    check_folder,
    named_costs,
    one_of,
    read_budget,
    read_groups,
    read_shape,
    recipe_share,
)
from spectrim.cli.weights import check_checkpoint, check_file
from spectrim.selection.budget import COSTS

if TYPE_CHECKING:
    from torch import nn

    from spectrim.train import Recipe

RUNTIMES = ("eager", "compile", "onnxruntime")
SELECTORS = ("exact", "lagrangian", "greedy", "energy", "uniform")


def model_argument(meaning: str) -> Any:
    """MODEL, with what it means to a command."""
    return typer.Argument(metavar="MODEL", autocompletion=completion.models, help=meaning)


def weights_option(meaning: str) -> Any:
    """``--weights``."""
    return typer.Option("--weights", "-w", metavar="FILE", help=meaning)


def data_option(meaning: str) -> Any:
    """``--data``."""
    return typer.Option("--data", "-d", metavar="DATA", autocompletion=completion.data, help=meaning)


def budget_option(meaning: str) -> Any:
    """``--budget``."""
    return typer.Option("--budget", "-b", metavar="COST=VALUE", autocompletion=completion.budgets, help=meaning)


def folder_option(meaning: str) -> Any:
    """``--out``."""
    return typer.Option("--out", "-o", metavar="DIR", help=meaning)


check_calibration = functools.partial(check_data, purpose="calibration")
check_test = functools.partial(check_data, purpose="test", labelled="--test")
Input = Annotated[
    str | None,
    typer.Option("--input", metavar="SHAPE", help="Shape of one random sample where there are no data, as 3x224x224."),
    read_shape,
]


class Fed(Checked):
    """Options of which one says what goes in: data, or the shape of a random sample."""

    data: str | None
    input_shape: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None and self.input_shape is not None:
            raise UsageError(
                f"--input {self.input_shape} is for where there are no data: leave it out, or --data {self.data}"
            )


Batch = Annotated[int, typer.Option(metavar="N", min=1, help="Samples a pass where time and memory are measured.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; by default all that torch takes.")]
Runtime = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"What runs the network where time is measured: {', '.join(RUNTIMES)}."),
    one_of("--runtime", RUNTIMES, {"onnx": "onnxruntime", "ort": "onnxruntime", "torch": "eager"}),
]
Device = Annotated[
    str,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ..., or auto.", autocompletion=completion.devices),
    check_device,
]
Selector = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"How choices are made: {', '.join(SELECTORS)}."),
    one_of("--selector", SELECTORS),
]
Guard = Annotated[bool, typer.Option("--guard", help="Leave out choices that are measured no faster than dense.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="METHOD",
        rich_help_panel="What layers become",
        autocompletion=completion.methods,
        help="auto (low rank and Tucker-2, the default), weight-svd, activation-svd, weight-cp, activation-cp, "
        "weight-tucker2, activation-tucker2, joint, joint-svd, low-rank-plus-sparse, principal-filters, learned-ranks "
        "(compress alone), or package.module:Class. Its options follow a colon, as weight-svd:multiple_of=8. "
        "Repeatable.",
    ),
]
Costs = Annotated[
    list[str] | None,
    typer.Option(
        "--cost",
        metavar="NAME=FUNCTION",
        help="A cost of your own, as joules=energy.py:joules, a function of a layer. Repeatable.",
    ),
]


@dataclass(frozen=True)
class NetworkOptions(Checked):
    """The model."""

    model: Annotated[
        str,
        model_argument(
            "What returns it: file.py:function or package.module:function; or torchvision:NAME, timm:NAME, "
            "hf:NAME. Options follow as ?key=value&key=value."
        ),
        check_model,
    ]
    weights: Annotated[
        Path | None,
        weights_option(
            "Its weights: .safetensors, also as compress writes it, to compress again; .pt with a state_dict."
        ),
        check_file,
    ] = None
    batch: Batch = 1
    threads: Threads = None
    runtime: Runtime = "eager"
    device: Device = "cpu"


@dataclass(frozen=True)
class InputOptions(Fed):
    """Data that layers are fitted to."""

    data: Annotated[
        str | None,
        data_option(
            "A few hundred samples like those of training, without labels if need be: imagefolder:DIR, "
            "FILE.npz, FILE.csv, file.py:function, package.module:function, cifar10:DIR, fashion-mnist:DIR or "
            "digits. Options follow as ?key=value."
        ),
        check_calibration,
    ] = None
    input_shape: Input = None
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Tensor of the batches that is not zero where a token is data; attention_mask by default.",
        ),
    ] = None
    rows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Input patches that a layer's statistics rest on, in all.")
    ] = None
    positions: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Input patches of every sample, in place of --rows.")
    ] = None


@dataclass(frozen=True)
class LayerOptions(Checked):
    """Which layers."""

    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave these layers alone, as fc or 'layer1.*'. Repeatable."),
    ] = None
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave all but these layers alone. Repeatable.")
    ] = None
    multiple_of: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ranks, and numbers of filters, are multiples of N.")
    ] = None


@dataclass(frozen=True)
class SharingOptions(Checked):
    """Layers that share factors."""

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
        typer.Option(metavar="FILE", help='Such layers by hand: a JSON file as {"name": ["fc1", "fc2"]}.'),
        read_groups,
    ] = None

    def __post_init__(self) -> None:
        if self.groups is not None and self.share is False:
            raise UsageError(f"--groups {self.groups} does not combine with --no-share")
        super().__post_init__()


@dataclass(frozen=True)
class TrainingOptions(Checked):
    """Training and testing."""

    train: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            autocompletion=completion.data,
            help="Batches with labels to fine-tune on, or to learn ranks from; named like --data.",
        ),
        functools.partial(check_data, purpose="training"),
    ] = None
    test: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            autocompletion=completion.data,
            help="Batches with labels to measure accuracy on; named like --data.",
        ),
        check_test,
    ] = None
    epochs: Annotated[int, typer.Option(metavar="N", min=0, help="Epochs of fine-tuning.")] = 10
    lr: Annotated[float | None, typer.Option(metavar="NUMBER", help="Highest learning rate of the fine-tuning.")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is not None and not 0 <= self.lr < float("inf"):
            raise UsageError(f"--lr: lr={self.lr} must be a finite number of at least 0")

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

    rank_epochs: Annotated[int, typer.Option(metavar="N", help="Epochs of learning weights and ranks together.")] = 10
    rank_lr: Annotated[float | None, typer.Option(metavar="NUMBER", help="Highest learning rate of these epochs.")] = (
        None
    )
    c_steps: Annotated[int, typer.Option(metavar="N", help="How often ranks are chosen in these epochs.")] = 64
    energy: Annotated[
        str, typer.Option(metavar="WHICH", help="weight or output, whose energy errors are shares of.")
    ] = "weight"

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

    def check(self, training: TrainingOptions, points: list[str], costs: list[str]) -> None:
        """Refuse what ranks cannot be learned from.

        Parameters
        ----------
        points
            Budgets, if there are any.
        costs
            Of the user's own, as ``--cost`` takes them.
        """
        if training.train is None:
            raise UsageError("ranks are learned in training: give --train, batches with labels")
        if bool(points) == (self.multiplier is not None):
            raise UsageError("give either --budget (as macs=50%), or a multiplier (as learned-ranks:multiplier=4e-9)")
        known = (*COSTS, *named_costs(costs))
        if self.cost not in known:
            raise UsageError(f"cost {self.cost!r} is not known; choose from {', '.join(known)}")
        for point in points:
            read_budget([point], known)


@dataclass(frozen=True)
class GoalOptions(Checked):
    """How small."""

    budget: Annotated[
        list[str] | None,
        budget_option(
            "What the whole model may cost: macs=50% (or 0.5) of dense, parameters=1.2M, bytes=10MiB or "
            "latency=3ms. Repeatable; all hold together."
        ),
    ] = None
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="In place of a budget, or beside one: how much accuracy on --test may be lost, as 0.5.",
        ),
    ] = None
    min_agreement: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="The same without labels: share of held-out samples of --data whose class stays, as 0.99.",
        ),
    ] = None
    compete: Annotated[
        bool,
        typer.Option(
            "--compete",
            help="Let several sets of methods make a network each (low rank, chains, filters first, sparse) and keep "
            "the one that loses least on held-out samples of --data, or with a tolerance the smallest that holds it.",
        ),
    ] = False
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="With --compete: begin nothing further after so long.")
    ] = None
    cost: Costs = None
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            autocompletion=completion.recipes,
            help="Principal filters: how many stay, in place of --budget: kl, or energy=0.95 for a share of the "
            "responses' energy.",
        ),
        recipe_share,
    ] = None
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Carry out this plan.json in place of a budget.")
    ] = None
    selector: Selector = "exact"
    guard: Guard = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # Without a function it is what a multiplier is for, as it was written formerly.
        costs = named_costs([text for text in self.cost or () if "=" in text])
        if self.budget:
            read_budget(self.budget, costs)
        if self.max_drop is not None and not 0 <= self.max_drop < float("inf"):
            raise UsageError(f"--max-drop {self.max_drop}: expected points of accuracy, at least 0, as 0.5")
        if self.min_agreement is not None and not 0 < self.min_agreement <= 1:
            raise UsageError(f"--min-agreement {self.min_agreement}: expected a share above 0 and at most 1, as 0.99")
        if self.max_drop is not None and self.min_agreement is not None:
            raise UsageError("--max-drop does not combine with --min-agreement: give one of them")
        if self.seconds is not None and not (self.compete and self.seconds >= 0):
            raise UsageError(f"--seconds {self.seconds:g} limits how long sets of methods compete: give --compete too")

    @property
    def tolerant(self) -> bool:
        """Whether there is a tolerance."""
        return self.max_drop is not None or self.min_agreement is not None


@dataclass(frozen=True)
class FileOptions(Checked):
    """Files."""

    folder: Annotated[Path, folder_option("Folder for model.safetensors, plan.json and report.html."), check_folder] = (
        Path("compressed")
    )
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html.")] = True
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Learned ranks: folder from which the same call continues after a kill; OUT/unfinished by default, "
            "which goes when all is done.",
        ),
    ] = None
    animate: Annotated[bool, typer.Option("--animate", help="Learned ranks: write ranks.gif too.")] = False


@dataclass(frozen=True)
class FinishedOptions(Checked):
    """The model, dense or compressed."""

    model: Annotated[
        str,
        model_argument("What returns the dense model, as compress takes it: file.py:function, torchvision:NAME, ..."),
        check_model,
    ]
    weights: Annotated[Path | None, weights_option("Weights of the dense model: .safetensors or .pt."), check_file] = (
        None
    )
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", "-c", metavar="FILE", help="model.safetensors that compress wrote, in place of --weights."
        ),
        check_checkpoint,
    ] = None

    def check_one(self, cure: str) -> None:
        """Refuse weights of the dense model beside a compressed one, where nothing would read them."""
        if self.weights is not None and self.checkpoint is not None:
            raise UsageError(f"--weights {self.weights} does not combine with --checkpoint {self.checkpoint}: {cure}")

    def load(self) -> nn.Module:
        """The compressed model if there is a checkpoint, else the dense one."""
        if self.checkpoint is not None:
            return load_compressed(self.model, self.checkpoint)
        return load_model(self.model, self.weights)


@dataclass(frozen=True)
class ExampleOptions(Fed):
    """What it is run on."""

    data: Annotated[
        str | None,
        data_option(
            "Batches, with labels where accuracy is measured: imagefolder:DIR, FILE.npz, FILE.csv, "
            "file.py:function, ...; options follow as ?key=value."
        ),
        functools.partial(check_data, purpose="test"),
    ] = None
    input_shape: Input = None
