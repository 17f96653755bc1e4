"""How the files beside this one were made, and what they must give for as long as files of version 0.1 can be read.

``python -m tests.golden.kept FOLDER`` makes such files with the present code. Those kept here were made at commit
05b5139, before method records named a module; they are never made again, only added to.

- ``*.json``: plans, for the seeded networks of :mod:`benchmarks.golden_nets`.
- ``*.safetensors``: compressed models as :func:`spectrim.save` wrote them, that of ``sparse`` in format 2.
- ``learning``: the folder of checkpoints of a finished :func:`spectrim.learn_ranks`; ``tuned.safetensors`` is the
  checkpoint of a finished :func:`spectrim.fine_tune` of the model in ``perceptron.safetensors``.
- ``outputs.safetensors``: what the models answer, by the name of the plan or the file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import spectrim as st
from benchmarks.golden_cases import module
from benchmarks.golden_nets import batches, dense, inputs, labelled

FILES = Path(__file__).parent


@dataclass(frozen=True)
class Kept:
    """One plan, and what it was made from.

    Attributes
    ----------
    net
        Name of the network.
    prepare
        The sites of the dense network, that the plan is applied to.
    choose
        How the plan was made.
    data
        Whether the plan is carried out with calibration batches.
    """

    net: str
    prepare: Callable[[nn.Module, Sequence[Tensor]], st.Sites]
    choose: Callable[[st.Sites], st.Plan]
    data: bool = True

    @property
    def batches(self) -> list[Tensor]:
        return batches(self.net, 1)

    def sites(self) -> st.Sites:
        return self.prepare(dense(self.net), self.batches)

    def apply(self, plan: st.Plan) -> nn.Module:
        return st.apply(dense(self.net), self.sites(), plan, self.batches if self.data else None)

    def answer(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(inputs(self.net, 8, seed=1))


def _found(model: nn.Module, data: Sequence[Tensor]) -> st.Sites:
    return st.find(model)


def _calibrated(model: nn.Module, data: Sequence[Tensor]) -> st.Sites:
    return st.sensitivity(model, st.calibrate(model, st.find(model), data), data)


def _grouped(model: nn.Module, data: Sequence[Tensor]) -> st.Sites:
    return st.group(_calibrated(model, data))


def _coupled(model: nn.Module, data: Sequence[Tensor]) -> st.Sites:
    return st.calibrate(model, st.couple(model, st.find(model), data[0]), data)


def _selected(methods: Sequence[st.Method] | None, **budget: Any) -> Callable[[st.Sites], st.Plan]:
    return lambda sites: st.select(st.tabulate(sites, methods), st.Budget(**budget))


def _learned(sites: st.Sites) -> st.Plan:
    """The C step of untrained weights will do: what is kept is the file."""
    schedule = module("train").Schedule(steps=2)
    model = dense("small residual")
    ranks = st.LearnedRanks(model, sites, st.Budget(macs=0.5), schedule=schedule)
    ranks.c_step()
    return ranks.finish()[1]


def _in_steps(sites: st.Sites) -> st.Plan:
    methods = [st.PrincipalFilters(multiple_of=2), st.ActivationSVD(multiple_of=2)]
    return module("stepwise").select_in_steps(sites, methods, st.Budget(macs=0.3))[0]


def _of_one_rate(sites: st.Sites) -> st.Plan:
    return module("rates").at_rate(sites, 0.3, "bi-jsvd")


def _pattern(name: str) -> list[st.Method]:
    """Both parts in every layer that is changed. Few turns: more of them follow rounding errors to other supports."""
    return [st.LowRankPlusSparse((name,), densities=(0.5,), share=0.2, turns=8)]


PLANS: dict[str, Kept] = {
    "low-rank": Kept("small residual", _calibrated, _selected(None, macs=0.4)),
    "without-data": Kept("spatial", _found, _selected([st.WeightSVD()], parameters=0.4), data=False),
    "shared": Kept("small residual", _grouped, _selected(None, parameters=0.35)),
    "one-input": Kept("attention", _grouped, _selected([st.JointSVD("left", multiple_of=1)], parameters=0.8)),
    "channels": Kept("small residual", _coupled, _in_steps),
    "sparse": Kept("small residual", _calibrated, _selected(_pattern("unstructured"), parameters=0.8)),
    "thinner": Kept("one axis", _calibrated, _selected(_pattern("channels"), parameters=0.8)),
    "cropped": Kept("small residual", _calibrated, _selected(_pattern("taps"), parameters=0.8)),
    "one-rate": Kept("small residual", _found, _of_one_rate, data=False),
    "learned-ranks": Kept("small residual", _calibrated, _learned, data=False),
    "perceptron": Kept("small perceptron", _calibrated, _selected(None, macs=0.6)),
}
CHECKPOINTS = ("low-rank", "shared", "one-input", "channels", "sparse", "thinner", "cropped", "perceptron")


def learn(folder: Path) -> st.Result:
    """Learned ranks with a multiplier at which some layers come to rank 0; continues what the folder holds."""
    train = module("train")
    return st.learn_ranks(
        dense("small perceptron"), labelled("small perceptron"), multiplier=1e-3, cost="parameters", dense=False,
        schedule=train.Schedule(start=0.05, factor=2.0, steps=3), learning=train.Recipe(epochs=2, lr=0.02),
        tuning=train.Recipe(epochs=0), checkpoint=folder, progress=False, accelerate=False,
    )  # fmt: skip


def tune(model: nn.Module, checkpoint: Path) -> None:
    """Fine-tune the model of ``perceptron.safetensors``, or take the weights of a run that has done it."""
    st.fine_tune(
        model, labelled("small perceptron"), epochs=2, lr=0.02, checkpoint=checkpoint, progress=False, accelerate=False
    )


def make(folder: Path) -> None:
    """Write all files."""
    torch.set_num_threads(1)
    outputs: dict[str, Tensor] = {}
    for name, kept in PLANS.items():
        plan = kept.choose(kept.sites())
        plan.write(folder / f"{name}.json")
        small = kept.apply(plan)
        outputs[name] = kept.answer(small)
        if name in CHECKPOINTS:
            st.save(small, plan, folder / f"{name}.safetensors")
    net = PLANS["perceptron"]
    outputs["learning"] = net.answer(learn(folder / "learning").model)
    small = st.load(dense(net.net), folder / "perceptron.safetensors")
    tune(small, folder / "tuned.safetensors")
    outputs["tuned"] = net.answer(small)
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
