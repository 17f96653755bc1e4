from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spectrim.cost.counted import Cost, macs, made_for, parameters, rank_multiple, size_bytes
from spectrim.cost.counted import register_width as register_width_here
from spectrim.linalg.unfold import unfoldings
from spectrim.network.layer import LayerSpec
from spectrim.nn.find import find

# (module, spatial shape of the input; rows for Linear)
LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (5,)),
    "linear-no-bias": (lambda: nn.Linear(12, 8, bias=False), (1,)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=1), (17,)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (9, 7)),
    "conv2d-strided": (lambda: nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(0, 2), bias=False), (9, 8)),
    "conv2d-dilated": (lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=1), (11, 9)),
    "conv2d-same": (lambda: nn.Conv2d(4, 8, (3, 4), dilation=(2, 1), padding="same"), (10, 9)),
    "conv2d-grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (6, 6)),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (6, 6)),
    "conv2d-1x1": (lambda: nn.Conv2d(8, 6, 1, stride=2), (7, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 6, (3, 1, 2), stride=(1, 2, 1)), (5, 6, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 4, 4, stride=3, padding=1, output_padding=2), (9,)),
    "transposed2d": (lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, output_padding=1), (5, 4)),
    "transposed2d-grouped": (lambda: nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2, dilation=2), (5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, (2, 3, 1), stride=(2, 1, 1)), (3, 4, 5)),
}


def spec_of(module: nn.Module, *inputs: tuple[int, ...]) -> LayerSpec:
    if isinstance(module, nn.Linear):
        return LayerSpec(
            ("layer",), module.in_features, module.out_features, bias=module.bias is not None, inputs=inputs
        )
    assert isinstance(module, nn.modules.conv._ConvNd)
    return LayerSpec(
        ("layer",),
        module.in_channels,
        module.out_channels,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
        dilation=tuple(module.dilation),
        output_padding=tuple(module.output_padding),
        groups=module.groups,
        transposed=module.transposed,
        padding_mode=module.padding_mode,
        bias=module.bias is not None,
        inputs=inputs,
    )


def module_of(spec: LayerSpec) -> nn.Module:
    if spec.is_linear:
        return nn.Linear(spec.in_channels, spec.out_channels, bias=spec.bias)
    options = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation, "groups": spec.groups}
    axes = len(spec.kernel) - 1
    if spec.transposed:
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes]
        options["output_padding"] = spec.output_padding
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes]
        options["padding_mode"] = spec.padding_mode
    return kind(spec.in_channels, spec.out_channels, spec.kernel, bias=spec.bias, **options)


def counted(module: nn.Module, spec: LayerSpec) -> float:
    (shape,) = spec.inputs
    x = torch.randn(*shape, spec.in_channels) if spec.is_linear else torch.randn(1, spec.in_channels, *shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops() / 2


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    module = make()
    return module, spec_of(module, shape)


def test_macs_are_half_the_flops(layer):
    module, spec = layer
    assert macs([spec]) == counted(module, spec)


def test_macs_of_pairs_are_half_the_flops(layer):
    _, spec = layer
    for how in unfoldings(spec.kernel):
        pair = spec.factor(how, 2)
        assert macs(pair) == counted(nn.Sequential(*map(module_of, pair)), spec), how.name


def test_parameters_and_bytes(layer):
    module, spec = layer
    numbers = sum(p.numel() for p in module.parameters())
    assert parameters([spec]) == numbers
    assert size_bytes([spec]) == 4 * numbers
    assert size_bytes([dataclasses.replace(spec, dtype=torch.bfloat16)]) == 2 * numbers
    for how in unfoldings(spec.kernel):
        pair = spec.factor(how, 3)
        assert parameters(pair) == sum(p.numel() for s in pair for p in module_of(s).parameters())


def test_calls_add_up():
    once = spec_of(nn.Conv2d(3, 4, 3), (8, 8))
    other = once.at(((6, 5),))
    assert macs([once.at(((8, 8), (6, 5)))]) == macs([once]) + macs([other]) == macs([once, other])
    assert parameters([once.at(((8, 8), (6, 5)))]) == parameters([once])


def test_a_shared_weight_is_computed_but_not_stored():
    spec = spec_of(nn.Linear(10, 4), (3,))
    shared = dataclasses.replace(spec, shared=math.prod(spec.shape))
    assert macs([shared]) == macs([spec])
    assert parameters([shared]) == 4  # the bias
    assert size_bytes([shared]) == 16


def test_density_thins_weights_and_not_biases():
    spec = dataclasses.replace(spec_of(nn.Linear(10, 4), (3,)), density=0.25)
    assert macs([spec]) == 30
    assert parameters([spec]) == 14
    assert size_bytes([spec]) == 56


def test_unknown_inputs_name_the_layer():
    spec = dataclasses.replace(spec_of(nn.Conv2d(3, 4, 3)), names=("stem.conv",))
    with pytest.raises(ValueError, match=r"'stem\.conv' \(Conv2d 3x3\).*calibrate"):
        macs([spec])
    assert parameters([spec]) == 112


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rank_multiple_leaves_enough_ranks(device, dtype, register_width):
    multiples = [rank_multiple(device, dtype, full) for full in range(1, 1200)]
    assert multiples == sorted(multiples)
    assert multiples[0] == 1
    on_cpu = register_width // 2 if dtype == torch.float64 else register_width
    assert multiples[-1] == (on_cpu if device == "cpu" else 8)
    assert all(m == 1 or full // m >= 16 for full, m in enumerate(multiples, 1))
    assert multiples == [rank_multiple(device, dtype, full, width=register_width) for full in range(1, 1200)]


def test_the_registers_are_those_of_the_cpu_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("SPECTRIM_REGISTER_WIDTH")
    for capability, expected in (("AVX2", 8), ("AVX512", 16)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert register_width_here() == expected
        assert rank_multiple("cpu", torch.float32, 512) == expected
    monkeypatch.setenv("SPECTRIM_REGISTER_WIDTH", "4")
    assert register_width_here() == 4
    with made_for({"register_width": 32}):
        assert register_width_here() == 32
        assert rank_multiple("cpu", torch.float32, 512) == 32
    assert register_width_here() == 4
    for wrong in ("wide", "0", "-8", "8.5"):
        monkeypatch.setenv("SPECTRIM_REGISTER_WIDTH", wrong)
        with pytest.raises(ValueError, match=f"SPECTRIM_REGISTER_WIDTH='{wrong}' is no whole number"):
            register_width_here()


@pytest.mark.parametrize("cost", [parameters, macs, size_bytes])
def test_a_network_in_place_of_layer_specs_is_told_where_its_cost_is(cost: Cost) -> None:
    net = nn.Sequential(nn.Linear(12, 8))
    sites = find(net)
    for given in (net, sites, list(net)):
        with pytest.raises(TypeError, match=rf"{cost.__name__} is given \w+: expected .*layer specs.*tabulate\(sites"):
            cost(given)  # type: ignore[arg-type]
