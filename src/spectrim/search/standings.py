"""What became of arms over several sizes of a network, and which of them still compete at a size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from spectrim.search.arms import Arm, Tried


@dataclass
class Standings:
    """What became of each arm last, where one after another size is tried."""

    arms: Sequence[Arm]  # all, in the order they are told in
    # By the name of the arm, of those that were planned or carried out.
    rows: dict[str, Tried] = field(default_factory=dict)
    # The largest size at which an arm did not hold, by its name: smaller ones it is not asked for.
    fallen: dict[str, float] = field(default_factory=dict)

    def standing(self, size: float) -> list[Arm]:
        """The arms that did not fail at this size or a larger one, without the first."""
        return [arm for arm in self.arms[1:] if self.fallen.get(arm.name, -math.inf) < size]

    def take(self, tried: Iterable[Tried], size: float, holds: bool) -> None:
        """What became of arms at a size, and whether the network that was chosen holds."""
        for each in tried:
            stays = each.chosen and holds
            made = math.isfinite(each.loss)
            if made or each.name not in self.rows:
                note = "holds; another set holds with less" if stays else "does not hold the tolerance at this size"
                self.rows[each.name] = replace(each, chosen=False, note=note if made else each.note)
            if not holds or (not stays and (made or math.isinf(each.predicted))):
                self.fallen[each.name] = max(size, self.fallen.get(each.name, size))

    def refused(self, arms: Iterable[Arm], size: float, why: str) -> None:
        """That no network came of some arms at a size."""
        self.take([Tried(arm.name, note=f"refused, {why}") for arm in arms], size, holds=False)

    def told(self, tried: Iterable[Tried], rest: str) -> tuple[Tried, ...]:
        """All arms: what was chosen as it was found, and ``rest`` of those that were never asked for."""
        rows = {**self.rows, **{each.name: each for each in tried if each.chosen}}
        return tuple(rows.get(arm.name, Tried(arm.name, note=rest)) for arm in self.arms)
