from __future__ import annotations

import pytest
import torch

from spectrim.nn.find import canonical, describe
from spectrim.nn.watch.patches import sample_outputs, sample_patches
from tests.nn.layers import LAYERS, close


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def respond(module, patches):
    """``W x + b`` in the order ``[g, n, o]``."""
    weight, bias = canonical(module)
    out = torch.einsum("gof,gnf->gno", weight.flatten(2), patches.flatten(2))
    return out if bias is None else out + bias.reshape(weight.shape[0], 1, -1)


@pytest.fixture(params=LAYERS)
def layer(request):
    make, shape = LAYERS[request.param]
    module = make().double()
    return module, describe(module, ["layer"]), torch.randn(shape, dtype=torch.float64)


def test_weight_times_patches_is_the_output_at_all_positions(layer):
    module, spec, inputs = layer
    outputs = module(inputs)
    patches = sample_patches(spec, inputs, None, seeded())
    assert patches.shape[0] == spec.groups
    assert patches.shape[2:] == spec.shape[2:]
    channels_last = outputs if spec.is_linear else outputs.movedim(1, -1)
    wanted = channels_last.reshape(-1, spec.groups, spec.out_channels // spec.groups).transpose(0, 1)
    assert close(respond(module, patches), wanted, 1e-12)
    assert torch.equal(sample_outputs(spec, outputs, None, seeded()), wanted)


@pytest.mark.parametrize("rows", [1, 5])
def test_sampled_patches_and_outputs_are_of_the_same_positions(layer, rows):
    module, spec, inputs = layer
    patches = sample_patches(spec, inputs, rows, seeded())
    outputs = sample_outputs(spec, module(inputs), rows, seeded())
    assert patches.shape[1] == outputs.shape[1] == rows
    assert close(respond(module, patches), outputs, 1e-12)


def test_output_shape_of_the_spec_is_that_of_the_layer(layer):
    module, spec, inputs = layer
    if not spec.is_linear:
        assert spec.output_shape(tuple(inputs.shape[2:])) == module(inputs).shape[2:]


@pytest.mark.parametrize("name", ["conv1d", "conv2d-grouped", "transposed2d", "conv3d"])
def test_an_input_without_a_batch_axis_is_a_batch_of_one(name):
    make, shape = LAYERS[name]
    spec, inputs = describe(make(), ["layer"]), torch.randn(shape[1:])
    assert torch.equal(sample_patches(spec, inputs, None, seeded()), sample_patches(spec, inputs[None], None, seeded()))


def test_more_rows_than_positions_gives_each_position_once():
    make, shape = LAYERS["conv2d"]
    spec, inputs = describe(make(), ["layer"]), torch.randn(shape)
    few, every = sample_patches(spec, inputs, 10_000, seeded()), sample_patches(spec, inputs, None, seeded())
    assert torch.equal(few, every)


def test_sampled_positions_do_not_repeat_and_cover_all_evenly():
    spec = describe(torch.nn.Linear(1, 1), ["layer"])
    rows = torch.arange(1000.0)[:, None]
    counts = torch.zeros(1000)
    for seed in range(200):
        picked = sample_patches(spec, rows, 100, seeded(seed)).flatten().long()
        assert len(picked.unique()) == 100
        counts[picked] += 1
    # A position is drawn one time in ten: 200 x 0.1 on average, standard deviation 4.2.
    assert 1 <= counts.min() <= counts.max() <= 45
    assert counts.reshape(10, 100).sum(1).tolist() == [2000] * 10
