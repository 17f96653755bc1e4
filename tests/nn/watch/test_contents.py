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


def test_what_is_large_or_holds_modules_is_left_as_it_is() -> None:
    model: Any = nn.Module()
    model.large, model.modules_too, model.small = [0] * 200_000, [[nn.Linear(1, 1)]], [[0]]
    with contents_kept(model):
        model.large.append(1)
        model.modules_too[0].append(nn.Linear(1, 1))
        model.small[0].append(1)
    assert (len(model.large), len(model.modules_too[0]), model.small) == (200_001, 2, [[0]])


class Remembering(nn.Module):
    """Answers by tensors that it keeps in records, some of which every pass writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
        self.mean: Any = {"deep": {"mean": torch.zeros(32)}}
        self.cache: Any = {"keys": [torch.zeros(32)]}
        self.flat: Any = [torch.zeros(32)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        self.mean["deep"]["mean"].mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        self.cache["keys"].append(y.detach().mean(0))
        self.flat[0].add_(1)
        return self.b(y + self.mean["deep"]["mean"] + sum(self.cache["keys"]) + self.flat[0])


def test_tensors_in_records_are_those_from_before() -> None:
    torch.manual_seed(0)
    model = Remembering().eval()
    with torch.no_grad():
        model(X[0])
    before, flat = repr((model.mean, model.cache, model.flat)), model.flat[0]
    small = st.compress(model, X, "macs=60%").model
    assert repr((model.mean, model.cache, model.flat)) == before
    assert model.flat[0] is flat
    assert repr((small.mean, small.cache, small.flat)) == before


def test_statistics_that_are_estimated_anew_stay_though_a_list_holds_them() -> None:
    model: Any = nn.BatchNorm1d(2)
    model.held = [model.running_mean]
    with contents_kept(model):
        model.running_mean.fill_(3)
    assert model.running_mean.tolist() == [3, 3]
