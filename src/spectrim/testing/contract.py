"""The contract of a method as a check, on small sites of one layer."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec
import torch
from torch import Tensor, nn

from spectrim.cost.counted import parameters
from spectrim.errors import MissingMomentsError
from spectrim.linalg.unfold import Unfolding, unfoldings
from spectrim.methods.base import Curve, LowRankMethod, Method, from_record, full_rank
from spectrim.network.choices import Choice
from spectrim.network.factors import Factors
from spectrim.network.sites import Site
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
            tried = _OnLayer.of(method, site, kind, tolerance, slack)
            if tried is not None:
                checked += tried.checked() + tried.at_full_rank([layer], [inputs])
    check_any(checked, method, "layers")
    return checked


def check_any(checked: int, method: Method, places: str) -> None:
    """A method has been checked at all."""
    if not checked:
        raise AssertionError(f"{method.name} offers nothing for any of the {places}")


def check_record(method: Method) -> None:
    """A record makes the method again."""
    if from_record(method.record()) != method:
        raise AssertionError(f"{method.name}: from_record(record()) is another method")
    text = msgspec.json.encode(method.record())
    if from_record(msgspec.json.decode(text)) != method:
        raise AssertionError(f"{method.name}: its record does not survive JSON")


@dataclass(frozen=True)
class Tried(ABC):
    """A method on a site, with what it offers there."""

    method: Method
    site: Site
    curve: Curve
    where: str  # for messages
    tolerance: float
    slack: float

    @classmethod
    def of(cls, method: Method, site: Site, name: str, tolerance: float, slack: float) -> Self | None:
        """None if the method is for other sites, or needs data and says so."""
        if not isinstance(site, method.takes):
            return None
        try:
            curve = method.curve(site)
        except MissingMomentsError:
            if site.calibrated:
                raise
            return None
        return cls(method, site, curve, f"{method.name} on {name} ({curve.unit})", tolerance, slack)

    @abstractmethod
    def check_built(self, choice: Choice, factors: Factors) -> None:
        """What is built is what is announced."""

    @abstractmethod
    def full_rank(self, how: Unfolding) -> int | None:
        """The rank at which a choice loses nothing; None if there is none."""

    def expect(self, holds: bool, otherwise: str) -> None:
        """Raise AssertionError where something does not hold."""
        if not holds:
            raise AssertionError(f"{self.where}: {otherwise}")

    def checked(self) -> int:
        """Check the curve, and carry some of its choices out; how many."""
        self._check_curve()
        offers = list(self._of_every_run())
        for choice, error in offers:
            factors = self._factors(choice, error)
            self.check_built(choice, factors)
            specs = self.method.layers(self.site, choice)
            plain = parameters([dataclasses.replace(spec, bias=False) for spec in specs])
            said = f"{choice} has numel() {factors.numel()}, and costs count {plain}"
            self.expect(factors.numel() == plain, said)
        return len(offers)

    def at_full_rank(self, layers: Sequence[nn.Module], inputs: Sequence[Tensor]) -> int:
        """Check that choices of full rank equal the layers; how many."""
        site, checked = self.site, 0
        # A fit to the responses of several layers adds a jitter of 1e-12 to their moments.
        close = max(256 * torch.finfo(site.layers[0].dtype).eps, 1e-9 if len(layers) > 1 else 0.0)
        for how in unfoldings(site.layers[0].kernel):
            if (rank := self.full_rank(how)) is None:
                continue
            maker: Any = self.method
            choice = maker.choice(site, how, rank, bias=any(spec.bias for spec in site.layers))
            pairs = build(maker.factorize(site, choice), site.layers, site.biases)
            for layer, pair, x in zip(layers, pairs, inputs, strict=True):
                with torch.no_grad():
                    answers, expected = pair(x).double(), layer(x).double()
                apart = float((answers - expected).abs().max() / expected.abs().max())
                self.expect(apart < close, f"{choice} should equal the layer and is {apart:.3g} apart")
            checked += 1
        return checked

    def _check_curve(self) -> None:
        """A curve is the same each time, and its errors are within 0 and 1."""
        curve, again = self.curve, self.method.curve(self.site)
        # Where numbers lie in memory may round sums another way.
        errors = zip(curve.errors, again.errors, strict=True)
        alike = curve.choices == again.choices and all(math.isclose(*pair, abs_tol=1e-9) for pair in errors)
        self.expect(alike, "the curve changes")
        self.expect(len(curve.choices) == len(curve.errors), "choices and errors differ in number")
        for choice, error in zip(curve.choices, curve.errors, strict=True):
            inside = math.isfinite(error) and 0 <= error <= 1 + 1e-9
            self.expect(inside, f"{choice} has error {error}, expected a number within 0 and 1")

    def _of_every_run(self) -> Iterator[tuple[Choice, float]]:
        """The first, the middle and the last choice of every run of equal settings other than the rank."""
        runs: dict[tuple[object, ...], list[tuple[Choice, float]]] = {}
        for choice, error in zip(self.curve.choices, self.curve.errors, strict=True):
            fixed = tuple(sorted((k, v) for k, v in choice.settings.items() if isinstance(v, str)))
            runs.setdefault((choice.kind, fixed), []).append((choice, error))
        for run in runs.values():
            yield from (run[at] for at in dict.fromkeys((0, len(run) // 2, len(run) - 1)))

    def _factors(self, choice: Choice, error: float) -> Factors:
        """The factors of a choice have the right shapes, lose what they should, and are the same each time."""
        factors = self.method.factorize(self.site, choice)
        dense = factors.dense()
        shapes, wanted = [tuple(w.shape) for w in dense], [tuple(w.shape) for w in self.site.weights]
        self.expect(shapes == wanted, f"{choice} stands for weights {shapes}, expected {wanted}")
        again = self.method.factorize(self.site, choice).dense()
        self.expect(all(map(torch.equal, dense, again)), f"{choice} gives other factors each time")
        measured = measured_error(self.site, dense, self.curve.unit)
        holds = (1 - self.slack) * error - self.tolerance <= measured <= error + self.tolerance
        self.expect(holds, f"{choice} should lose {error:.6f} and loses {measured:.6f}")
        return factors


class _OnLayer(Tried):
    def check_built(self, choice: Choice, factors: Factors) -> None:
        specs, site = self.method.layers(self.site, choice), self.site
        modules = {id(m): m for part in build(factors, site.layers, site.biases) for m in part.modules()}
        leaves = [m for m in modules.values() if isinstance(m._parameters.get("weight"), Tensor)]
        built = sorted((tuple(canonical(m)[0].shape), m.bias is not None) for m in leaves)
        announced = sorted((spec.shape, spec.bias) for spec in specs if not spec.shared)
        self.expect(built == announced, f"{choice} announces {announced} and builds {built}")
        if all(spec.density == 1 for spec in specs):
            stored = sum(p.numel() for m in leaves for p in m.parameters(recurse=False))
            counted = parameters(specs)
            self.expect(stored == counted, f"{choice} has {stored} parameters, and costs count {counted}")

    def full_rank(self, how: Unfolding) -> int | None:
        return full_rank(self.site.layers[0], how) if isinstance(self.method, LowRankMethod) else None
