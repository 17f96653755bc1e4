"""How a network is made, whatever its budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.cost.counted import Cost
from spectrim.methods import Method
from spectrim.preparation import Prepared
from spectrim.progress import Progress, silent
from spectrim.selection.selectors import Selector, exact


@dataclass(frozen=True)
class Making:
    """What a caller says but the network, its data and the budget; each as for :func:`spectrim.compress`."""

    # What may be chosen; where sets of them compete, those of each set take their place.
    methods: Sequence[Method] | None = None
    reconstruct: bool = True
    guard: bool = False
    costs: Mapping[str, Cost] | None = None
    selector: Selector = exact
    forward: Callable[[nn.Module, Any], Any] | None = None
    progress: Progress = silent

    def priced(self, known: Prepared) -> dict[str, Any]:
        """How choices for a network that is prepared are priced and told of, for :func:`spectrim.tabulate`."""
        return {
            "latency": known.latency, "dense_latency": known.dense_latency, "costs": self.costs, "guard": self.guard,
            "progress": self.progress,
        }  # fmt: skip
