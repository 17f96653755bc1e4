"""The state of every global random generator as tensors, so that it can be stored and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectrim.errors import CheckpointError
from spectrim.nn.watch.chance import draws_kept

State = dict[str, Tensor]

_NUMPY_WORDS = 624  # of which its position points at one


def seed(value: int) -> None:
    """Seed torch, numpy and python."""
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def capture(loader: Any = None) -> State:
    """States of torch, CUDA when in use, numpy, python, and of the generators that a data loader owns."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, spare = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": _words([*keys.tolist(), position, has_gauss]),  # type: ignore[union-attr]
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": _words([version, *internal]),
        "python_gauss": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state | {f"loader{i}": g.get_state() for i, g in enumerate(_generators(loader))}


def _words(values: list[int]) -> Tensor:
    """``torch.tensor(values)`` in a tenth of the time."""
    return torch.from_numpy(np.array(values, np.int64))


def restore(state: State, loader: Any = None) -> None:
    """Put back what :func:`capture` returned."""
    torch.set_rng_state(state["torch"])
    *keys, position, has_gauss = state["numpy"].tolist()
    gauss = state["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, gauss))
    version, *internal = state["python"].tolist()
    spare = state["python_gauss"].tolist()
    random.setstate((version, tuple(internal), spare[0] if spare else None))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda{i}"], i)
    for i, generator in enumerate(_generators(loader)):
        if f"loader{i}" in state:
            generator.set_state(state[f"loader{i}"])


def check_restorable(state: State, loader: Any, source: str) -> None:
    """See that :func:`restore` can put back a state. The generators are left as they are."""
    before = capture(loader)
    missing = [name for name in before if name not in state and not name.startswith("cuda")]
    if missing:
        raise CheckpointError(f"{source}: the state of the generator {missing[0]!r} is missing")
    for name, present in before.items():
        stored = state.get(name, present)
        # Python keeps a spare number, or none.
        if stored.dtype != present.dtype or (
            stored.shape != present.shape and not (name == "python_gauss" and len(stored) < 2)
        ):
            raise CheckpointError(f"{source}: the state of the generator {name!r} is another one's")
    try:
        if not 0 <= int(state["numpy"][-2]) <= _NUMPY_WORDS:
            raise ValueError(f"position {int(state['numpy'][-2])} of numpy's generator")
        restore(state, loader)
    except (RuntimeError, TypeError, ValueError, OverflowError, IndexError) as error:
        raise CheckpointError(f"{source}: the states of the random generators are damaged: {error}") from error
    finally:
        restore(before, loader)


def _generators(loader: Any) -> list[torch.Generator]:
    sampler = getattr(loader, "sampler", None)
    generators = [getattr(owner, "generator", None) for owner in (loader, sampler)]
    unique = {id(g): g for g in generators if isinstance(g, torch.Generator)}
    return list(unique.values())


@contextmanager
def seeded(value: int, loader: Any = None) -> Iterator[None]:
    """Seeded generators inside; as before on leaving."""
    with draws_kept(_generators(loader)):
        seed(value)
        yield
