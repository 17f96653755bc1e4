"""``spectrim sweep``: what a model loses at several sizes, from one calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spectrim.cli import completion, options
from spectrim.cli.common import Checked, Output, command, option, usage
from spectrim.cli.methods import FILTERS, LEARNED, Methods
from spectrim.cli.references import UsageError
from spectrim.cli.values import named_costs, read_budget, read_costs
from spectrim.errors import did_you_mean
from spectrim.selection.budget import COSTS, OTHER_NAMES


@dataclass(frozen=True)
class SizeOptions(Checked):
    """Which sizes."""

    cost: str = option(
        "What --points are shares of: macs, parameters, bytes, latency, or one of yours as joules=energy.py:joules, a "
        "function of a layer.",
        "NAME",
        "macs",
        autocompletion=completion.costs,
    )
    points: str | None = option("As 0.8,0.5,0.33; by default seven from 0.8 to 0.2.", "SHARES")
    budget: list[str] | None = options.budget_option(
        "One point, as macs=50% or macs=50%,parameters=40%, in place of --points. Repeatable."
    )
    selector: str = options.selector_option()
    guard: bool = options.guard_option()
    latency: bool = option("Time every network beside the dense one.", default=False, flags=("--latency",))

    def __post_init__(self) -> None:
        costs = named_costs(self.own)
        if self.name not in (*COSTS, *costs):
            known = ", ".join(COSTS)
            close = did_you_mean(self.name, COSTS, OTHER_NAMES)
            raise UsageError(f"--cost {self.cost!r} is not counted; choose from {known}, or give a function.{close}")
        if self.budget and self.points is not None:
            raise UsageError(f"--points {self.points} does not combine with --budget {self.budget[0]}")
        for text in self.budget or ():
            read_budget([text], costs)
        _ = self.shares
        super().__post_init__()

    @property
    def own(self) -> list[str]:
        """A cost of the user's own, as ``NAME=FUNCTION``."""
        return [self.cost] if "=" in self.cost else []

    @property
    def name(self) -> str:
        """Of the cost that is swept."""
        return self.cost.partition("=")[0]

    @property
    def shares(self) -> list[float] | None:
        """The shares that ``--points`` names; None where it does not."""
        if self.points is None:
            return None
        found = []
        for text in self.points.split(","):
            try:
                number = float(text.strip().removesuffix("%")) / (100 if "%" in text else 1)
            except ValueError:
                number = 0.0
            if not 0 < number <= 1:
                raise UsageError(
                    f"--points {self.points!r}: {text!r} is no share of the dense network; write numbers above 0 and "
                    "at most 1, joined by commas, as 0.8,0.5,0.33"
                )
            found.append(number)
        return found


@dataclass(frozen=True)
class SweepFileOptions(Checked):
    """Files."""

    folder: Path = options.folder_option(
        "Folder for sweep.json, sweep.svg, sweep.html and a folder a point.", default=Path("sweep")
    )
    models: bool = option(
        "Write model.safetensors for every point, to load or to compare.", default=False, flags=("--models",)
    )
    report: bool = option("Write sweep.html and sweep.svg.", default=True, flags=("--report/--no-report",))


@command
def sweep(
    out: Output,
    network: options.NetworkOptions,
    *,
    sizes: SizeOptions,
    inputs: options.InputOptions,
    method: options.Methods = None,
    training: options.TrainingOptions,
    layers: options.LayerOptions,
    sharing: options.SharingOptions,
    files: SweepFileOptions,
) -> None:
    """Compress a model to several sizes, and say what each loses: the front of quality against cost.

    The model is calibrated once. Every point is carried out and judged: by accuracy with --test, else by how far its
    outputs agree with the dense network's on samples that were held out. A point is written as soon as it is there.
    The same call again goes on after a stop; with --train or --models it adds fine-tuning or weights to what is there.
    Exit code 3 if no budget can be met.

    Examples
    --------
    $ spectrim sweep net.py:build -w net.pt -d imagefolder:photos --cost macs --points 0.8,0.5,0.33
    $ spectrim sweep net.py:build -w net.pt -d photos.py:train --test photos.py:test --latency --models
    """
    methods = Methods.read(method)
    if LEARNED in methods:
        raise UsageError(f"--method {LEARNED} learns ranks in training: spectrim path does so for several budgets")
    if inputs.data is None:
        raise UsageError("give --data: samples that layers are fitted to and that every network is judged on")
    if FILTERS in methods and (sharing.share or sharing.groups is not None):
        raise UsageError(f"--method {FILTERS} does not combine with layers that share factors")
    from spectrim.cli import sweeping
    from spectrim.cli.unfinished import make_folder
    from spectrim.train.sweeping import FRACTIONS, asked_budgets, files_of

    with usage():
        shares = (sizes.name, sizes.shares or FRACTIONS)
        costs = read_costs(sizes.own)
        asked = asked_budgets(sizes.budget or shares, costs)
    make_folder(out, files.folder, [*files_of(asked), "sweep.svg", "sweep.html"])
    sweeping.SweepRequest(network, sizes, inputs, methods, training, layers, sharing, files, asked, costs).carry_out(
        out
    )
