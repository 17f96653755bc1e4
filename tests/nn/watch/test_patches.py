from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from spectrim.linalg.moments import Moments
from spectrim.linalg.unfold import unfoldings
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.watch.patches import outputs_at, patches_at, slices_at, taps_at
from tests.nn.layers import LAYERS, close


def respond(module, patches):
    """``W x + b`` in the order ``[g, n, o]``."""
    weight, bias = canonical(module)
    out = torch.einsum("gof,gnf->gno", weight.flatten(2), patches.flatten(2))
    return out if bias is None else out + bias.reshape(weight.shape[0], 1, -1)


@pytest.fixture(params=LAYERS)
def layer(request):
    make, shape = LAYERS[request.param]
    module = make().double()
    return module, spec_of(module, ["layer"]), torch.randn(shape, dtype=torch.float64)


def test_weight_times_patches_is_the_output_at_all_positions(layer):
    module, spec, inputs = layer
    outputs = module(inputs)
    patches = patches_at(spec, inputs, None)
    assert patches.shape[0] == spec.groups
    assert patches.shape[2:] == spec.shape[2:]
    channels_last = outputs if spec.is_linear else outputs.movedim(1, -1)
    wanted = channels_last.reshape(-1, spec.groups, spec.out_channels // spec.groups).transpose(0, 1)
    assert close(respond(module, patches), wanted, 1e-12)
    assert torch.equal(outputs_at(spec, outputs, None), wanted)


@pytest.mark.table
@pytest.mark.parametrize("index", [[0], [3, 1, 4]])
def test_patches_and_outputs_at_an_index_are_of_the_same_positions(layer, index):
    module, spec, inputs = layer
    index = torch.tensor(index)
    patches, outputs = patches_at(spec, inputs, index), outputs_at(spec, module(inputs), index)
    assert torch.equal(patches, patches_at(spec, inputs, None)[:, index])
    assert close(respond(module, patches), outputs, 1e-12)


def test_output_shape_of_the_spec_is_that_of_the_layer(layer):
    module, spec, inputs = layer
    if not spec.is_linear:
        assert spec.output_shape(tuple(inputs.shape[2:])) == module(inputs).shape[2:]


@pytest.mark.parametrize("name", ["conv1d", "conv2d-grouped", "transposed2d", "conv3d"])
def test_an_input_without_a_batch_axis_is_a_batch_of_one(name):
    make, shape = LAYERS[name]
    spec, inputs = spec_of(make(), ["layer"]), torch.randn(shape[1:])
    assert torch.equal(patches_at(spec, inputs, None), patches_at(spec, inputs[None], None))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        lambda: nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=(2, 0), padding_mode="circular"),
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), padding=(1, 0)),
    ],
)
@pytest.mark.parametrize("few", [False, True])
def test_slices_are_those_of_the_patches_each_as_often_as_it_is_there(make, few):
    draw = torch.Generator().manual_seed(0)
    spec = spec_of(make(), ["layer"])
    inputs = torch.randn(3, 4, 7, 6, generator=draw, dtype=torch.float64)
    every = 3 * math.prod(spec.output_shape((7, 6)))
    index = torch.randperm(every, generator=draw)[: every // 4] if few else torch.arange(every)
    patches = taps_at(spec, inputs, index)
    for how, order in (("input", (0, 1, 2, 3, 4)), ("height-first", (0, 1, 3, 2, 4)), ("width-first", (0, 1, 2, 3, 4))):
        split = next(each for each in unfoldings((3, 3)) if each.name == how)
        whole = patches.permute(order).reshape(spec.groups, -1, split.sizes((3, 3))[0] * 4 // spec.groups)
        slices, counts = slices_at(spec, inputs, index, split)
        assert int(counts.sum()) == whole.shape[1]
        assert slices.shape[1] < whole.shape[1]
        one, two = Moments(*slices.shape[::2]), Moments(*slices.shape[::2])
        one.update(slices, counts)
        two.update(whole)
        assert one.count == two.count
        torch.testing.assert_close(one.mean, two.mean)
        torch.testing.assert_close(one.scatter, two.scatter)
