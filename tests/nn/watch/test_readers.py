"""What a forward pass does with layers besides calling them is found out before any work."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import spectrim as st

BATCHES = [torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(n)) for n in range(2)]


class Net(nn.Module):
    """Three layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def plain(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x)


class Energy(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.plain(x).square().sum(), x, create_graph=True)[0]


class Backward(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            self.plain(x).square().sum().backward(inputs=[x])
        assert x.grad is not None
        return x.grad


class Trusting(Net):
    """Takes it that gradients are on."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(self.plain(x).square().sum(), x)[0]


class Transformed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.plain)(x)


class Derived(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(self.plain, (x,), (x,))[1]


class Dual(Net):
    def forward(self, x: Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(self.plain(forward_ad.make_dual(x, x))).tangent


class Branching(Net):
    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, self.plain, lambda x: self.c(self.a(x)), (x,))


class Swapping(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.b, self.d = self.d, self.b
        return self.plain(x)

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(8, 8)


class Lent(Net):
    """Puts a layer away for a moment."""

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self._modules.pop("b")
        x = layer(self.a(x))
        self.b = layer
        return self.c(x)


class Making(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.act = nn.Tanh()
        return self.act(self.plain(x))


class Forked(Net):
    """Has C++ code of torch call its layers: a pass that waited there took the process with it."""

    def forward(self, x: Tensor) -> Any:
        return self.c(torch.jit.wait(torch.jit.fork(self.b, self.a(x))))


class InThreads(Net):
    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return self.c(pool.submit(torch.no_grad()(self.b), self.a(x)).result())


LOCK = threading.Lock()


class Locking(Net):
    """Holds a lock while its layers are called: passes that wait there side by side waited for one another for ever."""

    def forward(self, x: Tensor) -> Tensor:
        with LOCK:
            return self.plain(x)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Energy, "differentiates in its forward .*the first is 'a'.*Compress the network whose gradient"),
        (Backward, "differentiates in its forward .*the first is 'a'"),
        (Trusting, "differentiates in its forward .*without gradients it fails"),
        (Transformed, "layer 'a' is called inside a transformation of torch.func.*by itself"),
        (Dual, "layer 'a' is called inside a transformation"),
        (Derived, "layer 'a' is called inside a transformation of torch.func"),
        (Swapping, "forward puts another module in the place of 'b'.*calling one or the other"),
        (Lent, "forward puts another module in the place of 'b'"),
        (Making, "forward makes the module 'act' while it runs: make it in __init__"),
        (Forked, "layer 'b' is called from within torch.jit.fork.*from plain Python, or skip='b'"),
        (Locking, "layer 'a' is called while the lock '.*LOCK' is held.*where the model is called"),
        (InThreads, "layer 'b' is called in a thread of its own.*in the thread that runs the model"),
    ],
)
def test_what_cannot_be_watched_is_refused_with_layer_reason_and_cure(kind: type[Net], says: str):
    model = kind().eval()
    modules = dict(model.named_modules())
    with pytest.raises(st.CalibrationError, match=says):
        st.calibrate(model, st.find(model), BATCHES)
    assert dict(model.named_modules()) == modules
    assert all(type(vars(m)[held]) is dict for m in model.modules() for held in ("_modules", "_parameters"))
    if kind is not Making:
        with pytest.raises(st.CalibrationError, match=says):
            st.couple(model, st.find(model), BATCHES[0])


def test_a_layer_that_torch_calls_is_told_without_calibration_too():
    model = Forked().eval()
    sites = st.find(model)
    plan = st.select(st.tabulate(sites, st.WeightSVD()), "parameters=60%")
    with pytest.raises(st.CalibrationError, match="layer 'b' is called from within torch.jit.fork"):
        st.apply(model, sites, plan, BATCHES)


def test_layers_in_branches_that_torch_compiles_are_refused():
    model = Branching().eval()
    with pytest.raises(st.CalibrationError, match="torch's cond.*as plain Python"):
        st.calibrate(model, st.find(model), BATCHES)


class Called(Net):
    """Its last layer is called as a function of its own weights."""

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return torch.func.functional_call(self.c, dict(self.c.named_parameters()), (x,))


class Assigned(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.c.bias = nn.Parameter(torch.zeros(6))
        return self.plain(x)


@pytest.mark.parametrize("kind", [Called, Assigned])
def test_a_layer_whose_weights_are_put_in_while_running_is_left_alone(kind: type[Net]):
    model = kind().eval()
    result = st.compress(model, BATCHES, st.Budget(macs=0.8))
    assert {entry.site for entry in result.plan} == {"a", "b"}
    ((name, _, reason),) = result.report.skipped
    assert name == "c"
    assert "puts another weight or bias in place of its own" in reason
    assert result.model(BATCHES[0]).shape == BATCHES[0].shape


class Amid(Net):
    """Calls its last layer while the one before has other weights."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        weight = self.b._parameters.pop("weight")
        assert weight is not None
        self.b.weight = weight * 2
        x = self.c(torch.relu(self.b(x)))
        del self.b.weight
        self.b.weight = weight
        return x


def test_a_layer_that_is_called_while_another_has_other_weights_is_left_alone():
    model = Amid().eval()
    want = model(BATCHES[0])
    result = st.compress(model, BATCHES, st.Budget(macs=0.9))
    assert {name: reason.split()[0] for name, _, reason in result.report.skipped} == {"b": "forward", "c": "it"}
    assert torch.equal(model(BATCHES[0]), want)


class Flexible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.inputs(x).chunk(3, -1))
        out = flex_attention(q, k, v)
        assert isinstance(out, Tensor)
        return self.outputs(out.transpose(1, 2).flatten(2))


def test_attention_with_a_score_of_ones_own_is_run_and_counted():
    import torch.nn.attention.flex_attention

    model = Flexible().eval()
    sites = st.calibrate(model, st.find(model), [torch.randn(2, 16, 32)])
    assert sites.other_macs == 2 * 16 * 16 * 32
    assert not sites.uncounted


class Asks(Net):
    """Makes and turns tensors as its layers' weights are, and reads none of their numbers."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.b.weight.data
        start = weight.new_zeros(len(x), *x.shape[1:-1], 8) + torch.zeros_like(self.b.weight)[0]
        x = torch.relu(self.a(x.to(self.a.weight)))
        if self.b.weight.requires_grad and self.c.weight.is_signed():
            x = x + start
        return self.c(torch.relu(self.b(x)).type_as(self.c.weight.detach()))


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(torch.nn.functional.linear(self.a(x), self.b.weight.detach(), self.b.bias)))


def test_what_only_asks_for_shape_and_dtype_of_a_weight_leaves_the_layer_to_be_compressed():
    result = st.compress(Asks().eval(), BATCHES, "macs=60%")
    assert not result.report.skipped
    assert "b" in {entry.site for entry in result.plan if not entry.choice.is_dense}
    assert result.model(BATCHES[0]).shape == BATCHES[0].shape


def test_numbers_of_a_weight_are_read_under_another_name_too():
    model = Detached().eval()
    sites = st.calibrate(model, st.find(model), BATCHES)
    assert [(each.name, "computes with its weight" in each.reason) for each in sites.skipped] == [("b", True)]
