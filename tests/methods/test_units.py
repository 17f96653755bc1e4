"""The units of channels decide nothing: inputs times ``D`` and weights over ``D`` are the same function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.methods import ActivationSVD, JointSVD, LowRankPlusSparse, Method
from spectrim.methods.statistics import Standard
from spectrim.network.sites import Group, Layer, Site
from spectrim.nn.find import find
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.modules import make_layer
from spectrim.nn.watch import samples, watchers
from spectrim.nn.watch.calibrate import calibrate
from spectrim.nn.watch.sensitivity import sensitivity
from spectrim.testing import LAYERS, sample_inputs, small_site
from spectrim.testing.layers import small_group

SPARSE = LowRankPlusSparse(densities=(0.0, 0.3, 0.6), ranks=2, turns=8, multiple_of=1)
METHODS: dict[str, Method] = {
    "low rank": ActivationSVD(multiple_of=1),
    "sparse": SPARSE,
    "sparse, split": dataclasses.replace(SPARSE, unfoldings=("height-first", "input")),
    "sparse, exact": dataclasses.replace(SPARSE, exact=True),
}
JOINT = {share: JointSVD(share, multiple_of=1, sweeps=4) for share in ("left", "right", "both")}


@pytest.fixture(autouse=True)
def _same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of a few numbers tell too little to draw by, and bits are others in other units: here it goes by order."""
    monkeypatch.setattr(samples, "keys_of", lambda columns, mask, size: ((torch.arange(size) + 1) * 7919,) * 2)


def units(channels: int, seed: int = 0, *, decades: float = 6) -> Tensor:
    """Random sizes over twice so many decades, both ends among them."""
    spread = 2 * torch.rand(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    spread[:2] = torch.tensor([-1.0, 1.0])
    return 10 ** (decades * spread)


def rescaled(site: Layer, layer: nn.Module, x: Tensor, by: Tensor, *, weighted: bool) -> tuple[Layer, Tensor]:
    """The layer that answers the inputs times ``by`` as this one answers the inputs."""
    spec = site.spec
    weight, bias = canonical(layer)
    g, _, i, *kernel = spec.shape
    other = make_layer(spec, (weight.double() / by.reshape(g, 1, i, *(1 for _ in kernel))).to(weight.dtype), bias)
    axis = -1 if spec.is_linear else 1
    shape = [1] * x.dim()
    shape[axis] = -1
    inputs = (x.double() * by.reshape(shape)).to(x.dtype)
    model = nn.Sequential(other, nn.Softplus())
    sites = calibrate(model, find(model), [inputs], rows=None)
    if weighted:
        sites = sensitivity(model, sites, [inputs])
    found = sites.layer("0")
    return dataclasses.replace(found, spec=dataclasses.replace(found.spec, names=spec.names)), inputs


def answers(site: Layer, weight: Tensor, x: Tensor) -> Tensor:
    layer = make_layer(dataclasses.replace(site.spec, dtype=torch.float64), weight.double(), None)
    with torch.no_grad():
        return layer(x.double())


def check(method: Any, plain: Site, other: Site, seen: list[tuple[Tensor, Tensor]]) -> int:
    """The same choices, errors and responses; how many choices there were."""
    one, two = method.curve(plain), method.curve(other)
    assert one.choices == two.choices
    assert one.scale == pytest.approx(two.scale, rel=1e-3)
    torch.testing.assert_close(torch.tensor(one.errors), torch.tensor(two.errors), rtol=1e-3, atol=1e-5)
    for choice in one.choices[:: max(1, len(one.choices) // 2)]:
        made = method.factorize(plain, choice).dense(), method.factorize(other, choice).dense()
        for number, (x, y) in enumerate(seen):
            wanted = answers(plain.parts[number], made[0][number], x)
            found = answers(other.parts[number], made[1][number], y)
            whole = answers(plain.parts[number], plain.weights[number], x)
            assert float((found - wanted).norm()) <= 1e-3 * float(whole.norm()), choice
    return len(one.choices)


# Every kind of layer by low rank, some of them by the dearer methods. A linear layer has no kernel to split.
SOME = ("linear", "conv2d-grouped", "transposed2d")
CASES = [
    (kind, name, bool(n % 2))
    for n, kind in enumerate(LAYERS)
    for name in METHODS
    if ("sparse" not in name or kind in SOME) and (kind, name) != ("linear", "sparse, split")
]


@pytest.mark.table
@pytest.mark.parametrize(("kind", "name", "weighted"), CASES)
def test_units_of_inputs_decide_nothing(kind: str, name: str, weighted: bool) -> None:
    site, layer, x = small_site(kind, weighted=weighted)
    other, y = rescaled(site, layer, x, units(site.spec.in_channels), weighted=weighted)
    assert check(METHODS[name], site, other, [(x, y)]) > 0


@pytest.mark.table
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", ["low rank", "sparse"])
def test_the_scale_of_a_layer_decides_nothing(name: str, scale: float) -> None:
    site, layer, x = small_site("conv2d", weighted=True)
    other, y = rescaled(site, layer, x, torch.full((6,), scale).double(), weighted=True)
    assert check(METHODS[name], site, other, [(x, y)]) > 2


@pytest.mark.table
@pytest.mark.parametrize("share", JOINT)
@pytest.mark.parametrize(
    ("kind", "same", "weighted"),
    [("linear", True, True), ("conv2d-grouped", False, False), ("transposed1d", False, True)],
)
def test_units_of_shared_layers_decide_nothing(kind: str, share: str, same: bool, weighted: bool) -> None:
    group, layers, inputs = small_group(kind, weighted=weighted, same_input=same)
    parts, seen = [], []
    for n, (part, layer, x) in enumerate(zip(group.parts, layers, inputs, strict=True)):
        # A shared first factor sees one unit of a channel in all layers.
        own = units(part.spec.in_channels, seed=n if share == "right" and not same else 0)
        other, y = rescaled(part, layer, x, own, weighted=weighted)
        parts.append(other)
        seen.append((x, y))
    assert check(JOINT[share], group, Group("group", tuple(parts), same), seen) > 2


@pytest.mark.parametrize(("name", "weighted"), [("low rank", False), ("low rank", True), ("sparse", True)])
def test_units_of_long_patches_decide_nothing(name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices and outputs of convolutions, sketches of linear layers."""
    monkeypatch.setattr(watchers, "FULL_PATCH", 20)
    monkeypatch.setattr(watchers, "FULL_LINEAR", 10)
    for kind in ("conv2d", "linear"):
        site, layer, x = small_site(kind, weighted=weighted)
        assert site.statistics.input is None
        other, y = rescaled(site, layer, x, units(site.spec.in_channels), weighted=weighted)
        check(METHODS[name], site, other, [(x, y)])


def test_a_layer_in_its_own_units_answers_the_same() -> None:
    site, _, _ = small_site("conv2d-grouped", weighted=True)
    own = Standard.of(site)
    torch.testing.assert_close(own.weight(own.own_weight), site.weight.double())
    assert own.root is not None
    torch.testing.assert_close((own.root.mT @ own.root).diagonal(dim1=1, dim2=2), torch.ones(2, 6).double())


def test_inputs_that_never_change_and_outputs_that_nothing_reads() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 8), nn.Linear(8, 3)
    with torch.no_grad():
        second.weight[:, 4] = 0
    x = torch.randn(200, 6)
    x[:, 2] = 3.0
    model = nn.Sequential(first, nn.Tanh(), second)
    sites = sensitivity(model, calibrate(model, find(model), [x]), [x])
    methods: list[Any] = [ActivationSVD(multiple_of=1), SPARSE]
    for method in methods:
        site = sites.layer("0")
        curve = method.curve(site)
        assert all(0 <= error <= 1 for error in curve.errors)
        for choice in curve.choices:
            (made,) = method.factorize(site, choice).dense()
            assert bool(torch.isfinite(made).all())


def rescaled_hidden(model: Any, by: Tensor) -> nn.Sequential:
    """The same function with other units of what its first layer gives."""
    first, active, second, *rest = model
    made: list[Any] = [make_layer(spec_of(layer, ("0",)), *canonical(layer)) for layer in (first, second)]
    one, two = made
    with torch.no_grad():
        one.weight.copy_(first.weight.double() * by.reshape(-1, *(1,) * (first.weight.dim() - 1)))
        one.bias.copy_(first.bias.double() * by)
        two.weight.copy_(second.weight.double() / by.reshape(1, -1, *(1,) * (second.weight.dim() - 2)))
    return nn.Sequential(one, active, two, *rest)


NETS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)),
        (12,),
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.Flatten(), nn.Linear(192, 5)
        ),
        (4, 6, 6),
    ),
}


@pytest.mark.table
@pytest.mark.parametrize("name", ["low rank", "sparse"])
@pytest.mark.parametrize("net", NETS)
def test_units_inside_a_network_decide_nothing(net: str, name: str) -> None:
    """What a layer gives is in the units of what the next one reads; sensitivity weighs it."""
    make, shape = NETS[net]
    torch.manual_seed(0)
    model = make().eval()
    other = rescaled_hidden(model, units(model[0].weight.shape[0]))
    batches = [sample_inputs(shape, 96, seed=seed) for seed in range(2)]
    torch.testing.assert_close(model(batches[0]), other(batches[0]), rtol=1e-4, atol=1e-5)
    one, two = (
        st.compress(m, batches, st.Budget(parameters=0.5), methods=[METHODS[name]], reconstruct=False)
        for m in (model, other)
    )
    assert [e.choice for e in one.plan] == [e.choice for e in two.plan]
    with torch.no_grad():
        wanted, found = one.model(batches[0]), two.model(batches[0])
    assert float((wanted - found).norm()) <= 1e-3 * float(wanted.norm())


def spread(rows: int, features: int) -> Tensor:
    """Inputs whose directions are of very different strength."""
    return torch.randn(rows, features) @ (torch.randn(features, features) * 0.9 ** torch.arange(float(features)))


def lost(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want, have = model(x), small(x)
    return float((want - have).square().sum() / (want - want.mean(0)).square().sum())


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0, 1e6])
def test_what_is_stated_is_true_in_any_units(scale: float) -> None:
    torch.manual_seed(1)
    data, layer = spread(2048, 64), nn.Linear(64, 64, bias=False)
    data[:, 0] *= scale
    with torch.no_grad():
        layer.weight[:, 0] /= scale
    net = nn.Sequential(layer).eval()
    result = st.compress(
        net, list(data.split(256)), st.Budget(parameters=0.5), methods=[ActivationSVD()], sensitivity=False
    )
    true = lost(net, result.model, data)
    energies = torch.linalg.svdvals(
        data.double() @ layer.weight.double().mT - (data @ layer.weight.mT).mean(0)
    ).square()
    (entry,) = result.plan
    best = float(energies.detach()[entry.choice["rank"] :].sum() / energies.detach().sum())
    assert true == pytest.approx(best, rel=0.03)
    assert entry.error == pytest.approx(true, rel=0.03)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", ["low rank", "sparse"])
def test_tabular_data_in_its_own_units(name: str) -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    data = spread(1024, 32)
    data = data / data.std(0)
    found = []
    for own in (torch.ones(32).double(), units(32, decades=3)):
        other: Any = nn.Sequential(nn.Linear(32, 64), *net[1:]).eval()
        with torch.no_grad():
            other[0].weight.copy_(net[0].weight.double() / own)
            other[0].bias.copy_(net[0].bias)
        x = (data.double() * own).float()
        # A search that ends before it has settled shows what units have rounded.
        method = ActivationSVD(multiple_of=1) if name == "low rank" else dataclasses.replace(SPARSE, turns=60)
        result = st.compress(other, list(x.split(256)), st.Budget(parameters=0.6), methods=[method], reconstruct=False)
        found.append(lost(other, result.model, x))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_units_of_removed_channels_decide_nothing() -> None:
    """By what readers lose; the published rules leave out units of little variance first, as in the authors' code."""
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    x = sample_inputs((8,), 200, channel=-1)
    curves = []
    for net in (model, rescaled_hidden(model, units(12))):
        sites = calibrate(net, st.couple(net, st.find(net), x), [x], rows=None)
        curves.append(st.PrincipalFilters(multiple_of=1).curve(sites.coupled()[0]))
    assert curves[0].choices == curves[1].choices
    torch.testing.assert_close(torch.tensor(curves[0].errors), torch.tensor(curves[1].errors), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_rescaling_rounds_sends_no_search_another_way(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that are no powers of two round the weights; a search for entries is no longer decided by that."""
    monkeypatch.undo()  # the inputs stay as they are, and are drawn from as they are
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    batches = [sample_inputs((24,), 128, seed=seed + n) for n in range(2)]
    found = [
        st.compress(m, batches, st.Budget(parameters=0.6), methods=[LowRankPlusSparse()])
        for m in (model, rescaled_hidden(model, units(64, seed)))
    ]
    assert [e.choice for e in found[0].plan] == [e.choice for e in found[1].plan]
    with torch.no_grad():
        one, two = (each.model(batches[0]) for each in found)
    assert float((one - two).norm()) <= 1e-3 * float(one.norm())
