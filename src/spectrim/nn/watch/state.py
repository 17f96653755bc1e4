"""Models left as they were found: their modes, and what they keep on themselves beside their weights.

That is activations, caches, lists of features, counters.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.cost.rounds import ALONE as ALONE
from spectrim.nn.encoders import unfused
from spectrim.nn.parameters import modes_kept, parameters_of, version_of
from spectrim.nn.watch.contents import contents_kept
from spectrim.nn.watch.nesting import copied
from spectrim.nn.watch.outside import COMMON, Holder, outside, own_object, watches
from spectrim.nn.watch.writes import seen_writing, tell, written

_GONE = object()
_Container = list | dict | set | deque
# Numbers of a tensor that are compared and not only asked for how often they were written.
_FEW = 4096
# Torch's compiler, and what loads it once it is called.
_COMPILED = frozenset({"torch._dynamo", "torch.nn.attention.flex_attention"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is restored, one by one, and what its lists hold.

    Torch's fused transformer kernels are off meanwhile: they pass the layers by, so that hooks would not see them;
    encoders answer zero at padded positions as with them. So are compiled programs, in which hooks have no place. Other
    threads that want to watch a model wait.
    """
    with as_used(*models), unfused(*models):
        yield


@contextlib.contextmanager
def as_used(*models: nn.Module) -> Iterator[None]:
    """As :func:`evaluating`, for passes that nothing watches: with fused kernels, as users run their networks."""
    with ALONE, modes_kept(*models), contents_kept(*models):
        for model in models:
            model.eval()
        with torch.no_grad(), _eager():
            yield


def _eager() -> contextlib.AbstractContextManager[Any]:
    """What is compiled runs as it is written. Where nothing is, torch's compiler need not be loaded."""
    # Asked one by one: there are thousands of modules.
    if any(name in sys.modules for name in _COMPILED):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


class Location(NamedTuple):
    """Where something is kept."""

    module: str  # name of the module
    key: str
    # Whether it is a parameter, a buffer, another attribute, or a variable outside of the modules.
    among: Literal["parameters", "buffers", "attributes", "outside"]
    outside: Holder | None = None  # what has that variable
    within: tuple[Any, ...] = ()  # of an attribute of an object that the module holds: by which keys that is found

    def get(self, model: nn.Module) -> Any:
        """What is there, if there is anything."""
        return self._holder(model).get(self.key, _GONE)

    def put(self, model: nn.Module, value: Any) -> None:
        """Put something there, or take away what is."""
        holder = self._holder(model)
        if value is _GONE:
            holder.pop(self.key, None)
        elif self.among == "parameters" and not isinstance(value, nn.Parameter):
            holder[self.key] = nn.Parameter(value, requires_grad=False)
        else:
            holder[self.key] = value

    def _holder(self, model: nn.Module) -> Any:
        if self.outside is not None:
            return self.outside
        owner = model.get_submodule(self.module)
        return _space_in(vars(owner), self.within) if self.among == "attributes" else vars(owner)[f"_{self.among}"]


class State:
    """What a model keeps, as it is now.

    Parameters
    ----------
    model
        Its attributes and buffers are looked at, and lists, mappings and sets among them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held = {place: (value, _copy(value), _version(place, value)) for place, value in _places(model)}
        self._passing: dict[Location, None] = {}
        self._lively = [
            (place, place._holder(model)) for place, kept in self._held.items() if _may_pass(model, place, kept[1])
        ]
        self._sizes = [(name, within, space, len(space)) for name, within, space in _spaces(model)]
        tell(model, self)
        self._hooks = {module: [set(vars(module)[kind]) for kind in _HOOKS] for module in model.modules()}

    def learn(self) -> None:
        """Parameters that the model's first pass wrote into are a part of what it keeps; they are as they were."""
        for place in _written_places(self._model):
            value = place.get(self._model)
            self._held[place] = value, _copy(value), _version(place, value)

    def look(self) -> None:
        """Note, in the middle of a pass, what may be gone at its end, such as what is kept where nothing was before."""
        for place, holder in self._lively:
            value, copy, version = self._held[place]
            if holder.get(place.key, _GONE) is not value or not _same(value, copy, version):
                self._passing[place] = None
        for name, within, space, size in self._sizes:
            if len(space) > size:
                new = (Location(name, key, "attributes", None, within) for key in space if key not in COMMON)
                self._passing |= dict.fromkeys(place for place in new if place not in self._held)

    @property
    def keeps(self) -> bool:
        """Whether passes keep something, at their ends or before."""
        return bool(self._passing or self.changed())

    def changed(self) -> list[Location]:
        """Where something else is kept by now, or may be: parameters are put back at once after a first pass."""
        now = dict(_places(self._model))
        found = [place for place in now if place not in self._held]
        found += _written_places(self._model)
        for place, (value, copy, version) in self._held.items():
            if now.get(place, _GONE) is not value or not _same(value, copy, version):
                found.append(place)
        return found

    def of_pass(self) -> list[Location]:
        """Where a forward pass keeps what is its own, and not a mark that hooks of the model's own have been set up.

        That is also where it may take modules out of a list and put them back.
        """
        found = dict.fromkeys((*self.changed(), *self._passing, *self.holding()))
        # An object before what is in it.
        places = sorted(found, key=lambda place: len(place.within))
        if not self.sets_up:
            return places
        return [p for p in places if p in self._held or not isinstance(p.get(self._model), bool)]

    def _new_hooks(self) -> Iterator[tuple[dict[int, Any], int]]:
        """Hooks that came meanwhile, beside those that watch the model: where, and by which number."""
        for module, known in self._hooks.items():
            for kind, there in zip(_HOOKS, known, strict=True):
                hooks = vars(module)[kind]
                yield from ((hooks, key) for key in hooks.keys() - there if not watches(hooks[key]))

    def take_hooks(self) -> list[tuple[dict[int, Any], int, Any]]:
        """Take away hooks that came meanwhile: where each was, its number, and what it is."""
        return [(hooks, key, hooks.pop(key)) for hooks, key in list(self._new_hooks())]

    @property
    def sets_up(self) -> bool:
        """Whether hooks of the model's own have come to stay."""
        return any(self._new_hooks())

    def holding(self) -> list[Location]:
        """Lists and mappings of modules beside those that torch knows of: a queue of layers that takes turns."""
        return [
            place
            for place, (_, copy, _) in self._held.items()
            if isinstance(copy, _Container) and _holds(copy, nn.Module)
        ]

    def changed_tensors(self) -> list[Location]:
        """Where something else is kept by now, if tensors or modules are or were there: alone, in a list or mapping.

        With these go marks that say that they are there, unless they may say that hooks or modules have come.
        """
        changed = self.changed()
        values = [
            place
            for place in changed
            if _has_parts(place.get(self._model)) or (place in self._held and _has_parts(self._held[place][1]))
        ]
        set_up = self.sets_up or any(module not in self._hooks for module in self._model.modules())
        return changed if values and not set_up else values

    def fresh(self, places: Iterable[Location]) -> dict[Location, Any]:
        """Copies of what was kept at some places: one for what was the same object at several."""
        copies: dict[int, Any] = {}
        values = {place: self._held.get(place, (_GONE, _GONE, 0)) for place in places}
        return {
            place: copies.setdefault(id(value), value if copy is _GONE else _copy(copy))
            for place, (value, copy, _) in values.items()
        }

    def put_back(self, places: Iterable[Location] | None = None) -> None:
        """Have the model keep what it did, each object with what was in it.

        Logs outside of the modules, which hold neither tensors nor modules, go on: they are somebody else's.
        At some places only, where the rest is meant to be another by now; else hooks that came meanwhile go too, since
        what marks them as there does.
        """
        if places is None:
            self.take_hooks()
        for place in self.changed() if places is None else places:
            value, copy, version = self._held.get(place, (_GONE, None, 0))
            is_log = _is_log(place.get(self._model)) and (value is _GONE or _is_log(copy))
            if is_log and place.among == "outside":
                continue
            if not _same(value, copy, version):
                _refill(value, copy)
            place.put(self._model, value)


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[State]:
    """Whatever a model puts on itself meanwhile is gone afterwards, and what it took the place of is back."""
    state = State(model)
    try:
        yield state
    finally:
        state.put_back()


@contextlib.contextmanager
def left_as_found(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """As :func:`kept`, for a model that is run again and again: yields what has every pass find the same.

    That is to be called before each pass. What the first pass makes and later ones leave alone, as tables of positions,
    stays meanwhile; what each of them changes, as caches that grow, counters and weights that are written into, is put
    back. Up to two passes are made on copies of these arguments, in which what changes is seen.
    """
    with kept(model) as cold, torch.no_grad():
        try:
            with seen_writing(model):
                model(*copied(args), **copied(kwargs))
            warm = State(model)
            if cold.changed_tensors():
                model(*copied(args), **copied(kwargs))
        except Exception:  # whoever runs it next is told
            warm = State(model)
        places = warm.changed_tensors()
        warm.put_back(places)
        yield functools.partial(warm.put_back, places)


def cut_graphs(model: nn.Module) -> None:
    """Have a model keep activations without the graphs that they were computed in, which no copy can be made of."""
    for place, value in list(_places(model)):
        if isinstance(value, list | deque):
            for number, part in enumerate(value):
                value[number] = _without_graph(part)
        elif value is not (detached := _without_graph(value)):
            place.put(model, detached)


def _without_graph(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and not value.is_leaf else value


@contextlib.contextmanager
def settings_kept(model: nn.Module) -> Iterator[None]:
    """Which parameters take gradients and every module's hooks are afterwards what they were."""
    flags = [(parameter, parameter.requires_grad) for parameter in parameters_of(model)]
    hooks = [(held, dict(held)) for module in model.modules() for key, held in vars(module).items() if _is_hooks(key)]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for held, before in hooks:
            held.clear()
            held.update(before)


def _is_hooks(key: str) -> bool:
    """Whether torch keeps hooks of a module there, or how they are called."""
    return key.startswith(("_forward_", "_backward_")) and "_hooks" in key


def install(model: nn.Module, values: Mapping[Location, Any]) -> None:
    """Have a model keep these values."""
    for place, value in values.items():
        place.put(model, value)


def taken(model: nn.Module, places: Iterable[Location]) -> dict[Location, Any]:
    """What a model keeps at some places."""
    return {place: place.get(model) for place in places}


def _places(model: nn.Module) -> Iterator[tuple[Location, Any]]:
    for name, within, space in _spaces(model):
        for key, value in space.items():
            if key not in COMMON:
                yield Location(name, key, "attributes", None, within), value
    for name, module in model.named_modules():
        for key, value in module._buffers.items():
            yield Location(name, key, "buffers"), value
    for place in _written_places(model):
        yield place, place.get(model)
    for (holder, key), value in outside(model).items():
        yield Location("", key, "outside", holder), value


def _spaces(model: nn.Module) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """What has attributes: the modules by name, and the objects that they or hooks of theirs are made with."""
    for name, module in model.named_modules():
        yield name, (), vars(module)
        held = [((key,), value) for key, value in vars(module).items() if key not in COMMON]
        held += [((kind, number), hook) for kind in _HOOKS for number, hook in vars(module)[kind].items()]
        yield from ((name, within, vars(found)) for within, value in held if (found := own_object(value)) is not None)


def _space_in(space: dict[str, Any], within: tuple[Any, ...]) -> dict[str, Any]:
    """Attributes of an object that is found by these keys; of a module's own without any."""
    if not within:
        return space
    found = own_object(functools.reduce(lambda held, key: held.get(key, {}), within, space))
    return {} if found is None else vars(found)


def _written_places(model: nn.Module) -> Iterator[Location]:
    """Parameters that passes write into."""
    return (Location(name, key, "parameters") for name, key in sorted(written(model)))


def _is_log(value: Any) -> bool:
    """Whether something is a list or mapping without tensors and modules, as a user's own records are."""
    return isinstance(value, _Container) and not _has_parts(value)


def _may_pass(model: nn.Module, place: Location, value: Any) -> bool:
    """Whether a pass may keep something there that is gone at its end: a tensor for a while, a mark that it runs."""
    if place.among == "outside" or value is None or (isinstance(value, _Container) and not value):
        return True
    return isinstance(value, int) and not type(model.get_submodule(place.module)).__module__.startswith("torch.")


def _has_parts(value: Any) -> bool:
    return _holds(value, Tensor | nn.Module)


def _holds(value: Any, kind: Any) -> bool:
    """Whether something is of a kind, or a list or mapping of what is."""
    if isinstance(value, _Container | tuple):
        return any(isinstance(part, kind) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, kind)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, _Container) else value


def _version(place: Location, value: Any) -> int | None:
    """A number that rises with writes; None for parameters, which are written past it (``.data``)."""
    if place.among == "parameters":
        return None
    return version_of(value) if isinstance(value, Tensor) else 0


def _same(value: Any, copy: Any, version: int | None) -> bool:
    """Whether an object still has in it what it had."""
    if isinstance(value, Tensor) and version is None:
        return torch.equal(value, copy)
    if isinstance(value, Tensor):
        return version_of(value) == version and _unwritten(value, copy)
    if isinstance(value, list | deque):
        return len(value) == len(copy) and all(a is b for a, b in zip(value, copy, strict=True))
    if isinstance(value, dict):
        return len(value) == len(copy) and all(k in copy and copy[k] is v for k, v in value.items())
    return not isinstance(value, set) or value == copy


def _unwritten(value: Tensor, copy: Tensor) -> bool:
    """Whether few numbers are what they were: observers of quantisation write past the count of writes."""
    if value.shape != copy.shape:
        return False
    plain = value.layout is torch.strided and not value.is_meta and not value.is_quantized
    if not plain or value.numel() > _FEW or value.element_size() == 1:
        return True
    return torch.equal(value, copy) or bool(((value == copy) | ((value != value) & (copy != copy))).all())


def _refill(value: Any, copy: Any) -> None:
    if isinstance(value, Tensor):
        with torch.no_grad():
            if not value.is_leaf:
                value.detach_()
            if value.shape == copy.shape:
                value.copy_(copy)
            else:  # observers of quantisation resize their buffers
                value.data = copy.clone()
    elif isinstance(value, list | deque):
        value.clear()
        value.extend(copy)
    elif isinstance(value, dict | set):
        value.clear()
        value.update(copy)
