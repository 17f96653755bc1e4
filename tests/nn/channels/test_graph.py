"""Which channels belong together, and that a network without some of them is the network with their readers zeroed."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as st
from spectrim.network.coupling import IN, Coupling, axes_left
from spectrim.nn.channels.narrow import narrow
from tests.cases import one_thread
from tests.nn.coupled_nets import NETS, Attention, Net, conv, made, relu

pytest.importorskip("torch_pruning")

END = "no layer reads its channels: they are an output of the network"


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def coupled(model: nn.Module, x: Tensor, **options) -> st.Sites:
    return st.couple(model, st.find(model, **options), x)


@functools.cache
def analysed(name: str) -> tuple[nn.Module, Tensor, st.Sites]:
    model, x = made(name)
    return model, x, coupled(model, x)


def reasons(sites: st.Sites) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in sites.skipped}


# Where the channels of every group lie, and the groups they fall into where that is not one.
FOUND: dict[str, dict[str, str]] = {
    "chain": {"a:out": "a:out:1 b:in:1", "b:out": "b:out:1 c:in:1"},
    "mlp": {"a:out": "a:out:1 b:in:1", "b:out": "b:out:1 c:in:1"},
    "conv1d": {"a:out": "a:out:1 b:in:1", "b:out": "b:out:1 c:in:1"},
    "conv3d": {"a:out": "a:out:1 b:in:1", "b:out": "b:out:1 c:in:8"},
    "residual": {
        "stem:out": "stem:out:1 n0:through:1 c1:in:1 n2:through:1 head:in:1 c2:out:1",
        "c1:out": "c1:out:1 n1:through:1 c2:in:1",
    },
    "projection": {
        "stem:out": "stem:out:1 p:in:1 c1:in:1",
        "p:out": "p:out:1 c2:out:1 head:in:1",
        "c1:out": "c1:out:1 c2:in:1",
    },
    "concat": {
        "a:out": "a:out:1 n:through:1 c:in:1",
        "b:out": "b:out:1 n:through:1 c:in:1",
        "c:out": "c:out:1 head:in:1",
    },
    "dense": {"a:out": "a:out:1 b:in:1 head:in:1", "b:out": "b:out:1 head:in:1"},
    "doubled": {"a:out": "a:out:1 b:in:2"},
    "depthwise": {"a:out": "a:out:1 dw:through:1 n:through:1 c:in:1", "c:out": "c:out:1 head:in:1"},
    "grouped": {
        "a:out": "a:out:1 g:in:1 / 4",
        "g:out": "g:out:1 n:through:1 c:in:1 / 4",
        "c:out": "c:out:1 head:in:1",
    },
    "transposed": {
        "a:out": "a:out:1 t:in:1",
        "t:out": "t:out:1 n:through:1 u:in:1 / 2",
        "u:out": "u:out:1 out:in:1 / 2",
    },
    "flatten": {"a:out": "a:out:1 b:in:1", "b:out": "b:out:1 c:in:9", "c:out": "c:out:1 d:in:1"},
    "chunk": {"a:out": "a:out:2 b:in:1", "b:out": "b:out:1 c:in:1"},
    "groupnorm": {"a:out": "a:out:1 n:through:1 b:in:1 / 2", "b:out": "b:out:1 head:in:1"},
    "instancenorm": {"a:out": "a:out:1 n:through:1 b:in:1", "b:out": "b:out:1 head:in:1"},
    "layernorm": {"a:out": "a:out:1 b:in:1", "b:out": "b:out:1 n:through:1 c:in:1"},
    "prelu": {"a:out": "a:out:1 p:through:1 b:in:1", "b:out": "b:out:1 head:in:1"},
    "squeeze": {
        "a:out": "a:out:1 n:through:1 down:in:1 b:in:1 up:out:1",
        "down:out": "down:out:1 up:in:1",
        "b:out": "b:out:1 head:in:1",
    },
    "attention": {
        "0:out": "0:out:1 1.norm1:through:1 1.q:in:1 1.k:in:1 1.v:in:1 1.o:out:1 1.norm2:through:1 1.up:in:1 "
        "1.down:out:1 2:in:1",
        "1.up:out": "1.up:out:1 1.down:in:1",
        "1.q:out": "1.q:out:4 1.k:out:4 1.v:out:4 1.o:in:4 1:.heads:1",
    },
    "twice": {"a:out": "a:out:1 b:in:1 b:out:1 head:in:1"},
    "two readers": {"a:out": "a:out:1 b:in:1 c:in:1", "c:out": "c:out:1 d:in:1"},
    "product": {"a:out": "a:out:1 b:out:1 c:in:1"},
    "parameter": {"a:out": "a:out:1 pos:1:1 b:in:1"},
    "embedding": {"b:out": "b:out:1 c:in:1", "c:out": "c:out:1 e:out:1 pos:2:1 b:in:1 d:in:1"},
    "option a": {"a:out": "a:out:1 b:in:1 c:out:1 head:in:1", "b:out": "b:out:1 c:in:1"},
    "shuffle": {"a:out": "a:out:2 b:in:2", "b:out": "b:out:1 head:in:1"},
    "flip": {"a:out": "a:out:1 b:in:1"},
    "softmax": {},
    "glu": {"a:out": "a:out:2 b:in:1", "b:out": "b:out:1 c:in:1"},
    "pixel shuffle": {"a:out": "a:out:4 b:in:1"},
    "pixel unshuffle": {"a:out": "a:out:1 b:in:4"},
    "c2f": {
        "stem:out": "stem:out:2 c1:in:1 c2:out:1 c:in:3",
        "c1:out": "c1:out:1 c2:in:1",
        "c:out": "c:out:1 head:in:1",
    },
    "c2f without a sum": {
        "stem:out": "stem:out:2 c1:in:1 c:in:2",
        "c1:out": "c1:out:1 c2:in:1",
        "c2:out": "c2:out:1 c:in:1",
        "c:out": "c:out:1 head:in:1",
    },
    "generator": {"a:out": "a:out:9 n:through:1 t:in:1"},
    "unflatten": {"a:out": "a:out:9 u:through:9 t:in:1"},
    "frozen norm": {"a:out": "a:out:1 n:through:1 b:in:1"},
    "own number": {"a:out": "a:out:9 b:in:1 :.channels:1"},
    "split by a number": {"a:out": "a:out:18 b:in:2 :.channels:1"},
    "literal": {},
    "norm over two axes": {},
    "multihead": {"b:out": "b:out:1 c:in:1"},
    "recurrent": {"b:out": "b:out:1 c:in:1"},
    "width": {"a:out": "a:out:1 b:in:1 :.width:1", "b:out": "b:out:1 c:in:1"},
    "tied": {"d:out": "d:out:1 e:in:1"},
}

# What stands in the way, by the layer whose channels have to stay.
IN_THE_WAY: dict[str, dict[str, str]] = {
    "chain": {"c:out": END},
    "two readers": {"b:out": "output of the network"},
    "softmax": {"a:out": "a softmax. These channels have to stay, and nothing needs to be done"},
    "literal": {"a:out": "View.*write -1.*register_channels"},
    "norm over two axes": {"a:out": "n: LayerNorm over 2 axes"},
    "multihead": {"a:out": "att: it keeps its heads and channels.*with_linear_layers"},
    "recurrent": {"a:out": "r: LSTM holds parameters of its own that read or carry them"},
    "tied": {"a:out": "b: its weight is tied to c", "b:out": "tied", "c:out": "tied"},
}


def places(coupling: Coupling) -> set[str]:
    return {str(place) for place in coupling.places}


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", NETS)
def test_channels_and_where_they_lie(name: str):
    _, _, sites = analysed(name)
    wanted = {key: text.partition(" / ") for key, text in FOUND[name].items()}
    assert {c.name: places(c) for c in sites.couplings} == {k: set(t.split()) for k, (t, _, _) in wanted.items()}
    assert {c.name: c.pools for c in sites.couplings} == {k: int(p or 1) for k, (_, _, p) in wanted.items()}
    for coupling in sites.couplings:
        assert coupling.sides[0].name + ":out" == coupling.name
        for side in coupling.sides:
            held = side.positions.flatten()
            assert len(held.unique()) == len(held)
            assert 0 <= int(held.min()) <= int(held.max()) < side.size
            assert len(side.positions) == coupling.channels


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_stands_in_the_way_is_named(name: str):
    found = reasons(coupled(*made(name, dtype=torch.float32)))
    for channels, expected in IN_THE_WAY[name].items():
        assert re.search(expected, found[channels]), found[channels]


@pytest.mark.parametrize("name", NETS)
def test_every_layer_that_writes_channels_is_told_of(name: str):
    _, _, sites = analysed(name)
    told = {side.name for c in sites.couplings for side in c.sides if side.axis in ("out", "through")}
    told |= {skipped.name.removesuffix(":out") for skipped in sites.skipped}
    # Layers that write to the same sum as one that cannot be pruned are told of by that one.
    blocked = {"attention": {"1.k", "1.v"}, "two readers": {"d"}}.get(name, set())
    assert {site.name for site in sites} - told <= blocked


def drawn(couplings: tuple[Coupling, ...], seed: int) -> dict[str, list[int]]:
    """Random channels to keep, as many of every pool."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for c in couplings:
        size = c.channels // c.pools
        count = int(torch.randint(1, size + 1, (), generator=generator))
        runs = [torch.randperm(size, generator=generator)[:count] + pool * size for pool in range(c.pools)]
        kept[c.name] = torch.cat(runs).sort().values.tolist()
    return kept


@torch.no_grad()
def silenced(model: nn.Module, couplings: tuple[Coupling, ...], kept: Mapping[str, list[int]]) -> nn.Module:
    """The model with the weights zeroed that read channels which are not kept."""
    model = copy.deepcopy(model)
    for coupling in couplings:
        gone = [c for c in range(coupling.channels) if c not in kept[coupling.name]]
        for side in coupling.on(IN):
            layer = model.get_submodule(side.name)
            groups = getattr(layer, "groups", 1)
            inputs, outputs = side.size // groups, len(layer.weight) // groups
            for channel in side.positions[gone].flatten().tolist():
                if getattr(layer, "transposed", False):
                    layer.weight[channel] = 0
                else:
                    group = channel // inputs
                    layer.weight[group * outputs : (group + 1) * outputs, channel % inputs] = 0
    return model


@pytest.fixture
def no_statistics(monkeypatch):
    """Layer and group normalisation scale and shift only: their statistics mix the channels."""

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        return x * weight + bias

    def group_norm(x, groups, weight=None, bias=None, eps=1e-5):
        return x * weight[:, None, None] + bias[:, None, None]

    monkeypatch.setattr(F, "layer_norm", layer_norm)
    monkeypatch.setattr(F, "group_norm", group_norm)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", [name for name in NETS if FOUND[name]])
def test_narrowed_is_the_dense_model_with_the_readers_of_removed_channels_zeroed(name: str, no_statistics):
    model, x, sites = analysed(name)
    parameters = sum(p.numel() for p in model.parameters())
    changes = []
    for seed in range(4):
        kept = drawn(sites.couplings, seed)
        small = copy.deepcopy(model)
        narrow(small, axes_left(sites.couplings, kept))
        with torch.no_grad():
            wanted, given = silenced(model, sites.couplings, kept)(x), small(x)
            changes.append(float((wanted - model(x)).abs().max()))
        assert torch.allclose(given, wanted, rtol=0, atol=1e-10)
        if any(len(kept[c.name]) < c.channels for c in sites.couplings):
            assert sum(p.numel() for p in small.parameters()) < parameters
    assert max(changes) > 1e-3


def snapshot(model: nn.Module):
    tensors = [*model.parameters(), *model.buffers()]
    return (
        [(id(t), t.requires_grad, t.clone(), None if t.grad is None else t.grad.clone()) for t in tensors],
        [(m, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


def same(a, b) -> bool:
    return a[1] == b[1] and all(
        one[:2] == two[:2]
        and torch.equal(one[2], two[2])
        and (one[3] is None) == (two[3] is None)
        and (one[3] is None or torch.equal(one[3], two[3]))
        for one, two in zip(a[0], b[0], strict=True)
    )


@pytest.mark.table
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["residual", "grouped", "attention", "squeeze"])
def test_the_model_is_left_as_found_and_its_mode_does_not_matter(name: str, dtype: torch.dtype):
    model, x = made(name, dtype=dtype)
    wanted = [(c.name, c.places, c.pools) for c in analysed(name)[2].couplings]
    model.train()
    next(model.children()).eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        if number % 4 == 0:
            parameter.grad = torch.randn_like(parameter)
    before = snapshot(model)
    state = torch.get_rng_state()
    sites = coupled(model, x)
    assert same(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    assert [(c.name, c.places, c.pools) for c in sites.couplings] == wanted


def test_gradients_may_be_off():
    model, x = made("chain")
    with torch.no_grad():
        assert [c.name for c in coupled(model, x).couplings] == ["a:out", "b:out"]
    model.requires_grad_(False)
    assert [c.name for c in coupled(model, x).couplings] == ["a:out", "b:out"]


@pytest.mark.parametrize(
    "batch",
    [
        lambda x: x[:1], lambda x: x, lambda x: (x, torch.arange(3)), lambda x: [x, None], lambda x: {"x": x},
        lambda x: x.expand(3, *x.shape[1:]),
    ],
)  # fmt: skip
def test_examples_of_any_structure(batch):
    model, x = made("chain")
    assert [c.name for c in coupled(model, batch(x)).couplings] == ["a:out", "b:out"]


def test_another_way_to_run_the_model():
    model, x = made("chain")
    asked = []

    def forward(given: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        asked.append(given)
        return {"score": given(batch * 2)}

    sites = st.couple(model, st.find(model), x, forward=forward)
    assert [c.name for c in sites.couplings] == ["a:out", "b:out"]
    assert asked
    assert model not in asked


def test_layers_skipped_on_request_keep_their_channels():
    model, x = made("chain")
    sites = coupled(model, x, skip="b")
    assert sites.couplings == ()
    assert "b: skipped on request" in reasons(sites)["a:out"]
    assert "b: skipped on request" in reasons(sites)["b:out"]
    assert [c.name for c in coupled(model, x, skip="c").couplings] == ["a:out"]


def test_the_rest_of_what_find_said_stays():
    model, x = made("depthwise")
    found = st.find(model)
    sites = st.couple(model, found, x)
    assert [s.name for s in sites] == [s.name for s in found]
    assert sites.skipped[: len(found.skipped)] == found.skipped
    assert sites.untouched == found.untouched
    assert (sites.other_parameters, sites.other_bytes) == (found.other_parameters, found.other_bytes)


def test_layers_that_follow_their_neighbours_and_norms_that_alone_read_a_layer():
    model, x = made("depthwise")
    sites = coupled(model, x)
    (follower,) = sites.followers
    assert follower.name == "dw"
    assert torch.equal(follower.weight.flatten(), model.dw.weight.detach().flatten())
    assert sites.norms == {"dw": "n"}
    assert coupled(*made("residual")).norms == {"stem": "n0", "c1": "n1", "c2": "n2"}
    # The norm behind a concatenation reads two layers; the one behind an activation does not read a layer's mean.
    assert coupled(*made("concat")).norms == {}


def test_a_norm_without_statistics_and_one_beside_another_reader_take_over_nothing():
    bare = Net(
        lambda m, x: m.b(relu(m.n(m.a(x)))), a=conv(3, 8), n=nn.BatchNorm2d(8, track_running_stats=False), b=conv(8, 2)
    )
    assert coupled(bare, torch.randn(3, 3, 6, 6)).norms == {}
    forked = Net(lambda m, x: m.b(relu(m.n(y := m.a(x)) + y)), a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 2))
    assert coupled(forked, torch.randn(3, 3, 6, 6)).norms == {}


def test_what_a_channel_has_in_modules_that_are_no_layers():
    def held(name: str) -> dict[str, tuple[float, float]]:
        return {c.name: (c.parameters, c.bytes) for c in coupled(*made(name, dtype=torch.float32)).couplings}

    assert held("chain") == {"a:out": (0, 0), "b:out": (0, 0)}
    # BatchNorm: two parameters and two statistics a channel, of four bytes each.
    assert held("residual") == {"stem:out": (4, 32), "c1:out": (2, 16)}
    assert held("layernorm")["b:out"] == (2, 8)
    assert held("prelu") == {"a:out": (1, 4), "b:out": (0, 0)}
    assert held("parameter")["a:out"] == (5, 20)
    # The parameter alone: the embedding is a layer, whose spec tells what goes.
    assert held("embedding")["c:out"] == (5, 20)
    assert held("instancenorm")["a:out"] == (2, 8)


def test_channels_of_one_layer_alone_or_of_none():
    net = Net(lambda m, x: m.b(relu(m.a(x))), a=nn.Linear(6, 1), b=nn.Linear(1, 3))
    assert reasons(coupled(net, torch.randn(3, 6)))["a:out"] == "there is one channel only"
    net = Net(lambda m, x: m.a(x), a=nn.Linear(6, 4))
    assert coupled(net, torch.randn(3, 6)).couplings == ()
    net = nn.Sequential(nn.Flatten(), nn.ReLU())
    sites = coupled(net, torch.randn(3, 6))
    assert (sites.couplings, len(sites)) == ((), 0)


def test_a_model_that_cannot_be_traced_is_left_alone_and_says_why():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such luck\nmore of it")

    sites = coupled(Broken(), torch.randn(3, 6))
    assert sites.couplings == ()
    assert sites.skipped[-1].reason == "channels are left alone: tracing failed with RuntimeError: no such luck"


class Asked(nn.Module):
    """A network that does something to the channels of its first layer, by what ``mid`` finds in them."""

    def __init__(self, mid) -> None:
        super().__init__()
        self.mid = mid
        self.a, self.b, self.c, self.d = conv(3, 16), conv(16, 16), conv(16, 16), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(relu(self.c(relu(self.b(self.mid(relu(self.a(x))))))))


ASKING = {
    "the mean": lambda x: x.flip(1) if x.mean() > 2 else x,
    "the mean of each sample": lambda x: torch.where(x.mean((1, 2, 3), keepdim=True) > 2, x.flip(1), x),
    "the mean at each position": lambda x: torch.where(x.mean(1, keepdim=True) > 9, x.flip(1), x),
    "the largest mean": lambda x: x.flip(1) if x.mean((0, 2, 3)).argmax() == 17 else x,
    "whether it is a number": lambda x: x.flip(1) if torch.allclose(x.mean(), torch.tensor(7.0)) else x,
    "whether one is large": lambda x: x.clamp(max=1) if (x > 0.5).any() else x,
    "a number that Python reads": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1) if float(x.norm()) < 0.1 else x,
    "a gate that is shut": lambda x: x + x.flip(1) * relu(x.mean() - 5),
}


@pytest.mark.parametrize("asked", ASKING)
def test_channels_stay_that_a_network_decides_by_together(asked: str):
    sites = coupled(Asked(ASKING[asked]), torch.randn(4, 3, 6, 6))
    assert "is made with what they are taken together" in reasons(sites)["a:out"]
    assert {c.name for c in sites.couplings} == {"b:out", "c:out"}


@pytest.mark.parametrize(
    "mid",
    [
        lambda x: x.flip(1) if x.isnan().any() else x,
        lambda x: x * (x.mean((2, 3), keepdim=True) > 0.1),
        lambda x: torch.stack([c * (c.mean() > 0.1) for c in x.unbind(1)], 1),
    ],
)
def test_channels_go_that_a_network_decides_by_one_by_one(mid):
    sites = coupled(Asked(mid), torch.randn(4, 3, 6, 6))
    assert {c.name for c in sites.couplings} == {"a:out", "b:out", "c:out"}


def test_channels_are_tried_the_way_that_a_network_goes_with_all_samples():
    class Turned(Asked):
        def forward(self, x: Tensor) -> Tensor:
            h = relu(self.a(x))
            return self.d(relu(self.c(relu(self.b(h.flip(1) if x.mean() > 1 else h)))))

    x = torch.cat([torch.zeros(2, 3, 6, 6), torch.randn(6, 3, 6, 6) + 5])
    assert "a:out" in reasons(coupled(Turned(None), x))
    many = Asked(lambda x: x.flip(1) if len(x) > 4 and x.mean() > 0.2 else x)
    assert "a:out" in reasons(coupled(many, x))


def test_a_layer_that_is_not_reached_has_no_channels():
    net, x = made("chain")
    net.idle = nn.Linear(4, 4)
    assert [c.name for c in coupled(net, x).couplings] == ["a:out", "b:out"]


class HeadInTraining(nn.Module):
    """A second head reads the middle, in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.out, self.aside = nn.Linear(16, 5), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.b(F.relu(self.a(x))))
        y = self.out(F.relu(self.c(x)).mean((2, 3)))
        return (y, self.aside(x)) if self.training else y


def test_what_is_read_in_training_mode_alone_keeps_its_channels():
    torch.manual_seed(0)
    model, x = HeadInTraining().eval(), torch.randn(8, 3, 6, 6)
    sites = st.couple(model, st.find(model), x)
    assert [coupling.name for coupling in sites.couplings] == ["a:out", "c:out"]
    reasons = {each.name: each.reason for each in sites.skipped}
    assert "in training mode the narrowed model fails" in reasons["b:out"]
    small = st.compress(model, [x], "macs=70%", methods=st.PrincipalFilters(), sensitivity=False).model
    assert small.train()(x)[1].shape == (8, 5, 6, 6)


def test_a_module_under_two_names_goes_by_the_first():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
            self.again = self.b
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(relu(self.again(relu(self.b(relu(self.a(x)))))))

    model, x = Named(), torch.randn(3, 6)
    sites = coupled(model, x)
    (found,) = sites.couplings
    assert places(found) == {"a:out:1", "b:in:1", "b:out:1", "head:in:1"}
    small = copy.deepcopy(model)
    narrow(small, axes_left(sites.couplings, {"a:out": [1, 4, 6]}))
    assert small.again is small.b
    with torch.no_grad():
        assert torch.allclose(small(x), silenced(model, sites.couplings, {"a:out": [1, 4, 6]})(x), atol=1e-6)


def test_the_ranks_of_a_factored_network_are_channels(no_statistics):
    model, x = made("residual")
    sites = st.calibrate(model, st.find(model), [x])
    table = st.tabulate(sites, [st.WeightSVD()])
    factored = st.apply(model, sites, st.select(table, st.Budget(parameters=0.6)))
    pairs = [n for n, m in factored.named_modules() if getattr(m, "is_factored", False)]
    assert pairs
    again = coupled(factored, x)
    names = {c.name for c in again.couplings}
    ranks = {f"{pair}.0:out" for pair in pairs if dict(factored.named_modules())[pair].rank > 1}
    assert ranks <= names
    kept = drawn(again.couplings, 1)
    small = copy.deepcopy(factored)
    narrow(small, axes_left(again.couplings, kept))
    with torch.no_grad():
        assert torch.allclose(small(x), silenced(factored, again.couplings, kept)(x), atol=1e-10)
    for pair in pairs:
        module = small.get_submodule(pair)
        assert module.rank == len(kept.get(f"{pair}.0:out", range(module.rank)))
    with torch.no_grad():
        assert torch.allclose(st.merge(small)(x), small(x), atol=1e-10)


def test_heads_of_torchs_own_encoder_are_left_alone_and_its_mlp_is_not():
    model = nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    sites = coupled(model.double().eval(), torch.randn(3, 5, 6, dtype=torch.float64))
    assert [c.name for c in sites.couplings] == ["1.linear1:out"]
    assert "with_linear_layers" in reasons(sites)["0:out"]


def test_heads_of_attention_stay_whole_while_the_stream_around_them_is_narrowed():
    model, x = made("attention")
    sites = coupled(model, x)
    small = copy.deepcopy(model)
    narrow(small, axes_left(sites.couplings, {"0:out": [0, 2, 3, 5, 6], "1.up:out": [4, 9]}))
    block = small[1]
    assert isinstance(block, Attention)
    assert (block.q.in_features, block.q.out_features, block.o.in_features, block.o.out_features) == (5, 8, 8, 5)
    assert block.norm1.normalized_shape == (5,)
    with torch.no_grad():
        assert small(x).shape == model(x).shape


def test_a_permutation_is_found_out_whatever_the_width():
    """A draw of channels can be blind to how they are mixed; several widths and mixtures."""
    mixed = {
        "roll": lambda x: x.roll(1, 1),
        "summed": lambda x: x.cumsum(1),
        "centred": lambda x: x - x.mean(1, keepdim=True),
    }
    for width in (3, 4, 5, 8, 12):
        for name, mix in mixed.items():
            net = Net(lambda m, x: m.b(m.mix(torch.tanh(m.a(x)))), a=nn.Linear(6, width), b=nn.Linear(width, 3))
            net.mix = mix
            assert coupled(net, torch.randn(3, 6)).couplings == (), (width, name)


@pytest.mark.parametrize(
    ("fixed", "says"),
    [
        (lambda x: F.group_norm(x, 3), "divisible by num_groups"),
        (lambda x: F.layer_norm(x.mT, (18,)).mT, "normalized_shape"),
        (lambda x: F.batch_norm(x, torch.zeros(18), torch.ones(18)), "should contain"),
        (lambda x: x.view(len(x), 3, -1, 4).flip(2).reshape(x.shape), "invalid"),
    ],
    ids=["group_norm", "layer_norm", "batch_norm", "view"],
)
def test_numbers_of_channels_written_down_keep_those_channels_alone(fixed, says: str):
    """Half of 18 channels are three groups too, which is no proof that any number of them can go."""
    layers = {"a": nn.Conv1d(3, 18, 1), "b": nn.Conv1d(18, 8, 1), "c": nn.Conv1d(8, 2, 1)}
    sites = coupled(Net(lambda m, x: m.c(relu(m.b(fixed(relu(m.a(x)))))), **layers), torch.randn(2, 3, 4))
    assert [c.name for c in sites.couplings] == ["b:out"]
    assert says in reasons(sites)["a:out"]
    assert "read it off a layer" in reasons(sites)["a:out"]


def test_groups_whose_widths_have_to_be_equal_are_not_removed_apart():
    def run(m, x):
        a, b = relu(m.a(x)), relu(m.b(x))
        assert a.shape == b.shape, "no such shapes"
        return m.c(a) + m.d(b)

    model = Net(run, a=nn.Linear(6, 8), b=nn.Linear(6, 8), c=nn.Linear(8, 3), d=nn.Linear(8, 3))
    sites = coupled(model, torch.randn(3, 6))
    assert sites.couplings == ()
    assert "no such shapes" in reasons(sites)["a:out"]


@pytest.mark.parametrize("missing", ["Group", "update_concat_index_mapping"])
def test_a_torch_pruning_without_what_is_patched_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_pruning.dependency import graph, index_mapping

    if missing == "Group":
        monkeypatch.delattr(graph, "Group")
    else:
        for name in [name for name in vars(index_mapping) if name.startswith("update_")]:
            monkeypatch.delattr(index_mapping, name)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(ImportError, match=r"torch-pruning 1\.\d+.*<1\.7"):
        st.couple(model, st.find(model), torch.zeros(2, 3, 8, 8))


class TwoTables(nn.Module):
    """Two tables of one weight, as an encoder's and a decoder's, of which one is added to what a layer writes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(10, 8), nn.Embedding(10, 8)
        self.two.weight = self.one.weight
        self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.one(x) + self.inner(self.two(x)))


def test_a_table_whose_weight_another_one_has_keeps_its_channels():
    sites = coupled(TwoTables().double().eval(), torch.arange(10).reshape(2, 5))
    assert not sites.couplings
    assert re.match("one: its weight is tied to two", reasons(sites)["inner:out"])


class Places(nn.Embedding):
    """Positions by the shape of what they are added to, as in Marian."""

    def forward(self, shape: torch.Size) -> torch.Tensor:  # type: ignore[override]
        return super().forward(torch.arange(shape[1]))


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.places, self.out = nn.Linear(5, 8), Places(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.into(x) + self.places(x.shape))


def test_a_table_that_is_called_with_a_shape_stays_with_what_is_added_to_it():
    model, x = Placed().double().eval(), torch.randn(8, 6, 5).double()
    sites = st.calibrate(model, coupled(model, x), [x])
    assert [site.name for site in sites] == ["into", "out"]
    assert not sites.couplings
    assert reasons(sites)["into:out"] == "a layer of theirs was not calibrated"


class Generated(nn.Module):
    """A layer gives the weight that another one's answer is multiplied by."""

    def __init__(self):
        super().__init__()
        self.first, self.weights, self.last = nn.Linear(32, 16), nn.Linear(16, 8 * 32), nn.Linear(8, 8)

    def forward(self, x):
        weights = self.weights(torch.relu(self.first(x))).reshape(-1, 8, 32)
        return self.last(torch.einsum("boi,bi->bo", weights, x))


def test_products_that_multiply_indices_come_to_an_end():
    model = Generated().eval()
    found = st.couple(model, st.find(model), torch.randn(8, 32))
    assert "first:out" in {coupling.name for coupling in found.couplings}
    assert any(skipped.name == "weights:out" for skipped in found.skipped)


class Gram(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(1, 8, 3)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        gram = torch.einsum("bchw,bdhw->bcd", x, x)
        return self.last(torch.relu(self.second(gram.unsqueeze(1))).mean((2, 3)))


def test_channels_that_are_multiplied_with_one_another_are_not_followed_for_ever(monkeypatch):
    from torch_pruning.dependency import index_mapping

    made = []
    real = index_mapping._FlattenIndexMapping.__call__
    spy = lambda self, idxs: (found := real(self, idxs), made.append(len(found)))[0]  # noqa: E731
    monkeypatch.setattr(index_mapping._FlattenIndexMapping, "__call__", spy)
    model = Gram().eval()
    found = st.couple(model, st.find(model), torch.randn(2, 3, 8, 8))
    assert [coupling.name for coupling in found.couplings] == ["second:out"]
    assert 0 < sum(made) < 2_000_000
