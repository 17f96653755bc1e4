"""The state of a run of learned ranks as tensors, which continues it bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from spectrim.errors import CheckpointError, PlanError
from spectrim.methods import from_record
from spectrim.network.files import changed_values
from spectrim.selection.plan import Plan
from spectrim.selection.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class RunState:
    """How far a run has come."""

    # C steps and batches that are done.
    step: int
    batches: int
    # Of the C steps so far.
    plan: Plan
    trajectory: Trajectory
    # Low-rank copies (``target``) and, if they are used, multipliers (``multiplier``), by the layer.
    copies: Mapping[str, dict[str, Tensor]]

    def tensors(self, run: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state, with what makes it this run, as JSON values."""
        state = {"counts": torch.tensor([self.step, self.batches])}
        for kind, tensors in self.copies.items():
            state |= {f"{kind}:{name}": tensor for name, tensor in tensors.items()}
        texts = {"plan": self.plan.to_json(), "trajectory": self.trajectory.to_json(), "run": json.dumps(run)}
        for name, text in texts.items():
            state[name] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return state

    @classmethod
    def read(
        cls, state: Mapping[str, Tensor], run: Mapping[str, Any], weights: Mapping[str, Tensor], most: int
    ) -> Self:
        """The state that :meth:`tensors` gave.

        Parameters
        ----------
        run
            What makes it the present run.
        weights
            Of the layers, in their order.
        most
            C steps of the schedule.

        Raises
        ------
        CheckpointError
            If it is damaged, or of another run; the message says what differs.
        """
        try:
            then, plan = json.loads(_text(state["run"])), Plan.from_json(_text(state["plan"]))
            trajectory = Trajectory.from_json(_text(state["trajectory"]))
            step, batches = (int(number) for number in state["counts"])
            # As they are written now: states of version 0.1 do not say whose the methods are.
            then["methods"] = [from_record(record).record() for record in then["methods"]]
        except (KeyError, TypeError, ValueError, PlanError) as error:
            raise CheckpointError(f"this is no state of learned ranks, or a damaged one: {error!r}") from error
        now = json.loads(json.dumps(run))
        if changed := changed_values(then, now):
            raise CheckpointError(f"the checkpoint belongs to another run: {'; '.join(changed)}")
        low = {name for entry in plan for name in entry.sites if not entry.choice.is_dense}
        kinds = ("target", "multiplier") if now["augmented"] else ("target",)
        names = [name for name in weights if name in low]
        wanted = {f"{kind}:{name}" for kind in kinds for name in names} | {"counts", "plan", "trajectory", "run"}
        if wanted != set(state) or not low <= set(weights) or list(trajectory.sites) != now["sites"]:
            raise CheckpointError(f"the state of learned ranks has other tensors than {', '.join(sorted(wanted))}")
        if not 0 < step <= most or step != len(trajectory):
            raise CheckpointError(f"{step} C steps are done of {most}, and {len(trajectory)} are recorded")
        copies: dict[str, dict[str, Tensor]] = {"target": {}, "multiplier": {}}
        for kind in kinds:
            copies[kind] = {name: _copy(kind, name, state, weights[name]) for name in names}
        return cls(step, batches, plan, trajectory, copies)


def _copy(kind: str, name: str, state: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """A stored copy of a layer's weight, if it is like it; multipliers lie in another layout."""
    stored = state[f"{kind}:{name}"]
    like = stored.numel() == weight.numel() if kind == "multiplier" else stored.shape == weight.shape
    if not like or stored.dtype != weight.dtype or not bool(torch.isfinite(stored).all()):
        raise CheckpointError(f"{kind}:{name} of the state is no finite tensor like the layer's weight")
    return stored.to(weight.device, copy=True)


def _text(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
