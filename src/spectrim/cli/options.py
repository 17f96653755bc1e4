"""Options that commands share, in groups that a command takes as one value; see :func:`spectrim.cli.common.command`.

A group's first line is its heading in the help. It refuses values that cannot be used when it is made, without torch:
by the function behind the option of a field, and where fields must go together by its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectrim.cli import completion
from spectrim.cli.common import REQUIRED, Checked, option, usage
from spectrim.cli.data import check_data
from spectrim.cli.models import check_reference, load_compressed, load_model
from spectrim.cli.references import UsageError
from spectrim.cli.values import (
    check_device,
    check_results_folder,
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
STEPS = 200
"""Between two checkpoints of a fine-tuning."""


model_argument = functools.partial(
    option,
    metavar="MODEL",
    default=REQUIRED,
    check=check_reference,
    kind=typer.Argument,
    autocompletion=completion.models,
)
weights_option = functools.partial(option, metavar="FILE", flags=("--weights", "-w"), check=check_file)
data_option = functools.partial(option, metavar="DATA", autocompletion=completion.data)
calibration_option = functools.partial(
    data_option, flags=("--data", "-d"), check=functools.partial(check_data, purpose="calibration")
)
check_test = functools.partial(check_data, purpose="test", labelled="--test")
budget_option = functools.partial(
    option, metavar="COST=VALUE", flags=("--budget", "-b"), autocompletion=completion.budgets
)
folder_option = functools.partial(option, metavar="DIR", flags=("--out", "-o"), check=check_results_folder)
input_option = functools.partial(
    option, "Shape of one random sample where there are no data, as 3x224x224.", "SHAPE", flags=("--input",),
    check=read_shape,
)  # fmt: skip
mask_option = functools.partial(
    option, "Tensor of the batches that is not zero where a token is data, or says how many tokens a sample has; "
    "attention_mask by default, or one of torch's: a key_padding_mask is true of padding.", "NAME",
)  # fmt: skip
rows_option = functools.partial(option, "Input patches that a layer's statistics rest on, in all.", "N", min=1)
positions_option = functools.partial(option, "Input patches of every sample, in place of --rows.", "N", min=1)
batch_option = functools.partial(option, "Samples a pass where time and memory are measured.", "N", 1, min=1)
threads_option = functools.partial(option, "CPU threads; by default all that torch takes.", "N", min=1, max=1024)
runtime_option = functools.partial(
    option, f"What runs the network where time is measured: {', '.join(RUNTIMES)}.", "NAME", "eager",
    check=one_of("--runtime", RUNTIMES, {"onnx": "onnxruntime", "ort": "onnxruntime", "torch": "eager"}),
)  # fmt: skip
device_option = functools.partial(
    option, "cpu, cuda, cuda:1, ..., or auto.", "DEVICE", "cpu", check=check_device, autocompletion=completion.devices
)
selector_option = functools.partial(
    option, f"How choices are made: {', '.join(SELECTORS)}.", "NAME", "exact", check=one_of("--selector", SELECTORS)
)
guard_option = functools.partial(
    option, "Leave out choices that are measured no faster than dense.", default=False, flags=("--guard",)
)
costs_option = functools.partial(
    option, "A cost of your own, as joules=energy.py:joules, a function of a layer. Repeatable.", "NAME=FUNCTION",
    flags=("--cost",),
)  # fmt: skip
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="METHOD",
        rich_help_panel="What layers become",
        autocompletion=completion.methods,
        help="low-rank (and Tucker-2, the default), auto (compress alone: sets of methods compete), weight-svd, "
        "activation-svd, weight-cp, activation-cp, weight-tucker2, activation-tucker2, joint, joint-svd, "
        "low-rank-plus-sparse, principal-filters, learned-ranks (compress alone), or package.module:Class. Its options "
        "follow a colon, as weight-svd:multiple_of=8. Repeatable.",
    ),
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


@dataclass(frozen=True)
class NetworkOptions(Checked):
    """The model."""

    model: str = model_argument(
        "What returns it: file.py:function or package.module:function; or torchvision:NAME, timm:NAME, hf:NAME. "
        "Options follow as ?key=value&key=value."
    )
    weights: Path | None = weights_option(
        "Its weights: .safetensors, also as compress writes it, to compress again; .pt with a state_dict."
    )
    batch: int = batch_option()
    threads: int | None = threads_option()
    runtime: str = runtime_option()
    device: str = device_option()


@dataclass(frozen=True)
class InputOptions(Fed):
    """Data that layers are fitted to."""

    data: str | None = calibration_option(
        "A few hundred samples like those of training, without labels if need be: imagefolder:DIR, FILE.npz, FILE.csv, "
        "file.py:function, package.module:function, cifar10:DIR, fashion-mnist:DIR or digits. Options follow as "
        "?key=value."
    )
    input_shape: str | None = input_option()
    mask: str | None = mask_option()
    rows: int | None = rows_option()
    positions: int | None = positions_option()


@dataclass(frozen=True)
class LayerOptions(Checked):
    """Which layers."""

    skip: list[str] | None = option("Leave these layers alone, as fc or 'layer1.*'. Repeatable.", "NAME")
    only: list[str] | None = option("Leave all but these layers alone. Repeatable.", "NAME")
    multiple_of: int | None = option("Ranks, and numbers of filters, are multiples of N.", "N", min=1)


@dataclass(frozen=True)
class SharingOptions(Checked):
    """Layers that share factors."""

    share: bool | None = option(
        "Offer that repeated layers, and layers with one input, share factors. By default compress does where the "
        "budget limits parameters or bytes and there is no --method.",
        flags=("--share/--no-share",),
    )
    groups: Path | None = option(
        'Such layers by hand: a JSON file as {"name": ["fc1", "fc2"]}.', "FILE", check=read_groups
    )

    def __post_init__(self) -> None:
        if self.groups is not None and self.share is False:
            raise UsageError(f"--groups {self.groups} does not combine with --no-share")
        super().__post_init__()


@dataclass(frozen=True)
class TrainingOptions(Checked):
    """Training and testing."""

    train: str | None = data_option(
        "Batches with labels to fine-tune on, or to learn ranks from; named like --data.",
        check=functools.partial(check_data, purpose="training"),
    )
    test: str | None = data_option("Batches with labels to measure accuracy on; named like --data.", check=check_test)
    epochs: int = option("Epochs of fine-tuning.", "N", 10, min=0)
    lr: float | None = option("Highest learning rate of the fine-tuning.", "NUMBER")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is not None and not 0 <= self.lr < float("inf"):
            raise UsageError(f"--lr: lr={self.lr} must be a finite number of at least 0")

    def recipe(self, every: int | None = None) -> Recipe:
        """That of the fine-tuning, with so many steps between two checkpoints."""
        from spectrim.train import Recipe

        with usage("--lr"):
            return Recipe(epochs=self.epochs, lr=self.lr, checkpoint_every=every)


@dataclass(frozen=True)
class LearningOptions:
    """How ranks are learned."""

    rank_epochs: int = option("Epochs of learning weights and ranks together.", "N", 10)
    rank_lr: float | None = option("Highest learning rate of these epochs.", "NUMBER")
    c_steps: int = option("How often ranks are chosen in these epochs.", "N", 64)
    energy: str | None = option(
        "weight or output, whose energy errors are shares of; by default output, and weight with a multiplier.", "WHICH"
    )

    def __post_init__(self) -> None:
        if self.rank_epochs < 0:
            raise UsageError(f"rank_epochs is {self.rank_epochs}; expected 0 or more")
        if self.c_steps < 1:
            raise UsageError(f"c_steps is {self.c_steps}; expected 1 or more")
        if self.energy not in (None, "weight", "output"):
            raise UsageError(f"energy is {self.energy!r}; expected weight or output")


@dataclass(frozen=True)
class LearnedRanksOptions(LearningOptions):
    """The options of ``--method learned-ranks``."""

    multiplier: float | None = None  # loss that one unit of ``cost`` is worth, in place of a budget
    cost: str = "macs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiplier is not None and not 0 < self.multiplier < float("inf"):
            raise UsageError(f"multiplier is {self.multiplier}; expected a finite number above 0, as 4e-9")

    def check(self, training: TrainingOptions, points: list[str], costs: list[str]) -> None:
        """Refuse what ranks cannot be learned from."""
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

    budget: list[str] | None = budget_option(
        "What the whole model may cost: macs=50% (or 0.5) of dense, parameters=1.2M, bytes=10MiB or latency=3ms. "
        "Repeatable; all hold together."
    )
    max_drop: float | None = option(
        "In place of a budget, or beside one: how much accuracy on --test may be lost, as 0.5.", "POINTS"
    )
    min_agreement: float | None = option(
        "The same without labels: share of held-out samples of --data whose class stays, as 0.99.", "SHARE"
    )
    compete: bool = option(
        "As --method auto: let several sets of methods make a network each (low rank, chains, filters first, sparse) "
        "and keep the one that loses least on held-out samples of --data, or with a tolerance the smallest that holds "
        "it.",
        default=False,
        flags=("--compete",),
    )
    seconds: float | None = option("Where sets of methods compete: begin nothing further after so long.", "S")
    cost: list[str] | None = costs_option()
    recipe: str | None = option(
        "Principal filters: how many stay, in place of --budget: kl, or energy=0.95 for a share of the responses' "
        "energy.",
        "RECIPE",
        check=recipe_share,
        autocompletion=completion.recipes,
    )
    plan: Path | None = option("Carry out this plan.json in place of a budget.", "FILE")
    selector: str = selector_option()
    guard: bool = guard_option()

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
        if self.seconds is not None and not self.seconds >= 0:
            raise UsageError(f"--seconds {self.seconds:g}: expected a number of at least 0")

    @property
    def tolerant(self) -> bool:
        """Whether there is a tolerance."""
        return self.max_drop is not None or self.min_agreement is not None


@dataclass(frozen=True)
class FileOptions(Checked):
    """Files."""

    folder: Path = folder_option("Folder for model.safetensors, plan.json and report.html.", default=Path("compressed"))
    report: bool = option("Write report.html.", default=True, flags=("--report/--no-report",))
    checkpoint: Path | None = option(
        "Learned ranks: folder from which the same call continues after a kill; OUT/unfinished by default, which goes "
        "when all is done.",
        "DIR",
    )
    animate: bool = option("Learned ranks: write ranks.gif too.", default=False, flags=("--animate",))


@dataclass(frozen=True)
class FinishedOptions(Checked):
    """The model, dense or compressed."""

    model: str = model_argument(
        "What returns the dense model, as compress takes it: file.py:function, torchvision:NAME, ..."
    )
    weights: Path | None = weights_option("Weights of the dense model: .safetensors or .pt.")
    checkpoint: Path | None = option(
        "model.safetensors that compress wrote, in place of --weights.", "FILE", flags=("--checkpoint", "-c"),
        check=check_checkpoint,
    )  # fmt: skip

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

    data: str | None = data_option(
        "Batches, with labels where accuracy is measured: imagefolder:DIR, FILE.npz, FILE.csv, file.py:function, ...; "
        "options follow as ?key=value.",
        flags=("--data", "-d"),
        check=functools.partial(check_data, purpose="test"),
    )
    input_shape: str | None = input_option()
