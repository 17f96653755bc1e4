from __future__ import annotations

import copy
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import spectrim as st
import spectrim.nn.watch.watchers as module_under_test
from spectrim.cost.counted import macs, parameters
from spectrim.errors import CalibrationError
from spectrim.linalg.unfold import unfoldings
from spectrim.nn.channels.graph import couple
from spectrim.nn.find import find
from spectrim.nn.layers import canonical
from spectrim.nn.surgery import parameter_count
from spectrim.nn.watch.calibrate import calibrate
from spectrim.nn.watch.patches import patches_at
from spectrim.pipeline.report import uncounted_work
from tests.nn.layers import LAYERS, ConvNet, Wrapped, close


def every_patch(site, inputs):
    return patches_at(site.spec, inputs, None).flatten(2).double()


def direct(rows):
    """Mean and centred second moment of ``[g, n, d]``."""
    mean = rows.mean(1)
    centred = rows - mean.unsqueeze(1)
    return mean, centred.transpose(1, 2) @ centred / rows.shape[1]


def same(first, second, tolerance=1e-6):
    return (
        first.count == second.count
        and close(first.mean, second.mean, tolerance)
        and close(first.covariance, second.covariance, tolerance)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_moments_of_every_layer_kind_equal_a_direct_computation(name):
    make, shape = LAYERS[name]
    model = Wrapped(make())
    batches = [torch.randn(shape) + 3 for _ in range(3)]
    site = calibrate(model, find(model), batches, rows=None)["layer"]
    mean, covariance = direct(torch.cat([every_patch(site, x) for x in batches], 1))
    moments = site.statistics.input
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    assert close(moments.mean, mean, 1e-6)
    assert close(moments.covariance, covariance)


def test_one_batch_or_many_make_no_difference():
    model, x = ConvNet().eval(), torch.randn(12, 3, 8, 8)
    sites = find(model)
    whole = calibrate(model, sites, [x], rows=None)
    parts = calibrate(model, sites, iter(x.split([5, 1, 6])), rows=None)
    assert whole.samples == parts.samples == 12
    for a, b in zip(whole, parts, strict=True):
        assert a.spec == b.spec
        assert same(a.statistics.input, b.statistics.input, 1e-5)


@pytest.mark.parametrize(
    ("amount", "count"),
    [({"rows": 480}, 480), ({"rows": 481}, 96 * 6), ({"positions": 7}, 96 * 7), ({"rows": "auto"}, 96 * 11)],
    ids=str,
)
def test_sampled_positions_estimate_the_same_moments(amount, count, monkeypatch):
    monkeypatch.setattr(module_under_test, "EFFORT", 0.0)
    monkeypatch.setattr(module_under_test, "FEWEST", 1000)
    model = Wrapped(nn.Conv2d(2, 4, 3, padding=1))
    batches = [torch.randn(8, 2, 8, 8) for _ in range(12)]
    moments = calibrate(model, find(model), batches, **amount)["layer"].statistics.input
    exact = calibrate(model, find(model), batches, rows=None)["layer"].statistics.input
    assert moments.count == count
    assert close(moments.covariance, exact.covariance, 0.2)
    assert not torch.equal(moments.covariance, exact.covariance)


def test_more_effort_samples_more_positions(monkeypatch):
    model, batches = Wrapped(nn.Conv2d(2, 4, 3, padding=1)), [torch.randn(16, 2, 16, 16)]
    monkeypatch.setattr(module_under_test, "EFFORT", 1.5)
    # A position costs 18 x 4 products in the layer and 18 x 18 in the statistics: of 256 a sample, one in three.
    assert calibrate(model, find(model), batches)["layer"].statistics.input.count == 16 * (256 // 3)


def test_the_same_seed_gives_the_same_bits():
    model, batches = Wrapped(nn.Conv2d(2, 4, 3)), [torch.randn(4, 2, 8, 8)]
    runs = [calibrate(model, find(model), batches, rows=20, seed=s)["layer"].statistics.input for s in (0, 0, 1)]
    assert torch.equal(runs[0].scatter, runs[1].scatter)
    assert not torch.equal(runs[0].scatter, runs[2].scatter)


def test_long_patches_keep_slices_of_each_unfolding_and_outputs(monkeypatch):
    monkeypatch.setattr(module_under_test, "FULL_PATCH", 20)
    model = Wrapped(nn.Conv2d(6, 4, (3, 2), groups=2))
    x = torch.randn(5, 6, 6, 6)
    sites = find(model)
    full = calibrate(model, sites, [x], rows=None)["layer"]
    assert set(full.statistics.names) == {"input"}  # 18 numbers
    monkeypatch.setattr(module_under_test, "FULL_PATCH", 17)
    site = calibrate(model, sites, [x], rows=None)["layer"]
    assert set(site.statistics.names) == {"slices", "output"}
    assert set(site.statistics.slices) == {"input", "height-first", "width-first"}
    patches = patches_at(site.spec, x, None).double()
    for how in unfoldings((3, 2))[1:]:
        kept = [a for a in range(2) if a in how.axes]
        rest = [a for a in range(2) if a not in how.axes]
        slices = patches.permute(0, 1, *(3 + a for a in rest), 2, *(3 + a for a in kept))
        mean, covariance = direct(slices.reshape(2, -1, 3 * how.sizes((3, 2))[0]))
        assert close(site.statistics.slices[how.name].mean, mean)
        assert close(site.statistics.slices[how.name].covariance, covariance)
    weight, bias = canonical(model.layer)
    outputs = torch.einsum("gof,gnf->gno", weight.double().flatten(2), patches.flatten(2))
    mean, covariance = direct(outputs + bias.reshape(2, 1, 2))
    assert close(site.statistics.output.mean, mean)
    assert close(site.statistics.output.covariance, covariance)


def test_a_wide_linear_layer_keeps_its_outputs_and_a_sketch_of_its_inputs(monkeypatch):
    monkeypatch.setattr(module_under_test, "FULL_LINEAR", 6)
    model, x = Wrapped(nn.Linear(7, 3)), torch.randn(9, 7)
    site = calibrate(model, find(model), [x])["layer"]
    assert set(site.statistics.names) == {"output", "sketch"}
    assert close(site.statistics.output.covariance, direct(model(x).detach().double()[None])[1])
    assert close(site.statistics.sketch.covariance, direct(x.double()[None])[1], 1e-5)


@dataclass
class Answer:
    logits: torch.Tensor


class Branches(nn.Module):
    """Two inputs, and outputs of any structure."""

    def __init__(self, wrap=lambda y: y):
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(3, 4), nn.Linear(2, 4), wrap

    def forward(self, x, y):
        return self.wrap(self.a(x) + self.b(y))


@pytest.mark.parametrize("shape", ["tuple", "nested", "dict", "UserDict", "dict and labels"])
@pytest.mark.parametrize("wrap", [Answer, lambda y: {"logits": y}, lambda y: (y, None)])
def test_batches_and_outputs_of_any_structure(shape, wrap):
    x, y, labels = torch.randn(6, 3), torch.randn(6, 2), torch.arange(6)
    batch = {
        "tuple": (x, y, labels),
        "nested": ((x, y), labels),
        "dict": {"y": y, "x": x},
        "UserDict": UserDict(x=x, y=y),
        "dict and labels": ({"x": x, "y": y}, labels),
    }[shape]
    model = Branches(wrap)
    sites = calibrate(model, find(model), [batch])
    assert close(sites["a"].statistics.input.covariance, direct(x.double()[None])[1])
    assert close(sites["b"].statistics.input.covariance, direct(y.double()[None])[1])
    assert sites.samples == 6


def test_another_way_to_run_the_model():
    model = Branches()
    batches = [{"left": torch.randn(5, 3), "right": torch.randn(5, 2)}]
    sites = calibrate(model, find(model), batches, forward=lambda m, b: m(b["left"], b["right"]))
    assert [s.name for s in sites] == ["a", "b"]
    assert sites.samples == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype):
    model = ConvNet().to(dtype)
    x = torch.randn(4, 3, 6, 6)
    sites = calibrate(model, find(model), [x], rows=None)
    moments = sites["stem"].statistics.input
    mean, covariance = direct(every_patch(sites["stem"], x.to(dtype)))
    assert close(moments.mean, mean, 1e-6)
    assert close(moments.covariance, covariance, 1e-12 if dtype == torch.float64 else 1e-5)
    assert all(s.statistics.input.is_finite() for s in sites)


def hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]


@pytest.mark.parametrize("broken", [False, True])
def test_modes_hooks_gradients_and_statistics_are_left_as_found(broken):
    model = ConvNet().train()
    model.after.eval()
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    modes, found, state = [m.training for m in model.modules()], hooks(model), copy.deepcopy(model.state_dict())
    everywhere = len(nn.modules.module._global_forward_hooks)
    batches = [torch.randn(2, 3, 6, 6), torch.randn(2, 4 if broken else 3, 6, 6)]
    if broken:
        with pytest.raises(RuntimeError):
            calibrate(model, find(model), batches)
        with pytest.raises(RuntimeError):
            calibrate(model, find(model), batches[1:])
    else:
        calibrate(model, find(model), batches)
        assert len(calls) == 2
    assert [m.training for m in model.modules()] == modes
    assert hooks(model) == found
    assert len(nn.modules.module._global_forward_hooks) == everywhere
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.stem.weight.grad, torch.ones_like(model.stem.weight))
    assert torch.is_grad_enabled()


def test_progress_is_reported_with_the_total_if_known():
    model, batches, seen = Wrapped(nn.Linear(3, 2)), [torch.randn(2, 3)] * 3, []
    calibrate(model, find(model), batches, progress=lambda *p: seen.append(p))
    calibrate(model, find(model), iter(batches), progress=lambda *p: seen.append(p))
    assert seen == [(1, 3), (2, 3), (3, 3), (1, None), (2, None), (3, None)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_name_the_layer_and_the_batch(bad):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    batches = [torch.randn(3, 12) for _ in range(3)]
    batches[2][1, 5] = bad
    with pytest.raises(CalibrationError, match="layer '1' .Linear. .* in calibration batch 2"):
        calibrate(model, find(model), batches)


def test_one_broken_position_is_found_though_few_are_sampled():
    model, x = Wrapped(nn.Conv2d(1, 4, 3)), torch.randn(2, 1, 40, 40)
    x[1, 0, 20, 20] = float("nan")
    with pytest.raises(CalibrationError, match="'layer'"):
        calibrate(model, find(model), [x], rows=1)


def test_overflow_of_half_precision_inside_the_network():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    with torch.no_grad():
        model[0].weight.fill_(60_000)
    with pytest.raises(CalibrationError, match="layer '1'"):
        calibrate(model, find(model), [torch.ones(2, 2)])


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batches_are_an_error(batches):
    model = ConvNet()
    with pytest.raises(CalibrationError, match="empty"):
        calibrate(model, find(model), batches)


@pytest.mark.parametrize("rows", [0, -1, 2.5, "all"])
def test_rows_of_another_kind_are_an_error(rows):
    model = ConvNet()
    with pytest.raises(ValueError, match="rows="):
        calibrate(model, find(model), [torch.randn(2, 3, 6, 6)], rows=rows)


def test_sites_of_another_model_are_an_error():
    with pytest.raises(CalibrationError, match="no layer 'stem'"):
        calibrate(nn.Sequential(nn.Linear(3, 2)), find(ConvNet()), [torch.randn(2, 3)])


def trained(model):
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    return model


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda net: trained(copy.deepcopy(net)), "the weight of layer '0' has other numbers in the sites"),
        (lambda net: copy.deepcopy(net).half(), "layer '0' is torch.float16 .* in the sites torch.float32"),
        (lambda net: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), r"1, 9, 6\] and in the .*1, 8, 6\]"),
        (lambda net: nn.Sequential(net[0]), "the model has no layer '2'"),
    ],
)  # fmt: skip
def test_sites_of_other_weights_are_told_before_any_work(other, said):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(32, 6)
    sites = calibrate(net, find(net), [x])
    plan = st.select(st.tabulate(sites), "parameters=70%")
    another = other(net)
    for call in (
        lambda: calibrate(another, sites, [x]),
        lambda: st.sensitivity(another, sites, [x]),
        lambda: st.apply(another, sites, plan),
        lambda: st.apply(another, sites, plan, [x]),
    ):
        with pytest.raises((CalibrationError, st.PlanError), match=said):
            call()
    # A copy of the same numbers is the same model.
    st.apply(copy.deepcopy(net), sites, plan, [x])


class Detours(nn.Module):
    """Runs its layers in another order than they are registered in, one of them twice and one never."""

    def __init__(self):
        super().__init__()
        self.last, self.unused, self.twice, self.first = (nn.Linear(4, 4) for _ in range(4))
        self.late = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.twice(torch.relu(self.twice(self.first(x))))
        return self.last(self.late(x) if self.calls > 1 else x)


def test_sites_come_in_order_of_execution_and_those_not_reached_are_skipped():
    model = Detours()
    before = find(model)
    assert [s.name for s in before] == ["last", "unused", "twice", "first", "late"]
    sites = calibrate(model, before, [torch.randn(3, 4)] * 2)
    assert [s.name for s in sites] == ["first", "twice", "late", "last"]
    assert [(s.name, s.reason) for s in sites.skipped] == [("unused", "never reached by the calibration batches")]
    assert [s.statistics.input.count for s in sites] == [6, 12, 3, 6]
    assert sites["twice"].spec.inputs == ((1,), (1,))
    assert sites["late"].spec.inputs == ((1,),)
    assert sites.seen
    assert sites.other_parameters == before.other_parameters + 20
    specs = [*(s.spec for s in sites), *sites.untouched]
    assert parameters(specs) + sites.other_parameters == parameter_count(model)
    assert macs(specs) + sites.other_macs == 16 * 5


def test_no_site_reached_is_an_error():
    class Idle(ConvNet):
        def forward(self, x):
            return x

    model = Idle()
    with pytest.raises(CalibrationError, match="none of the 4 sites was reached"):
        calibrate(model, find(model), [torch.randn(2, 3, 6, 6)])


def test_a_layer_that_gets_no_rows_counts_as_not_reached():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            return torch.cat([layer(part) for layer, part in zip(self.layers, (x, x[:0]), strict=True)])

    model = Experts()
    sites = calibrate(model, find(model), [torch.randn(3, 4)])
    assert [s.name for s in sites] == ["layers.0"]
    assert "never reached" in sites.skipped[0].reason


def test_a_shared_module_is_one_site_that_sees_all_calls():
    inner = nn.Linear(4, 4)
    model = nn.Sequential(inner, nn.ReLU(), inner)
    x = torch.randn(5, 4)
    (site,) = calibrate(model, find(model), [x])
    assert site.spec.names == ("0", "2")
    rows = torch.cat([x, torch.relu(inner(x))]).detach().double()[None]
    assert close(site.statistics.input.covariance, direct(rows)[1])
    assert macs([site.spec]) == 32


def test_a_transposed_layer_called_with_an_output_size_is_skipped():
    class Sized(Wrapped):
        def forward(self, x):
            return self.layer(self.before(x), output_size=(11, 11))

    model = Sized(nn.ConvTranspose2d(4, 4, 3, stride=2))
    model.before = nn.Conv2d(3, 4, 1)
    sites = calibrate(model, find(model), [torch.randn(2, 3, 5, 5)])
    assert [s.name for s in sites] == ["before"]
    assert "output_size" in sites.skipped[0].reason
    assert macs(sites.untouched) == 16 * 9 * 25


def test_an_input_given_by_keyword():
    class Keyword(Wrapped):
        def forward(self, x):
            return self.layer(input=x)

    model, x = Keyword(nn.Linear(3, 2)), torch.randn(4, 3)
    assert calibrate(model, find(model), [x])["layer"].statistics.input.count == 4


def test_frames_folded_into_the_batch_axis_count_as_calls_for_a_sample():
    class Clips(Wrapped):
        def forward(self, x):
            return self.layer(x.flatten(0, 1))

    model = Clips(nn.Conv2d(2, 3, 3))
    (site,) = calibrate(model, find(model), [torch.randn(2, 5, 2, 6, 6)])
    assert site.spec.inputs == ((6, 6),) * 5


def test_shapes_alone_are_learnt_from_the_first_batch():
    model, seen = ConvNet(), []

    def batches():
        for i in range(3):
            seen.append(i)
            yield torch.randn(2, 3, 6, 6)

    sites = calibrate(model, find(model), batches(), statistics=False)
    assert seen == [0]
    assert sites.seen
    assert sites.samples == 2
    assert not any(s.statistics for s in sites)


def test_fewer_samples_than_channels_are_taken_as_they_are():
    model, x = Wrapped(nn.Linear(12, 3)), torch.randn(2, 12)
    moments = calibrate(model, find(model), [x])["layer"].statistics.input
    assert moments.count == 2
    assert torch.linalg.matrix_rank(moments.covariance[0], rtol=1e-5) == 1


def test_memory_does_not_depend_on_the_number_of_samples():
    model = Wrapped(nn.Linear(12, 3))
    sizes = [calibrate(model, find(model), [torch.randn(50, 12)] * n)["layer"].statistics.input.nbytes for n in (1, 20)]
    assert sizes == [8 * (12 + 12 * 12)] * 2


class Attentive(nn.Module):
    """Convolution, fused and explicit attention, and a layer left alone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.block(self.depthwise(self.stem(x)).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("rows", ["auto", None])
def test_the_macs_of_all_parts_add_up_to_the_flop_counter(statistics, rows):
    model, x = Attentive().eval(), torch.randn(4, 3, 8, 8)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    sites = calibrate(model, find(model, skip="qkv"), [x], statistics=statistics, rows=rows)
    assert [s.name for s in sites] == ["stem", "block.linear1", "block.linear2", "head"]
    assert [s.name for s in sites.untouched] == ["depthwise", "qkv"]
    specs = [*(s.spec for s in sites), *sites.untouched]
    assert macs(specs) + sites.other_macs == counter.get_total_flops() / 2 / 4
    # Projections of the fused block, and the products of queries, keys and values twice.
    assert sites.other_macs == 16 * 8 * 32 + 2 * 2 * 16 * 16 * 8
    assert parameters(specs) + sites.other_parameters == parameter_count(model)


class Attended(nn.Module):
    """Queries, keys and values of one tensor, and layers that see something else."""

    def __init__(self, between=None, view=False):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.conv = nn.Conv1d(4, 3, 1)
        self.between, self.view = between, view

    def forward(self, x):
        x = x + 0.0
        q = self.q(x)
        if self.between is not None:
            self.between(x)
        k = self.k(x[:] if self.view else x)
        return self.out(q * k + self.v(x)) + self.conv(x).sum()


def test_layers_that_see_one_tensor_are_listed_together():
    model, x = Attended(), torch.randn(2, 4, 6)
    sites = find(model)
    assert sites.same_inputs == ()
    for statistics in (True, False):
        found = calibrate(model, sites, [x, x + 1], statistics=statistics)
        assert found.same_inputs == (("q", "k", "v", "conv"),)
    assert found.together("some", ["q", "v"]).same_input
    assert not found.together("some", ["q", "out"]).same_input


@pytest.mark.parametrize(
    ("model", "listed"),
    [
        (Attended(between=lambda x: x.add_(1)), (("k", "v", "conv"),)),
        (Attended(view=True), (("q", "v", "conv"),)),
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), ()),
        # In place, the activation hands on the very tensor that it was given, changed.
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), ()),
    ],
    ids=["changed in place", "a view", "one after the other", "changed before"],
)
def test_layers_that_see_another_tensor_are_not(model, listed):
    found = calibrate(model, find(model), [torch.randn(2, 4, 6)])
    assert found.same_inputs == listed


class Reused(nn.Module):
    """A layer that is called again with another tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.b(self.a(x) + self.b(x)) + self.c(x)


def test_layers_called_more_than_once_are_left_out_of_what_sees_one_tensor():
    model = Reused()
    assert calibrate(model, find(model), [torch.randn(2, 6)]).same_inputs == (("a", "c"),)


def test_tensors_that_are_gone_are_not_taken_for_those_in_their_place():
    class Fresh(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))

        def forward(self, x):
            total = 0
            for number, layer in enumerate(self.layers):
                # Each lives for one call, so that the next may get its address.
                total = total + float(layer(x + number).sum())
            return torch.tensor(total)

    model = Fresh()
    assert calibrate(model, find(model), [torch.randn(2, 6)]).same_inputs == ()


def test_layers_that_see_one_tensor_in_inference_mode():
    model, x = Attended(), torch.randn(2, 4, 6)

    def forward(net, batch):
        with torch.inference_mode():
            return net(batch)

    assert calibrate(model, find(model), [x], forward=forward).same_inputs == (("q", "k", "v", "conv"),)


def test_a_layer_that_is_not_reached_in_a_pass_is_in_no_list():
    class Gated(Attended):
        def forward(self, x):
            x = x + 0.0
            return self.q(x) + self.k(x)

    model = Gated()
    assert calibrate(model, find(model), [torch.randn(2, 6)]).same_inputs == (("q", "k"),)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.l, self.o = nn.Linear(8, 8), nn.LSTM(8, 16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.o(self.l(F.relu(self.a(x)))[0][:, -1])


def test_recurrent_layers_and_bilinear_forms_are_work_beside_the_sites():
    model = Recurrent().eval()
    sites = calibrate(model, find(model), [torch.randn(4, 5, 8)])
    recurrent = 5 * 4 * 16 * (8 + 16 + 16 + 16)
    assert sites.other_macs == recurrent
    assert dict(sites.work) == {"l": recurrent}
    assert macs([s.spec for s in sites]) + sites.other_macs == 5 * 8 * 8 + recurrent + 16 * 4
    assert not sites.uncounted


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.values = nn.Linear(8, 8), nn.Identity()

    def forward(self, x):
        return torch.linalg.svdvals(self.a(x).unsqueeze(1))


class Same(nn.Conv2d):
    """Pads by itself, as layers from TensorFlow do."""

    def forward(self, x):
        return self._conv_forward(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


def test_what_a_layer_does_in_its_own_way_is_counted():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), Same(8, 8, 3, stride=2)).eval(), torch.randn(4, 3, 10, 10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    sites = calibrate(model, find(model), [x])
    known = macs([site.spec for site in sites]) + macs(sites.untouched)
    assert known + sites.other_macs == counter.get_total_flops() / 2 / 4 > known


def test_work_that_cannot_be_counted_is_told():
    model = nn.Sequential(Spectral())
    sites = calibrate(model, find(model), [torch.randn(4, 8)])
    (operation,) = sites.uncounted
    assert sites.uncounted[operation] == "0"
    (sentence,) = uncounted_work(sites)
    assert f"{operation} in 0" in sentence


class TwoEnds(nn.Module):
    """Ends early for some batches, where another layer reads what both ways have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.early, self.late = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.early(x) if x.shape[0] == 5 else self.late(torch.relu(self.second(x)))


def test_channels_that_other_layers_read_in_later_batches_stay():
    model = TwoEnds().eval()
    long, short = torch.randn(4, 6), torch.randn(5, 6)
    found = couple(model, find(model), long)
    assert {c.name for c in calibrate(model, found, [long, long]).couplings} >= {"first:out", "second:out"}
    sites = calibrate(model, found, [long, short])
    assert "first:out" not in {c.name for c in sites.couplings}
    assert "second:out" in {c.name for c in sites.couplings}
    (reason,) = (skipped.reason for skipped in sites.skipped if skipped.name == "first:out")
    assert "different ways" in reason


class OfSeveralLengths(nn.Module):
    """Sequences of several lengths without padding, in one of three layers."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.layout = layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.table(x)
        ragged = torch.nested.as_nested_tensor([x[:2], x[2:]], layout=self.layout)
        return self.b(torch.cat(list(self.a(ragged).relu().unbind())))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_layer_that_is_given_nested_tensors_is_left_alone_and_counted(layout: torch.layout) -> None:
    words = [torch.randint(9, (8,)) for _ in range(3)]
    model = OfSeveralLengths(layout).eval()
    sites = calibrate(model, find(model), words)
    assert [site.name for site in sites] == ["table", "b"]
    assert "nested tensor" in next(each.reason for each in sites.skipped if each.name == "a")
    assert sites.other_macs == 0
    assert sum(spec.in_channels * spec.out_channels * spec.rows for spec in sites.untouched) == 64
    assert [site.name for site in calibrate(model, find(model, skip="a"), words)] == ["table", "b"]
