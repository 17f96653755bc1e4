"""Small layers of every kind, weights of planted spectra, inputs as layers see them, and sites made of both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.network.sites import Group, Layer, Sites
from spectrim.nn.find import find
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.modules import make_layer
from spectrim.nn.watch.calibrate import calibrate
from spectrim.nn.watch.sensitivity import sensitivity


@dataclass(frozen=True)
class SmallLayer:
    """A layer to try things on."""

    make: Callable[[], nn.Module]  # makes it, from torch's global generator
    shape: tuple[int, ...]  # one sample of its input, without the batch axis


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
) -> tuple[Layer, nn.Module, Tensor]:
    """A site of one of :data:`LAYERS`.

    Parameters
    ----------
    calibrated
        With moments of all output positions.
    weighted
        With the gradients of a random nonlinear function of the outputs as well.

    Returns
    -------
    Layer, nn.Module, Tensor
        The site, its layer and the inputs it was calibrated on.
    """
    layer = _made(kind, dtype, seed)
    site, inputs = _sited(layer, LAYERS[kind].shape, samples, seed, calibrated=calibrated, weighted=weighted)
    return site, layer, inputs


def small_group(
    kind: str,
    *,
    number: int = 3,
    narrow: str | None = None,
    calibrated: bool = True,
    weighted: bool = False,
    same_input: bool = False,
    dtype: torch.dtype = torch.float32,
    samples: int = 96,
    seed: int = 0,
) -> tuple[Group, tuple[nn.Module, ...], tuple[Tensor, ...]]:
    """A site of several layers of one kind, as a group has them.

    Parameters
    ----------
    kind
        One of :data:`LAYERS`.
    number
        Of layers.
    narrow
        ``"inputs"`` or ``"outputs"``: the last layer has half as many of these channels.
    calibrated, weighted
        As for :func:`small_site`.
    same_input
        All layers see one input; otherwise each has inputs of its own.

    Returns
    -------
    Group, layers, inputs
        The site, its layers, called ``"0"``, ``"1"``, ..., and what each was calibrated on.

    Raises
    ------
    ValueError
        For another ``narrow``, or narrow inputs where all see the same.
    """
    if narrow not in (None, "inputs", "outputs") or (narrow == "inputs" and same_input):
        raise ValueError(
            f"narrow is {narrow!r}; expected None, 'outputs' or, where layers see inputs of their own, 'inputs'"
        )
    layers = [_made(kind, dtype, seed + n) for n in range(number)]
    shapes = [LAYERS[kind].shape] * number
    if narrow is not None:
        layers[-1] = _narrowed(layers[-1], narrow)
        if narrow == "inputs":
            channels, axis = spec_of(layers[-1], ("0",)).in_channels, -1 if isinstance(layers[-1], nn.Linear) else 0
            fewer = list(shapes[-1])
            fewer[axis] = channels
            shapes[-1] = tuple(fewer)
    parts: list[Layer] = []
    inputs: list[Tensor] = []
    for n, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        drawn = seed if same_input else seed + n
        site, seen = _sited(layer, shape, samples, drawn, calibrated=calibrated, weighted=weighted)
        parts.append(dataclasses.replace(site, spec=dataclasses.replace(site.spec, names=(str(n),))))
        inputs.append(seen)
    return Group("group", tuple(parts), same_input), tuple(layers), tuple(inputs)


def _made(kind: str, dtype: torch.dtype, seed: int) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LAYERS[kind].make().to(dtype)


def _narrowed(layer: nn.Module, side: str) -> nn.Module:
    """The layer with about half of its channels on a side."""
    spec = spec_of(layer, ("0",))
    weight, bias = canonical(layer)
    g, o, i, *_ = spec.shape
    if side == "inputs":
        i = max(2, i // 2)
    else:
        o = max(2, o // 2)
        bias = None if bias is None else bias.reshape(g, -1)[:, :o].reshape(-1)
    small = dataclasses.replace(spec, in_channels=g * i, out_channels=g * o)
    return make_layer(small, weight[:, :o, :i], bias)


def _sited(
    layer: nn.Module, shape: Sequence[int], samples: int, seed: int, *, calibrated: bool, weighted: bool
) -> tuple[Layer, Tensor]:
    """The site of a layer, and the inputs it was calibrated on."""
    dtype = next(layer.parameters()).dtype
    inputs = sample_inputs(shape, samples, channel=-1 if isinstance(layer, nn.Linear) else 0, dtype=dtype, seed=seed)
    model = nn.Sequential(layer, nn.Softplus())
    sites: Sites = find(model)
    if calibrated:
        sites = calibrate(model, sites, [inputs], rows=None)
    if weighted:
        sites = sensitivity(model, sites, [inputs])
    return sites.layer("0"), inputs


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
