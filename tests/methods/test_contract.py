"""The methods against the contract, on every layer kind, and the contract's check against broken methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from spectrim.errors import MissingMomentsError
from spectrim.linalg.moments import shrunk
from spectrim.linalg.unfold import unfoldings
from spectrim.methods import ActivationSVD, Curve, LowRankPlusSparse, Method, WeightSVD
from spectrim.methods.base import break_even, full_rank
from spectrim.network.choices import Choice
from spectrim.network.factors import LowRank
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Site, Statistics
from spectrim.testing import check_method, measured_error
from spectrim.testing.layers import small_group
from tests.cases import LAYERS, small_site


@pytest.mark.table(every=6)
@pytest.mark.parametrize("kind", LAYERS)
def test_methods_keep_the_contract_on_every_layer_kind(kind: str) -> None:
    kernel = small_site(kind, calibrated=False)[0].spec.kernel
    number = len(unfoldings(kernel))
    # Three curves with a choice or more and the full rank of every unfolding; two where data are needed.
    assert check_method(WeightSVD(), layers=[kind]) >= 3 * 2 * number
    assert check_method(ActivationSVD(sweeps=0), layers=[kind]) >= 2 * 2 * number


@pytest.mark.table(every=2)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "transposed2d-grouped-no-bias"])
def test_alternation_keeps_the_contract_too(kind: str) -> None:
    assert check_method(ActivationSVD(sweeps=2), layers=[kind], slack=0.9) > 0


@pytest.mark.table(every=2)
@pytest.mark.parametrize(
    ("kind", "pattern"), [("linear", "2:4"), ("conv1d", "unstructured"), ("conv2d-grouped", "channels")]
)
def test_low_rank_plus_sparse_keeps_the_contract(kind: str, pattern: str) -> None:
    method = LowRankPlusSparse(patterns=(pattern,), densities=(0.0, 0.3), ranks=1, turns=4)
    # What is carried out goes on from the curve's few turns: it may lose much less.
    assert check_method(method, layers=[kind], slack=1.0) >= 3


@pytest.mark.table
@pytest.mark.parametrize("kind", ["linear", "conv2d-grouped", "transposed1d"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.01), (torch.bfloat16, 0.03)])
def test_methods_keep_the_contract_in_other_precisions(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    for method in (WeightSVD(), ActivationSVD(sweeps=0)):
        assert check_method(method, layers=[kind], dtype=dtype, tolerance=tolerance) > 0


@dataclass(frozen=True)
class Optimist(WeightSVD):
    """Reports less than it loses."""

    def curve(self, site: Site) -> Curve:
        curve = super().curve(site)
        return dataclasses.replace(curve, errors=tuple(0.5 * e for e in curve.errors))


@dataclass(frozen=True)
class Negative(WeightSVD):
    def curve(self, site: Site) -> Curve:
        curve = super().curve(site)
        return dataclasses.replace(curve, errors=tuple(e - 1 for e in curve.errors))


@dataclass(frozen=True)
class Fickle(WeightSVD):
    """Other factors each time, of the same product at full rank only."""

    def factorize(self, site: Site, choice: Choice) -> LowRank:
        factors = super().factorize(site, choice)
        return dataclasses.replace(factors, left=factors.left * (1 + 1e-5 * torch.rand(())))


@dataclass(frozen=True)
class Understated(WeightSVD):
    """Announces smaller layers than it builds."""

    def layers(self, site: Site, choice: Choice) -> tuple[LayerSpec, ...]:
        smaller = Choice(choice.kind, choice.method, {**choice.settings, "rank": max(1, choice["rank"] - 1)})
        return super().layers(site, smaller)


@dataclass(frozen=True)
class Forgetful(WeightSVD):
    """Leaves an option out of its record."""

    gain: float = 1.0

    def record(self) -> dict[str, object]:
        return {"type": "Forgetful", "options": {}}


@dataclass(frozen=True)
class Lossy(WeightSVD):
    """A full rank that does not keep the layer."""

    def factorize(self, site: Site, choice: Choice) -> LowRank:
        factors = super().factorize(site, choice)
        return dataclasses.replace(factors, right=factors.right * (1 + 1e-4))


@dataclass(frozen=True)
class Idle(WeightSVD):
    """Says that it lacks data also where there are some."""

    def curve(self, site: Site) -> Curve:
        raise MissingMomentsError("data, please")


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        (Optimist(), "Optimist on linear .weight energy.: .* should lose"),
        (Negative(), "has error -0"),
        (Fickle(), "other factors each time"),
        (Understated(), "announces"),
        (Forgetful(gain=2.0), "Forgetful: from_record"),
        (Lossy(), "should equal the layer"),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_the_check_finds_what_is_wrong(method: Method, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_method(method, layers=["linear"])


def test_the_check_refuses_unknown_units() -> None:
    site, _, _ = small_site("linear")
    with pytest.raises(ValueError, match="unit 'percent' is none of"):
        measured_error(site, site.weights, "percent")


def test_a_method_that_wants_data_must_take_them() -> None:
    with pytest.raises(MissingMomentsError, match="data, please"):
        check_method(Idle(), layers=["linear"])


def specs() -> Iterator[LayerSpec]:
    for kind in LAYERS:
        for calibrated in (False, True):
            yield small_site(kind, calibrated=calibrated)[0].spec


def test_break_even_is_the_largest_rank_that_saves_anything() -> None:
    from spectrim.cost.counted import macs, parameters

    for spec in specs():
        for how in unfoldings(spec.kernel):
            paying = [0]
            for rank in range(1, full_rank(spec, how) + 1):
                pair = spec.factor(how, rank)
                saves = parameters(pair) < parameters([spec]) or (spec.inputs and macs(pair) < macs([spec]))
                paying += [rank] if saves else []
            assert break_even(spec, how) == max(paying), (spec.kind, how.name)


@pytest.mark.parametrize("cls", [WeightSVD, ActivationSVD])
def test_options_limit_what_is_offered(cls: type[WeightSVD] | type[ActivationSVD]) -> None:
    site, _, _ = small_site("conv2d")
    everything = cls(multiple_of=1).curve(site)
    assert {c["unfolding"] for c in everything.choices} == {u.name for u in unfoldings((3, 3))}
    few = cls(unfoldings=("width-first",), multiple_of=3).curve(site)
    assert {c["unfolding"] for c in few.choices} == {"width-first"}
    assert all(c["rank"] % 3 == 0 for c in few.choices)
    assert few.choices
    errors = dict(zip(everything.choices, everything.errors, strict=True))
    assert [errors[c] for c in few.choices] == pytest.approx(list(few.errors))
    with pytest.raises(ValueError, match="multiple_of must be at least 1, got 0"):
        cls(multiple_of=0)
    for wrong in ("channel", ("chanel",)):
        with pytest.raises(ValueError, match="expected a tuple of names out of channel, input, height-first"):
            cls(unfoldings=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [WeightSVD, ActivationSVD])
def test_errors_fall_with_the_rank(cls: type[WeightSVD] | type[ActivationSVD]) -> None:
    for kind in ("linear", "conv1d", "conv2d"):
        site, _, _ = small_site(kind)
        if cls is WeightSVD:
            site = dataclasses.replace(site, statistics=Statistics())  # in output energy its error may rise
        curve = cls().curve(site)
        for how in unfoldings(site.spec.kernel):
            run = [e for c, e in zip(curve.choices, curve.errors, strict=True) if c["unfolding"] == how.name]
            assert run == sorted(run, reverse=True)
            assert sum(curve.spectra[how.name]) == pytest.approx(1)


def test_methods_for_layers_are_not_asked_for_groups() -> None:
    group, _, _ = small_group("linear")
    for method in (WeightSVD(), ActivationSVD()):
        assert isinstance(group.parts[0], method.takes)
        assert not isinstance(group, method.takes)
        with pytest.raises(AttributeError, match="site 'group' is 3 layers .* ask each of its parts"):
            method.curve(group)


def test_shrinkage_grows_as_samples_become_few() -> None:
    covariance = torch.diag(torch.tensor([4.0, 2.0, 0.0])).double()[None]

    def added(count: int) -> Tensor:
        return (shrunk(covariance, count) - covariance)[0]

    for count, share in ((0, 1e-6 + 1e-2), (2, 1e-6 + 1e-2), (3, 1e-6 + 1e-2), (300, 1e-6 + 1e-4), (10**9, 1e-6)):
        torch.testing.assert_close(added(count), share * covariance[0], atol=1e-12, rtol=1e-4)
