"""Low rank plus sparse on the command line: its options, and how sparse layers are run where time is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer
from torch import nn

from spectrim.cli.common import refuse
from spectrim.cli.references import UsageError
from spectrim.linalg import patterns
from spectrim.methods import LowRankPlusSparse
from spectrim.network.sites import Sites
from spectrim.nn.sparse.kernels import ChosenKernel, Kernel, choose_kernels
from spectrim.nn.sparse.packed import masked_layers

METHOD = "low-rank-plus-sparse"
# Parameters of commands that no other method has.
PARAMETERS = frozenset({"pattern", "low_rank_share"})


@dataclass(frozen=True)
class Sparsity:
    """What the command line says about the two parts.

    Attributes
    ----------
    patterns
        Of the sparse part, each on offer.
    share
        Part of the stored numbers that the low-rank part gets, or None where the budget decides.
    """

    patterns: tuple[str, ...] = ("unstructured",)
    share: float | None = None

    @classmethod
    def of(cls, context: typer.Context, method: str, pattern: Sequence[str] | None, share: float | None) -> Sparsity:
        """What ``--pattern`` and ``--low-rank-share`` say.

        Raises
        ------
        UsageError
            If they do not go with the method, or their values cannot be used.
        """
        if method != METHOD:
            refuse(context, PARAMETERS, f"is for --method {METHOD}, not for --method {method}")
            return cls()
        found = cls(tuple(dict.fromkeys(pattern or ())) or cls.patterns, share)
        for name in found.patterns:
            try:
                if name != "taps":
                    patterns.pattern(name)
            except ValueError as error:
                raise UsageError(f"--pattern: {error}; or 'taps' for the best box of every size") from error
        if share is not None and not 0 <= share <= 1:
            raise UsageError(f"--low-rank-share {share}: expected a number from 0, all sparse, to 1, all low rank")
        return found

    def method(self, multiple_of: int | None) -> LowRankPlusSparse:
        return LowRankPlusSparse(patterns=self.patterns, share=self.share, multiple_of=multiple_of)

    def check(self, sites: Sites) -> None:
        """Refuse patterns that no layer can have.

        Raises
        ------
        UsageError
            Quotes the first of them.
        """
        for name in self.patterns:
            if name == "taps":
                has = any(max(s.spec.kernel, default=1) > 1 and not s.spec.transposed for s in sites)
            else:
                has = any(s.spec.allows(patterns.pattern(name)) for s in sites)
            if not has:
                kinds = dict.fromkeys(f"{s.spec.kind}, {s.spec.in_channels} -> {s.spec.out_channels}" for s in sites)
                raise UsageError(f"--pattern {name!r} fits no layer of the model ({'; '.join(kinds)})")


def fastest(model: nn.Module, example: Any, threads: int | None) -> tuple[ChosenKernel, ...]:
    """Let every layer with a sparse weight run as is fastest here
    (:func:`spectrim.nn.sparse.kernels.choose_kernels`)."""
    return choose_kernels(model, example, threads=threads) if any(masked_layers(model)) else ()


def kernel_values(chosen: Sequence[ChosenKernel]) -> list[dict[str, Any]]:
    """The kernels as JSON values."""
    return [
        {
            "layer": each.name,
            "kernel": each.kernel.value,
            "milliseconds": {kernel.value: ms for kernel, ms in each.milliseconds.items()},
        }
        for each in chosen
    ]


def kernel_notes(chosen: Sequence[ChosenKernel]) -> list[str]:
    """A sentence on how sparse layers were run, for people; none where there was nothing to choose."""
    if not chosen:
        return []
    packed = [each for each in chosen if each.kernel is not Kernel.DENSE]
    layers = f"{len(chosen)} layer{'s'[: len(chosen) > 1]} with a sparse weight"
    if not packed:
        return [f"Of {layers} none is faster here when its zeros are skipped: latency is that of dense kernels."]
    names = ", ".join(sorted({each.kernel.value.upper() for each in packed}))
    return [f"Of {layers} {len(packed)} skip their zeros ({names}), which was measured to be faster here."]
