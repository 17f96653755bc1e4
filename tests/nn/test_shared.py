"""Layers with a factor in common: one parameter in several modules, through all that is done with modules."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectrim.linalg.unfold import unfolding, unfoldings
from spectrim.network.choices import Choice
from spectrim.network.factors import SharedBasis
from spectrim.nn.build import build, skeleton
from spectrim.nn.export import export_onnx, export_program
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.modules import Factored, make_layer
from spectrim.nn.shared import Once, Wide
from spectrim.nn.surgery import merge, parameter_count, size_in_bytes
from tests.cases import one_thread
from tests.nn.layers import close


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# Layer number ``n`` of a group with so many inputs and outputs: strides and paddings may differ within it.
Make = Callable[[int, int, int], nn.Module]
KINDS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda n, i, o: nn.Linear(i, o), ()),
    "conv1d": (lambda n, i, o: nn.Conv1d(i, o, 3, stride=1 + n, padding=1), (9,)),
    "conv2d": (lambda n, i, o: nn.Conv2d(i, o, 3, stride=2 - n % 2, padding=1), (6, 5)),
    "conv2d-1x1": (lambda n, i, o: nn.Conv2d(i, o, 1, stride=1 + n), (5, 5)),
    "conv2d-grouped": (lambda n, i, o: nn.Conv2d(i, o, (3, 2), groups=2, padding=n), (5, 6)),
    "conv2d-reflect": (lambda n, i, o: nn.Conv2d(i, o, 3, padding=(2, 1), padding_mode="reflect"), (6, 6)),
    "conv2d-same": (lambda n, i, o: nn.Conv2d(i, o, 3, padding="same", dilation=(1, 1 + n)), (6, 6)),
    "conv2d-unbiased": (lambda n, i, o: nn.Conv2d(i, o, 3, bias=False), (5, 5)),
    "conv3d": (lambda n, i, o: nn.Conv3d(i, o, (3, 1, 2), stride=(1 + n, 1, 1)), (4, 3, 4)),
    "transposed2d": (lambda n, i, o: nn.ConvTranspose2d(i, o, 3, stride=2, output_padding=n % 2), (4, 3)),
    "transposed2d-grouped": (lambda n, i, o: nn.ConvTranspose2d(i, o, (3, 2), stride=1 + n, groups=2), (4, 3)),
}
SHARES = ("left", "right", "both")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
WIDTHS = {
    "left": [(4, 6), (4, 8), (4, 6)],
    "right": [(4, 6), (8, 6), (4, 6)],
    "both": [(4, 6), (4, 6), (4, 6)],
    "once": [(4, 6), (4, 6), (4, 6)],
}
RANKS = {"left": (2, 2), "right": (2, 0), "both": (3, 1), "once": (2, 2)}


@dataclasses.dataclass
class Group:
    """Layers of a kind, random factors that some of them share, and the modules made of these."""

    layers: list[nn.Module]
    factors: SharedBasis
    modules: tuple[nn.Module, ...]
    inputs: list[Tensor]

    def dense(self) -> list[nn.Module]:
        """The layers that the factors stand for."""
        weights = self.factors.dense()
        return [
            make_layer(spec_of(layer, ["layer"]), weight, layer.bias)
            for layer, weight in zip(self.layers, weights, strict=True)
        ]

    def tied(self) -> list[list[nn.Parameter]]:
        """Parameters of the shared factors, as every layer has them."""
        left_rank, right_rank = self.factors.ranks
        found = []
        for module in self.modules:
            first, second = part(module[0], 0) if left_rank else None, part(module[1], -1) if right_rank else None
            found.append([layer.weight for layer in (first, second) if layer is not None])
        return [list(same) for same in zip(*found, strict=True)]


def part(layer: nn.Module, number: int) -> nn.Module:
    if isinstance(layer, Once):
        return layer.layer
    return layer.parts[number] if isinstance(layer, Wide) else layer


def settings(share: str, how: str = "channel") -> dict[str, str | int | bool]:
    rank, left_rank = RANKS[share]
    return {"unfolding": how, "rank": rank, "left_rank": left_rank, "once": share == "once"}


def group(kind: str, share: str, dtype: torch.dtype = torch.float32, *, how: str = "channel") -> Group:
    make, shape = KINDS[kind]
    layers = [make(n, i, o).to(dtype) for n, (i, o) in enumerate(WIDTHS[share])]
    specs = [spec_of(layer, [f"layer{n}"]) for n, layer in enumerate(layers)]
    empty = SharedBasis.empty([spec.shape for spec in specs], Choice("shared_basis", "m", settings(share, how)))

    def drawn(shaped: Tensor) -> Tensor:
        return (torch.randn(shaped.shape, dtype=torch.float64) / 2).to(dtype)

    factors = dataclasses.replace(
        empty,
        own_lefts=tuple(map(drawn, empty.own_lefts)),
        shared_right=drawn(empty.shared_right),
        shared_left=drawn(empty.shared_left),
        own_rights=tuple(map(drawn, empty.own_rights)),
    )
    modules = build(factors, specs, [None if layer.bias is None else layer.bias.detach() for layer in layers])
    inputs = [torch.randn(2, i, *shape, dtype=dtype) for i, _ in WIDTHS[share]]
    return Group(layers, factors, modules, inputs)


CASES = [("linear", "once"), *((kind, share) for kind in KINDS for share in SHARES)]
FEW = [("linear", "once"), ("conv2d", "right"), ("conv2d", "both"), ("conv2d-grouped", "both")]


@pytest.mark.table
@pytest.mark.parametrize(
    ("kind", "share", "dtype"),
    [
        *((*case, torch.float64) for case in CASES),
        *((*case, dtype) for case in FEW for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_modules_compute_the_product_with_one_parameter_for_what_is_shared(kind, share, dtype):
    for how in unfoldings(spec_of(KINDS[kind][0](0, 4, 6), ["layer"]).kernel):
        made = group(kind, share, dtype, how=how.name)
        for module, layer, x in zip(made.modules, made.dense(), made.inputs, strict=True):
            assert close(module(x), layer(x), TOLERANCE[dtype])
            assert module.rank == sum(made.factors.ranks)
        assert len(made.tied()) == (2 if share == "both" else 1)
        for same in made.tied():
            assert all(parameter is same[0] for parameter in same)
        biases = sum(layer.bias.numel() for layer in made.layers if layer.bias is not None)
        model = nn.ModuleList(made.modules)
        assert parameter_count(model) == made.factors.numel() + biases
        assert size_in_bytes(model) == parameter_count(model) * dtype.itemsize


@pytest.mark.parametrize(("kind", "share"), [*FEW, ("transposed2d-grouped", "both"), ("conv2d-same", "left")])
def test_merged_layers_are_plain_and_compute_the_same(kind, share):
    made = group(kind, share)
    model = nn.ModuleList(made.modules)
    merged = merge(model)
    assert all(isinstance(module, Factored) for module in model)
    for layer, module, old, x in zip(merged, made.modules, made.layers, made.inputs, strict=True):
        assert type(layer) is type(old)
        assert spec_of(layer, ["layer"]) == spec_of(old, ["layer"])
        assert close(layer(x), module(x), 1e-5)
    assert len({parameter.data_ptr() for parameter in merged.parameters()}) == len(list(merged.parameters()))


@pytest.mark.parametrize(("kind", "share"), [*FEW, ("transposed2d-grouped", "both")])
def test_the_gradient_of_a_shared_parameter_is_the_sum_over_its_uses(kind, share):
    made = group(kind, share, torch.float64)
    sum(module(x).square().sum() for module, x in zip(made.modules, made.inputs, strict=True)).backward()
    apart = [copy.deepcopy(module) for module in made.modules]
    for module in apart:
        module.zero_grad()
    sum(module(x).square().sum() for module, x in zip(apart, made.inputs, strict=True)).backward()
    one, *others = [list(module.parameters()) for module in apart]
    held = {id(same[0]) for same in made.tied()}
    for number, parameter in enumerate(made.modules[0].parameters()):
        wanted = one[number].grad
        if id(parameter) in held:
            wanted = wanted + sum(other[number].grad for other in others)
        assert close(parameter.grad, wanted, 1e-12)


def ties(model: nn.Module) -> list[list[str]]:
    """Names of every parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "to dtype": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "half": lambda model: model.half(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "frozen and back": lambda model: model.requires_grad_(False).requires_grad_(True),
    "to nowhere and back": lambda model: model.to("cpu").cpu().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("kind", "share"), FEW)
def test_what_is_shared_stays_shared(kind, share, change):
    made = group(kind, share)
    model = nn.ModuleList(made.modules)
    before, count = ties(model), parameter_count(model)
    wanted = [module(x) for module, x in zip(model, made.inputs, strict=True)]
    assert len(before) == len(made.tied())
    model = CHANGES[change](model)
    assert ties(model) == before
    assert parameter_count(model) == count
    tolerance = 3e-2 if change in ("to dtype", "half") else 1e-5
    for module, x, y in zip(model, made.inputs, wanted, strict=True):
        assert close(module(x.to(next(model.parameters()).dtype)), y, tolerance)


@pytest.mark.parametrize(("kind", "share"), FEW)
def test_an_optimizer_has_every_parameter_once_and_moves_all_uses(kind, share):
    made = group(kind, share)
    model = nn.ModuleList(made.modules)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = [id(parameter) for g in optimizer.param_groups for parameter in g["params"]]
    assert len(held) == len(set(held))
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == parameter_count(model)
    before = [same[0].detach().clone() for same in made.tied()]
    sum(module(x).square().sum() for module, x in zip(model, made.inputs, strict=True)).backward()
    optimizer.step()
    for same, old in zip(made.tied(), before, strict=True):
        assert all(torch.equal(parameter, same[0]) for parameter in same)
        assert close(same[0], old - 0.1 * same[0].grad)


@pytest.mark.parametrize(("kind", "share"), FEW)
def test_state_dicts_have_every_name_and_load_into_a_skeleton(kind, share):
    made = group(kind, share)
    specs = [spec_of(layer, [f"layer{n}"]) for n, layer in enumerate(made.layers)]
    again = nn.ModuleList(skeleton(Choice("shared_basis", "m", settings(share)), specs))
    model = nn.ModuleList(made.modules)
    assert ties(again) == ties(model)
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    for one, other, x in zip(again, model, made.inputs, strict=True):
        assert torch.equal(one(x), other(x))


class Three(nn.Module):
    """Three layers on one input, as queries, keys and values are."""

    def __init__(self, modules):
        super().__init__()
        self.q, self.k, self.v = modules

    def forward(self, x):
        return self.q(x).tanh() + self.k(x).sin() * self.v(x)


class Mixed(nn.Module):
    """Convolutions that share both factors, then layers on one input whose shared factor is most of the model."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular") for _ in range(3))
        self.wide = nn.Linear(4, 2048)
        self.three = Three(nn.Linear(2048, 8) for _ in range(3))
        choices = (
            {"unfolding": "height-first", "rank": 5, "left_rank": 2},
            {**settings("once"), "rank": 8, "left_rank": 8},
        )
        for owner, choice in zip((self.blocks, self.three), choices, strict=True):
            names, layers = zip(*owner.named_children(), strict=True)
            specs = [spec_of(layer, [name]) for name, layer in zip(names, layers, strict=True)]
            for name, module in zip(names, skeleton(Choice("shared_basis", "m", choice), specs), strict=True):
                setattr(owner, name, module)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.three(torch.relu(self.wide(x.mean((2, 3)))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("export", [export_program, pytest.param(export_onnx, marks=pytest.mark.slow)])
def test_exports_compute_the_same_and_store_what_is_shared_once(export, tmp_path):
    if export is export_onnx:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = Mixed().eval()
    assert export(model, torch.randn(4, 4, 6, 6), tmp_path / "model") < 1e-4
    stored = sum(file.stat().st_size for file in tmp_path.iterdir())
    shared = model.three.q[0].layer.weight.numel() * 4
    assert size_in_bytes(model) < stored < size_in_bytes(model) + 1.5 * shared


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_traced_and_compiled_models_compute_the_same():
    model, x = Mixed().eval(), torch.randn(4, 4, 6, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for traced in (torch.fx.symbolic_trace(model), torch.jit.trace(model, (x,)), compiled):
        other = torch.randn_like(x)
        assert close(traced(other), model(other), 1e-4)
    compiled(x).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(close(a, p.grad, 1e-4) for a, p in zip(found, model.parameters(), strict=True))


# A layer that is computed once.


def once(calls: int = 3) -> tuple[Once, list[int]]:
    """A linear layer for several callers, and the number of times it is computed."""
    layer = nn.Linear(6, 4, bias=False)
    count = [0]

    def hook(*_: object) -> None:
        count[0] += 1

    layer.register_forward_hook(hook)
    return Once(layer, spec_of(layer, ["layer"]), calls), count


def test_three_calls_with_one_tensor_compute_it_once_and_keep_nothing():
    shared, count = once()
    x = torch.randn(5, 6)
    answers = [shared(x) for _ in range(3)]
    assert count == [1]
    assert all(answer is answers[0] for answer in answers)
    assert torch.equal(answers[0], shared.layer(x))
    gone = weakref.ref(answers.pop())
    answers.clear()
    assert gone() is None


def rewrite(x: Tensor, shared: Once) -> Tensor:
    x.mul_(2)
    return x


def train(x: Tensor, shared: Once) -> Tensor:
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1)
    shared.layer(x.detach()).sum().backward()
    optimizer.step()
    return x


def reweigh(x: Tensor, shared: Once) -> Tensor:
    with torch.no_grad():
        shared.layer.weight.mul_(2)
    return x


def replace(x: Tensor, shared: Once) -> Tensor:
    shared.layer.weight = nn.Parameter(torch.ones_like(shared.layer.weight))
    return x


ASKED_ANEW = {
    "another tensor": lambda x, shared: x.clone(),
    "a view": lambda x, shared: x[:],
    "tensor changed in place": rewrite,
    "weight changed in place": reweigh,
    "another weight": replace,
    "a step of an optimizer": train,
    "another dtype": lambda x, shared: x.to(next(shared.double().parameters()).dtype),
}


@pytest.mark.parametrize("change", ASKED_ANEW)
@pytest.mark.parametrize("grad", [True, False])
def test_another_question_is_answered_anew(change, grad):
    shared, count = once()
    with torch.set_grad_enabled(grad):
        x = torch.randn(5, 6)
        shared(x)
        with torch.enable_grad():
            x = ASKED_ANEW[change](x, shared)
        count[0] = 0
        answer = shared(x)
        assert count == [1]
        assert torch.equal(answer, shared.layer(x))


def test_a_weight_swapped_for_one_call_is_noticed():
    shared, count = once()
    x = torch.randn(5, 6)
    answers = [
        torch.func.functional_call(shared, {"layer.weight": torch.full((4, 6), float(n))}, (x,)) for n in range(3)
    ]
    assert count == [3]
    assert [float(answer[0, 0]) for answer in answers] == pytest.approx([n * float(x[0].sum()) for n in range(3)], 1e-5)


MODES = {
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "other autocast": lambda: torch.autocast("cpu", torch.float16),
}


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_an_answer_holds_in_its_own_mode_alone(first, second):
    shared, count = once()
    x = torch.randn(5, 6)
    with MODES[first]():
        wanted = shared.layer(x)
        count[0] = 0
        shared(x)
    with MODES[second]():
        answer = shared(x)
        plain = shared.layer(x)
    assert (answer.dtype, answer.requires_grad, answer.is_inference()) == (
        plain.dtype, plain.requires_grad, plain.is_inference(),
    )  # fmt: skip
    assert torch.equal(answer, plain)
    assert count == [2 if first == second else 3]
    assert first != second or torch.equal(answer, wanted)


def three(dtype: torch.dtype = torch.float32) -> tuple[Three, list[int]]:
    """Three layers that compute their first factor once, and the number of times that it is computed."""
    model, count = Three(group("linear", "once", dtype).modules), [0]

    def hook(*_: object) -> None:
        count[0] += 1

    for pair in (model.q, model.k, model.v):
        pair[0].layer.register_forward_hook(hook)
    return model, count


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_computes_once_and_answers_right(mode):
    model, count = three()
    plain = merge(model)
    for step in range(3):
        with MODES[mode]():
            x = torch.randn(5, 4)
            y = model(x)
        with torch.inference_mode():
            assert close(y, plain(x), 5e-2 if "autocast" in mode else 1e-5)
        assert count == [step + 1]
        assert model.q[0]._kept.held is None


def test_training_computes_once_a_step_and_moves_as_plain_layers_do():
    model, count = three()
    plain = copy.deepcopy(model)
    for pair in (plain.q, plain.k, plain.v):
        pair[0] = pair[0].layer
        pair[0]._forward_hooks.clear()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, plain)]
    x = torch.randn(5, 4)
    for _ in range(4):
        # One and the same batch: neither the weights from before nor a graph that is gone may be used.
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert count == [4]
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert close(one, other, 1e-5)


def test_gradients_add_up_over_batches_that_are_the_same_tensor():
    model, count = three()
    x = torch.randn(5, 4)
    model(x).sum().backward()
    first = model.q[0].layer.weight.grad.clone()
    model(x).sum().backward()
    assert close(model.v[0].layer.weight.grad, 2 * first)
    assert count == [2]


def test_a_layer_whose_parameters_are_no_longer_the_same_answers_for_itself():
    model, count = three()
    model.k[0].layer.weight = nn.Parameter(torch.zeros(2, 4))
    x = torch.randn(5, 4)
    assert torch.equal(model.k(x), model.k[1].bias.expand(5, 6))
    assert close(model(x), merge(model)(x))
    assert count == [4]


def test_a_graph_that_is_gone_is_not_asked_again():
    shared, count = once()
    x = torch.randn(5, 6)
    (shared(x) + shared(x)).sum().backward()
    assert shared._kept.held is None
    shared(x).sum().backward()
    assert count == [2]


def test_a_pass_that_broke_off_leaves_nothing_once_its_input_is_gone():
    shared, count = once()
    x = torch.randn(5, 6)
    with torch.no_grad():
        gone = weakref.ref(shared(x))
    assert gone() is not None
    del x
    assert gone() is None
    assert shared._kept.held is None
    assert count == [1]


def test_nothing_is_left_of_a_pass_with_gradients():
    shared, _ = once()
    tensors = []
    for calls in (1, 2, 3):
        x = torch.randn(5, 6)
        answer = sum(shared(x) for _ in range(calls))
        answer.sum().backward()
        tensors += [weakref.ref(x), weakref.ref(answer)]
        del x, answer
    gc.collect()
    assert all(tensor() is None for tensor in tensors)


def test_a_copy_in_the_middle_of_a_pass_starts_afresh():
    shared, _ = once()
    x = torch.randn(5, 6)
    answer = shared(x)
    with torch.no_grad():
        twin = copy.deepcopy(shared)
        twin.layer.weight.zero_()
    assert not twin(x).any()
    assert shared(x) is answer
    assert list(shared.state_dict()) == ["layer.weight"]


def test_layers_of_a_copy_answer_for_each_other():
    model, count = three()
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        count[0] = 0
        twin(torch.randn(5, 4))
        assert count == [1]
    again = pickle.loads(pickle.dumps(Three(group("linear", "once").modules)))
    assert again.q[0]._kept is again.v[0]._kept is not model.q[0]._kept


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("regions", ["all in one", "each by itself"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, regions):
    (model, _), x = three(torch.float64), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    wanted = [p.grad.clone() for p in (x, *model.parameters())]
    x.grad = None
    model.zero_grad()
    for _ in range(2):
        if regions == "all in one":
            y = checkpoint(model, x, use_reentrant=reentrant)
        else:
            q, k, v = (checkpoint(pair, x, use_reentrant=reentrant) for pair in (model.q, model.k, model.v))
            y = q.tanh() + k.sin() * v
        y.sum().backward()
    assert all(close(p.grad, 2 * g, 1e-12) for p, g in zip((x, *model.parameters()), wanted, strict=True))


def test_transforms_of_functions_see_a_plain_layer():
    model, _ = three()
    x = torch.randn(5, 4)
    weights = dict(model.named_parameters())
    found = torch.func.grad(lambda w: torch.func.functional_call(model, w, (x,)).sum())(weights)
    model(x).sum().backward()
    assert all(close(found[name], p.grad) for name, p in model.named_parameters())
    assert close(torch.vmap(model)(x), model(x))
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())


def test_a_device_without_autocast():
    shared, _ = once()
    shared.to("meta")
    x = torch.randn(5, 6, device="meta")
    assert shared(x).shape == shared(x).shape == (5, 4)


def test_a_layer_that_was_made_a_pair_since_can_be_computed_once_and_multiplied_out():
    shared, _ = once()
    pair = Factored(nn.Linear(6, 2, bias=False), nn.Linear(2, 4), unfolding="channel", original=shared.original)
    shared.layer = pair
    x = torch.randn(5, 6)
    with torch.no_grad():
        assert close(shared(x), pair(x))
        pair[1].weight.zero_()
        assert not (shared(x) - pair[1].bias).any()
    weight, bias = shared.whole()
    assert close(weight[0], pair[1].weight @ pair[0].weight)
    assert torch.equal(bias, pair[1].bias)


@pytest.mark.parametrize("share", SHARES)
def test_whole_gives_weight_and_bias_side_by_side(share):
    made = group("conv2d-grouped", share)
    for n, module in enumerate(made.modules):
        left, right, _ = made.factors.pairs()[n]
        for layer in module:
            if isinstance(layer, Wide):
                weight, bias = layer.whole()
                assert weight.shape == layer.original.shape
                assert (bias is None) == (not layer.original.bias)
                assert str(layer.original.in_channels) in repr(layer)
        first = canonical(module[0])[0] if not isinstance(module[0], Wide) else module[0].whole()[0]
        how = unfolding((3, 2), "channel")
        assert torch.equal(first.flatten(2).mT, left)
        assert how.sizes((3, 2)) == (6, 1)
        assert right.shape[1] == module.rank
