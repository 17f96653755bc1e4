"""What a batch is: how a model is called with it, and what its samples are. Decided once, with the first batch.

Loaders give tensors, ``(inputs, targets)``, mappings, lists of images; what a model takes of them is seen from the
parameters of its ``forward``. Where that leaves several ways, they are tried on the first batch, the likeliest first.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim.errors import CalibrationError, SpectrimError, check_function, in_short
from spectrim.nn.watch.chance import drawn_from, generators_of, seed_of
from spectrim.nn.watch.layout import Layout, Mask, Where, check_where
from spectrim.nn.watch.masks import with_numbers
from spectrim.nn.watch.nesting import begun, check_numbers, copied, dtype_of, in_words, kind_of, moved, tensors
from spectrim.nn.watch.nesting import checked_batches as checked_batches
from spectrim.nn.watch.nesting import logits as logits
from spectrim.nn.watch.nesting import output_tensors as output_tensors
from spectrim.nn.watch.nesting import resized as resized
from spectrim.nn.watch.rows import counted, parted, uncounted
from spectrim.nn.watch.state import evaluating as evaluating
from spectrim.nn.watch.state import kept
from spectrim.nn.watch.ways import (
    Arguments,
    Parameters,
    Way,
    bare,
    batch_alone,
    is_per_sample,
    is_sample,
    is_vector,
    ways,
)
from spectrim.nn.watch.writes import seen_writing

log = logging.getLogger(__name__)

Forward = Callable[[nn.Module, Any], Any]
# Outputs that differ by no more of their size are those of the same sample.
_ALIKE = 1e-2


class Feed:
    """Runs a model on batches. Has the form of a ``forward=`` function, and is one that knows what samples are.

    Parameters
    ----------
    forward
        Runs a model on a batch, where a user says how.
    samples
        The axis of the inputs that samples lie on, or a function that counts the samples of a batch.
    mask
        Says what is padding, in which a model is given no NaN and no Inf.
    """

    def __init__(self, forward: Forward | None = None, samples: Where = None, mask: Mask = None) -> None:
        check_where(samples)
        if forward is not None:
            check_function("forward", forward, ("the model", "a batch"), "a function of both that runs the model")
        if mask is not None and not isinstance(mask, str):
            check_function(
                "mask", mask, ("a batch",), "the name of a tensor of the batch, or a function that gives one"
            )
        self._forward, self._samples = forward, samples
        self._way: Way | None = None
        self._form: _Form | None = None
        self._first = ""
        self._has_run = False
        self.layout = Layout(mask=mask)  # where samples are; known once a batch has been seen
        self.notes: tuple[str, ...] = ()  # what was decided that a user may not expect

    @classmethod
    def of(cls, forward: Forward | None = None, samples: Where = None, mask: Mask = None) -> Feed:
        """The feed that a verb was given in place of a function, or a new one."""
        return forward if isinstance(forward, Feed) else cls(forward, samples, mask)

    def decide(self, model: nn.Module, batch: Any) -> Feed:
        """See from a first batch what batches are; nothing where that is known.

        Raises
        ------
        CalibrationError
            If the model cannot be called with it; the message says what was tried.
        """
        if self._way is None:
            if self._forward is None:
                check_numbers(Layout().inputs(batch))
            way = _own(batch) if self._forward is not None else _working(model, batch)
            if self._forward is None and self._samples is None and not way.listed:
                _check_batched(model, batch, way)
            self._way = way
            self._settle(model, batch)
        return self

    def _settle(self, model: nn.Module, batch: Any) -> None:
        assert self._way is not None
        way, asked = self._way, self._samples
        notes = [way.note] if way.note else []
        notes += [] if self._forward is not None else _rounded(model, way.take(batch))
        layout = dataclasses.replace(self.layout, whole=way.whole, names=way.names)
        if callable(asked):
            self.layout = dataclasses.replace(layout, count=asked)
        elif asked is not None:
            self.layout = dataclasses.replace(layout, axis=asked)
        else:
            axis, note = (0, "") if way.listed or self._forward is not None else _axis(model, batch, way)
            layout = dataclasses.replace(layout, axis=axis, listed=way.listed)
            if self._forward is None and not note:
                layout, note = _by_rows(model, batch, way, layout)
            # What a way says of a list is untrue where its entries are no samples.
            notes = notes if layout.listed == way.listed else notes[1:]
            notes += [note] if note else []
            self.layout = layout
        self.notes = tuple(notes)
        self._form, self._first = _Form.of(model, self.layout, batch), in_words(batch)

    @property
    def words(self) -> str:
        """What of a batch a model is given, once that is known."""
        return self._way.words if self._way is not None else "what is not known yet"

    def arguments(self, model: nn.Module, batch: Any) -> Arguments:
        """Positional and keyword arguments, copies on the model's device and in its dtype.

        Raises
        ------
        CalibrationError
            For a batch of another form than the first one's, of which other parts would be taken.
        """
        self.decide(model, batch)
        assert self._way is not None
        if self._form is not None and self._form.differs(model, self.layout, batch):
            raise CalibrationError(
                f"a batch is {in_words(batch)}, and the first one was {self._first}: give batches of one form, or pass "
                "forward=, a function (model, batch) that runs the model"
            )
        return cast(Arguments, moved(self._way.take(batch), model))

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Run a model on a batch, which is left as it is whatever the model does with its inputs."""
        return self.ready(model, batch)()

    def ready(self, model: nn.Module, batch: Any) -> Callable[[], Any]:
        """What runs a model on a batch, once: with copies of the batch, which are made now."""
        self.decide(model, batch)
        batch = with_numbers(batch, self.layout)
        if self._forward is not None:
            run = functools.partial(self._forward, model, copied(batch))
        else:
            args, kwargs = self.arguments(model, batch)
            run = functools.partial(bare(model), *args, **kwargs)
        return functools.partial(self._seen, batch, functools.partial(_run, model, run, seed_of(batch)))

    def _seen(self, batch: Any, run: Callable[[], Any]) -> Any:
        """What a pass gives; the first one that goes well tells whether samples are counted rightly."""
        output = run()
        if not self._has_run and self._forward is None and self._samples is None:
            self._has_run = True
            note = uncounted(self.layout, batch, [*tensors(output)])
            self.notes = (*self.notes, *((note,) if note else ()))
        return output

    def resized(self, batch: Any, size: int) -> Any:
        """The same batch with other samples than it has, repeated or cut."""
        return self.layout.resized(batch, size)


def _run(model: nn.Module, run: Callable[[], Any], seed: int) -> Any:
    with seen_writing(model), drawn_from(seed, generators_of(model)):
        return run()


def in_order(model: nn.Module, batches: Iterable[Any], feed: Feed) -> Iterator[tuple[int, Any]]:
    """Batches with their numbers; of a list one of the largest samples first, whose shapes are counted and timed.

    Else the order of samples that differ in size would decide what a network costs. Raises CalibrationError if there is
    no batch.
    """
    first, stream = begun(batches)
    if not isinstance(batches, list | tuple):
        return enumerate(stream)
    layout = feed.decide(model, first).layout
    sizes = [layout.numbers(batch) for batch in batches]
    place = sizes.index(max(sizes))
    return iter(sorted(enumerate(batches), key=lambda numbered: numbered[0] != place))


def one_by_one(model: nn.Module, batches: Sequence[Any], feed: Feed) -> list[Any]:
    """Batches of one sample each; as they are where these are no batches for the model, or give other outputs."""
    alone = [
        feed.layout.picked(batch, torch.tensor([number]))
        for batch in batches
        for number in range(feed.layout.size(batch))
    ]
    try:
        with evaluating(model), kept(model):
            same = begins_alike(functools.partial(feed, model), batches[0], alone[0])
        parted = same and all(feed.layout.size(each) == 1 for each in alone)
    except Exception:  # a model may raise anything where it is given what it does not take
        parted = False
    return alone if parted else list(batches)


def begins_alike(running: Callable[[Any], Any], batch: Any, part: Any) -> bool:
    """Whether outputs of a batch begin as those of its first samples alone, as far as they can be compared."""
    whole, first = (output_tensors(running(each)) for each in (batch, part))
    for a, b in zip(whole, first, strict=False):
        of_part = a[: len(b)] if a.dim() and b.dim() and a.shape[1:] == b.shape[1:] else a
        comparable = of_part.shape == b.shape and of_part.is_floating_point() and b.numel()
        if comparable and bool((of_part - b).abs().max() > _ALIKE * torch.maximum(of_part.abs().max(), b.abs().max())):
            return False
    return True


def arguments(model: nn.Module, batch: Any) -> Arguments:
    """Positional and keyword arguments that a batch stands for, moved to the model.

    A tensor is the only argument. A mapping, such as tokenisers return, gives keyword arguments, those that ``forward``
    takes. A tuple or list is ``(inputs, targets, ...)`` as data loaders give it: its first element is taken, or as many
    as the model's ``forward`` requires. Inputs that are a mapping, tuple or list themselves are spread over the
    arguments where ``forward`` takes them so, and passed as they are where they are one entry a sample. Floating
    tensors are cast to the model's dtype if all its parameters have one.
    """
    return Feed().arguments(model, batch)


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch; see :func:`arguments` for what is passed."""
    return Feed()(model, batch)


def _working(model: nn.Module, batch: Any) -> Way:
    """The first way that works; the only one without trying it."""
    found = list(ways(model, batch))
    if not found:
        raise CalibrationError(
            f"cannot feed a batch of type {type(batch).__name__}: expected a tensor, a mapping, or (inputs, targets); "
            "or pass forward=, a function (model, batch) that runs the model"
        )
    if len(found) == 1:
        return found[0]
    failures = []
    for way in found:
        error = _runs(model, way, batch)
        if error is None:
            return way
        log.info("%s cannot be run with %s: %s", type(model).__name__, way.words, in_short(error))
        failures.append(f"with {way.words} it raises {type(error).__name__}: {in_short(error)}")
    raise CalibrationError(
        f"{type(model).__name__} cannot be run with a batch that is {in_words(batch)}: {'; '.join(failures)}. Pass "
        "forward=, a function (model, batch) that runs the model"
    )


def _check_batched(model: nn.Module, batch: Any, way: Way) -> None:
    """Raise CalibrationError for a single sample without an axis for samples: it cannot be cut into any.

    Convolutions take such images, linear layers such vectors, and a model with one in front may take them or batches.
    """
    layout = Layout(whole=way.whole)
    inputs = next(tensors(layout.inputs(batch)), None)
    if (
        inputs is None
        or not (is_sample(model, inputs) or is_vector(model, inputs))
        or layout.size(batch) < 2
        or _runs(model, way, layout.resized(batch, 1)) is None
    ):
        return
    shape = tuple(inputs.shape)
    raise CalibrationError(
        f"the inputs are one sample of shape {shape} without an axis for samples: give batches, such as "
        f"{(1, *shape)} by x.unsqueeze(0), or a DataLoader with a batch_size; or say so, samples=lambda batch: 1"
    )


@dataclass(frozen=True)
class _Form:
    """What tells which part of a batch is passed."""

    kinds: tuple[type, type]  # of the batch and of its inputs
    axes: int | None  # how many the first tensor of the inputs has
    names: frozenset[str]  # those of a mapping that ``forward`` takes

    @classmethod
    def of(cls, model: nn.Module, layout: Layout, batch: Any) -> _Form:
        inputs = layout.inputs(batch)
        first = next(tensors(inputs), None)
        names = frozenset(inputs) & set(Parameters.of(model).names) if isinstance(inputs, Mapping) else frozenset()
        return cls((kind_of(batch), kind_of(inputs)), None if first is None else first.dim(), names)

    def differs(self, model: nn.Module, layout: Layout, batch: Any) -> bool:
        """Whether a batch has another form, or is a single sample; other models may take any number of axes.

        Names that only the first batch had may have been left out; others would not be passed.
        """
        now = _Form.of(model, layout, batch)
        single = now.axes != self.axes and is_sample(model, next(tensors(layout.inputs(batch)), None))
        needed = self.names & set(Parameters.of(model).required)
        return single or now.kinds != self.kinds or not needed <= now.names <= self.names


def _runs(model: nn.Module, way: Way, batch: Any, outputs: list[Tensor] | None = None) -> Exception | None:
    """What a model raises on a batch; None where it runs, and its ``outputs`` are added to those given."""
    try:
        with evaluating(model), kept(model):
            args, kwargs = moved(way.take(batch), model)
            given = _run(model, functools.partial(bare(model), *args, **kwargs), seed_of(batch))
            if outputs is not None:
                outputs += tensors(given)
    except SpectrimError:
        raise
    except Exception as error:  # a model may raise anything where it is given what it does not take
        return error
    return None


def _by_rows(model: nn.Module, batch: Any, way: Way, layout: Layout) -> tuple[Layout, str]:
    """The layout as a model's outputs tell it, and what a user should know of it."""

    def outputs(part: Any) -> list[Tensor] | None:
        given: list[Tensor] = []
        return given if _runs(model, way, part, given) is None else None

    if not layout.listed:
        args, kwargs = way.take(batch)
        return counted(layout, batch, list(tensors((args, kwargs))), outputs)
    first = next(iter(layout.inputs(batch)), None)
    if is_sample(model, first) or is_vector(model, first):
        return layout, ""
    return parted(layout, batch, outputs)


def _rounded(model: nn.Module, taken: Any) -> Iterator[str]:
    """What a user should know of inputs of another dtype than the model's."""
    wanted = dtype_of(model)
    others = {t.dtype for t in tensors(taken) if t.is_floating_point()} - {wanted}
    if wanted is not None and others:
        kinds = " and ".join(sorted(str(each).removeprefix("torch.") for each in others))
        yield (
            f"inputs of {kinds} were given to the model as {str(wanted).removeprefix('torch.')}, in which its "
            "parameters are: whoever runs it has to do that, too"
        )


def _own(batch: Any) -> Way:
    """What a user's own function runs: only the samples are to be told."""
    mappings = isinstance(batch, list) and len(batch) > 1 and all(isinstance(entry, Mapping) for entry in batch)
    listed = isinstance(batch, list | tuple) and len(batch) > 1 and is_per_sample(batch)
    return Way(
        "what forward= takes", batch_alone, listed=listed or (mappings and is_per_sample((batch,))), whole=mappings
    )


def _axis(model: nn.Module, batch: Any, way: Way) -> tuple[int, str]:
    """The axis that samples lie on, and what a user should know of it.

    Recurrent layers and attention of torch take time first unless they are told otherwise. Targets, one a sample, tell
    which axis is which.
    """
    layout = Layout(whole=way.whole)
    first = next(tensors(layout.inputs(batch)), None)
    # Features in time, or tokens; images are neither.
    if first is None or first.dim() != (3 if first.is_floating_point() else 2):
        return 0, ""
    targets = [t for t in batch[1:] if isinstance(t, Tensor) and t.dim()] if isinstance(batch, list | tuple) else []
    if not any(vars(module).get("batch_first") is False for module in model.modules()):
        return 0, ""
    time, samples = first.shape[:2]
    if targets and all(len(t) == samples != time for t in targets):
        return 1, (
            f"samples were taken to lie on the second axis of inputs of shape {tuple(first.shape)}, since the targets "
            f"are {samples}; pass samples=0 if they lie on the first one"
        )
    if targets and all(len(t) == time != samples for t in targets):
        return 0, ""
    return 0, (
        f"samples were taken to lie on the first axis of inputs of shape {tuple(first.shape)}, though the model has "
        "layers with batch_first=False; pass samples=1 if time comes first"
    )
