from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.errors import CalibrationError
from spectrim.nn.watch.batches import Feed, arguments, call, checked_batches, evaluating, logits, resized
from spectrim.nn.watch.layout import Layout

X, Y = torch.randn(4, 3), torch.randn(4, 2)
LABELS = torch.arange(4)
Pair = namedtuple("Pair", "image label")


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x, scale=None):
        return self.fc(x)


class Two(One):
    def forward(self, x, y):
        return self.fc(x) + y


class Whole(One):
    """Takes a pair as one argument."""

    def forward(self, pair):
        return self.fc(pair[0]) + pair[1]


@pytest.mark.parametrize(
    "batch",
    [X, (X, LABELS), [X, LABELS], (X,), Pair(X, LABELS), {"x": X}, UserDict(x=X), ({"x": X}, LABELS), ([X], LABELS)],
    ids=["tensor", "tuple", "list", "single", "named", "dict", "UserDict", "(dict, y)", "([x], y)"],
)
def test_structures_of_one_input(batch):
    model = One()
    assert torch.equal(call(model, batch), model(X))
    assert Layout().size(batch) == 4


@pytest.mark.parametrize(
    "batch",
    [(X, Y), ((X, Y), LABELS), ([X, Y], LABELS), (X, Y, LABELS), {"y": Y, "x": X}, ({"x": X, "y": Y}, LABELS)],
    ids=["(x, y)", "((x1, x2), y)", "([x1, x2], y)", "(x1, x2, y)", "dict", "(dict, y)"],
)
def test_structures_of_two_inputs(batch):
    model = Two()
    assert torch.equal(call(model, batch), model(X, Y))


def test_a_pair_that_the_model_takes_as_one_argument():
    model = Whole()
    assert torch.equal(call(model, ((X, Y), LABELS)), model((X, Y)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_inputs_get_the_dtype_of_the_model_and_others_stay(dtype):
    (x, pair), _ = arguments(Two().to(dtype), (X, Pair(X, LABELS)))
    assert x.dtype == pair.image.dtype == dtype
    assert pair.label.dtype == LABELS.dtype
    assert isinstance(pair, Pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inputs_of_another_dtype_than_the_model_are_told_of(dtype):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    given = torch.float64 if dtype == torch.float32 else torch.float32
    batches = [torch.randn(32, 8, dtype=given) for _ in range(2)]
    result = st.compress(model, batches, "parameters=80%")
    says = f"inputs of {given} were given to the model as {dtype}".replace("torch.", "")
    assert [says in note for note in result.report.notes].count(True) == 1
    same = st.compress(model, [batch.to(dtype) for batch in batches], "parameters=80%")
    assert not any("were given to the model as" in note for note in same.report.notes)


def test_inputs_in_pairs_and_mappings_beside_another_one():
    class Beside(One):
        def forward(self, several, scale):
            x, y = several.values() if isinstance(several, dict) else several
            return self.fc(x) * scale + y

    class Together(One):
        def forward(self, batch):
            (x, y), scale = batch
            return self.fc(x) * scale + y

    want = One().requires_grad_(False)
    for model, batch in ((Beside(), ((X, Y), 2.0)), (Beside(), ({"x": X, "y": Y}, 2.0)), (Together(), ((X, Y), 2.0))):
        model.load_state_dict(want.state_dict())
        assert torch.equal(call(model, batch), want(X) * 2.0 + Y)


def test_inputs_of_a_model_of_mixed_dtypes_stay():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).half())
    assert arguments(model, X)[0][0].dtype == torch.float32
    assert arguments(nn.ReLU(), X.double())[0][0].dtype == torch.float64


@pytest.mark.parametrize("batch", ["text", 3, None, (), []])
def test_what_cannot_be_fed_is_named(batch):
    with pytest.raises(CalibrationError, match=type(batch).__name__):
        arguments(One(), batch)


@pytest.mark.parametrize("batch", [{}, [], ("a", "b"), torch.tensor(1.0)])
def test_a_batch_without_a_batch_axis_is_refused(batch):
    with pytest.raises(CalibrationError, match="batch axis"):
        Layout().size(batch)


@dataclass
class Output:
    logits: torch.Tensor


def test_the_tensor_that_an_output_stands_for():
    assert logits(X) is X
    assert logits(Output(Y)) is Y
    assert logits((X, Y)) is X
    assert logits(OrderedDict(hidden=[X], other=Y)) is X
    with pytest.raises(CalibrationError, match="holds no tensor"):
        logits(("a",))


def test_every_mode_and_the_fused_kernels_are_restored_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))).train()
    model[1][1].eval()
    modes = [m.training for m in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    seen = []

    def fail():
        with evaluating(model):
            seen.append(any(m.training for m in model.modules()))
            seen.append(torch.is_grad_enabled())
            seen.append(torch.backends.mha.get_fastpath_enabled())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False] * 3
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fused


@pytest.mark.parametrize("size", [1, 4, 9])
def test_resized_repeats_or_cuts_the_first_axis_everywhere(size):
    other = resized({"a": X, "b": [Pair(LABELS, "text")], "c": torch.tensor(2.0), "d": 5}, size)
    assert other["a"].shape == (size, 3)
    assert other["b"][0].image.tolist() == [i % 4 for i in range(size)]
    assert other["b"][0].label == "text"
    assert other["c"] == 2.0
    assert other["d"] == 5


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (np.zeros((4, 3), np.float32), r"numpy array of shape \(4, 3\) and float32.*torch.from_numpy"),
        ((np.zeros((4, 3)), np.zeros(4)), r"numpy array of shape \(4, 3\) and float64"),
        ({"x": np.zeros((4, 3))}, r"numpy array of shape \(4, 3\)"),
        ([[0.0, 1.0, 2.0]] * 4, r"list of 3 numbers.*torch.tensor"),
        ({"x": [0.0, 1.0]}, r"list of 2 numbers"),
    ],
)
def test_arrays_and_lists_of_numbers_are_refused_with_the_cure(batch, says):
    model = nn.Linear(3, 2)
    with pytest.raises(CalibrationError, match=says):
        call(model, batch)
    with pytest.raises(CalibrationError, match=r"one numpy array of shape \(8, 3\): pass a list of batches"):
        checked_batches(np.zeros((8, 3)))
    # What stands beside tensors is somebody's own, as are labels.
    assert call(model, (torch.zeros(4, 3), np.zeros(4))).shape == (4, 2)


class _Open(nn.Module):
    """Takes whatever it is given by name, as many models of transformers do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, pixels=None):
        return self.first(pixels)


_IMAGES = torch.ones(5, 3, 8, 8)


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ((_IMAGES, torch.ones(5)), _IMAGES),
        (_IMAGES, (_IMAGES, torch.ones(5))),
        (_IMAGES, _IMAGES[0]),
        ({"pixels": _IMAGES}, _IMAGES),
        (_IMAGES, None),
    ],
)
def test_batches_of_another_form_than_the_first_are_refused(first, later):
    # The first element of a pair is its images, and that of a tensor one image, which a convolution takes as well.
    model, feed = _Open().eval(), Feed()
    feed(model, first)
    feed(model, first)
    with pytest.raises(CalibrationError, match=r"a batch is a .*, and the first one was a .*give batches of one form"):
        feed(model, later)


def test_as_many_samples_as_a_model_has_channels_are_no_single_one():
    class Mono(nn.Sequential):
        def forward(self, x):
            return super().forward(x[:, None])

    model, feed = Mono(nn.Conv2d(1, 4, 3)).eval(), Feed()
    feed(model, torch.ones(5, 8, 8))
    assert feed(model, torch.ones(1, 8, 8)).shape == (1, 4, 6, 6)


def test_single_samples_in_a_list_of_mappings_are_refused():
    with pytest.raises(CalibrationError, match="one sample of shape .3, 8, 8. without an axis for samples"):
        Feed().decide(_Open().eval(), [{"pixels": image} for image in _IMAGES])


def test_names_of_entries_may_be_numbers():
    model = nn.Sequential(nn.Linear(4, 2))
    assert call(model, {0: torch.ones(3, 4), 1: torch.ones(3, dtype=torch.int64)}).shape == (3, 2)


def test_samples_of_several_lengths_are_a_list_and_no_batch_and_targets():
    model = nn.Embedding(5, 3)
    with pytest.raises(TypeError):
        Feed()(model, [torch.zeros(n, dtype=torch.int64) for n in (4, 7)])
