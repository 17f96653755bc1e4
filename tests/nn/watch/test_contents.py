"""Records that a model keeps are what they were, whatever the library runs."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.nn.watch.contents import contents_kept

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).split(32)


class Recording(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
        self.history: Any = []
        self.stats: Any = {"n": 0}
        self.nested: Any = {"list": [1], "set": {1}, "dict": {"x": []}, "array": np.zeros(2)}
        self.last: Any = deque(maxlen=3)
        self.by_name: Any = defaultdict(list)
        self.counts: Any = Counter(calls=0)
        self.array: Any = np.full(3, np.nan)
        self.pair: Any = ([], {})
        self.rebound: Any = []

    def forward(self, x: Tensor) -> Tensor:
        self.stats["n"] += 1
        self.history.append(float(x.mean()))
        self.nested["list"].append(2)
        self.nested["set"].add(self.stats["n"])
        self.nested["dict"]["x"].append(1)
        self.nested["array"][0] += 1
        self.nested["new"] = []
        self.last.append(1)
        self.by_name["k"].append(1)
        self.counts["calls"] += 1
        self.array[0] = 1
        self.pair[0].append(1)
        self.rebound = [*self.rebound, 1]
        if not hasattr(self, "late"):
            self.late: Any = []
        self.late.append(1)
        return self.b(self.a(x).relu())


def _records(model: nn.Module) -> dict[str, Any]:
    common = vars(nn.Module())
    return {key: value for key, value in vars(model).items() if key not in common and "spectrim" not in key}


def test_records_are_those_from_before_on_both_networks() -> None:
    model = Recording().eval()
    told, objects = repr(_records(model)), {key: id(value) for key, value in _records(model).items()}
    small = st.compress(model, X, "macs=60%").model
    st.agreement(model, small, X)
    st.compare(model, small, X[0][:2], repeats=2)
    assert repr(_records(model)) == told
    assert repr(_records(small)) == told
    assert {key: id(value) for key, value in _records(model).items()} == objects


def test_what_is_large_or_holds_tensors_is_left_as_it_is() -> None:
    model: Any = nn.Module()
    model.large, model.tensors, model.small = [0] * 200_000, [[torch.ones(1)]], [[0]]
    with contents_kept(model):
        model.large.append(1)
        model.tensors[0].append(torch.ones(1))
        model.small[0].append(1)
    assert (len(model.large), len(model.tensors[0]), model.small) == (200_001, 2, [[0]])
