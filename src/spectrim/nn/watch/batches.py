"""What a batch is: how a model is called with it, and what its samples are. Decided once, with the first batch.

Loaders give tensors, ``(inputs, targets)``, mappings, lists of images; what a model takes of them is seen from the
parameters of its ``forward``. Where that leaves several ways, they are tried on the first batch, the likeliest first.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from spectrim.errors import CalibrationError, SpectrimError
from spectrim.nn.watch.layout import Layout, Where, check_where
from spectrim.nn.watch.nesting import checked_batches as checked_batches
from spectrim.nn.watch.nesting import copied, moved, tensors
from spectrim.nn.watch.nesting import logits as logits
from spectrim.nn.watch.nesting import output_tensors as output_tensors
from spectrim.nn.watch.nesting import resized as resized
from spectrim.nn.watch.state import evaluating as evaluating
from spectrim.nn.watch.state import kept

Forward = Callable[[nn.Module, Any], Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_LISTED = "a batch was taken for a list with one entry a sample, {} in the first one"
# Entries of a mapping that are no inputs, in the spelling of loaders.
_TARGETS = frozenset(
    ["label", "labels", "target", "targets", "y", "class", "classes", "label_ids", "idx", "index", "id", "ids"]
)


@dataclass(frozen=True)
class Way:
    """How a model is called with a batch.

    Attributes
    ----------
    words
        What is passed, for people.
    take
        Arguments of a batch.
    listed, whole
        As of :class:`spectrim.nn.watch.layout.Layout`.
    note
        What a user should know who did not ask for it; empty where there is nothing to know.
    """

    words: str
    take: Callable[[Any], Arguments]
    listed: bool = False
    whole: bool = False
    note: str = ""


class Feed:
    """Runs a model on batches. Has the form of a ``forward=`` function, and is one that knows what samples are.

    Parameters
    ----------
    forward
        Runs a model on a batch, where a user says how.
    samples
        The axis of the inputs that samples lie on, or a function that counts the samples of a batch.

    Attributes
    ----------
    layout
        Where samples are; known once a batch has been seen.
    notes
        What was decided that a user may not expect.
    """

    def __init__(self, forward: Forward | None = None, samples: Where = None) -> None:
        check_where(samples)
        self._forward, self._samples = forward, samples
        self._way: Way | None = None
        self.layout = Layout()
        self.notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, forward: Forward | None = None, samples: Where = None) -> Feed:
        """The feed that a verb was given in place of a function, or a new one."""
        return forward if isinstance(forward, Feed) else cls(forward, samples)

    def decide(self, model: nn.Module, batch: Any) -> Feed:
        """See from a first batch what batches are; nothing where that is known.

        Raises
        ------
        CalibrationError
            If the model cannot be called with it; the message says what was tried.
        """
        if self._way is None:
            self._way = _own(batch) if self._forward is not None else _working(model, batch)
            self._settle(model, batch)
        return self

    def _settle(self, model: nn.Module, batch: Any) -> None:
        assert self._way is not None
        way, asked = self._way, self._samples
        notes = [way.note] if way.note else []
        if callable(asked):
            self.layout = Layout(whole=way.whole, count=asked)
        elif asked is not None:
            self.layout = Layout(axis=asked, whole=way.whole)
        else:
            axis, note = (0, "") if way.listed or self._forward is not None else _axis(model, batch, way)
            notes += [note] if note else []
            self.layout = Layout(axis, listed=way.listed, whole=way.whole)
        self.notes = tuple(notes)

    def arguments(self, model: nn.Module, batch: Any) -> Arguments:
        """Positional and keyword arguments, copies on the model's device and in its dtype."""
        self.decide(model, batch)
        assert self._way is not None
        return cast(Arguments, moved(self._way.take(batch), model))

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Run a model on a batch, which is left as it is whatever the model does with its inputs."""
        return self.ready(model, batch)()

    def ready(self, model: nn.Module, batch: Any) -> Callable[[], Any]:
        """What runs a model on a batch, once: with copies of the batch, which are made now."""
        self.decide(model, batch)
        if self._forward is not None:
            return functools.partial(self._forward, model, copied(batch))
        args, kwargs = self.arguments(model, batch)
        return functools.partial(bare(model), *args, **kwargs)

    def resized(self, batch: Any, size: int) -> Any:
        """The same batch with other samples than it has, repeated or cut."""
        return self.layout.resized(batch, size)


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


def batch_size(batch: Any) -> int:
    """How many samples a batch has, by its first tensor; where a model tells more, by :class:`Feed`.

    Raises
    ------
    CalibrationError
        If the batch holds no tensor with an axis.
    """
    return Layout().size(batch)


def bare(model: nn.Module) -> nn.Module:
    """A model without what distributes or compiles it, which has no part in watching it."""
    kinds = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, kinds) or type(model).__name__ == "OptimizedModule":
        model = cast(nn.Module, model.module if isinstance(model, kinds) else model._orig_mod)
    return model


def _working(model: nn.Module, batch: Any) -> Way:
    """The first way that works; the only one without trying it."""
    ways = list(_ways(model, batch))
    if not ways:
        raise CalibrationError(
            f"cannot feed a batch of type {type(batch).__name__}: expected a tensor, a mapping, or (inputs, targets); "
            "or pass forward=, a function (model, batch) that runs the model"
        )
    if len(ways) == 1:
        return ways[0]
    failures = []
    for way in ways:
        try:
            with evaluating(model), kept(model):
                args, kwargs = moved(way.take(batch), model)
                bare(model)(*args, **kwargs)
        except SpectrimError:
            raise
        except Exception as error:  # a model may raise anything where it is given what it does not take
            failures.append(f"with {way.words} it raises {type(error).__name__}: {_first_line(error)}")
        else:
            return way
    raise CalibrationError(
        f"{type(model).__name__} cannot be run with a batch that is {_shape(batch)}: {'; '.join(failures)}. Pass "
        "forward=, a function (model, batch) that runs the model"
    )


def _own(batch: Any) -> Way:
    """What a user's own function runs: only the samples are to be told."""
    mappings = isinstance(batch, list) and len(batch) > 1 and all(isinstance(entry, Mapping) for entry in batch)
    listed = isinstance(batch, list | tuple) and len(batch) > 1 and _is_per_sample(batch)
    return Way("forward=", _alone, listed=listed or (mappings and _is_per_sample((batch,))), whole=mappings)


@dataclass(frozen=True)
class _Parameters:
    """What a model's ``forward`` takes.

    Attributes
    ----------
    required
        Names that have no default, of those that can be given by position.
    names
        All that can be given by name.
    any_number, any_names
        Whether it takes ``*args`` and ``**kwargs``.
    """

    required: tuple[str, ...] = ("input",)
    names: tuple[str, ...] = ("input",)
    any_number: bool = False
    any_names: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> _Parameters:
        """Of the model, or of what it hands everything on to."""
        model = bare(model)
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):
            return cls(any_number=True, any_names=True)
        passed_on = {p.kind for p in parameters} == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        children = list(model.children())
        if passed_on and len(children) == 1:
            return cls.of(children[0])
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return cls(
            tuple(p.name for p in parameters if p.kind in by_place and p.default is p.empty),
            tuple(p.name for p in parameters if p.kind in by_name),
            any(p.kind is p.VAR_POSITIONAL for p in parameters),
            any(p.kind is p.VAR_KEYWORD for p in parameters),
        )


def _takes(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's forward has parameters for these arguments."""
    try:
        inspect.signature(bare(model).forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _ways(model: nn.Module, batch: Any) -> Iterator[Way]:
    """Ways to call a model with a batch, the likeliest first."""
    wanted = _Parameters.of(model)
    if isinstance(batch, Mapping):
        yield from _named(wanted, batch, lambda batch: batch)
    elif isinstance(batch, list | tuple) and batch:
        yield from _placed(model, wanted, batch)
    elif isinstance(batch, Tensor):
        yield from (dataclasses.replace(way, words="the tensor", take=_alone) for way in _counted(wanted, (batch,)))


def _alone(batch: Any) -> Arguments:
    return (batch,), {}


def _placed(model: nn.Module, wanted: _Parameters, batch: list[Any] | tuple[Any, ...]) -> Iterator[Way]:
    """For ``(inputs, targets, ...)``, or a list of samples."""
    inputs = batch[0]
    as_list = Way(
        f"the whole list of {len(batch)}", _alone, listed=True, whole=True,
        note=_LISTED.format(len(batch)),
    )  # fmt: skip
    alike = isinstance(batch, list) and len(batch) > 1 and _is_per_sample((batch,))
    if alike and isinstance(inputs, Mapping):
        # Pairs of mappings, inputs and targets, have other names in each.
        yield as_list
    if isinstance(inputs, Mapping):
        yield from _named(wanted, inputs, lambda batch: batch[0])
    elif isinstance(inputs, list | tuple) and inputs:
        yield from _nested(model, wanted, batch)
    else:
        yield from _counted(wanted, batch)
        if alike:
            yield as_list


def _nested(model: nn.Module, wanted: _Parameters, batch: Any) -> Iterator[Way]:
    """For ``((x1, x2), targets)`` and ``([image, image], [target, target])``."""
    inputs, needed = batch[0], max(1, len(wanted.required))
    listed = _is_per_sample(batch)
    ways = [Way(f"{len(inputs)} inputs as arguments", lambda batch: (tuple(batch[0]), {}))]
    if not _takes(model, inputs, {}):
        ways = []
    if needed <= len(batch):
        as_it_is = Way(
            f"a {type(inputs).__name__} of {len(inputs)} as one argument", lambda batch: (tuple(batch[:needed]), {}),
            listed=listed, note=_LISTED.format(len(inputs)) if listed else "",
        )  # fmt: skip
        ways.insert(0 if listed else len(ways), as_it_is)
    yield from ways or _counted(wanted, batch)


def _counted(wanted: _Parameters, batch: Any) -> Iterator[Way]:
    """For tensors one after the other, of which the first ones are inputs."""
    needed = max(1, len(wanted.required))
    if needed > len(batch):
        raise CalibrationError(
            f"forward needs {needed} inputs ({', '.join(wanted.required)}), and the batch has {len(batch)}: give "
            "batches that hold them, or pass forward=, a function (model, batch) that runs the model"
        )
    most = len(batch) if wanted.any_number else needed
    for number in range(needed, most + 1):
        yield Way(
            "the first element" if number == 1 else f"the first {number} elements",
            lambda batch, number=number: (tuple(batch[:number]), {}),
            note="" if number == needed else f"the first {number} elements of a batch were taken for inputs",
        )


def _named(wanted: _Parameters, inputs: Mapping[str, Any], of: Callable[[Any], Any]) -> Iterator[Way]:
    """For a mapping: by name what ``forward`` takes, else the mapping itself, else its only input."""
    if wanted.any_names:
        yield Way("all entries by name", lambda batch: ((), dict(of(batch))))
    taken = [name for name in inputs if name in wanted.names]
    if taken and set(wanted.required) <= set(taken):
        if len(taken) < len(inputs) or not wanted.any_names:
            yield Way(
                f"{_names(taken)} by name", lambda batch: ((), {k: v for k, v in of(batch).items() if k in taken}),
                note=_dropped(inputs, taken),
            )  # fmt: skip
        return
    if len(wanted.required) > 1:
        if not wanted.any_names:
            raise CalibrationError(
                f"forward needs {_names(wanted.required)}, and the batch holds {_names(inputs)}: rename its entries, "
                "or pass forward=, a function (model, batch) that runs the model"
            )
        return
    yield Way("the mapping itself", lambda batch: ((of(batch),), {}))
    held = [k for k, v in inputs.items() if isinstance(v, Tensor) and k.lower() not in _TARGETS]
    for name in sorted(held, key=lambda name: (_is_mask(name), not inputs[name].is_floating_point())):
        yield Way(
            f"{name!r}", lambda batch, name=name: ((of(batch)[name],), {}), note=_dropped(inputs, [name])
        )  # fmt: skip


def _dropped(inputs: Mapping[str, Any], taken: list[str]) -> str:
    left = [name for name in inputs if name not in taken]
    if not left:
        return ""
    note = f"of each batch {_names(taken)} was passed to the model, not {_names(left)}, which its forward does not take"
    masks = [name for name in left if _is_mask(name)]
    return f"{note}; so the model does not know the mask {_names(masks)}" if masks else note


def _is_mask(name: str) -> bool:
    return "mask" in name.lower()


def _names(names: Any) -> str:
    return ", ".join(map(repr, names))


def _is_per_sample(parts: Any) -> bool:
    """Whether the first of some parts is a list with one entry a sample: all of a kind, and so are the others.

    Tensors with their samples in front, as collated inputs are, agree in their first axis with the targets.
    """
    inputs, *targets = parts
    if not isinstance(inputs, list | tuple) or not inputs or hasattr(inputs, "_fields"):
        return False
    if all(isinstance(entry, Tensor) for entry in inputs):
        if len({entry.dim() for entry in inputs}) != 1 or len({entry.dtype for entry in inputs}) != 1:
            return False
    elif not all(isinstance(entry, Mapping) and set(entry) == set(inputs[0]) for entry in inputs):
        return False
    if not targets:
        return True
    size = len(inputs)
    lists = [t for t in targets if isinstance(t, list | tuple)]
    if lists:
        return all(len(t) == size for t in lists)
    columns = [t for t in targets if isinstance(t, Tensor) and t.dim()]
    collated = isinstance(inputs[0], Tensor) and inputs[0].dim() and any(len(t) == len(inputs[0]) for t in columns)
    return bool(columns) and all(len(t) == size for t in columns) and not collated


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
    if not any(getattr(module, "batch_first", None) is False for module in model.modules()):
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


def _shape(batch: Any) -> str:
    """A batch in words."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a mapping of {_names(batch)}"
    kinds = ", ".join(type(part).__name__ for part in itertools.islice(batch, 4))
    return f"a {type(batch).__name__} of {len(batch)} ({kinds}{', ...' if len(batch) > 4 else ''})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["without a word"])[0][:160]
