"""The verb apply: a plan carried out on a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from spectrim.application.carried import MEMORY
from spectrim.application.carried import Applied as Applied
from spectrim.application.carried import carry_out as carry_out
from spectrim.errors import called_as
from spectrim.methods import Method
from spectrim.network.sites import Sites
from spectrim.nn.watch.batches import Feed
from spectrim.nn.watch.layout import Mask, Where
from spectrim.nn.watch.sampling import Sampling
from spectrim.progress import Progress, reports
from spectrim.selection.plan import Plan

log = logging.getLogger(__name__)


@reports
@called_as(
    "Write apply(model, sites, plan, batches), with the sites of calibrate and the plan of select",
    model=nn.Module,
    sites=Sites,
    plan=Plan,
)
def apply(
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    methods: Method | Sequence[Method] | None = None,
    reconstruct: bool = True,
    batchnorm: bool | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: Where = None,
    rows: int | str | None = "auto",
    positions: int | None = None,
    mask: Mask = None,
    memory: int = MEMORY,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Carry out a plan on a copy of the model.

    Parameters
    ----------
    model
        The dense model that the sites were found in; it is left untouched.
    sites
        From :func:`spectrim.calibrate` for methods that use activations; with couplings (:func:`spectrim.couple`) for
        plans that remove channels. Of these the ``sites`` of a result give its bits again: :func:`spectrim.compress`
        leaves samples that it holds out out of their statistics, and ``calibrate`` knows none.
    plan
        From :func:`spectrim.select`, or read from a file.
    batches
        Calibration batches, read several times. Needed for reconstruction and for BatchNorm. Without them the new model
        is tried on noise of the shapes that the sites were calibrated with, and the log says so where it is not.
    methods
        The methods the plan names, for methods of your own that a plan file cannot make again.
    reconstruct
        Factorise the layers in order of execution, each for the inputs that its already compressed predecessors
        deliver and the responses of the dense model; both are run side by side, once. A part of the samples is held
        out: a layer goes only as far from its dense weight as they agree. Without it every layer is factorised on its
        own.
    batchnorm
        Re-estimate BatchNorm statistics on the batches. By default where there was no reconstruction: factors fitted
        on their own shift the statistics, reconstructed ones have been fitted to them.
    forward
        Runs a model on a batch in another way.
    samples
        Where a batch's samples are; see :func:`spectrim.calibrate`.
    rows
        Positions that a layer is fitted at, over all batches: a number, None for all, or ``"auto"`` for enough for the
        length of its patches.
    positions
        Positions of each sample, in place of ``rows``.
    mask
        Tells padding from data: the name of a batch's entry or a function of the batch, which gives ``[batch,
        positions]``; ``attention_mask`` by default.
    memory
        Bytes that activations of both networks may take while they wait for a layer. Batches beyond it go in waves,
        each beside layers that were fitted to the waves before.

    Returns
    -------
    nn.Module
        A new model of plain layers. The same plan, weights and batches give the same bits.

    Raises
    ------
    PlanError
        If the plan names a site the model does not have, or batches that can be read once only are given.
    """
    applied = carry_out(
        model, sites, plan, batches, methods=methods, reconstruct=reconstruct, batchnorm=batchnorm,
        forward=Feed.of(forward, samples, mask), sampling=Sampling(rows, positions), memory=memory,
        progress=progress,
    )  # fmt: skip
    for note in applied.notes:
        log.warning("%s", note)
    return applied.model
