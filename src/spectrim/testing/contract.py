"""The contract of a method as a check, on small sites of one layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import msgspec
import torch
from torch import Tensor, nn

from spectrim.cost.counted import parameters
from spectrim.errors import MissingMomentsError
from spectrim.linalg.unfold import unfoldings
from spectrim.methods.base import Curve, LowRankMethod, Method, from_record, full_rank
from spectrim.network.choices import Choice
from spectrim.network.factors import Factors
from spectrim.network.sites import Layer, Site
from spectrim.nn.build import build
from spectrim.nn.layers import canonical
from spectrim.testing.layers import LAYERS, small_site
from spectrim.testing.measures import measured_error


def check_method(
    method: Method,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 0.01,
    slack: float = 0.0,
) -> int:
    """Run a method on small sites of every layer kind and check that it keeps the contract.

    Each layer is given without data, calibrated, and with gradients. It is checked that

    - its curve is finite, within 0 and 1, and the same each time;
    - the factors of a choice lose what the curve says, in the curve's unit, and are the same each time;
    - the built modules have the shapes that ``layers`` announces and as many parameters as ``costs.parameters``
      counts;
    - a low-rank method loses nothing at full rank;
    - ``from_record`` makes the method again from its record, also through JSON.

    Parameters
    ----------
    method
        Under test.
    layers
        Names from :data:`LAYERS`; all by default.
    tolerance
        By how much the error of a choice may differ from the measured one, in fractions of the site's energy. Methods
        may regularise what few samples tell them.
    slack
        The share by which the factors may be better than the curve says, for methods that refine a choice when it is
        carried out.

    Returns
    -------
    int
        Choices that were carried out and checked.

    Raises
    ------
    AssertionError
        Naming the layer, the choice, and what was found and expected.
    """
    check_record(method)
    checked = 0
    for kind in layers if layers is not None else LAYERS:
        for calibrated, weighted in ((False, False), (True, False), (True, True)):
            site, layer, inputs = small_site(kind, calibrated=calibrated, weighted=weighted, dtype=dtype)
            curve = offered(method, site, calibrated=calibrated)
            if curve is None:
                continue
            where = f"{method.name} on {kind} ({curve.unit})"
            checked += check_offered(method, site, curve, _check_modules, tolerance, slack, where)
            if isinstance(method, LowRankMethod):
                checked += _check_full_rank(method, site, layer, inputs, where)
    expect(checked > 0, f"{method.name} offers nothing for any of the layers")
    return checked


def offered(method: Method, site: Site, *, calibrated: bool) -> Curve | None:
    """The curve of a site, or None if the method is for others, or needs data and says so."""
    if not isinstance(site, method.takes):
        return None
    try:
        return method.curve(site)
    except MissingMomentsError:
        if calibrated:
            raise
        return None


def check_offered(
    method: Method,
    site: Site,
    curve: Curve,
    check_built: Callable[[Method, Site, Choice, Factors, str], None],
    tolerance: float,
    slack: float,
    where: str,
) -> int:
    """Check a curve, and carry some of its choices out; how many."""
    check_curve(method, site, curve, where)
    carried_out = 0
    for choice, error in of_every_run(curve):
        factors = check_factors(method, site, choice, error, curve.unit, tolerance, slack, where)
        check_built(method, site, choice, factors, where)
        check_numel(method, site, choice, factors, where)
        carried_out += 1
    return carried_out


def of_every_run(curve: Curve) -> Iterator[tuple[Choice, float]]:
    """The first, the middle and the last choice of every run of equal settings other than the rank."""
    runs: dict[tuple[object, ...], list[int]] = {}
    for index, choice in enumerate(curve.choices):
        fixed = tuple(sorted((k, v) for k, v in choice.settings.items() if isinstance(v, str)))
        runs.setdefault((choice.kind, fixed), []).append(index)
    for run in runs.values():
        for index in dict.fromkeys((run[0], run[len(run) // 2], run[-1])):
            yield curve.choices[index], curve.errors[index]


def check_record(method: Method) -> None:
    """A record makes the method again."""
    expect(from_record(method.record()) == method, f"{method.name}: from_record(record()) is another method")
    text = msgspec.json.encode(method.record())
    expect(from_record(msgspec.json.decode(text)) == method, f"{method.name}: its record does not survive JSON")


def check_curve(method: Method, site: Site, curve: Curve, where: str) -> None:
    """A curve is the same each time, and its errors are within 0 and 1."""
    again = method.curve(site)
    expect(curve.choices == again.choices and curve.errors == again.errors, f"{where}: the curve changes")
    expect(len(curve.choices) == len(curve.errors), f"{where}: choices and errors differ in number")
    for choice, error in zip(curve.choices, curve.errors, strict=True):
        expect(
            math.isfinite(error) and 0 <= error <= 1 + 1e-9,
            f"{where}: {choice} has error {error}, expected a number within 0 and 1",
        )


def check_factors(
    method: Method, site: Site, choice: Choice, error: float, unit: str, tolerance: float, slack: float, where: str
) -> Factors:
    """The factors of a choice have the right shapes, lose what they should, and are the same each time."""
    factors = method.factorize(site, choice)
    dense = factors.dense()
    shapes, wanted = [tuple(w.shape) for w in dense], [tuple(w.shape) for w in site.weights]
    expect(shapes == wanted, f"{where}: {choice} stands for weights {shapes}, expected {wanted}")
    expect(
        all(torch.equal(a, b) for a, b in zip(dense, method.factorize(site, choice).dense(), strict=True)),
        f"{where}: {choice} gives other factors each time",
    )
    measured = measured_error(site, dense, unit)
    expect(
        (1 - slack) * error - tolerance <= measured <= error + tolerance,
        f"{where}: {choice} should lose {error:.6f} and loses {measured:.6f}",
    )
    return factors


def check_numel(method: Method, site: Site, choice: Choice, factors: Factors, where: str) -> None:
    """Factors count what the costs count."""
    plain = parameters([dataclasses.replace(spec, bias=False) for spec in method.layers(site, choice)])
    expect(factors.numel() == plain, f"{where}: {choice} has numel() {factors.numel()}, and costs count {plain}")


def _check_modules(method: Method, site: Site, choice: Choice, factors: Factors, where: str) -> None:
    """What is built is what is announced."""
    specs = method.layers(site, choice)
    modules = {id(m): m for part in build(factors, site.layers, site.biases) for m in part.modules()}
    leaves = [m for m in modules.values() if isinstance(m._parameters.get("weight"), Tensor)]
    built = sorted((tuple(canonical(m)[0].shape), m.bias is not None) for m in leaves)
    announced = sorted((spec.shape, spec.bias) for spec in specs if not spec.shared)
    expect(built == announced, f"{where}: {choice} announces {announced} and builds {built}")
    if all(spec.density == 1 for spec in specs):
        stored = sum(p.numel() for m in leaves for p in m.parameters(recurse=False))
        counted = parameters(specs)
        expect(stored == counted, f"{where}: {choice} has {stored} parameters, and costs count {counted}")


def _check_full_rank(method: LowRankMethod, site: Layer, layer: nn.Module, inputs: Tensor, where: str) -> int:
    epsilon = torch.finfo(site.weight.dtype).eps
    checked = 0
    with torch.no_grad():
        for how in unfoldings(site.spec.kernel):
            choice = method.choice(site, how, full_rank(site.spec, how), bias=site.spec.bias)
            (module,) = build(method.factorize(site, choice), site.layers, site.biases)
            check_equal(module(inputs), layer(inputs), 256 * epsilon, f"{where}: {choice} should equal the layer")
            checked += 1
    return checked


def check_equal(answers: Tensor, expected: Tensor, close: float, should: str) -> None:
    """Answers are those that are expected, up to a share of the largest."""
    apart = float((answers.double() - expected.double()).abs().max() / expected.double().abs().max())
    expect(apart < close, f"{should} and is {apart:.3g} apart")


def expect(holds: bool, otherwise: str) -> None:
    """Raise AssertionError where something does not hold."""
    if not holds:
        raise AssertionError(otherwise)
