from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from spectrim.linalg import csr
from spectrim.linalg.patterns import NofM, Taps, Unstructured, WholeChannels, taps
from spectrim.linalg.unfold import unfoldings
from spectrim.nn.export import export_onnx, export_program
from spectrim.nn.flops import WorkCounter
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.modules import Factored, make_layer
from spectrim.nn.sparse.layers import Cropped, Masked, Slim, Summed, laid_open, laid_out, sparse_layer
from spectrim.nn.sparse.products import Kernel
from tests.nn.layers import LAYERS, close

needs_csr = pytest.mark.skipif(not csr.is_available(), reason="this torch has no fast CSR products")
CSR_LAYERS = [
    "linear", "linear-tokens", "conv2d", "conv2d-1x1", "conv2d-oblong", "conv2d-dilated", "conv2d-valid", "conv2d-same",
]  # fmt: skip


def masked(plain, density=0.3, pattern=None):
    """A masked layer like a plain one, in evaluation mode."""
    spec = spec_of(plain, ("layer",))
    weight, bias = canonical(plain)
    pattern = pattern or Unstructured()
    mask = pattern.keep(weight.square(), density)
    return sparse_layer(spec, weight * mask, mask, pattern, bias).eval()


def summed(plain, density=0.3):
    """A pair and a masked layer in place of a plain one."""
    spec = spec_of(plain, ("layer",))
    how = unfoldings(spec.kernel)[0]
    pair = Factored(*(make_layer(s) for s in spec.factor(how, 2)), unfolding=how.name, original=spec)
    for parameter in pair.parameters():
        nn.init.normal_(parameter, std=0.3)
    alone = dataclasses.replace(spec, bias=False)
    weight, _ = canonical(plain)
    mask = Unstructured().keep(weight.square(), density)
    return Summed(pair, sparse_layer(alone, weight * mask, mask, Unstructured(), None), spec).eval()


def layer_of(name):
    make, shape = LAYERS[name]
    return make(), torch.randn(shape)


@pytest.fixture
def counted(monkeypatch):
    """How often a weight has been packed."""
    packs = []
    pack = csr.pack
    monkeypatch.setattr(csr, "pack", lambda weight: packs.append(1) or pack(weight))
    return packs


# --- what the layers compute


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_computes_what_its_whole_weight_does(name):
    plain, x = layer_of(name)
    spec = spec_of(plain, ("layer",))
    weight, _ = canonical(plain)
    modules = [masked(plain), summed(plain)]
    patterns = [WholeChannels(), *([] if spec.transposed or not spec.kernel else taps(weight.square()))]
    modules += [masked(plain, 0.5, p) for p in patterns if spec.allows(p)]
    assert {Masked, Summed, Slim} <= {type(m) for m in modules}
    for module in modules:
        whole, b = module.whole()
        same = make_layer(dataclasses.replace(spec, bias=b is not None), whole, b)
        with torch.no_grad():
            assert close(module(x), same(x), 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_layout_of_torch_and_the_canonical_one(name):
    plain, _ = layer_of(name)
    spec = spec_of(plain, ("layer",))
    weight, _ = canonical(plain)
    assert torch.equal(laid_out(weight, spec), plain.weight)
    assert torch.equal(laid_open(plain.weight, spec), weight)
    module = masked(plain)
    assert torch.equal(module.support, module.whole()[0] != 0)


@needs_csr
@pytest.mark.parametrize("name", LAYERS)
def test_csr_is_on_offer_where_it_is_right(name):
    plain, x = layer_of(name)
    module, total = masked(plain), summed(plain)
    assert (Kernel.CSR in module.kernels) == (name in CSR_LAYERS)
    if name not in CSR_LAYERS:
        with pytest.raises(ValueError, match="cannot run with"):
            module.kernel = Kernel.CSR
        return
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for made, sparse in ((module, module), (total, total.sparse)):
                wanted = made(x)
                sparse.kernel = Kernel.CSR
                given = made(x)
                assert sparse._packed is not None
                assert given.stride() == wanted.stride()
                assert close(given, wanted, 1e-5)
                sparse.kernel = Kernel.DENSE


def test_unknown_kernels_are_refused_by_name():
    module = masked(nn.Linear(8, 8))
    with pytest.raises(
        ValueError, match="Linear with the pattern 'unstructured' cannot run with Kernel.SEMI_STRUCTURED"
    ):
        module.kernel = Kernel.SEMI_STRUCTURED


def test_the_semi_structured_kernel_stays_dense_without_its_hardware():
    module = masked(nn.Linear(64, 32), pattern=NofM(2, 4))
    assert Kernel.SEMI_STRUCTURED in module.kernels
    assert Kernel.SEMI_STRUCTURED not in masked(nn.Linear(60, 32), pattern=NofM(2, 4)).kernels
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = module(x)
        module.kernel = Kernel.SEMI_STRUCTURED
        assert torch.equal(module(x), wanted)
        half, seen = copy.deepcopy(module).bfloat16(), x.bfloat16()
        assert torch.equal(half(seen), nn.functional.linear(seen, half.layer.weight, half.layer.bias))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_semi_structured_kernel_on_a_gpu(dtype):
    module = masked(nn.Linear(128, 64), pattern=NofM(2, 4)).to("cuda", dtype)
    x = torch.randn(2, 40, 128, device="cuda", dtype=dtype)
    with torch.no_grad():
        wanted = module(x)
        module.kernel = Kernel.SEMI_STRUCTURED
        assert close(module(x), wanted, 2e-2)
        assert module._packed is not None


# --- when the packed form is used


@needs_csr
@pytest.mark.parametrize(
    "change",
    {
        "in place": lambda m: m.layer.weight.mul_(2),
        "mask": lambda m: m.mask.fill_(True),
        "settle": lambda m: (m.mask.logical_and_(torch.rand(m.mask.shape) < 0.5), m.settle()),
        "data": lambda m: setattr(m.layer.weight, "data", m.layer.weight.data * 2),
        "data, then mode": lambda m: (m.layer.weight.data.mul_(2), m.eval()),
        "state": lambda m: m.load_state_dict({k: v * 2 if "weight" in k else v for k, v in m.state_dict().items()}),
        "state assigned": lambda m: m.load_state_dict(
            {k: v * 2 if "weight" in k else v for k, v in m.state_dict().items()}, assign=True
        ),
        "dtype": lambda m: m.double(),
        "parameter": lambda m: setattr(m.layer, "weight", nn.Parameter(m.layer.weight * 2)),
        "bias": lambda m: m.layer.bias.add_(1),
    }.items(),
    ids=lambda item: item[0],
)
def test_changes_are_seen(change):
    _, alter = change
    module = masked(nn.Linear(8, 6), 0.4)
    module.kernel = Kernel.CSR
    x = torch.randn(5, 8)
    with torch.no_grad():
        module(x)
        alter(module)
        x = x.to(module.layer.weight.dtype)
        assert close(module(x), nn.functional.linear(x, module.layer.weight, module.layer.bias), 1e-5)


@needs_csr
def test_a_weight_is_packed_once(counted):
    module = masked(nn.Linear(8, 6))
    module.kernel = Kernel.CSR
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(4, 8))
        assert len(counted) == 1
        module.layer.weight.add_(0)
        module(torch.randn(4, 8))
    assert len(counted) == 2


@needs_csr
@pytest.mark.parametrize(
    "what", ["gradient", "input gradient", "training", "autocast", "meta", "vmap", "counter", "bfloat16", "forward"]
)
def test_only_ordinary_calls_use_it(counted, what):
    module = masked(nn.Linear(8, 6))
    module.kernel = Kernel.CSR
    x = torch.randn(4, 8)
    weight, bias = module.layer.weight, module.layer.bias
    if what == "gradient":
        assert module(x).requires_grad
    elif what == "input gradient":
        module.requires_grad_(False)
        assert module(x.requires_grad_()).requires_grad
    elif what == "training":
        with torch.no_grad():
            module.train()(x)
    elif what == "autocast":
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
    elif what == "meta":
        with torch.no_grad():
            assert module.to("meta")(x.to("meta")).shape == (4, 6)
    elif what == "vmap":
        with torch.no_grad():
            assert close(vmap(module)(x), nn.functional.linear(x, weight, bias))
    elif what == "counter":
        with torch.no_grad(), WorkCounter() as counter:
            module(x[:1])
        assert counter.get_total_flops() == 2 * 8 * 6
    elif what == "forward":
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            y = module(torch.autograd.forward_ad.make_dual(x, x))
            assert close(torch.autograd.forward_ad.unpack_dual(y).tangent, nn.functional.linear(x, weight))
    else:
        with torch.no_grad():
            module = module.bfloat16()
            assert torch.equal(
                module(x.bfloat16()), nn.functional.linear(x.bfloat16(), module.layer.weight, module.layer.bias)
            )
    assert not counted


@needs_csr
def test_other_weights_for_one_call(counted):
    module = masked(nn.Linear(8, 6))
    module.kernel = Kernel.CSR
    x = torch.randn(4, 8)
    other = {name: value.detach() * 2 for name, value in module.named_parameters()}
    with torch.no_grad():
        assert close(functional_call(module, other, (x,)), 2 * module(x), 1e-5)


@needs_csr
def test_weights_made_in_inference_mode(counted):
    with torch.inference_mode():
        module = masked(nn.Linear(8, 6))
        module.kernel = Kernel.CSR
        assert module(torch.randn(3, 8)).shape == (3, 6)
    assert not counted


@needs_csr
def test_what_is_packed_in_inference_mode_is_used_outside_and_conversely():
    module = masked(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    module.kernel = Kernel.CSR
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        inside = module(x)
    with torch.no_grad():
        outside = module(x)
    assert torch.equal(inside, outside)
    assert outside.is_contiguous(memory_format=torch.channels_last)
    assert not outside.is_inference()


@needs_csr
def test_copies_and_files_are_without_the_packed_form():
    module = summed(nn.Linear(8, 6))
    keys = set(module.state_dict())
    module.sparse.kernel = Kernel.CSR
    x = torch.randn(3, 8)
    with torch.no_grad():
        wanted = module(x)
        assert module.sparse._packed is not None
        assert set(module.state_dict()) == keys == {"pair.0.weight", "pair.1.weight", "pair.1.bias", "sparse.mask",
                                                    "sparse.layer.weight"}  # fmt: skip
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
            assert twin.sparse._packed is None
            assert twin.sparse.kernel is Kernel.CSR
            assert torch.equal(twin(x), wanted)
            twin.sparse.layer.weight.zero_()
            assert not torch.equal(twin(x), wanted)
        assert torch.equal(module(x), wanted)
        fresh = summed(nn.Linear(8, 6))
        fresh.load_state_dict(module.state_dict())
        assert fresh.sparse.kernel is Kernel.DENSE
        assert close(fresh(x), wanted, 1e-5)


@needs_csr
def test_the_sum_adds_in_place_only_without_gradients():
    module = summed(nn.Linear(8, 6))
    module.sparse.kernel = Kernel.CSR
    x = torch.randn(4, 8, requires_grad=True)
    y = module(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    whole, _ = module.whole()
    assert close(grad, whole[0].sum(0).expand(4, 8), 1e-5)
    with torch.no_grad():
        assert close(module(x), y, 1e-5)
    kept = []
    module.pair.register_forward_hook(lambda m, args, out: kept.append(out))
    module.sparse.kernel = Kernel.DENSE
    with torch.no_grad():
        y = module(x)
    assert kept[0] is not y


# --- types and layouts


@pytest.mark.table
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types(name, dtype):
    plain, x = layer_of(name)
    module = summed(plain)
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 5e-2}[dtype]
    exact = copy.deepcopy(module).double()
    if Kernel.CSR in module.sparse.kernels:
        module.sparse.kernel = Kernel.CSR
    module = module.to(dtype)
    assert module.sparse.mask.dtype == torch.bool
    with torch.no_grad():
        given = module(x.to(dtype))
        assert given.dtype == dtype
        if dtype == torch.float64:
            assert close(given, exact.to(dtype)(x.to(dtype)), tolerance)
        else:
            assert close(given, exact(x.double()), tolerance)


@needs_csr
def test_half_precision_weights_are_kept_to_the_mask():
    module = masked(nn.Linear(16, 8)).half()
    module.kernel = Kernel.CSR
    with torch.no_grad():
        assert module(torch.randn(2, 16).half()).dtype == torch.float16
    assert not module.layer.weight[~module.mask].any()


# --- gradients


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d-grouped", "transposed2d", "conv1d-circular"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_training_keeps_zeros_exactly(name, optimizer):
    plain, x = layer_of(name)
    module = summed(plain).train()
    start = module.sparse.layer.weight.detach().clone()
    if optimizer == "momentum":
        steps = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)
    else:
        steps = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(4):
        steps.zero_grad()
        module(x).square().mean().backward()
        assert not module.sparse.layer.weight.grad[~module.sparse.mask].any()
        assert module.sparse.layer.weight.grad[module.sparse.mask].any()
        steps.step()
    weight = module.sparse.layer.weight
    assert torch.equal(weight[~module.sparse.mask], torch.zeros_like(weight[~module.sparse.mask]))
    assert not torch.equal(weight, start)


def test_gradients_are_those_of_the_dense_layer_inside_the_mask():
    module = masked(nn.Conv2d(3, 5, 3, padding=1)).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: nn.functional.conv2d(x, module.layer.weight * module.mask, b, padding=1), (x, module.layer.bias)
    )
    plain = copy.deepcopy(module.layer)
    module(x).sin().sum().backward()
    ours = module.layer.weight.grad
    plain(x).sin().sum().backward()
    torch.testing.assert_close(ours, plain.weight.grad * module.mask)


# --- export


class Net(nn.Module):
    """One layer of every kind that a sparse weight leads to."""

    def __init__(self):
        super().__init__()
        self.a = masked(nn.Conv2d(3, 8, 3, padding=1))
        self.b = masked(nn.Conv2d(8, 8, 3, padding=1), 0.5, WholeChannels())
        weight = torch.rand(1, 8, 8, 3, 3)
        self.c = masked(nn.Conv2d(8, 8, 3, padding=1), 0.5, taps(weight)[2])
        self.d = summed(nn.Conv2d(8, 8, 3, padding=1))
        self.e = summed(nn.Linear(8, 5))

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        x = torch.relu(self.d(torch.relu(self.c(x))))
        return self.e(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["program", pytest.param("onnx", marks=pytest.mark.slow), "trace"])
def test_exports_hold_plain_layers(way, tmp_path):
    net = Net().eval()
    assert [type(m) for m in (net.b, net.c)] == [Slim, Cropped]
    for module in net.modules():
        if isinstance(module, Masked):
            module.kernel = module.kernels[-1]
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        wanted = net(x)
    if way == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        assert export_onnx(net, x, tmp_path / "net.onnx") < 1e-4
    elif way == "program":
        assert export_program(net, x, tmp_path / "net.pt2") < 1e-4
        program = torch.export.load(tmp_path / "net.pt2")
        assert "sparse" not in program.graph_module.code.replace("sparse_layer", "").replace("sparse_mask", "")
    else:
        with torch.no_grad():
            traced = torch.jit.trace(net, x)
            assert close(traced(x[:2]), wanted[:2], 1e-4)


def test_no_warning_comes_from_packing():
    module = masked(nn.Linear(8, 6))
    if Kernel.CSR in module.kernels:
        module.kernel = Kernel.CSR
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert module(torch.randn(3, 8)).shape == (3, 6)
    assert "unstructured, density 0.292" in repr(module)


@needs_csr
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_frozen_weights_need_no_context(name, counted):
    plain, x = layer_of(name)
    module = summed(plain).requires_grad_(False)
    wanted = module(x)
    module.sparse.kernel = Kernel.CSR
    assert close(module(x), wanted, 1e-5)
    assert len(counted) == 1


@pytest.mark.parametrize("corner", [0, 2])
def test_a_position_may_lie_further_out_than_the_input_is_wide(corner):
    plain = nn.Conv2d(2, 3, 3, padding=6, dilation=6)
    x = torch.randn(2, 2, 4, 5)
    layer = masked(plain, pattern=Taps((1, 2), (corner, 0)))
    assert isinstance(layer, Cropped)
    weight = torch.zeros_like(plain.weight)
    weight[:, :, corner, :2] = plain.weight.detach()[:, :, corner, :2]
    wanted = functional_call(plain, {"weight": weight, "bias": plain.bias}, (x,))
    torch.testing.assert_close(layer(x), wanted)
