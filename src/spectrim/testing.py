"""For writers of methods: matrices with planted spectra, small layers of every kind, the contract as a check."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.costs import parameters
from spectrim.errors import MissingMomentsError
from spectrim.methods.base import (
    OUTPUT_ENERGY,
    WEIGHT_ENERGY,
    WEIGHTED_ENERGY,
    LowRankMethod,
    Method,
    from_record,
    full_rank,
)
from spectrim.nn.build import build
from spectrim.nn.calibrate import calibrate
from spectrim.nn.find import canonical, find
from spectrim.nn.sensitivity import sensitivity
from spectrim.plan import Choice
from spectrim.sites import Site, Sites
from spectrim.unfold import unfoldings


@dataclass(frozen=True)
class SmallLayer:
    """A layer to try things on.

    Attributes
    ----------
    make
        Makes it, from torch's global generator.
    shape
        One sample of its input, without the batch axis.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


LAYERS: Mapping[str, SmallLayer] = {
    "linear": SmallLayer(lambda: nn.Linear(12, 8), (12,)),
    "linear-tokens-no-bias": SmallLayer(lambda: nn.Linear(8, 12, bias=False), (5, 8)),
    "conv1d": SmallLayer(lambda: nn.Conv1d(6, 10, 5, stride=2, padding=1), (6, 17)),
    "conv2d": SmallLayer(lambda: nn.Conv2d(6, 8, 3, padding=1), (6, 7, 6)),
    "conv2d-1x1": SmallLayer(lambda: nn.Conv2d(8, 6, 1, stride=2), (8, 7, 7)),
    "conv2d-strided-no-bias": SmallLayer(
        lambda: nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(0, 2), bias=False), (6, 9, 8)
    ),
    "conv2d-dilated": SmallLayer(lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=1), (4, 9, 8)),
    "conv2d-same": SmallLayer(lambda: nn.Conv2d(4, 8, (3, 5), dilation=(2, 1), padding="same"), (4, 8, 7)),
    "conv2d-reflect": SmallLayer(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 7, 6)),
    "conv2d-circular": SmallLayer(lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (4, 7, 6)),
    "conv2d-replicate": SmallLayer(lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="replicate"), (4, 7, 6)),
    "conv2d-grouped": SmallLayer(lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), (8, 6, 6)),
    "conv3d": SmallLayer(lambda: nn.Conv3d(3, 6, (3, 2, 2), stride=(1, 2, 1), padding=1), (3, 5, 6, 4)),
    "transposed1d": SmallLayer(lambda: nn.ConvTranspose1d(6, 4, 4, stride=3, padding=1, output_padding=2), (6, 9)),
    "transposed2d": SmallLayer(lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, output_padding=1), (6, 5, 4)),
    "transposed2d-grouped-no-bias": SmallLayer(
        lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, dilation=2, bias=False), (8, 4, 5)
    ),
    "transposed3d": SmallLayer(lambda: nn.ConvTranspose3d(4, 6, (2, 3, 1), stride=(2, 1, 1)), (4, 3, 4, 4)),
}
"""One small layer of every kind that can be factorised, by a name for messages."""


def planted(
    rows: int,
    columns: int,
    energies: Sequence[float],
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Float[Tensor, "g rows columns"]:
    """Random matrices whose squared singular values are known.

    Parameters
    ----------
    energies
        Squared singular values, at most ``min(rows, columns)``; the others are zero. Any order.
    groups
        How many, each with other singular vectors.

    Returns
    -------
    Tensor
        ``[groups, rows, columns]``.

    Raises
    ------
    ValueError
        For more energies than the matrix has singular values, or negative ones.
    """
    if len(energies) > min(rows, columns) or any(e < 0 for e in energies):
        raise ValueError(
            f"a {rows} x {columns} matrix takes at most {min(rows, columns)} energies of at least 0; "
            f"got {list(energies)}"
        )
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(size: int) -> Tensor:
        drawn = torch.randn(groups, size, len(energies), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn)[0]

    values = torch.tensor([float(e) for e in energies], dtype=torch.float64).sqrt()
    return ((orthonormal(rows) * values) @ orthonormal(columns).mT).to(dtype)


def sample_inputs(
    shape: Sequence[int], samples: int, *, channel: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Inputs as layers see them: channels of unequal strength that correlate, neighbours too, with a mean.

    Parameters
    ----------
    shape
        One sample.
    channel
        Which of its axes the channels are.
    """
    generator = torch.Generator().manual_seed(seed)
    axis = channel % len(shape)
    width = shape[axis]
    drawn = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    mixing = mixing * torch.linspace(1.5, 0.3, width, dtype=torch.float64)
    mean = torch.randn(width, generator=generator, dtype=torch.float64)
    mixed = drawn.movedim(1 + axis, -1) @ mixing.mT + mean
    inputs = mixed.movedim(-1, 1 + axis)
    if axis == 0 and len(shape) > 1:
        inputs = inputs + 0.7 * inputs.roll(1, -1)
    return inputs.to(dtype)


def small_site(
    kind: str,
    *,
    calibrated: bool = True,
    weighted: bool = False,
    dtype: torch.dtype = torch.float32,
    samples: int = 96,
    seed: int = 0,
) -> tuple[Site, nn.Module, Tensor]:
    """A site of one of :data:`LAYERS`.

    Parameters
    ----------
    calibrated
        With moments of all output positions.
    weighted
        With the gradients of a random nonlinear function of the outputs as well.

    Returns
    -------
    Site, nn.Module, Tensor
        The site, its layer and the inputs it was calibrated on.
    """
    small = LAYERS[kind]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layer = small.make().to(dtype)
    inputs = sample_inputs(
        small.shape, samples, channel=-1 if isinstance(layer, nn.Linear) else 0, dtype=dtype, seed=seed
    )
    model = nn.Sequential(layer, nn.Softplus())
    sites: Sites = find(model)
    if calibrated:
        sites = calibrate(model, sites, [inputs], rows=None)
    if weighted:
        sites = sensitivity(model, sites, [inputs])
    return sites["0"], layer, inputs


def measured_error(site: Site, weights: Sequence[Tensor], unit: str) -> float:
    """What replacing a site's weights loses, computed from the definition of the unit.

    Parameters
    ----------
    weights
        Canonical, one ``[g, o, i, *k]`` a layer, as :meth:`spectrim.Factors.dense` gives them.
    unit
        As reported by a method's curve.

    Raises
    ------
    ValueError
        For a unit that is not known.
    """
    if unit not in (WEIGHT_ENERGY, OUTPUT_ENERGY, WEIGHTED_ENERGY):
        raise ValueError(f"unit {unit!r} is none of {WEIGHT_ENERGY!r}, {OUTPUT_ENERGY!r}, {WEIGHTED_ENERGY!r}")
    if unit == WEIGHT_ENERGY:
        pairs = [(w.double(), w.double() - n.double()) for w, n in zip(site.weights, weights, strict=True)]
        return float(sum(d.square().sum() for _, d in pairs) / sum(w.square().sum() for w, _ in pairs))
    (new,) = weights
    g, o = site.weight.shape[:2]
    weight = site.weight.double().reshape(g, o, -1)
    missing = weight - new.double().reshape(g, o, -1)
    covariance = site.require("input", "measured_error").covariance
    outer = site.require("gradient", "measured_error").second_moment if unit == WEIGHTED_ENERGY else None
    lost, whole = (
        torch.einsum("gad,gde,gbe->gab", matrix, covariance, matrix)
        if outer is None
        else outer @ torch.einsum("gad,gde,gbe->gab", matrix, covariance, matrix)
        for matrix in (missing, weight)
    )
    return float(_trace(lost) / _trace(whole))


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
    _check_record(method)
    checked = 0
    for kind in layers if layers is not None else LAYERS:
        for calibrated, weighted in ((False, False), (True, False), (True, True)):
            site, layer, inputs = small_site(kind, calibrated=calibrated, weighted=weighted, dtype=dtype)
            try:
                curve = method.curve(site)
            except MissingMomentsError:
                if calibrated:
                    raise
                continue  # it needs data and says so
            where = f"{method.name} on {kind} ({curve.unit})"
            again = method.curve(site)
            _expect(curve.choices == again.choices and curve.errors == again.errors, f"{where}: the curve changes")
            _expect(len(curve.choices) == len(curve.errors), f"{where}: choices and errors differ in number")
            for choice, error in zip(curve.choices, curve.errors, strict=True):
                _expect(
                    math.isfinite(error) and 0 <= error <= 1 + 1e-9,
                    f"{where}: {choice} has error {error}, expected a number within 0 and 1",
                )
            for choice, error in _some(curve.choices, curve.errors):
                _check_choice(method, site, choice, error, curve.unit, tolerance, slack, where)
                checked += 1
            if isinstance(method, LowRankMethod):
                checked += _check_full_rank(method, site, layer, inputs, where)
    _expect(checked > 0, f"{method.name} offers nothing for any of the layers")
    return checked


def _some(choices: Sequence[Choice], errors: Sequence[float]) -> Iterator[tuple[Choice, float]]:
    """The first, the middle and the last choice of every run of equal settings other than the rank."""
    runs: dict[tuple[object, ...], list[int]] = {}
    for index, choice in enumerate(choices):
        fixed = tuple(sorted((k, v) for k, v in choice.settings.items() if isinstance(v, str)))
        runs.setdefault((choice.kind, fixed), []).append(index)
    for run in runs.values():
        for index in dict.fromkeys((run[0], run[len(run) // 2], run[-1])):
            yield choices[index], errors[index]


def _check_record(method: Method) -> None:
    _expect(from_record(method.record()) == method, f"{method.name}: from_record(record()) is another method")
    text = msgspec.json.encode(method.record())
    _expect(from_record(msgspec.json.decode(text)) == method, f"{method.name}: its record does not survive JSON")


def _check_choice(
    method: Method, site: Site, choice: Choice, error: float, unit: str, tolerance: float, slack: float, where: str
) -> None:
    factors = method.factorize(site, choice)
    dense = factors.dense()
    shapes, wanted = [tuple(w.shape) for w in dense], [tuple(w.shape) for w in site.weights]
    _expect(shapes == wanted, f"{where}: {choice} stands for weights {shapes}, expected {wanted}")
    _expect(
        all(torch.equal(a, b) for a, b in zip(dense, method.factorize(site, choice).dense(), strict=True)),
        f"{where}: {choice} gives other factors each time",
    )
    measured = measured_error(site, dense, unit)
    _expect(
        (1 - slack) * error - tolerance <= measured <= error + tolerance,
        f"{where}: {choice} should lose {error:.6f} and loses {measured:.6f}",
    )
    specs = method.layers(site, choice)
    modules = {id(m): m for part in build(factors, site.layers, site.biases) for m in part.modules()}
    leaves = [m for m in modules.values() if isinstance(getattr(m, "weight", None), Tensor)]
    found = sorted((tuple(canonical(m)[0].shape), m.bias is not None) for m in leaves)
    announced = sorted((spec.shape, spec.bias) for spec in specs if not spec.shared)
    _expect(found == announced, f"{where}: {choice} announces {announced} and builds {found}")
    if all(spec.density == 1 for spec in specs):
        stored = sum(p.numel() for m in leaves for p in m.parameters(recurse=False))
        counted = parameters(specs)
        _expect(stored == counted, f"{where}: {choice} has {stored} parameters, and costs count {counted}")
    plain = parameters([dataclasses.replace(spec, bias=False) for spec in specs])
    _expect(factors.numel() == plain, f"{where}: {choice} has numel() {factors.numel()}, and costs count {plain}")


def _check_full_rank(method: LowRankMethod, site: Site, layer: nn.Module, inputs: Tensor, where: str) -> int:
    epsilon = torch.finfo(site.weight.dtype).eps
    checked = 0
    with torch.no_grad():
        expected = layer(inputs).double()
        for how in unfoldings(site.spec.kernel):
            choice = method.choice(site, how, full_rank(site.spec, how), bias=site.spec.bias)
            (module,) = build(method.factorize(site, choice), site.layers, site.biases)
            found = module(inputs).double()
            apart = float((found - expected).abs().max() / expected.abs().max())
            _expect(apart < 24 * epsilon, f"{where}: {choice} should equal the layer and is {apart:.3g} apart")
            checked += 1
    return checked


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum()


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
