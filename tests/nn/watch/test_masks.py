"""What tells padding from data, in every form that models take it in."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.nn.agreement import agreement, output_error
from spectrim.nn.find import find
from spectrim.nn.watch.calibrate import calibrate
from spectrim.nn.watch.layout import Layout
from spectrim.nn.watch.masks import mask_of
from spectrim.nn.watch.samples import Samples
from spectrim.nn.watch.sampling import directions

LENGTHS = torch.tensor([3, 5, 1, 4])
DATA = torch.arange(6) < LENGTHS.unsqueeze(1)
IDS = torch.where(DATA, torch.arange(1, 25).reshape(4, 6), 0)
PAIRS = DATA.unsqueeze(1) & DATA.unsqueeze(2)
CAUSAL = torch.ones(6, 6).tril().bool() & DATA[:, None, None]


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("attention_mask", DATA),
        ("attention_mask", DATA.byte()),
        ("attention_mask", DATA.half()),
        ("attention_mask", DATA.unsqueeze(1).long()),
        ("attention_mask", PAIRS),
        ("attention_mask", CAUSAL.float()),
        ("attention_mask", torch.zeros(CAUSAL.shape).masked_fill(~CAUSAL, -torch.inf)),
        ("attention_mask", torch.zeros(PAIRS.shape).masked_fill(~PAIRS, torch.finfo(torch.float32).min)),
        ("attention_mask", torch.zeros(4, 1, 1, 6).half().masked_fill(~DATA[:, None, None], -1e4)),
        ("src_key_padding_mask", ~DATA),
        ("key_padding_mask", (~DATA).long()),
        ("key_padding_mask", torch.zeros(4, 6).masked_fill(~DATA, -torch.inf)),
        ("lengths", LENGTHS),
        ("lengths", LENGTHS.int()),
    ],
    ids=lambda each: each if isinstance(each, str) else f"{tuple(each.shape)} {each.dtype}",
)
def test_every_form_says_the_same(name: str, mask: Tensor) -> None:
    batch = {"input_ids": IDS, name: mask}
    told = Samples.of(batch, Layout(mask=name)).mask
    assert told is not None
    assert torch.equal(told, DATA)
    if name != "lengths":
        assert torch.equal(told, Samples.of((batch, torch.zeros(4))).mask)
    # By the names of what the model takes, too.
    layout = Layout(names=("input_ids", name), mask=name)
    for tupled in ((IDS, mask, torch.zeros(4)), ((IDS, mask), torch.zeros(4))):
        assert torch.equal(told, mask_of(tupled, 4, layout))


def test_left_padding_between_positions() -> None:
    left = DATA.flip(1)
    causal = (torch.ones(6, 6).tril().bool() & left.unsqueeze(1)).unsqueeze(1)
    assert torch.equal(mask_of({"attention_mask": causal, "input_ids": IDS.flip(1)}, 4), left)
    # Padding that would attend to nothing attends to all, so that no softmax is of nothing.
    freed = causal | ~causal.any(-1, keepdim=True)
    for mask in (freed, torch.zeros(freed.shape).masked_fill(~freed, -torch.inf)):
        assert torch.equal(mask_of({"attention_mask": mask, "input_ids": IDS.flip(1)}, 4), left)
    # As many features as positions, and the mask made of another that stands in front.
    batch = {"hidden_mask": ~causal, "x": torch.ones(4, 6, 6)}
    assert torch.equal(mask_of(batch, 4, Layout(mask=lambda b: ~b["hidden_mask"])), left)


@pytest.mark.parametrize("features", [False, True])
def test_a_mask_that_is_true_of_padding_is_refused(features: bool) -> None:
    inputs = IDS.unsqueeze(2) * torch.ones(3) if features else IDS
    with pytest.raises(st.CalibrationError, match=r"turned round.*mask=lambda batch: batch\['mask'\] == 0"):
        Samples.of({"x": inputs, "mask": ~DATA}, Layout(mask="mask"))
    assert torch.equal(Samples.of({"x": inputs, "mask": DATA}, Layout(mask="mask")).mask, DATA)
    # Where there is no padding nothing is turned round.
    full = Samples.of({"x": inputs, "mask": torch.ones(4, 6)}, Layout(mask="mask")).mask
    assert full is not None
    assert bool(full.all())


def test_nothing_taken_away_is_all_data_and_numbers_of_both_signs_are_refused() -> None:
    scores = torch.zeros(4, 1, 6, 6)
    assert bool(torch.as_tensor(mask_of({"attention_mask": scores, "input_ids": IDS}, 4)).all())
    with pytest.raises(st.CalibrationError, match=r"'attention_mask' has numbers below 0.*others above it"):
        mask_of({"attention_mask": scores + torch.randn(6), "input_ids": IDS}, 4)


def test_longer_than_the_inputs_is_refused() -> None:
    with pytest.raises(st.CalibrationError, match=r"'lengths' says that a sample has 9 tokens, .* \[6\] positions"):
        Samples.of({"input_ids": IDS, "lengths": LENGTHS + 4}, Layout(mask="lengths"))


class Masked(nn.Module):
    """A token reads its own embedding; padding has a large one, that counts if nothing says what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(30, 16), nn.Linear(16, 24), nn.Linear(24, 8)
        with torch.no_grad():
            self.embed.weight[0] = 20

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.embed(input_ids)))) * attention_mask.unsqueeze(2)


class Padded(Masked):
    def forward(self, input_ids: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return super().forward(input_ids, ~src_key_padding_mask)


class Counted(Masked):
    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(input_ids, torch.arange(6) < lengths.unsqueeze(1))


@pytest.mark.parametrize("tupled", [False, True])
@pytest.mark.parametrize(
    ("kind", "says", "mask"), [(Masked, DATA.long(), None), (Padded, ~DATA, None), (Counted, LENGTHS, "lengths")]
)
def test_what_a_model_calls_a_mask_keeps_padding_out(
    kind: type[Masked], says: Tensor, mask: str | None, tupled: bool
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    name = {Masked: "attention_mask", Padded: "src_key_padding_mask", Counted: "lengths"}[kind]
    batch: Any = (IDS, says, torch.zeros(4)) if tupled else {"input_ids": IDS, name: says}
    sites = st.calibrate(model, st.find(model), [batch], mask=mask)
    assert sites.tokens == int(DATA.sum())
    seen, moments = model.embed(IDS)[DATA].double(), sites["a"].statistics.input
    assert moments is not None
    torch.testing.assert_close(moments.mean[0], seen.mean(0), rtol=1e-4, atol=1e-5)
    assert moments.count == len(seen)


class Token(nn.Module):
    """Every position for itself, or as a convolution that is given zeros as padding."""

    def __init__(self, *, convolves: bool) -> None:
        super().__init__()
        self.a = nn.Conv1d(8, 24, 3, padding=1) if convolves else nn.Linear(8, 24)
        self.b = nn.Linear(24, 8)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.bool().unsqueeze(2)
        return self.b(torch.where(mask, self.a(torch.where(mask.mT, x, 0)).mT, 0) if x.shape[1] == 8 else self.a(x))


@pytest.mark.table
@pytest.mark.parametrize("convolves", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_no_number_in_padding_changes_anything(convolves: bool, named: bool) -> None:
    torch.manual_seed(0)
    model, data = Token(convolves=convolves).eval(), torch.arange(12) < torch.randint(3, 13, (64, 1))
    x = torch.randn(64, 12, 8) @ torch.randn(8, 8)

    def compressed(padding: float) -> Tensor:
        filled = torch.where(data.unsqueeze(2), x, padding)
        filled = filled.mT.contiguous() if convolves else filled
        batches = [{"x": a, "attention_mask": b} for a, b in zip(filled.split(20), data.split(20), strict=True)]
        mask = (lambda batch: batch["attention_mask"]) if named else None
        result = st.compress(model, batches, st.Budget(parameters=0.6), mask=mask)
        assert result.report.agreement is not None
        with torch.no_grad():
            return result.model(filled, data)[data]

    wanted = compressed(0.0)
    for odd in (float("nan"), float("inf")):
        assert torch.allclose(compressed(odd), wanted, atol=1e-5)


def test_what_may_tell_padding_and_is_not_read_is_told() -> None:
    model = Counted().eval()
    batches = [(IDS, LENGTHS)]
    assert any("'lengths' may tell it" in note for note in st.calibrate(model, st.find(model), batches).notes)
    assert not st.calibrate(model, st.find(model), batches, mask="lengths").notes[1:]
    model = Masked().eval()
    assert not any("may tell" in note for note in st.calibrate(model, st.find(model), [(IDS, DATA)]).notes)


def test_an_entry_that_stands_for_padding_is_not_expected_in_further_data() -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    sites = st.calibrate(model, st.find(model), [(IDS, DATA.long())])
    moments = sites["embed"].statistics.output
    assert moments is not None
    # All tokens were seen once: those that were not seen have as large a part, and padding has none.
    known = model.embed.weight[1:].double()
    counts = torch.bincount(IDS[DATA], minlength=30)[1:]
    shares = counts + (counts == 0) * (counts.sum() / (counts == 0).sum())
    torch.testing.assert_close(moments.mean[0], (known * (shares / shares.sum()).unsqueeze(1)).sum(0))


def test_a_mask_of_pixels_is_one_number_a_pixel() -> None:
    pixels, told = torch.arange(5) < torch.tensor([2, 5]).reshape(2, 1, 1).expand(2, 4, 1), Layout(mask="mask")
    for mask in (pixels, pixels.unsqueeze(1)):
        assert torch.equal(mask_of({"x": torch.ones(2, 3, 4, 5), "mask": mask}, 2, told), pixels.flatten(1))
    assert torch.equal(mask_of({"x": torch.ones(2, 4, 5, 3), "mask": pixels}, 2, told), pixels.flatten(1))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(3, 4, 5),
        nn.Conv1d(3, 4, 3, stride=2, padding=1),
        nn.Conv1d(3, 4, 3, padding="same", dilation=2),
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, (3, 1), stride=(2, 1), padding=(1, 0)),
    ],
    ids=str,
)
def test_a_convolution_answers_for_data_where_the_middle_of_its_patch_is_data(conv: nn.Module) -> None:
    torch.manual_seed(0)
    axes = conv.weight.dim() - 2
    sides = (12, 7)[:axes]
    x, data = torch.randn(6, 3, *sides), torch.rand(6, *sides) > 0.4
    # A convolution of the middles alone shows where they are.
    middle = copy.deepcopy(conv).double()
    with torch.no_grad():
        middle.weight.zero_()
        middle.weight[0, 0][tuple(k // 2 for k in conv.kernel_size)] = 1
        there = middle(data.unsqueeze(1).double().expand(-1, 3, *sides))[:, 0] - middle.bias[0] > 0.5
    sites = st.calibrate(
        model := nn.Sequential(conv), st.find(model), [{"input": x, "mask": data}], rows=None, mask="mask"
    )
    rows = conv(x).movedim(1, -1)[there].double()
    moments = sites["0"].statistics.input
    assert moments is not None
    assert moments.count == len(rows) == int(there.sum())
    answers = moments.mean[0] @ conv.weight.flatten(1).double().T + conv.bias.double()
    torch.testing.assert_close(answers, rows.mean(0), rtol=1e-4, atol=1e-4)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_padding_counts_nothing_in_what_is_compared_where_time_comes_first() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(7, 12, 8), TimeFirst().eval()
    data = torch.arange(7) < torch.randint(1, 8, (12, 1))
    noisy = torch.where(data.T.unsqueeze(2), x, 50 * torch.randn(7, 12, 8))
    batches = [[{"x": each, "mask": data}] for each in (x, noisy)]
    clean, padded = (st.compress(model, each, "parameters=60%", mask="mask", samples=1) for each in batches)
    assert clean.plan == padded.plan
    assert clean.report.agreement is not None
    said = {"mask": lambda _: data, "samples": 1}
    one, other = (st.agreement(model, clean.model, [each], **said) for each in (x, noisy))
    assert one is not None
    assert other is not None
    assert one.error == pytest.approx(other.error, rel=1e-5)
    assert len(one.parts) == 12
    assert sum(part > 0 for part in one.parts) == 12


def test_directions_are_a_sample_s_own_where_time_comes_first() -> None:
    x = torch.randn(7, 12, 8)
    whole = directions(torch.zeros(7, 12, 4), Samples.of(x, layout=Layout(axis=1)))
    part = directions(torch.zeros(7, 5, 4), Samples.of(x[:, 3:8], layout=Layout(axis=1)))
    assert torch.equal(whole[:, 3:8], part)


class Shorter(nn.Module):
    """Pools pairs of tokens before its second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.second(self.first(x).unflatten(1, (-1, 2)).mean(2))
        return self.head(y.mean(1))


@pytest.mark.parametrize("padded", [True, False])
def test_padding_behind_a_pooling_is_told(padded: bool) -> None:
    mask = torch.ones(20, 16)
    mask[::2, 8:] = 0 if padded else 1
    model = Shorter().eval()
    sites = calibrate(model, find(model), [{"x": torch.randn(20, 16, 8), "attention_mask": mask}])
    told = [note for note in sites.notes if "padding" in note]
    assert len(told) == padded
    assert all("1 of 3 layers, first in 'second': it is given 8 positions" in note for note in told)


class Classifier(nn.Module):
    """Five classes of sentences, by the mean over their tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.inner, self.head = nn.Embedding(40, 8), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, data = torch.tanh(self.inner(self.words(input_ids))), attention_mask.to(torch.float32).unsqueeze(2)
        return self.head((x * data).sum(1) / data.sum(1).clamp_min(1))


def _sentences(number: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 9, (number,), generator=draw).tolist()
    return [torch.randint(1, 40, (length,), generator=draw) for length in lengths]


def _padded(
    texts: list[Tensor], size: int = 6, width: int | None = None, *, left: bool = False, dtype: torch.dtype = torch.long
) -> list[dict[str, Tensor]]:
    batches = []
    for part in (texts[n : n + size] for n in range(0, len(texts), size)):
        ids = torch.zeros(len(part), width or max(map(len, part)), dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=dtype)
        for row, text in enumerate(part):
            place = slice(ids.shape[1] - len(text), None) if left else slice(len(text))
            ids[row, place], mask[row, place] = text, 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


_ALIKE: dict[str, Any] = {
    "wide": lambda texts: _padded(texts, width=20),
    "left": lambda texts: _padded(texts, width=12, left=True),
    "other numbers in the mask": lambda texts: _padded(texts, dtype=torch.float32),
    "bool": lambda texts: _padded(texts, dtype=torch.bool),
    # Batches without padding, and batches of as many tokens as there are classes, among them.
    "by length": lambda texts: _padded(sorted(texts, key=len)),
    "one by one": lambda texts: _padded(texts, 1),
    "turned round": lambda texts: _padded(texts[::-1], 7),
    "samples of padding alone": lambda texts: _padded([*texts[:6], torch.zeros(0).long(), *texts[6:]], 7, width=10),
}


@functools.cache
def _compressed() -> st.Result:
    return st.compress(Classifier().eval(), _padded(_sentences(60)), "parameters=80%")


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow) if form == "one by one" else form for form in _ALIKE]
)
def test_padding_order_and_cut_change_no_choice_and_no_output(form: str) -> None:
    one, test = _compressed(), _padded(_sentences(20), 20)[0]
    two = st.compress(Classifier().eval(), _ALIKE[form](_sentences(60)), "parameters=80%")
    assert [e.choice for e in two.plan] == [e.choice for e in one.plan]
    assert (two.report.samples, two.report.held_out) == (one.report.samples, one.report.held_out) == (60, 8)
    assert [e.error for e in two.plan] == pytest.approx([e.error for e in one.plan], rel=1e-3, abs=1e-6)
    torch.testing.assert_close(two.model(**test), one.model(**test), rtol=1e-3, atol=1e-4)
    assert two.report.agreement is not None
    assert one.report.agreement is not None
    assert two.report.agreement.error == pytest.approx(one.report.agreement.error, rel=1e-3)


def test_as_many_classes_as_tokens_are_no_positions() -> None:
    """Also of outputs that are compared: of five classes none is padding."""
    model, (batch,) = Classifier().eval(), _padded([text[:5] for text in _sentences(8)], 8, width=5)
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.head.weight.mul_(0.5)
        wanted, given = (each(**batch).double() for each in (model, small))
    found = agreement(model, small, [batch])
    assert found is not None
    assert found.error == pytest.approx(float((wanted - given).norm() / wanted.norm()))
    assert output_error(model, small, [batch]) == pytest.approx(
        float((wanted - given).square().sum() / (wanted - wanted.mean(0)).square().sum())
    )
