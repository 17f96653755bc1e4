"""Principal filter analysis of coupled channels: errors that are measured ones, and which channels go."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.errors import CalibrationError, MissingMomentsError
from spectrim.linalg import principal
from spectrim.linalg.moments import Moments
from spectrim.methods import from_record
from spectrim.network.factors import KeptChannels
from tests.cases import one_thread
from tests.nn.coupled_nets import Net, conv, made, mean, relu

pytest.importorskip("torch_pruning")

FINE = st.PrincipalFilters(multiple_of=1)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def calibrated(model: nn.Module, batches: list[Tensor], **options) -> st.Sites:
    return st.calibrate(model, st.couple(model, st.find(model), batches[0]), batches, **{"rows": None, **options})


def coupled(name: str, *, samples: int = 240) -> tuple[nn.Module, Tensor, st.Sites, dict[str, st.Site]]:
    model, x = made(name, samples=samples)
    sites = calibrated(model, [x[: samples // 3], x[samples // 3 :]])
    return model, x, sites, {site.name: site for site in sites.coupled()}


@torch.no_grad()
def answers(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer is given and what it answers."""
    held: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, o: held.extend([i[0], o]))
    model(x)
    handle.remove()
    return held[0], held[1]


def fraction_lost(model: nn.Module, layer: str, weight: Tensor, x: Tensor) -> float:
    """Share of a layer's centred answers that another weight, with the best bias, does not give."""
    given, wanted = answers(model, layer, x)
    module = model.get_submodule(layer)
    with torch.no_grad():
        shape = module.weight.shape
        flat = weight.transpose(1, 2) if getattr(module, "transposed", False) else weight
        changed = torch.nn.utils.stateless._reparametrize_module
        with changed(module, {"weight": flat.reshape(shape)}):
            found = module(given)
    rest = wanted - found
    axis = -1 if isinstance(module, nn.Linear) else 1
    rest, wanted = (t.movedim(axis, -1).reshape(-1, t.shape[axis]) for t in (rest, wanted))
    return float((rest - rest.mean(0)).square().sum() / (wanted - wanted.mean(0)).square().sum())


# Groups of channels and the only layer that reads them.
READ_BY = [
    ("chain", "a:out", "b"), ("chain", "b:out", "c"), ("conv1d", "a:out", "b"), ("conv3d", "b:out", "c"),
    ("flatten", "b:out", "c"), ("concat", "a:out", "c"), ("concat", "b:out", "c"), ("grouped", "a:out", "g"),
    ("transposed", "a:out", "t"), ("transposed", "t:out", "u"), ("depthwise", "a:out", "c"), ("chunk", "a:out", "b"),
    ("doubled", "a:out", "b"), ("layernorm", "b:out", "c"),
]  # fmt: skip


@pytest.mark.table(every=5)
@pytest.mark.parametrize("rule", ["reconstruction", "l1-max"])
@pytest.mark.parametrize(("name", "channels", "layer"), READ_BY)
def test_errors_are_those_measured_on_the_calibration_inputs(name: str, channels: str, layer: str, rule: str) -> None:
    model, x, _, found = coupled(name)
    method = st.PrincipalFilters(rule=rule, multiple_of=1)
    curve = method.curve(found[channels])
    assert list(curve.errors) == sorted(curve.errors)
    for number in {0, len(curve.choices) // 2, len(curve.choices) - 1}:
        choice = curve.choices[number]
        factors = method.factorize(found[channels], choice)
        weight = dict(zip(factors.layers, factors.dense(), strict=True))[layer]
        measured = fraction_lost(model, layer, weight, x)
        # The covariance is shrunk a little, which costs that much.
        assert curve.errors[number] == pytest.approx(measured, rel=0.03, abs=1e-4)


def test_losses_of_several_readers_add_up_in_shares_of_their_own_energy() -> None:
    model, x, _, found = coupled("two readers")
    site = found["a:out"]
    curve = FINE.curve(site)
    for choice, error in zip(curve.choices[::3], curve.errors[::3], strict=True):
        factors = FINE.factorize(site, choice)
        weights = dict(zip(factors.layers, factors.dense(), strict=True))
        measured = [fraction_lost(model, layer, weights[layer], x) for layer in ("b", "c")]
        assert error == pytest.approx(sum(measured) / 2, rel=0.03, abs=1e-4)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", ["chain", "grouped", "depthwise", "transposed", "flatten", "concat", "twice", "chunk"])
def test_weights_in_the_dense_shapes_are_zero_where_channels_are_gone(name: str) -> None:
    _, _, _, found = coupled(name, samples=60)
    for site in found.values():
        choice = FINE.curve(site).choices[-1]
        factors = FINE.factorize(site, choice)
        assert isinstance(factors, KeptChannels)
        assert factors.numel() == sum(weight.numel() for weight in factors.weights)
        gone = [c for c in range(site.coupling.channels) if c not in choice["kept"]]
        specs = {spec.name: spec for spec in site.layers}
        for layer, weight in zip(factors.layers, factors.dense(), strict=True):
            assert tuple(weight.shape) == specs[layer].shape
            _, o, i, *_ = specs[layer].shape
            for side in site.coupling.sides:
                if side.name != layer:
                    continue
                for p in side.positions[gone].flatten().tolist():
                    index = {"in": (p // i, slice(None), p % i), "out": (p // o, p % o), "through": (p,)}[side.axis]
                    assert not bool(weight[index].any())
        stored = sum(int((weight != 0).sum()) for weight in factors.dense())
        assert stored <= factors.numel()
        assert tuple(s.shape for s in FINE.layers(site, choice)) == tuple(tuple(w.shape) for w in factors.weights)


@pytest.mark.table
@pytest.mark.parametrize("rule", principal.RULES)
@pytest.mark.parametrize(("pooling", "held"), [("max", "max"), ("mean", "mean"), ("none", "unpooled")])
def test_published_rules_choose_by_correlations_of_pooled_responses(rule: str, pooling: str, held: str) -> None:
    model, x, _, found = coupled("chain", samples=90)
    site = found["a:out"]
    inputs, _ = answers(model, "b", x)
    rows = {"max": inputs.amax((2, 3)), "mean": inputs.mean((2, 3)), "none": inputs.movedim(1, -1).reshape(-1, 8)}[
        pooling
    ]
    assert torch.allclose(site.pooled.max.mean[0], inputs.amax((2, 3)).mean(0), atol=1e-9)
    if pooling == "none":
        # Positions are drawn: take what was drawn.
        covariance = site.require(held, "a test").covariance[0]
    else:
        covariance = torch.cov(rows.T, correction=0)
        assert torch.allclose(site.require(held, "a test").covariance[0], covariance, atol=1e-6)
    wanted = principal.removal_order(principal.correlations(covariance), 1, rule, principal.inactive(covariance))
    method = st.PrincipalFilters(rule=rule, pooling=pooling, multiple_of=1)
    for choice in method.curve(site).choices:
        width = len(choice["kept"])
        assert set(range(8)) - set(choice["kept"]) == set(wanted[: 8 - width])
    assert torch.allclose(method.energies(site), principal.spectrum(covariance), atol=1e-6)


def test_the_greedy_choice_loses_no_more_than_the_published_rules() -> None:
    for name in ("chain", "residual", "flatten"):
        _, _, _, found = coupled(name, samples=60)
        for site in found.values():
            best = sum(FINE.curve(site).errors)
            for rule in principal.RULES:
                assert best <= 1.02 * sum(st.PrincipalFilters(rule=rule, multiple_of=1).curve(site).errors)


def test_streamed_moments_equal_those_of_one_batch() -> None:
    model, x = made("residual", samples=60)
    whole = calibrated(model, [x])
    parts = calibrated(model, [x[:7], x[7:8], x[8:41], x[41:]])
    for name in whole.pooled:
        for key in ("max", "mean"):
            one, many = (getattr(sites.pooled[name], key) for sites in (whole, parts))
            assert one.count == many.count == 60 * (2 if name == "stem:out" else 1)
            scale = float(one.covariance.abs().max())
            # The mean over positions is taken in single precision.
            assert torch.allclose(one.covariance, many.covariance, atol=(1e-9 if key == "max" else 1e-6) * scale)
    rows = torch.randn(1, 40, 5, dtype=torch.float64)
    one, many = Moments(1, 5), Moments(1, 5)
    one.update(rows)
    for part in rows.split(7, dim=1):
        many.update(part)
    assert torch.allclose(one.covariance, many.covariance, atol=1e-12)


def dead(channels: list[int]) -> tuple[nn.Module, Tensor]:
    model, x = made("chain", samples=60)
    with torch.no_grad():
        model.a.weight[channels] = 0
        model.a.bias[channels] = -1
    return model, x


@pytest.mark.parametrize("rule", ["reconstruction", "l1-max", "abs-max", "l1-min"])
def test_dead_filters_go_first(rule: str) -> None:
    model, x = dead([1, 4, 6])
    site = calibrated(model, [x]).coupled()[0]
    order, errors, _ = st.PrincipalFilters(rule=rule, multiple_of=1).elimination(site)
    assert set(order[:3]) == {1, 4, 6}
    assert float(errors[3]) < 1e-3
    assert st.Energy(1.0)(FINE.energies(site)) <= 5


@pytest.mark.parametrize("rule", ["reconstruction", "l1-max", "abs-min"])
def test_all_dead_keeps_one_and_one_live_keeps_that_one(rule: str) -> None:
    method = st.PrincipalFilters(rule=rule, multiple_of=1)
    model, x = dead(list(range(8)))
    sites = calibrated(model, [x])
    site = sites.coupled()[0]
    assert (st.KL()(method.energies(site)), st.Energy(0.9)(method.energies(site))) == (1, 1)
    curve = method.curve(site)
    assert [len(c["kept"]) for c in curve.choices] == [7, 6, 5, 4, 3, 2, 1]
    assert all(error == 0 for error in curve.errors)
    plan = st.recommend(sites, st.KL(), method=method)
    small = st.apply(model, sites, plan, [x])
    assert small.a.out_channels == 1
    assert bool(torch.isfinite(small(x)).all())
    model, x = dead([0, 1, 2, 3, 4, 6, 7])
    site = calibrated(model, [x]).coupled()[0]
    curve = method.curve(site)
    assert curve.choices[-1]["kept"] == (5,)
    assert curve.errors[-1] < 1e-3
    assert st.KL()(method.energies(site)) == 1


def test_fewer_samples_than_filters() -> None:
    model, x = made("chain", samples=4)
    sites = calibrated(model, [x])
    for site in sites.coupled():
        curve = FINE.curve(site)
        assert all(0 <= e <= 1 for e in curve.errors)
        assert 1 <= st.KL()(FINE.energies(site)) <= site.coupling.channels
    with pytest.warns(UserWarning, match="more channels than responses were seen"):
        plan = st.recommend(sites, st.KL(), method=FINE)
    small = st.apply(model, sites, plan, [x])
    assert bool(torch.isfinite(small(x)).all())


def test_numbers_that_are_not_finite_are_refused_by_calibration() -> None:
    for bad in (float("nan"), float("inf")):
        model, x = made("chain", samples=8)
        sites = st.couple(model, st.find(model), x)
        with torch.no_grad():
            model.a.bias[3] = bad
        with pytest.raises(CalibrationError, match="NaN or Inf"):
            st.calibrate(model, sites, [x])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rule": "magnitude"}, "rule is 'magnitude'; expected one of reconstruction, l1-max"),
        ({"pooling": "median"}, "pooling is 'median'"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"least": 0}, "least must be at least 1, got 0"),
    ],
)
def test_options_are_checked(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        st.PrincipalFilters(**options)


def test_widths_are_multiples_at_least_so_many_and_the_same_in_every_pool() -> None:
    _, _, _, found = coupled("grouped", samples=40)
    assert FINE.widths(found["c:out"]) == (7, 6, 5, 4, 3, 2, 1)
    assert FINE.widths(found["g:out"]) == (8, 4)
    assert FINE.widths(found["a:out"]) == (4,)
    assert st.PrincipalFilters(multiple_of=4).widths(found["c:out"]) == (4,)
    assert st.PrincipalFilters(multiple_of=3, least=4).widths(found["c:out"]) == (6,)
    assert st.PrincipalFilters(multiple_of=64).widths(found["c:out"]) == ()
    assert st.PrincipalFilters(multiple_of=1, least=9).widths(found["c:out"]) == ()
    for site in found.values():
        for choice in FINE.curve(site).choices:
            runs = torch.tensor(choice["kept"]) // (site.coupling.channels // site.coupling.pools)
            assert len(set(torch.bincount(runs, minlength=site.coupling.pools).tolist())) == 1


def test_wide_groups_lose_several_at_a_time_and_little_by_it() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.b(mean(relu(m.a(x)))), a=conv(3, 80), b=nn.Linear(80, 6)).double()
    site = calibrated(model, [torch.randn(300, 3, 5, 5, dtype=torch.float64)]).coupled()[0]
    rough = st.PrincipalFilters(multiple_of=4).curve(site)
    assert [len(c["kept"]) for c in rough.choices] == list(range(76, 0, -4))
    assert list(rough.errors) == sorted(rough.errors)
    fine = dict(zip((len(c["kept"]) for c in FINE.curve(site).choices), FINE.curve(site).errors, strict=True))
    for choice, error in zip(rough.choices, rough.errors, strict=True):
        assert error <= 1.5 * fine[len(choice["kept"])] + 0.02


def test_sites_without_channels_or_moments() -> None:
    model, x = made("chain", samples=20)
    sites = calibrated(model, [x])
    assert not isinstance(sites["a"], FINE.takes)
    bare = st.couple(model, st.find(model), x)
    with pytest.raises(MissingMomentsError, match="a:out"):
        FINE.curve(bare.coupled()[0])
    unpooled = dataclasses.replace(sites, pooled={})
    with pytest.raises(MissingMomentsError, match="no 'max' moments"):
        st.PrincipalFilters(rule="l1-max").curve(unpooled.coupled()[0])


@pytest.mark.parametrize("method", [FINE, st.PrincipalFilters("abs-max", "none", 8, 16), st.PrincipalFilters()])
def test_records(method: st.PrincipalFilters) -> None:
    assert from_record(method.record()) == method


def test_errors_weighed_by_what_reaches_the_loss() -> None:
    model, x = made("chain", samples=60)
    sites = calibrated(model, [x])
    weighed = st.sensitivity(model, sites, [x])
    curve = FINE.curve(weighed.coupled()[0])
    assert curve.unit != FINE.curve(sites.coupled()[0]).unit
    assert curve.scale > 0
    assert all(0 <= error <= 1 for error in curve.errors)
