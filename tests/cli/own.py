"""A method and a cost of a user's own, which command line tests name by reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import spectrim as st
from spectrim.network.layer import LayerSpec


@dataclass(frozen=True)
class Mine(st.WeightSVD):
    """Low rank with options of every kind that a text can stand for."""

    flavours: tuple[str, ...] = ("plain",)
    strength: float | None = None
    careful: bool = False
    turns: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns > 9:
            raise ValueError(f"turns is {self.turns}; expected at most 9")


class Plain(st.WeightSVD):
    """Without options of its own."""


def joules(layers: Sequence[LayerSpec]) -> float:
    return 2.0 * st.macs(layers) + 1.0 * st.parameters(layers)


NUMBER = 3
