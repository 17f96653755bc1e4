"""The units of channels decide nothing: inputs times ``D`` and weights over ``D`` are the same function."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.methods import ActivationSVD, JointSVD, LowRankPlusSparse, Method
from spectrim.methods.statistics import Standard
from spectrim.network.sites import Group, Layer, Site
from spectrim.nn.find import canonical, find
from spectrim.nn.modules import make_layer
from spectrim.nn.watch import calibrate as calibration
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


def check(method: Method, plain: Site, other: Site, seen: list[tuple[Tensor, Tensor]]) -> int:
    """The same choices, errors and responses; how many choices there were."""
    one, two = method.curve(plain), method.curve(other)
    assert one.choices == two.choices
    assert one.scale == pytest.approx(two.scale, rel=1e-3)
    torch.testing.assert_close(torch.tensor(one.errors), torch.tensor(two.errors), rtol=1e-3, atol=1e-5)
    for choice in one.choices[:: max(1, len(one.choices) // 4)]:
        made = method.factorize(plain, choice).dense(), method.factorize(other, choice).dense()
        for number, (x, y) in enumerate(seen):
            wanted = answers(plain.parts[number], made[0][number], x)
            found = answers(other.parts[number], made[1][number], y)
            whole = answers(plain.parts[number], plain.weights[number], x)
            assert float((found - wanted).norm()) <= 1e-3 * float(whole.norm()), choice
    return len(one.choices)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_units_of_inputs_decide_nothing(kind: str, name: str, weighted: bool) -> None:
    site, layer, x = small_site(kind, weighted=weighted)
    other, y = rescaled(site, layer, x, units(site.spec.in_channels), weighted=weighted)
    check(METHODS[name], site, other, [(x, y)])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", METHODS)
def test_the_scale_of_a_layer_decides_nothing(name: str, scale: float) -> None:
    site, layer, x = small_site("conv2d", weighted=True)
    other, y = rescaled(site, layer, x, torch.full((6,), scale).double(), weighted=True)
    assert check(METHODS[name], site, other, [(x, y)]) > 2


@pytest.mark.parametrize("share", JOINT)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d-grouped", "transposed2d"])
@pytest.mark.parametrize(("same", "weighted"), [(False, False), (False, True), (True, True)])
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


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_units_of_long_patches_decide_nothing(name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices and outputs of convolutions, sketches of linear layers."""
    monkeypatch.setattr(calibration, "FULL_PATCH", 20)
    monkeypatch.setattr(calibration, "FULL_LINEAR", 10)
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
    for method in (ActivationSVD(multiple_of=1), SPARSE):
        site = sites.layer("0")
        curve = method.curve(site)
        assert all(0 <= error <= 1 for error in curve.errors)
        for choice in curve.choices:
            (made,) = method.factorize(site, choice).dense()
            assert bool(torch.isfinite(made).all())


def rescaled_hidden(model: nn.Sequential, by: Tensor) -> nn.Sequential:
    """The same function with other units of what its first layer gives."""
    first, active, second, *rest = model
    one, two = (make_layer(st.find(nn.Sequential(layer)).sites[0].spec, *canonical(layer)) for layer in (first, second))
    with torch.no_grad():
        one.weight.copy_(first.weight.double() * by.reshape(-1, *(1,) * (first.weight.dim() - 1)))
        one.bias.copy_(first.bias.double() * by)
        two.weight.copy_(second.weight.double() / by.reshape(1, -1, *(1,) * (second.weight.dim() - 2)))
    return nn.Sequential(one, active, two, *rest)


NETS = {
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
