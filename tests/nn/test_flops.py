"""What is counted that torch's own counter leaves out, against the same work written out as matrix products."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spectrim.cost.counted import macs
from spectrim.nn.find import find
from spectrim.nn.flops import WorkCounter, unwatched
from spectrim.nn.watch.calibrate import calibrate

torch.manual_seed(0)
x = torch.randn(4, 10, 16)


def counted(run):
    with torch.no_grad(), WorkCounter() as counter:
        run()
    return counter.get_total_flops() / 2


def by_torch(run):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


def matrices(module):
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)


RECURRENT = {
    "one layer": {"num_layers": 1},
    "two layers": {"num_layers": 2},
    "both ways": {"num_layers": 2, "bidirectional": True},
    "without biases": {"num_layers": 1, "bias": False},
}


@pytest.mark.table
@pytest.mark.parametrize("options", RECURRENT.values(), ids=RECURRENT)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_uses_every_matrix_once_a_step(kind, options):
    module = kind(16, 24, batch_first=True, **options).eval()
    assert counted(lambda: module(x)) == 4 * 10 * matrices(module)
    # In double precision torch runs the layer as the products it is made of.
    assert counted(lambda: module.double()(x.double())) == by_torch(lambda: module(x.double()))
    assert counted(lambda: module(x.double())) == 4 * 10 * matrices(module)


def test_a_recurrent_layer_with_a_projection_of_its_states():
    module = nn.LSTM(16, 24, 2, batch_first=True, proj_size=8).eval()
    assert counted(lambda: module(x)) == 4 * 10 * matrices(module)


def test_complex_numbers_count_four_products_in_layers_as_in_all():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.cfloat))
    x = torch.randn(4, 8)

    def forward(model, batch):
        return model[1](model[0](batch).to(torch.cfloat)).abs()

    sites = calibrate(model, find(model), [x], forward=forward)
    assert macs(sites.untouched) == counted(lambda: forward(model, x)) / 4 - 64 == 4 * 64
    assert sites.other_macs == 0


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_recurrent_cell(kind):
    module = kind(16, 24)
    assert counted(lambda: module(x[0])) == 10 * matrices(module)


def test_the_lengths_of_packed_sequences_count():
    module, lengths = nn.LSTM(16, 24, batch_first=True).eval(), [10, 7, 7, 2]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    # What is shorter ends earlier: as many steps as the packed rows.
    assert counted(lambda: module(packed)) == pytest.approx(sum(lengths) * matrices(module), rel=0.1)


def test_a_bilinear_layer_uses_every_weight_once_a_row():
    module = nn.Bilinear(16, 16, 5)
    assert counted(lambda: module(x, x)) == 40 * module.weight.numel()


@pytest.mark.parametrize("length", [10, 40])  # above 25 torch multiplies matrices
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_distances_of_all_pairs(length, p):
    a, b = torch.randn(3, length, 16), torch.randn(3, 7, 16)
    assert counted(lambda: torch.cdist(a, b, p)) == 3 * length * 7 * 16


@pytest.mark.parametrize("length", [64, 100])
def test_fourier_transforms_by_the_textbook(length):
    signal = torch.randn(3, length)
    whole = 2.5 * 3 * length * torch.tensor(float(length)).log2().item()
    assert counted(lambda: torch.fft.fft(signal.to(torch.complex64))) == pytest.approx(whole, rel=1e-3)
    assert counted(lambda: torch.fft.rfft(signal)) == pytest.approx(whole / 2, rel=1e-3)
    assert counted(lambda: torch.fft.irfft(torch.fft.rfft(signal), n=length)) == pytest.approx(whole, rel=1e-3)


ATTENTION = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(10, 6, dtype=torch.bool)),
    "added mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(10, 6)),
    "values of another size": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :3]),
    "grouped heads": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    "written out": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "as sums": lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
}


@pytest.mark.parametrize("run", ATTENTION.values(), ids=ATTENTION)
def test_attention_in_every_form(run):
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    size = {"causal": (10, 8), "values of another size": (6, 3)}
    name = next(name for name, each in ATTENTION.items() if each is run)
    length, last = size.get(name, (6, 8))
    assert counted(lambda: run(q, k, v)) == 2 * 4 * 10 * length * (8 + last)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.TransformerEncoder(m, 2, enable_nested_tensor=False)])
def test_fused_layers_of_transformers_cost_what_their_parts_do(wrap):
    module = wrap(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)).eval()
    found, fast = [], torch.backends.mha.get_fastpath_enabled()
    try:
        for fused in (True, False):
            torch.backends.mha.set_fastpath_enabled(fused)
            found.append(counted(lambda: module(x)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    layers = 1 if isinstance(module, nn.TransformerEncoderLayer) else 2
    assert found == [layers * (40 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 4 * 10 * 10 * 16)] * 2


def test_fused_attention_of_padded_samples():
    module, fast = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(True)
        assert counted(lambda: module(x, x, x, need_weights=False)) == 40 * 4 * 16 * 16 + 2 * 4 * 10 * 10 * 16
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def test_a_layer_that_multiplies_a_part_of_a_parameter_is_counted_where_gradients_are_off():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.key = nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.key(self.table[:6]).mT

    module = Positions()
    with torch.no_grad():
        assert counted(lambda: module(torch.randn(3, 4))) == 6 * 16 * 4 + 3 * 4 * 6


PRODUCTS = {
    "matrix and vector": (lambda: x[0] @ x[0, 0], 10 * 16),
    "vectors": (lambda: x[0, 0] @ x[0, 0], 16),
    "added outer product": (lambda: torch.addr(torch.zeros(16, 16), x[0, 0], x[0, 0]), 16 * 16),
    "added products": (lambda: torch.addbmm(torch.zeros(10, 10), x, x.mT), 4 * 10 * 10 * 16),
    "sparse": (lambda: torch.sparse.mm(torch.eye(10).to_sparse(), x[0]), 10 * 16),
    "convolution over time": (
        lambda: torch.conv_tbc(torch.randn(5, 2, 3), torch.randn(3, 3, 4), torch.zeros(4)), 3 * 2 * 3 * 3 * 4
    ),
    "functional convolution": (lambda: F.conv2d(torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)), 2 * 4 * 36 * 27),
}  # fmt: skip


@pytest.mark.parametrize(("run", "macs"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_that_torch_leaves_out(run, macs):
    assert counted(run) == macs


def test_what_is_counted_in_inference_mode_is_the_same():
    module = nn.LSTM(16, 24, batch_first=True).eval()
    with torch.inference_mode(), WorkCounter() as counter:
        module(x)
    assert counter.get_total_flops() / 2 == 4 * 10 * matrices(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_layers_count_as_the_layers_they_were():
    dense = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    try:
        packed = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear})
        packed(x)
    except (RuntimeError, AttributeError):
        pytest.skip("no quantised kernels here")
    assert counted(lambda: packed(x)) == counted(lambda: dense(x))


class Decomposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, y):
        return torch.linalg.svdvals(self.layer(y))


def test_what_has_no_formula_is_named_with_its_module():
    model = nn.Sequential(nn.Linear(16, 16), Decomposed(), nn.ReLU(), nn.BatchNorm1d(4))
    model.eval()
    with torch.no_grad(), WorkCounter() as counter:
        model[:2](x)
        F.layer_norm(x, (16,)), x.softmax(-1), F.interpolate(x, 20), x.norm(), x.cumsum(0), x.sort(-1)
    ((operation, place),) = counter.uncounted_in(model[:2]).items()
    assert "svd" in operation
    assert place == "1"


@torch.library.custom_op("spectrim_tests::twice", mutates_args=())
def twice(y: torch.Tensor) -> torch.Tensor:
    return y * 2


def test_operations_of_other_libraries_are_named():
    with WorkCounter() as counter:
        twice(x)
    assert list(counter.uncounted) == ["spectrim_tests::twice"]


def test_macs_of_modules_add_up_to_the_whole():
    model = nn.Sequential(nn.Linear(16, 16), nn.LSTM(16, 24, batch_first=True)).eval()
    with torch.no_grad(), WorkCounter() as counter:
        model(x)
    assert counter.own_macs(model) == {"0": 40 * 256, "1": 40 * matrices(model[1])}
    assert counter.get_total_flops() / 2 == 40 * 256 + 40 * matrices(model[1])


def test_a_pause_counts_nothing():
    with WorkCounter() as counter:
        with unwatched():
            _ = x @ x.mT
        assert counter.get_total_flops() == 0
        _ = x @ x.mT
    assert counter.get_total_flops() / 2 == 4 * 10 * 10 * 16


@pytest.mark.parametrize(
    "kind", [lambda: nn.Linear(16, 5, dtype=torch.complex64), lambda: nn.Conv1d(10, 5, 1, dtype=torch.complex64)]
)
def test_a_product_of_complex_numbers_is_four_or_three_of_real_ones(kind):
    layer = kind()
    rows = 40 if isinstance(layer, nn.Linear) else 4 * 16
    times = 4 if isinstance(layer, nn.Linear) else 3  # torch makes three convolutions of it
    assert counted(lambda: layer(x.to(torch.complex64))) == times * rows * layer.weight.numel()


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, y):
        return nn.Sequential(self.a, nn.ReLU(), self.b)(y) @ y.new_ones(8, 3)


def test_layers_in_a_container_that_the_model_does_not_hold_keep_their_names():
    model = Unregistered()
    with torch.no_grad(), WorkCounter() as counter:
        model(x)
    assert counter.own_macs(model) == {"": 40 * 24, "a": 40 * 16 * 24, "b": 40 * 24 * 8}


class Meanwhile(nn.Linear):
    """Another thread is in the middle of another layer while this one computes."""

    def __init__(self, other):
        super().__init__(8, 4)
        self.other = other

    def forward(self, x):
        began, done = threading.Event(), threading.Event()

        def stay(*_):
            began.set()
            done.wait(10)

        self.other.register_forward_pre_hook(stay)
        thread = threading.Thread(target=self.other, args=(x,))
        thread.start()
        began.wait(10)
        try:
            return super().forward(x)
        finally:
            done.set()
            thread.join()


def test_what_runs_in_another_thread_is_none_of_a_models_work():
    model = nn.Sequential(nn.Linear(8, 2))
    model.append(Meanwhile(model[0]))
    with torch.no_grad(), WorkCounter() as counter:
        model[1](torch.randn(3, 8))
    assert counter.own_macs(model) == {"1": 3 * 8 * 4}
