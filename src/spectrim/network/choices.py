"""What may be done with a site: plain values, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Setting = str | int | float | bool | tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """One option of one site. Selectors never look inside.

    Attributes
    ----------
    kind
        The factor type it leads to (``low_rank``), or ``dense`` for leaving the site alone.
    method
        The method that offered it; empty for ``dense``.
    settings
        What the method needs to carry it out, such as the rank and the unfolding.
    """

    kind: str = "dense"
    method: str = ""
    settings: Mapping[str, Setting] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        return self.kind == "dense"

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def __hash__(self) -> int:
        return hash((self.kind, self.method, tuple(sorted(self.settings.items()))))

    def __str__(self) -> str:
        if self.is_dense:
            return "dense"
        return " ".join([self.method, *(f"{key}={_brief(value)}" for key, value in sorted(self.settings.items()))])


def _brief(value: Setting) -> str:
    """A setting for people to read; long lists by their length."""
    if isinstance(value, (tuple, list)) and len(value) > 8:
        return f"<{len(value)} numbers>"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


DENSE = Choice()
