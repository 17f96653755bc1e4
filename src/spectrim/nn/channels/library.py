"""torch-pruning, as the reader of its graph needs it: there, of a version that can be read, and kept from giving up."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any
from unittest import mock

# Ways by which the channels of one layer may reach one operation.
_VISITS = 16
# Or one channel may be named so often in one place: products of two parts of one tensor multiply indices.
_REPEATS = 64
# More entries than any axis has that a layer reads: channels were multiplied with one another, again and again.
_ENTRIES = 2**17
LOST = "they cannot be followed to all that reads them"


class Blocked(Exception):
    """A group of channels that cannot be removed, and why."""

    lost = False


class Lost(Blocked):
    """A group of channels that the graph does not come to the end of."""

    lost = True


def _mapping_names(index_mapping: Any) -> list[str]:
    return [name for name in vars(index_mapping) if re.fullmatch(r"update_\w+_index_mapping", name)]


def check_library() -> None:
    """Raise ImportError unless torch-pruning is there, with what :func:`careful` puts something else in place of."""
    try:
        from torch_pruning.dependency import graph, index_mapping
    except ImportError as error:
        raise ImportError("removing filters needs torch-pruning: pip install 'spectrim[filters]'") from error
    group, flatten = getattr(graph, "Group", None), getattr(index_mapping, "_FlattenIndexMapping", None)
    if not hasattr(group, "add_dep") or flatten is None or not _mapping_names(index_mapping):
        raise ImportError(
            f"torch-pruning {version('torch-pruning')} has no dependency.graph.Group.add_dep, "
            "index_mapping._FlattenIndexMapping or index_mapping.update_*_index_mapping, which reading its graph rests "
            "on: pip install 'torch-pruning>=1.6,<1.7'"
        )


def empty_graph() -> Any:
    """A graph of dependencies of nothing yet."""
    from torch_pruning import DependencyGraph

    return DependencyGraph()


@contextlib.contextmanager
def careful() -> Iterator[None]:
    """Keep torch-pruning from failing altogether where it cannot follow one operation.

    It would go round in circles where parts of a split meet again, as in rotary embeddings: each time round moves the
    indices on, so that it does not notice having been there. And a reshape or concatenation whose sizes it takes for
    others would end the whole search; left as it is, what passes it fails the trial.
    """
    from torch_pruning.dependency import graph, index_mapping

    before, flatten = graph.Group, index_mapping._FlattenIndexMapping
    spread = flatten.__call__

    def guarded(update: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            with contextlib.suppress(IndexError, ZeroDivisionError, TypeError):
                update(*arguments)

        return run

    def bounded(mapping: Any, idxs: Any) -> Any:
        if len(idxs) > _ENTRIES:
            raise Lost(f"{LOST}: they are multiplied with one another")
        return spread(mapping, idxs)

    class Bounded(before):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.visits: dict[tuple[int, Any], int] = {}

        def add_dep(self, dep: Any, idxs: Any) -> None:
            place = (id(dep.target), dep.handler)
            self.visits[place] = self.visits.get(place, 0) + 1
            if self.visits[place] > _VISITS or len(idxs) > _REPEATS * len({each.idx for each in idxs}):
                raise Lost(f"{LOST}: they come to one place again and again, as where parts of a split meet")
            super().add_dep(dep, idxs)

    mappings: dict[str, Any] = {name: guarded(getattr(index_mapping, name)) for name in _mapping_names(index_mapping)}
    with (
        mock.patch.object(graph, "Group", Bounded),
        mock.patch.object(flatten, "__call__", bounded),
        mock.patch.multiple(index_mapping, **mappings),
    ):
        yield
