"""LowRankPlusSparse against the methods it contains, what it builds, and what a network answers with it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.cost.counted import parameters
from spectrim.errors import MissingMomentsError
from spectrim.linalg import patterns
from spectrim.linalg.unfold import unfolding, unfoldings
from spectrim.methods import ActivationSVD, LowRankPlusSparse, WeightSVD, from_record
from spectrim.network.choices import Choice
from spectrim.network.sites import Site, Statistics
from spectrim.nn.agreement import output_error
from spectrim.nn.build import build
from spectrim.nn.find import find
from spectrim.nn.modules import whole
from spectrim.nn.sparse.layers import Cropped, Masked, Slim, Summed
from spectrim.nn.watch import watchers
from spectrim.nn.watch.calibrate import calibrate
from spectrim.testing import measured_error, sample_inputs
from tests.cases import LAYERS, batches_for, settled, small_site

FEW = LowRankPlusSparse(densities=(0.0, 0.1, 0.3), ranks=2, turns=8)


def wide_site(*, dtype: torch.dtype = torch.float32, weighted: bool = False) -> tuple[Site, nn.Module, Tensor]:
    return small_site("conv2d", dtype=dtype, weighted=weighted)


def choice(method: LowRankPlusSparse, site: Site, rank: int, density: float, name: str, how: str = "channel") -> Choice:
    return method.choice(site, unfolding(site.spec.kernel, how), rank, patterns.pattern(name), density)


@pytest.mark.table
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d-grouped"])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_a_sparse_part_it_loses_what_activation_svd_does(kind: str, weighted: bool) -> None:
    site, _, _ = small_site(kind, dtype=torch.float64, weighted=weighted)
    method = LowRankPlusSparse(exact=True, unfoldings=("channel",), multiple_of=1, ranks=3)
    curve = method.curve(site)
    reference = ActivationSVD(unfoldings=("channel",), multiple_of=1, to_full_rank=True).curve(site)
    wanted = {c["rank"]: e for c, e in zip(reference.choices, reference.errors, strict=True)}
    compared = [(c, e) for c, e in zip(curve.choices, curve.errors, strict=True) if c["density"] == 0]
    assert compared
    assert curve.unit == reference.unit
    assert curve.scale == pytest.approx(reference.scale, rel=1e-3)
    for held, error in compared:
        assert error == pytest.approx(wanted[held["rank"]], abs=1e-4)
        made = measured_error(site, method.factorize(site, held).dense(), curve.unit)
        assert made == pytest.approx(error, abs=1e-3)


@pytest.mark.parametrize("name", ["input", "height-first", "width-first"])
def test_the_other_unfoldings_lose_what_activation_svd_does(name: str) -> None:
    site, _, _ = small_site("conv2d", dtype=torch.float64)
    method = LowRankPlusSparse(unfoldings=(name,), multiple_of=1, ranks=3)
    for rank in (1, 3):
        made, other = (
            measured_error(site, m.factorize(site, c).dense(), "output energy")
            for m, c in (
                (method, choice(method, site, rank, 0.0, "unstructured", name)),
                (ActivationSVD(sweeps=20), ActivationSVD().choice(site, unfolding((3, 3), name), rank, bias=True)),
            )
        )
        assert made == pytest.approx(other, rel=0.05)


def test_without_a_low_rank_part_it_prunes_with_reconstruction() -> None:
    site, layer, inputs = small_site("linear", dtype=torch.float64)
    held = choice(FEW, site, 0, 0.3, "unstructured")
    factors = FEW.factorize(site, held)
    assert factors.rank == 0
    (module,) = build(factors, site.layers, site.biases)
    assert isinstance(module, Masked)
    # The kept entries are the least squares solution for the responses, up to the shrinkage of the moment.
    mask = factors.mask[0]
    rows = inputs - inputs.mean(0)
    weight = layer.weight.detach()
    for row, wanted, kept in zip(factors.sparse[0], weight, mask, strict=True):
        best = torch.linalg.lstsq(rows[:, kept], rows @ wanted.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(row[kept], best, atol=2e-2, rtol=2e-2)
    with torch.no_grad():
        torch.testing.assert_close(module(inputs).mean(0), layer(inputs).mean(0), atol=1e-9, rtol=1e-9)
    largest = torch.zeros_like(weight).view(-1)
    order = weight.abs().flatten().topk(int(mask.sum())).indices
    largest[order] = weight.flatten()[order]
    pruned = largest.view(1, *weight.shape)
    made = measured_error(site, factors.dense(), "output energy")
    assert made < measured_error(site, (pruned,), "output energy")


def test_both_parts_together_lose_less_than_either_at_equal_numbers() -> None:
    site, _, _ = small_site("conv2d", dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    g, o, i, *kernel = site.spec.shape
    n = site.spec.features
    low = torch.randn(g, o, 1, generator=generator) @ torch.randn(g, 1, n, generator=generator)
    spikes = (torch.rand(g, o, n, generator=generator) < 0.05) * 6 * torch.randn(g, o, n, generator=generator)
    site = dataclasses.replace(site, weight=(low + spikes).double().reshape(g, o, i, *kernel))
    method = LowRankPlusSparse(unfoldings=("channel",), multiple_of=1)
    both = choice(method, site, 1, 0.08, "unstructured")
    numbers = method.factorize(site, both).numel()
    each = sum(math.prod(part.shape) for part in site.spec.factor(unfolding(site.spec.kernel, "channel"), 1))
    errors = {
        name: measured_error(site, method.factorize(site, c).dense(), "output energy")
        for name, c in {
            "both": both,
            "low rank": choice(method, site, max(1, numbers // each), 0.0, "unstructured"),
            "sparse": choice(method, site, 0, numbers / math.prod(site.spec.shape), "unstructured"),
        }.items()
    }
    assert errors["both"] < 0.5 * min(errors["low rank"], errors["sparse"]), errors


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_splits_the_numbers(share: float) -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    site = calibrate(model, find(model), [sample_inputs((64,), 200)])["0"]
    numbers = 64 * 48
    method = LowRankPlusSparse(share=share, densities=(0.1, 0.25, 0.5), turns=4)
    found = method.curve(site).choices
    assert len(found) == 3
    for total, held in zip((0.1, 0.25, 0.5), found, strict=True):
        assert held["rank"] == int(share * total * numbers / (64 + 48))
        assert held["density"] == pytest.approx((1 - share) * total)
        stored = parameters([dataclasses.replace(s, bias=False) for s in method.layers(site, held)])
        assert total * numbers - (64 + 48) <= stored <= total * numbers + 1


def test_a_share_splits_a_single_density_too() -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    site = find(model)["0"]
    (held,) = LowRankPlusSparse(share=0.25, densities=(0.3,), turns=4).curve(site).choices
    assert held["density"] == pytest.approx(0.225)
    assert held["rank"] == int(0.075 * 64 * 48 / (64 + 48))


def test_channels_and_taps_make_the_layers_smaller() -> None:
    site, _, inputs = wide_site()
    method = LowRankPlusSparse(patterns=("channels", "taps"), densities=(0.5,), ranks=1, turns=3)
    curve = method.curve(site)
    names = {c["pattern"] for c in curve.choices if not c["rank"]}
    assert "channels" in names
    assert sum(name.startswith("taps-") for name in names) == 8  # every size of box within 3 x 3 but itself
    boxes = [c for c in curve.choices if c["pattern"] != "channels"]
    for held in (*(c for c in curve.choices if c["pattern"] == "channels"), *boxes[::3]):
        specs = method.layers(site, held)
        spec = specs[-1]
        factors = method.factorize(site, held)
        (module,) = build(factors, site.layers, site.biases)
        sparse = module.sparse if isinstance(module, Summed) else module
        assert spec.density == 1
        if held["pattern"] == "channels":
            assert isinstance(sparse, Slim)
            kept = round(held["density"] * 6)
            assert (spec.in_channels, spec.kernel) == (kept, (3, 3))
            assert sparse.layer.weight.shape == (8, kept, 3, 3)
        else:
            assert isinstance(sparse, Cropped)
            extent = tuple(map(int, held["pattern"].removeprefix("taps-").partition("@")[0].split("x")))
            assert spec.kernel == extent
            assert sparse.layer.weight.shape == (8, 6, *extent)
        built = sum(p.numel() for p in module.parameters())
        assert built == parameters(specs)
        # The module answers what its factors stand for.
        (dense,), shift = factors.dense(), factors.shift
        bias = site.biases[0] if shift is None else site.biases[0] + shift
        expected = torch.nn.functional.conv2d(inputs, dense[0], bias, padding=1)
        with torch.no_grad():
            torch.testing.assert_close(module(inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.table
@pytest.mark.parametrize(
    ("name", "density"), [("unstructured", 0.2), ("rows", 0.25), ("2:4", 0.5), ("4x1", 0.25), ("2x2", 0.3)]
)
@pytest.mark.parametrize("rank", [0, 2])
def test_masks_have_their_pattern_and_counts(name: str, density: float, rank: int) -> None:
    model = nn.Sequential(nn.Linear(16, 12))
    site = calibrate(model, find(model), [sample_inputs((16,), 100)])["0"]
    kind = patterns.pattern(name)
    held = choice(FEW, site, rank, density, name)
    factors = FEW.factorize(site, held)
    opened = kind.open(factors.mask)
    assert torch.equal(opened.any(-1), opened.all(-1))
    assert set(opened.any(-1).sum(1).tolist()) == {kind.kept((1, 12, 16), density)}
    assert not factors.sparse[~factors.mask].any()
    stored = kind.stored((1, 12, 16), density)
    assert factors.numel() == stored + rank * 28
    (*_, spec) = FEW.layers(site, held)
    assert spec.stored == stored
    assert spec.index_bytes > 0
    (module,) = build(factors, site.layers, site.biases)
    weight, _ = whole(module)
    torch.testing.assert_close(weight, factors.dense()[0])


def test_patterns_a_layer_cannot_have_are_not_offered() -> None:
    site, _, _ = small_site("transposed2d")
    # Rows of nine times six are no multiple of four, and a transposed convolution cannot be cropped.
    method = LowRankPlusSparse(patterns=("2:4", "taps", "unstructured"), densities=(0.1,), ranks=0)
    assert {c["pattern"] for c in method.curve(site).choices} == {"unstructured"}
    site, _, _ = small_site("linear")
    assert LowRankPlusSparse(patterns=("taps",), ranks=0).curve(site).choices == ()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"patterns": ("3:2",)}, "pattern '3:2'"),
        ({"patterns": ("lace",)}, "unknown pattern 'lace'"),
        ({"patterns": "2:4"}, "patterns is '2:4'; expected a tuple"),
        ({"patterns": ()}, r"patterns is \(\)"),
        ({"densities": ()}, r"densities is \(\)"),
        ({"densities": (0.1, 1.5)}, r"densities is \(0.1, 1.5\)"),
        ({"share": 1.2}, "share is 1.2"),
        ({"ranks": -1}, "ranks is -1"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"turns": 1}, "turns is 1"),
        ({"unfoldings": ("chanel",)}, "'chanel'"),
    ],
)
def test_bad_arguments_are_quoted(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LowRankPlusSparse(**options)  # type: ignore[arg-type]


def test_a_record_makes_the_method_again() -> None:
    method = LowRankPlusSparse(patterns=("2:4", "taps"), densities=(0.1,), share=0.25, exact=True)
    assert from_record(json.loads(json.dumps(method.record()))) == method


def test_without_calibration_the_weight_counts() -> None:
    site, _, _ = small_site("conv2d", calibrated=False, dtype=torch.float64)
    curve = FEW.curve(site)
    assert curve.unit == "weight energy"
    reference = WeightSVD(unfoldings=("channel",), multiple_of=1).curve(site)
    wanted = {c["rank"]: e for c, e in zip(reference.choices, reference.errors, strict=True)}
    exact = LowRankPlusSparse(unfoldings=("channel",), multiple_of=1, ranks=3, exact=True).curve(site)
    compared = [(c, e) for c, e in zip(exact.choices, exact.errors, strict=True) if not c["density"]]
    assert compared
    assert all(e == pytest.approx(wanted[c["rank"]]) for c, e in compared)
    for held, error in zip(curve.choices, curve.errors, strict=True):
        factors = FEW.factorize(site, held)
        assert factors.shift is None
        assert measured_error(site, factors.dense(), curve.unit) <= error + 1e-9


def test_a_sensitivity_weighs_the_outputs() -> None:
    site, _, _ = small_site("linear", dtype=torch.float64, weighted=True)
    plain = dataclasses.replace(site, statistics=dataclasses.replace(site.statistics, gradient=None))
    held = choice(FEW, site, 1, 0.1, "unstructured")
    weighted, other = (
        measured_error(site, FEW.factorize(s, held).dense(), "weighted output energy") for s in (site, plain)
    )
    assert weighted < other
    curve = FEW.curve(site)
    assert curve.unit == "weighted output energy"
    assert curve.scale > 0


def test_long_patches_are_fitted_in_the_moment_of_their_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1)
    model = nn.Sequential(layer)
    inputs = sample_inputs((6, 7, 6), 96)
    full = calibrate(model, find(model), [inputs], rows=None)["0"]
    monkeypatch.setattr(watchers, "FULL_PATCH", 50)
    site = calibrate(model, find(model), [inputs], rows=None)["0"]
    assert site.statistics.input is None
    method = LowRankPlusSparse(densities=(0.0, 0.1, 0.3), ranks=2, turns=8, unfoldings=None)
    curve = method.curve(site)
    assert {bool(c["rank"]) for c in curve.choices} == {True, False}
    for held, error in zip(curve.choices, curve.errors, strict=True):
        factors = method.factorize(site, held)
        assert 0 <= error <= 1
        # The slices are an approximation of the patches: what is lost in truth is near.
        assert measured_error(full, factors.dense(), "output energy") < 2 * error + 0.1
    without = dataclasses.replace(site, statistics=Statistics(output=site.statistics.output))
    with pytest.raises(MissingMomentsError, match="LowRankPlusSparse"):
        method.factorize(without, choice(method, site, 1, 0.1, "unstructured"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_are_in_the_precision_of_the_layer(dtype: torch.dtype) -> None:
    site, layer, inputs = wide_site(dtype=dtype)
    held = choice(FEW, site, 2, 0.3, "unstructured", "height-first")
    factors = FEW.factorize(site, held)
    assert {t.dtype for t in (factors.left, factors.right, factors.sparse)} == {dtype}
    (module,) = build(factors, site.layers, site.biases)
    with torch.no_grad():
        apart = (module(inputs).double() - layer(inputs).double()).square().sum()
        spread = (layer(inputs).double() - layer(inputs).double().mean((0, 2, 3), keepdim=True)).square().sum()
    lost = measured_error(site, factors.dense(), "output energy")
    assert float(apart / spread) == pytest.approx(lost, rel=0.1, abs=1e-3)


def test_every_unfolding_is_offered_if_asked_for() -> None:
    site, _, _ = wide_site()
    all_names = tuple(u.name for u in unfoldings((3, 3)))
    curve = dataclasses.replace(FEW, unfoldings=all_names, multiple_of=1).curve(site)
    assert {c["unfolding"] for c in curve.choices if c["rank"]} == set(all_names)
    # Without a rank they are all the same, and offered once.
    alone = [(c["density"], c["pattern"]) for c in curve.choices if not c["rank"]]
    assert len(alone) == len(set(alone))
    assert set(curve.spectra) == set(all_names)


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", ["twice", "residual"])
def test_reconstruction_lowers_the_error_of_a_network_and_plans_survive_json(name: str) -> None:
    model = settled(name)
    batches = batches_for(name)
    sites = st.calibrate(model, st.find(model), batches)
    table = st.tabulate(sites, [FEW])
    plan = st.select(table, st.Budget(bytes=0.6))
    again = st.Plan.from_json(plan.to_json())
    assert any(not entry.choice.is_dense for entry in again)
    # Inputs of another seed have another covariance, which nothing was fitted to.
    fresh = torch.cat(batches)
    with torch.no_grad():
        wanted = model(fresh)
        errors = {}
        for reconstruct in (True, False):
            small = st.apply(model, sites, again, batches, reconstruct=reconstruct, batchnorm=False)
            errors[reconstruct] = float((small(fresh) - wanted).square().mean())
            other = st.apply(model, sites, plan, batches, reconstruct=reconstruct, batchnorm=False)
            torch.testing.assert_close(other(fresh), small(fresh))
    assert errors[True] < errors[False]


@pytest.mark.slow
def test_the_layer_kinds_have_a_curve() -> None:
    method = LowRankPlusSparse(densities=(0.1,), ranks=1, turns=3)
    for kind in LAYERS:
        site, _, _ = small_site(kind)
        curve = method.curve(site)
        assert curve.choices, kind
        assert all(0 <= e <= 1 for e in curve.errors)


@pytest.mark.parametrize("weighted", [False, True])
def test_wide_linear_layers_are_fitted_to_a_sketch_of_their_inputs(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, _, _ = small_site("linear", weighted=weighted)
    wanted = FEW.curve(full)
    monkeypatch.setattr(watchers, "FULL_LINEAR", 4)
    site, _, _ = small_site("linear", weighted=weighted)
    assert site.statistics.input is None
    curve = FEW.curve(site)
    assert curve.choices == wanted.choices
    assert curve.unit == wanted.unit
    # With room for all samples the sketch is the moment, but in single precision.
    assert curve.errors == pytest.approx(wanted.errors, rel=0.05, abs=1e-4)
    for held, error in zip(curve.choices, curve.errors, strict=True):
        factors = FEW.factorize(site, held)
        assert factors.left.dtype == torch.float32
        assert measured_error(full, factors.dense(), curve.unit) <= error * 1.01 + 1e-3
    # A layer of rows is in single precision already, however large it is.
    monkeypatch.setattr("spectrim.methods.low_rank_plus_sparse._SINGLE", 1)
    whole = FEW.factorize(site, curve.choices[-1]).dense()
    assert measured_error(full, whole, curve.unit) <= curve.errors[-1] * 1.01 + 1e-3


@pytest.mark.slow
def test_what_has_long_patches_is_fitted_to_what_compressed_layers_deliver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "FULL_PATCH", 20)
    monkeypatch.setattr(watchers, "FULL_LINEAR", 10)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 24),
        nn.Tanh(), nn.Linear(24, 5),
    ).eval()  # fmt: skip
    batches = [sample_inputs((3, 8, 8), 64, seed=seed) for seed in range(30)]
    sites = st.calibrate(model, st.find(model), batches)
    assert all(site.statistics.input is None for site in sites)
    plan = st.select(st.tabulate(sites, [FEW]), st.Budget(bytes=0.35))
    assert sum(not entry.choice.is_dense for entry in plan) >= 2
    fresh = sample_inputs((3, 8, 8), 200, seed=9)
    apart = {}
    with torch.no_grad():
        for reconstruct in (False, True):
            small = st.apply(model, sites, plan, batches, reconstruct=reconstruct, batchnorm=False)
            apart[reconstruct] = float((small(fresh) - model(fresh)).square().mean())
    assert apart[True] < apart[False]


@pytest.mark.table
@pytest.mark.parametrize("how", ["channel", "height-first"])
@pytest.mark.parametrize("known", ["nothing", "slices"])
def test_layers_without_a_moment_keep_their_mean_response(
    monkeypatch: pytest.MonkeyPatch, how: str, known: str
) -> None:
    if known == "slices":
        monkeypatch.setattr(watchers, "FULL_PATCH", 20)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3)).eval()
    batches = [sample_inputs((3, 8, 8), 32, seed=seed) for seed in range(2)]
    sites = find(model) if known == "nothing" else calibrate(model, find(model), batches)
    method = dataclasses.replace(FEW, unfoldings=(how,), share=0.6, densities=(0.4,))
    plan = st.select(st.tabulate(sites, [method]), st.Budget(parameters=0.4))
    assert [entry.choice["unfolding"] for entry in plan if entry.choice["rank"]] == [how, how]
    small = st.apply(model, sites, plan, batches, rows=None)
    with torch.no_grad():
        wanted, found = (torch.cat([m(batch) for batch in batches]) for m in (model, small))
    torch.testing.assert_close(found.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_a_layer_behind_dead_units_gives_finite_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12)).eval()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    sites = calibrate(model, find(model), [torch.randn(64, 6)])
    method = LowRankPlusSparse(densities=(0.0, 0.2, 0.5), ranks=2)
    curve = method.curve(sites["2"])
    assert curve.choices
    for held in curve.choices:
        assert all(bool(weight.isfinite().all()) for weight in method.factorize(sites["2"], held).dense())


def test_a_layer_that_cannot_have_the_pattern_keeps_low_rank() -> None:
    site, _, _ = small_site("conv2d-1x1")
    curve = LowRankPlusSparse(patterns=("taps",), ranks=2).curve(site)
    assert curve.choices
    assert all(held["rank"] and held["density"] == 0 for held in curve.choices)
    both = LowRankPlusSparse(patterns=("unstructured", "rows"), ranks=2).curve(site)
    alone = [held for held in both.choices if not held["density"]]
    assert len(alone) == len({held["rank"] for held in alone})


@pytest.mark.parametrize("weighted", [False, True])
def test_the_curve_of_a_large_layer_is_the_same_in_single_precision(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _, _ = small_site("linear", dtype=torch.float64, weighted=weighted)
    wanted = FEW.curve(site)
    monkeypatch.setattr("spectrim.methods.low_rank_plus_sparse._SINGLE", 1)
    found = FEW.curve(site)
    assert found.choices == wanted.choices
    assert found.scale == pytest.approx(wanted.scale)
    # Another order of entries that are nearly equal leads to another minimum, nearly as good.
    assert found.errors == pytest.approx(wanted.errors, rel=0.02, abs=1e-5)
    assert found.errors != wanted.errors


def test_few_rows_of_a_long_patch_are_fitted_in_the_precision_of_their_slices() -> None:
    """Rows of few samples are kept in float32; the moments of a slice of the kernel that come of them are float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(136, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 36, 4)).eval()
    batches = [torch.randn(10, 136, 6, 6)]
    method = LowRankPlusSparse(densities=(0.1,), ranks=1, turns=8, unfoldings=("input",))
    result = st.compress(model, batches, "parameters=20%", methods=method, only="0")
    (layer,) = (entry for entry in result.plan if not entry.choice.is_dense)
    assert layer.site == "0"
    assert output_error(model, result.model, batches) < 0.85
