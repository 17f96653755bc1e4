"""Ways to call a model with a batch, as the parameters of its ``forward`` and the parts of the batch allow."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from spectrim.errors import CalibrationError, in_short

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_LISTED = "a batch was taken for a list with one entry a sample, {} in the first one"
# Entries of a mapping that are no inputs, in the spelling of loaders.
_TARGETS = frozenset(
    ["label", "labels", "target", "targets", "y", "class", "classes", "label_ids", "idx", "index", "id", "ids"]
)
_SEVERAL = 2


@dataclass(frozen=True)
class Way:
    """How a model is called with a batch."""

    words: str  # what is passed, for people
    take: Callable[[Any], Arguments]  # arguments of a batch
    # As of :class:`spectrim.nn.watch.layout.Layout`.
    listed: bool = False
    whole: bool = False
    note: str = ""  # what a user should know who did not ask for it; empty where there is nothing to know
    names: tuple[str, ...] = ()  # as of the layout, too


def bare(model: nn.Module) -> nn.Module:
    """A model without what distributes or compiles it, which has no part in watching it."""
    kinds = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, kinds) or type(model).__name__ == "OptimizedModule":
        model = cast(nn.Module, model.module if isinstance(model, kinds) else model._orig_mod)
    return model


@dataclass(frozen=True)
class Parameters:
    """What a model's ``forward`` takes."""

    required: tuple[str, ...] = ("input",)  # names that have no default, of those that can be given by position
    names: tuple[str, ...] = ("input",)  # all that can be given by name
    places: tuple[str, ...] = ("input",)  # all that can be given by position
    # Whether it takes ``*args`` and ``**kwargs``.
    any_number: bool = False
    any_names: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Parameters:
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
            tuple(p.name for p in parameters if p.kind in by_place),
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


def ways(model: nn.Module, batch: Any) -> Iterator[Way]:
    """Ways to call a model with a batch, the likeliest first."""
    wanted = Parameters.of(model)
    if isinstance(batch, PackedSequence):
        yield Way("the packed sequence", batch_alone, whole=True)
    elif isinstance(batch, Mapping):
        yield from _named(wanted, batch, lambda batch: batch)
    elif isinstance(batch, list | tuple) and batch:
        yield from _placed(model, wanted, batch)
    elif dataclasses.is_dataclass(batch) and len(wanted.required) < _SEVERAL:
        yield Way(f"the {type(batch).__name__} as one argument", batch_alone, whole=True)
    elif dataclasses.is_dataclass(batch):
        yield from _named(wanted, _fields(batch), _fields)
    elif isinstance(batch, Tensor):
        yield from (
            dataclasses.replace(way, words="the tensor", take=batch_alone) for way in _counted(wanted, (batch,))
        )


def _fields(batch: Any) -> dict[str, Any]:
    return {part.name: getattr(batch, part.name) for part in dataclasses.fields(batch)}


def batch_alone(batch: Any) -> Arguments:
    return (batch,), {}


def _placed(model: nn.Module, wanted: Parameters, batch: list[Any] | tuple[Any, ...]) -> Iterator[Way]:
    """For ``(inputs, targets, ...)``, or a list of samples."""
    inputs = batch[0]
    as_list = Way(
        f"the whole list of {len(batch)}", batch_alone, listed=True, whole=True,
        note=_LISTED.format(len(batch)),
    )  # fmt: skip
    samples = isinstance(batch, list) and is_per_sample((batch,))
    alike = samples and len(batch) > 1
    if alike and isinstance(inputs, Mapping):
        # Pairs of mappings, inputs and targets, have other names in each.
        yield as_list
    needed = len(wanted.required)
    if isinstance(inputs, Mapping) and 1 < needed <= len(batch) and not set(wanted.required) <= set(inputs):
        # A mapping that is the first of several inputs.
        yield Way(f"the first {needed} elements", lambda batch: (tuple(batch[:needed]), {}))
    elif isinstance(inputs, Mapping):
        yield from _named(wanted, inputs, lambda batch: batch[0])
    elif isinstance(inputs, list | tuple) and inputs and not isinstance(inputs, PackedSequence):
        yield from _nested(model, wanted, batch)
    elif alike and _of_several_lengths(batch):
        # The first of them would be taken for a batch.
        yield as_list
    else:
        # A model that stacks its images would take the first of them for a batch.
        images = samples and all(is_sample(model, entry) for entry in batch)
        yield from (as_list,) if images else ()
        yield from _counted(wanted, batch)
        yield from (as_list,) if alike and not images else ()


def _of_several_lengths(samples: Sequence[Tensor]) -> bool:
    """Whether samples are rows of numbers that no batch can be made of."""
    return all(entry.dim() == 1 for entry in samples) and len({len(entry) for entry in samples}) > 1


def _nested(model: nn.Module, wanted: Parameters, batch: Any) -> Iterator[Way]:
    """For ``((x1, x2), targets)`` and ``([image, image], [target, target])``."""
    inputs, needed = batch[0], max(1, len(wanted.required))
    listed = is_per_sample(batch)
    names = wanted.places[: len(inputs)]
    ways = [Way(f"{len(inputs)} inputs as arguments", lambda batch: (tuple(batch[0]), {}), names=names)]
    if not _takes(model, inputs, {}):
        ways = []
    if needed <= len(batch):
        as_it_is = Way(
            f"a {type(inputs).__name__} of {len(inputs)} as one argument", lambda batch: (tuple(batch[:needed]), {}),
            listed=listed, note=_LISTED.format(len(inputs)) if listed else "",
        )  # fmt: skip
        ways.insert(0 if listed else len(ways), as_it_is)
    if needed == 1 and isinstance(batch, tuple) and not listed:
        # The likeliest is that what follows are targets.
        ways.append(Way(f"the whole tuple of {len(batch)} as one argument", batch_alone, whole=True))
    yield from ways or _counted(wanted, batch)


def _counted(wanted: Parameters, batch: Any) -> Iterator[Way]:
    """For tensors one after the other, of which the first ones are inputs."""
    needed = max(1, len(wanted.required))
    if needed > len(batch):
        raise CalibrationError(
            f"forward needs {needed} inputs ({', '.join(wanted.required)}), and the batch has {len(batch)}: give "
            "batches that hold them, or pass forward=, a function (model, batch) that runs the model"
        )
    most = len(batch) if wanted.any_number else needed
    spare = wanted.places[needed : len(batch)]
    masked = [place for place, name in enumerate(spare, needed) if _is_mask(name) and _hides(batch[place], batch[0])]
    if masked:
        last = masked[-1] + 1
        yield Way(
            f"the first {last} elements", lambda batch: (tuple(batch[:last]), {}),
            note=f"the first {last} elements of a batch were taken for {names_of(wanted.places[:last])}",
            names=wanted.places[:last],
        )  # fmt: skip
    for number in range(needed, most + 1):
        yield Way(
            "the first element" if number == 1 else f"the first {number} elements",
            lambda batch, number=number: (tuple(batch[:number]), {}),
            note=_left_over(number, needed, spare, batch), names=wanted.places[:number] if number > 1 else (),
        )  # fmt: skip


def _left_over(number: int, needed: int, spare: Sequence[str], batch: Sequence[Any]) -> str:
    """What a user should know of elements that may be inputs too. A second one that is a tensor is the targets."""
    size = len(batch)
    if number > needed:
        return f"the first {number} elements of a batch were taken for inputs"
    if needed == 1 and spare and (size > 2 or isinstance(batch[1], bool | int | float | str)):
        return (
            f"of {size} elements of a batch the first was taken for inputs, though forward takes {names_of(spare)} "
            "too; to pass more, pass forward=, a function (model, batch) that runs the model"
        )
    return ""


def _hides(entry: Any, inputs: Any) -> bool:
    """Whether an element of a batch can be the mask of its inputs: zeros and ones (or truths) in the same place."""
    if not (isinstance(entry, Tensor) and isinstance(inputs, Tensor) and entry.dim() > 1):
        return False
    return entry.shape[:2] == inputs.shape[:2] and bool(((entry == 0) | (entry == 1)).all())


def _named(wanted: Parameters, inputs: Mapping[str, Any], of: Callable[[Any], Any]) -> Iterator[Way]:
    """For a mapping: by name what ``forward`` takes, else the mapping itself, else its only input."""
    if wanted.any_names:
        yield Way("all entries by name", lambda batch: ((), dict(of(batch))))
    taken = [name for name in inputs if name in wanted.names]
    if taken and set(wanted.required) <= set(taken):
        if len(taken) < len(inputs) or not wanted.any_names:
            yield Way(
                f"{names_of(taken)} by name", lambda batch: ((), {k: v for k, v in of(batch).items() if k in taken}),
                note=_dropped(inputs, taken),
            )  # fmt: skip
        return
    if len(wanted.required) > 1:
        if not wanted.any_names:
            raise CalibrationError(
                f"forward needs {names_of(wanted.required)}, and the batch holds {names_of(inputs)}: rename its "
                "entries, or pass forward=, a function (model, batch) that runs the model"
            )
        return
    yield Way("the mapping itself", lambda batch: ((of(batch),), {}))
    held = [k for k, v in inputs.items() if isinstance(v, Tensor) and str(k).lower() not in _TARGETS]
    for name in sorted(held, key=lambda name: (_is_mask(name), not inputs[name].is_floating_point())):
        yield Way(
            f"{name!r}", lambda batch, name=name: ((of(batch)[name],), {}), note=_dropped(inputs, [name])
        )  # fmt: skip


def _dropped(inputs: Mapping[str, Any], taken: list[str]) -> str:
    left = [name for name in inputs if name not in taken]
    if not left:
        return ""
    note = f"of each batch {names_of(taken)} was passed to the model, but not {names_of(left)}, which it does not take"
    masks = [name for name in left if _is_mask(name)]
    return f"{note}; so the model does not know the mask {names_of(masks)}" if masks else note


def _is_mask(name: Any) -> bool:
    return "mask" in str(name).lower()


def names_of(names: Any) -> str:
    return ", ".join(map(repr, names))


def is_per_sample(parts: Any) -> bool:
    """Whether the first of some parts is a list with one entry a sample: all of a kind, and so are the others.

    Tensors with their samples in front, as collated inputs are, agree in their first axis with the targets.
    """
    inputs, *targets = parts
    return _of_one_kind(inputs) and (not targets or _one_each(inputs, targets))


def _of_one_kind(inputs: Any) -> bool:
    """Whether it is a list of tensors of one type and number of axes, or of mappings with the same names."""
    if not isinstance(inputs, list | tuple) or not inputs or hasattr(inputs, "_fields"):
        return False
    if all(isinstance(entry, Tensor) for entry in inputs):
        return len({(entry.dim(), entry.dtype) for entry in inputs}) == 1
    return all(isinstance(entry, Mapping) and set(entry) == set(inputs[0]) for entry in inputs)


def _one_each(inputs: Sequence[Any], targets: Sequence[Any]) -> bool:
    """Whether targets have an entry for each of a list of inputs, and not a row for each row of the first of them."""
    size = len(inputs)
    lists = [t for t in targets if isinstance(t, list | tuple)]
    if lists:
        return all(len(t) == size for t in lists)
    columns = [t for t in targets if isinstance(t, Tensor) and t.dim()]
    collated = isinstance(inputs[0], Tensor) and inputs[0].dim() and any(len(t) == len(inputs[0]) for t in columns)
    return bool(columns) and all(len(t) == size for t in columns) and not collated


def is_sample(model: nn.Module, entry: Any) -> bool:
    """Whether a tensor looks like a single sample of a model: channels and sides, as its first convolution has them."""
    first = next((m for m in bare(model).modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if first is None or not isinstance(entry, Tensor):
        return False
    return entry.dim() == len(first.kernel_size) + 1 and entry.shape[0] == first.in_channels


def is_vector(model: nn.Module, entry: Any) -> bool:
    """Whether a tensor looks like a single sample of a model whose first layer is linear."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next((m for m in bare(model).modules() if isinstance(m, kinds)), None)
    return isinstance(first, nn.Linear) and isinstance(entry, Tensor) and entry.shape == (first.in_features,)


# What torch says of whole numbers where it wants others, bytes first, and of inputs of another size than a layer has.
_BYTES = re.compile(r"unsigned char|\bByte\b")
_WHOLE = re.compile(r"\b(long int|int|Long|Int)\b.*\b(float|Float|Half|BFloat16|c10::\w+)\b")
_SIZES = re.compile(
    r"to have \d+ channels, but got \d+|mat1 and mat2 shapes cannot be multiplied|Given normalized_shape="
)


def cure(error: BaseException) -> str:
    """What may help against what a model raises on a batch, in a sentence without a full stop."""
    said = in_short(error)
    if _BYTES.search(said):
        return "Give numbers prepared as in training: images of bytes become such by batch.float() / 255"
    if _WHOLE.search(said):
        return "Give numbers prepared as in training: whole numbers become such by batch.float()"
    if _SIZES.search(said):
        return "Give batches of the shape that the model was trained on: samples first, then its channels or features"
    return "If it takes batches in another way, pass forward=, a function (model, batch) that runs it"
