"""Statistics of BatchNorm layers, estimated anew on the data as a whole, however it is cut into batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spectrim.nn.watch.batches import Feed, one_by_one
from spectrim.nn.watch.observe import Hook, observe
from spectrim.nn.watch.passes import passes, waves
from spectrim.nn.watch.probe import probe


@dataclass
class _Pooled:
    """Mean and variance of a layer's inputs over all batches, by the channel, in double precision."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, inputs: Tensor) -> None:
        """Take in one batch, ``(n, channels, ...)``."""
        rows = inputs.detach().double().transpose(0, 1).flatten(1)
        count, mean = rows.shape[1], rows.mean(1)
        if not count:
            return
        total = self.count + count
        gap = mean - self.mean
        self.squares = (
            self.squares + (rows - mean[:, None]).square().sum(1) + gap.square() * (self.count * count / total)
        )
        self.mean, self.count = self.mean + gap * (count / total), total

    def renew(self, norm: _BatchNorm, every: Iterable[Tensor], batches: int) -> None:
        """Add what a layer is given, and have it normalise by all there is."""
        for inputs in every:
            self.add(inputs)
        if self.count:
            self.give(norm, batches)

    def give(self, norm: _BatchNorm, batches: int) -> None:
        """Have a layer normalise by these."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(torch.as_tensor(self.mean))
        norm.running_var.copy_(torch.as_tensor(self.squares) / max(self.count - 1, 1))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(batches)


def batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """BatchNorm layers that keep running statistics, by name."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None:
            yield name, module


def reestimate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    memory: int = 4 << 30,
) -> int:
    """Replace BatchNorm running statistics by those of the data; weights and modes are left as found.

    Factors change the scale of what a BatchNorm sees, which costs far more accuracy than the approximation itself. All
    forward passes stop at each such layer, so that its mean and (unbiased) variance are those of all samples, and the
    layers after it see what it will give: how the samples are cut into batches changes nothing but rounding. Statistics
    that are averaged over batches, as in training, miss what differs between small ones.

    Parameters
    ----------
    batches
        Read once.
    forward
        Runs the model on a batch in another way.
    memory
        Bytes of activations that may wait at a layer at once. What does not fit goes in waves: layers then see what
        those before them give by the statistics of the waves so far.

    Returns
    -------
    int
        BatchNorm layers updated. Layers that no batch reached keep their statistics; without BatchNorm layers the
        batches are not read.
    """
    norms = dict(batch_norms(model))
    if not norms:
        return 0
    rest = iter(batches)
    begin = list(itertools.islice(rest, 1))
    if not begin:
        return 0
    (first,) = begin
    before = {buffer: buffer.clone() for norm in norms.values() for buffer in norm.buffers()}
    pooled = {name: _Pooled() for name in norms}
    feed, seen = Feed.of(forward).decide(model, first), 0
    like = probe(model, norms, first, forward=feed)
    # Where a model loops over its samples, passes would stop at the first of them.
    loops = _calls(model, norms, first, feed) > len(like.order)
    calls = {name: like.calls.get(name, 1) for name in norms}
    order = _by_last_call(like.order, norms)
    every_batch = itertools.chain(begin, rest)
    parts = _alone(model, every_batch, feed) if loops else every_batch
    try:
        for wave in waves(((part, feed.layout.size(part) * like.nbytes) for part in parts), memory):
            seen += len(wave)
            with torch.no_grad(), passes(model, calls, wave, forward=feed, places=like.places) as every:
                for name in order:
                    pooled[name].renew(norms[name], itertools.chain.from_iterable(every.reach(name)), seen)
                    if name in like.ends() and name != order[-1]:
                        every.restart()
    except BaseException:
        for buffer, value in before.items():
            buffer.copy_(value)
        raise
    return sum(bool(each.count) for each in pooled.values())


def _alone(model: nn.Module, batches: Iterable[Any], feed: Feed) -> Iterator[Any]:
    """The samples of batches, one at a time."""
    for batch in batches:
        yield from one_by_one(model, [batch], feed)


def _calls(model: nn.Module, names: Iterable[str], batch: Any, feed: Feed) -> int:
    """How often a pass of a whole batch calls some layers in all."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with observe(model, [Hook(model.get_submodule(name), count) for name in names], forward=feed) as run:
        run(batch)
    return calls


def _by_last_call(order: Sequence[str], names: Iterable[str]) -> list[str]:
    """The order in which passes stop; layers that the pass looked at did not call come last."""
    return [*dict.fromkeys(reversed(order))][::-1] + [name for name in names if name not in order]
