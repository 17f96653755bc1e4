"""Tucker-2 and CP as methods: the contract, what layers really answer, files, and layers too wide to observe."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.errors import MissingMomentsError, PlanError
from spectrim.linalg import multilinear
from spectrim.methods import ActivationCP, ActivationTucker2, Method, WeightCP, WeightTucker2, chained_layer, statistics
from spectrim.network.choices import Choice, CPChoice, TuckerChoice
from spectrim.nn.build import build, skeleton
from spectrim.nn.find import find
from spectrim.nn.modules import whole
from spectrim.nn.watch import reconstruct, watchers
from spectrim.selection.plan import Plan
from spectrim.testing import check_method, measured_error
from tests.cases import LAYERS, small_site

# Few ranks and evaluations, and the same at every point of the curve and of what is carried out.
FEW: list[Method] = [
    WeightCP(multiple_of=8, evaluations=3),
    ActivationCP(multiple_of=8, evaluations=3),
    WeightTucker2(multiple_of=3, evaluations=0),
    ActivationTucker2(multiple_of=3, evaluations=0),
]
CONVOLUTIONS = [kind for kind in LAYERS if kind.startswith("conv") and kind not in ("conv2d-1x1", "conv2d-grouped")]


def named(method: Method) -> str:
    return method.name


@pytest.mark.table
@pytest.mark.parametrize("method", FEW, ids=named)
@pytest.mark.parametrize("kind", ["conv1d", "conv2d-strided-no-bias", "conv3d"])
def test_methods_keep_the_contract(method: Method, kind: str) -> None:
    assert check_method(method, layers=[kind]) >= 2


@pytest.mark.table(every=2)
@pytest.mark.parametrize("method", FEW, ids=named)
def test_the_contract_holds_in_bfloat16(method: Method) -> None:
    assert check_method(method, layers=["conv2d"], dtype=torch.bfloat16, tolerance=0.03, slack=0.2) > 0


def test_components_that_cancel_cost_what_few_bits_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of three components, which two come arbitrarily close to, the larger they are and the more they cancel.
    torch.manual_seed(0)
    (o, p), (i, j), (k, m) = (torch.linalg.qr(torch.randn(size, 2))[0].T for size in (16, 16, 9))
    weight = sum(torch.einsum("o,i,k->oik", *each) for each in ((o, i, m), (o, j, k), (p, i, k)))

    def lost(kind: torch.dtype) -> float:
        model = nn.Sequential(nn.Conv1d(16, 16, 9, padding=4))
        model[0].weight.data.copy_(weight)  # pyright: ignore[reportArgumentType]
        return WeightCP(multiple_of=2, evaluations=50).curve(find(model.to(kind)).sites[0]).errors[0]

    # With a ridge they hardly cancel.
    assert lost(torch.float32) < lost(torch.bfloat16) < 2e-3
    for name in ("_RIDGE", "_SHARE"):
        monkeypatch.setattr(multilinear, name, 0.0)
    assert lost(torch.float32) < 1e-3
    assert lost(torch.bfloat16) > 1e-3


@pytest.mark.parametrize("kind", sorted(set(LAYERS) - set(CONVOLUTIONS)))
def test_other_layers_are_offered_nothing(kind: str) -> None:
    site, _, _ = small_site(kind, calibrated=False)
    assert all(not method.curve(site).choices for method in (WeightCP(), WeightTucker2()))
    with pytest.raises(PlanError, match="does not fit"):
        skeleton(CPChoice(1), [site.spec])


CHOICES = [CPChoice(5), CPChoice(4, "axes"), TuckerChoice(2, 3)]


@pytest.mark.table
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_chain_computes_what_its_factors_stand_for(kind: str, choice: Choice) -> None:
    # Strides, dilations and every way of padding, also "same".
    site, layer, inputs = small_site(kind, dtype=torch.float64, calibrated=False)
    method: Method = WeightTucker2(evaluations=0) if isinstance(choice, TuckerChoice) else WeightCP(evaluations=0)
    factors = method.factorize(site, choice)
    (module,) = build(factors, site.layers, site.biases)
    alike = copy.deepcopy(layer)
    with torch.no_grad():
        alike.weight.copy_(factors.dense()[0][0])  # type: ignore[operator,union-attr]
        torch.testing.assert_close(module(inputs), alike(inputs), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(whole(module)[0], factors.dense()[0])


@pytest.mark.parametrize("kind", ["conv1d", "conv2d-strided-no-bias", "conv2d-dilated"])
def test_full_ranks_are_the_layer(kind: str) -> None:
    site, layer, inputs = small_site(kind, dtype=torch.float64)
    _, o, i, *kernel = site.spec.shape
    full = min(o, i) * torch.Size(kernel).numel()
    pairs: list[tuple[Method, Choice]] = [
        (WeightCP(), CPChoice(full)),
        (ActivationCP(), CPChoice(full, "axes", True)),
        (WeightTucker2(evaluations=0), TuckerChoice(i, o)),
        (ActivationTucker2(evaluations=0), TuckerChoice(i, o, True)),
    ]
    for method, choice in pairs:
        (module,) = build(method.factorize(site, choice), site.layers, site.biases)
        with torch.no_grad():
            torch.testing.assert_close(module(inputs), layer(inputs), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def rows_of(outputs: Tensor) -> Tensor:
    return outputs.double().movedim(1, -1).flatten(0, -2)


@pytest.mark.table
@pytest.mark.parametrize("method", FEW, ids=named)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_curve_is_what_chains_lose_on_the_calibration_data(
    method: Method, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "shrunk", lambda covariance, count: covariance)
    site, layer, inputs = small_site("conv2d", dtype=torch.float64, weighted=weighted, samples=32)
    curve = method.curve(site)
    assert curve.unit == ("weighted output energy" if weighted else "output energy")
    outer = site.statistics.gradient.second_moment[0] if site.statistics.gradient is not None else torch.eye(8).double()
    pairs = list(zip(curve.choices, curve.errors, strict=True))
    for choice, error in pairs[:: max(1, len(pairs) // 3)]:
        (module,) = build(method.factorize(site, choice), site.layers, site.biases)
        with torch.no_grad():
            wanted, found = rows_of(layer(inputs)), rows_of(module(inputs))
        centred, missing = wanted - wanted.mean(0), found - wanted
        lost, all_of_it = (torch.einsum("na,ab,nb->", rows, outer, rows) for rows in (missing, centred))
        assert float(lost / all_of_it) == pytest.approx(error, abs=1e-6), choice
        torch.testing.assert_close(found.mean(0), wanted.mean(0), atol=1e-8, rtol=1e-8)


def test_what_is_carried_out_is_no_worse_than_the_curve_says_and_more_evaluations_help() -> None:
    site, _, _ = small_site("conv2d", dtype=torch.float64)
    kinds: list[Callable[..., Method]] = [ActivationCP, ActivationTucker2]
    for cls in kinds:
        curve = cls(multiple_of=2, evaluations=4).curve(site)
        middle = len(curve.choices) // 2
        choice, error = curve.choices[middle], curve.errors[middle]
        few, many = (
            measured_error(site, cls(evaluations=n).factorize(site, choice).dense(), curve.unit) for n in (4, 60)
        )
        assert many < few <= error + 1e-3


def test_errors_fall_with_the_rank_and_chains_cost_less_than_the_layer() -> None:
    site, _, _ = small_site("conv2d")
    methods: list[Method] = [ActivationCP(evaluations=2), ActivationTucker2()]
    for method in methods:
        curve = method.curve(site)
        assert all(st.parameters(method.layers(site, c)) < st.parameters([site.spec]) for c in curve.choices)
    curve = ActivationCP(multiple_of=1, evaluations=2).curve(site)
    assert [c["rank"] for c in curve.choices] == sorted(c["rank"] for c in curve.choices)
    assert list(curve.errors) == sorted(curve.errors, reverse=True)


def test_wide_kernels_are_offered_by_axes_too() -> None:
    wide = find(nn.Sequential(nn.Conv2d(4, 6, 5)))["0"]
    kinds = {str(c).rpartition("components")[2] for c in WeightCP(multiple_of=8, evaluations=0).curve(wide).choices}
    assert kinds == {"", ", kernel by axes"}
    narrow = find(nn.Sequential(nn.Conv2d(4, 6, 3)))["0"]
    assert not any(
        c.settings.get("kernel") == "axes" for c in WeightCP(multiple_of=4, evaluations=0).curve(narrow).choices
    )
    asked = WeightCP(multiple_of=4, evaluations=0, kernels=("axes",)).curve(narrow).choices
    assert asked
    assert all(c.settings.get("kernel") == "axes" for c in asked)
    with pytest.raises(ValueError, match="kernels is 'axes'; expected a tuple of names out of whole, axes"):
        WeightCP(kernels="axes")  # type: ignore[arg-type]


def test_ranks_that_would_take_too_long_are_not_offered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site, _, _ = small_site("conv2d")
    every = ActivationCP(multiple_of=1, evaluations=8).curve(site).choices
    monkeypatch.setattr(chained_layer, "WORK", 1e6)
    monkeypatch.setattr("spectrim.methods.cp.WORK", 3e6)
    monkeypatch.setattr("spectrim.methods.tucker.WORK", 1.0)
    with caplog.at_level("INFO", logger="spectrim"):
        some = ActivationCP(multiple_of=1, evaluations=8).curve(site).choices
    assert some == every[: len(some)]
    assert len(some) < len(every)
    assert "on is not offered" in caplog.text
    assert not ActivationTucker2().curve(site).choices
    # Of a budget that cannot be met this is the reason.
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3)), torch.randn(16, 8, 6, 6)
    with pytest.raises(st.InfeasibleBudgetError, match="fitting ActivationTucker2 to it would take too long"):
        st.compress(model, [x], "macs=50%", methods=ActivationTucker2())


def test_without_data_activations_say_which_method_needs_none() -> None:
    site, _, _ = small_site("conv2d", calibrated=False)
    with pytest.raises(MissingMomentsError, match="ActivationCP needs calibration statistics.* or use WeightCP"):
        ActivationCP().curve(site)


def test_layers_too_wide_to_observe_are_fitted_by_slices_and_their_last_layer_to_the_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchers, "FULL_PATCH", 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    batches = list(torch.randn(32, 3, 8, 8).split(8))
    sites = st.calibrate(model, find(model), batches)
    assert sites["2"].statistics.input is None
    fitted: list[str] = []
    original = reconstruct.Joint.layer
    monkeypatch.setattr(reconstruct.Joint, "layer", lambda self, site: fitted.append(site.name) or original(self, site))
    for method in (ActivationCP(multiple_of=4, evaluations=4), ActivationTucker2(multiple_of=2, evaluations=2)):
        plan = st.select(st.tabulate(sites, method), st.Budget(parameters=0.6))
        alone, both = (st.apply(model, sites, plan, batches, reconstruct=on) for on in (False, True))
        with torch.no_grad():
            x = torch.cat(batches)
            apart, together = (float((net(x) - model(x)).norm()) for net in (alone, both))
        assert together < apart
    assert "2.2" in fitted


@pytest.mark.parametrize("choice", [CPChoice(6), CPChoice(5, "axes"), TuckerChoice(3, 4)], ids=str)
def test_files_merging_and_plans_know_chains(choice: Choice, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(6, 4, (3, 5), stride=2)
    ).eval()
    x = torch.randn(16, 3, 9, 9)
    methods = [ActivationCP(evaluations=4), ActivationTucker2(evaluations=2)]
    sites = st.calibrate(model, find(model), [x])
    plan = st.select(st.tabulate(sites, methods), st.Budget(parameters=0.9))
    by = next(m for m in methods if isinstance(choice, m.offers))
    picked = dataclasses.replace(choice, method=by.name, bias=True)
    entries = tuple(dataclasses.replace(e, choice=picked if e.site == "2" else e.choice) for e in plan.entries)
    plan = Plan.from_json(
        dataclasses.replace(plan, entries=entries, methods={m.name: m.record() for m in methods}).to_json()
    )
    assert plan["2"].choice == picked
    small = st.apply(model, sites, plan, [x])
    st.save(small, plan, tmp_path / "small.safetensors")
    loaded = st.load(copy.deepcopy(model), tmp_path / "small.safetensors").eval()
    merged = st.merge(small)
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))
        torch.testing.assert_close(merged(x), small(x), atol=1e-5, rtol=1e-5)
    layer = small.get_submodule("2")
    assert type(merged.get_submodule("2")) is nn.Conv2d
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight.shape == model[2].weight.shape


def test_choices_that_no_layer_can_have_are_refused() -> None:
    spec = small_site("conv2d", calibrated=False)[0].spec
    with pytest.raises(PlanError, match="rank 55; expected at most 54"):
        skeleton(CPChoice(55), [spec])
    with pytest.raises(PlanError, match="ranks 7 and 2; expected at most the layer's 6 inputs and 8 outputs"):
        skeleton(TuckerChoice(7, 2), [spec])
    for wrong in ({"multiple_of": 0}, {"evaluations": -1}):
        with pytest.raises(ValueError, match="must"):
            WeightCP(**wrong)  # type: ignore[arg-type]
    for wrong in ({"multiple_of": 2.5}, {"evaluations": 2.5}, {"evaluations": True}, {"evaluations": None}):
        with pytest.raises(TypeError, match="must be a whole number, got"):
            ActivationCP(**wrong)  # type: ignore[arg-type]
    for kernels in ((), [], 3, ([],)):
        with pytest.raises(ValueError, match="kernels is .*; expected a tuple of names out of whole, axes"):
            ActivationCP(kernels=kernels)  # type: ignore[arg-type]


def test_a_chain_compressed_again_merges_unless_a_bias_lies_before_padding() -> None:
    site, _, inputs = small_site("conv2d", dtype=torch.float64)
    (module,) = build(ActivationCP(evaluations=0).factorize(site, CPChoice(6, bias=True)), site.layers, site.biases)
    again = copy.deepcopy(module)
    again[0].bias = nn.Parameter(torch.ones(6, dtype=torch.float64))  # type: ignore[index]
    with pytest.raises(ValueError, match="the layer 0 of its chain has a bias"):
        whole(again)
    assert again(inputs).shape == module(inputs).shape
