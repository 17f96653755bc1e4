"""What calibration keeps is about the data: not about cuts, order, padding, or how a layer is given its rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.nn.find import find
from spectrim.nn.watch import watchers
from spectrim.nn.watch.calibrate import calibrate, few_rows
from spectrim.nn.watch.sensitivity import sensitivity
from spectrim.pipeline import output_error
from tests.nn.layers import close


class Texts(nn.Module):
    """Tokens, queries and keys of one tensor, a pooled head; attention aside, every token stands alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(200, 8)
        self.query, self.key = nn.Linear(8, 6), nn.Linear(8, 6)
        self.out, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        tokens = self.out(torch.tanh(self.query(x)) * torch.tanh(self.key(x)))
        weights = attention_mask.unsqueeze(2).to(tokens)
        return self.head((tokens * weights).sum(1) / weights.sum(1))


def texts(width, *, left=False, numbers=range(24)):
    """Texts of 1 to 30 tokens, padded with token 199 on one side."""
    ids, mask = torch.full((len(numbers), width), 199), torch.zeros(len(numbers), width, dtype=torch.int64)
    for row, number in enumerate(numbers):
        generator = torch.Generator().manual_seed(number)
        length = int(torch.randint(1, 31, (1,), generator=generator))
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place] = torch.randint(0, 199, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def cut(batch, sizes):
    if isinstance(batch, dict):
        parts = zip(*(value.split(sizes) for value in batch.values()), strict=True)
        return [dict(zip(batch, part, strict=True)) for part in parts]
    return list(batch.split(sizes))


def assert_same(first, second, statistics=("input",), tolerance=1e-5):
    for a, b in zip(first, second, strict=True):
        for name in ("output",) if a.spec.looks_up and statistics == ("input",) else statistics:
            one, other = getattr(a.statistics, name), getattr(b.statistics, name)
            assert one.count == other.count > 0
            assert close(one.mean, other.mean, tolerance)
            assert close(one.covariance, other.covariance, tolerance)


SMALL = {"rows": 24 * 5}


@pytest.mark.table(every=2)
@pytest.mark.parametrize("sizes", [1, 4, 24, [1, 16, 7]], ids=str)
def test_cut_and_order_of_images_change_nothing_but_rounding(sizes):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2)).eval()
    x = torch.randn(24, 3, 9, 9)
    whole = calibrate(model, find(model), [x], **SMALL)
    parts = cut(x[torch.randperm(24)], sizes)
    assert [s.statistics.input.count for s in whole] == [120, 120]
    assert_same(whole, calibrate(model, find(model), parts, **SMALL))
    weighed = sensitivity(model, calibrate(model, find(model), parts), parts, rows=48)
    assert_same(weighed, sensitivity(model, whole, [x], rows=48), ["gradient"])


@pytest.mark.table
@pytest.mark.parametrize("sizes", [1, 5, [1, 16, 7]], ids=str)
@pytest.mark.parametrize("amount", [SMALL, {"rows": None}, {"rows": "auto"}, {"positions": 3}], ids=str)
def test_cut_order_and_padding_of_texts_change_nothing_but_rounding(sizes, amount):
    model = Texts().eval()
    whole = calibrate(model, find(model), [texts(30)], **amount)
    order = torch.randperm(24).tolist()
    parts = cut(texts(128, left=True, numbers=order), sizes)
    again = calibrate(model, find(model), parts, **amount)
    assert_same(whole, again)
    tokens = int(texts(30)["attention_mask"].sum())
    assert whole.tokens == again.tokens == tokens
    assert whole.samples == again.samples == 24
    assert again["head"].statistics.input.count == 24
    if amount == {"rows": None}:
        assert again["out"].statistics.input.count == tokens
    assert_same(sensitivity(model, whole, [texts(30)]), sensitivity(model, again, parts), ["gradient"])


def test_padding_counts_where_the_mask_is_turned_off():
    model = Texts().eval()
    sites = calibrate(model, find(model), [texts(40)], rows=None, mask=lambda batch: None)
    assert sites["out"].statistics.input.count == 24 * 40
    assert sites.tokens == 0


def test_samples_that_are_windows_of_the_batch_or_stand_behind_positions():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.back, self.folded = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.back(torch.relu(self.front(x)).transpose(0, 1)).transpose(0, 1)
            return self.folded(y.reshape(-1, 2, 4))

    model, x = Turned().eval(), torch.randn(10, 12, 4)
    whole = calibrate(model, find(model), [x], rows=30)
    assert [s.statistics.input.count for s in whole] == [30, 30, 30]
    for sizes in (3, 1):
        assert_same(whole, calibrate(model, find(model), cut(x.flip(0), sizes), rows=30))


def test_layers_that_see_one_tensor_hold_one_moment():
    model = Texts().eval()
    sites = calibrate(model, find(model), cut(texts(30), 5))
    query, key, out = (sites[name].statistics.input for name in ("query", "key", "out"))
    assert query is key
    assert query is not out
    alone = calibrate(model, find(model, skip="key"), cut(texts(30), 5))
    assert torch.equal(alone["query"].statistics.input.scatter, query.scatter)


class Ways(nn.Module):
    """Layers that see one tensor in some passes and not in others."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.way, self.passes = way, 0

    def forward(self, x):
        self.passes += 1
        later = self.passes > 2
        first = self.a(x)
        if self.way == "left out" and later:
            return first + self.c(x)
        if self.way == "another" and later:
            return first + self.b(x + 1) + self.c(x)
        if self.way == "twice":
            return self.c(self.b(first + self.b(x)) + self.a(x * 2))
        return first + self.b(x) + self.c(x)


@pytest.mark.parametrize("way", ["always", "left out", "another", "twice"])
def test_layers_that_part_keep_what_each_has_seen(way):
    model, batches = Ways(way).eval(), [torch.randn(7, 4) for _ in range(4)]
    seen = {name: [] for name in "abc"}
    hooks = [
        getattr(model, name).register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0].clone()))
        for name in seen
    ]
    sites = calibrate(model, find(model), batches)
    for hook in hooks:
        hook.remove()
    for name, rows in seen.items():
        moments = sites[name].statistics.input
        every = torch.cat(rows).double()
        assert moments.count == len(every)
        assert close(moments.covariance[0], (every - every.mean(0)).T @ (every - every.mean(0)) / len(every), 1e-5)
    together = sites["a"].statistics.input is sites["b"].statistics.input
    assert together == (way == "always")


def test_a_generator_is_read_once():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(8, 3, 8, 8)
    sites = calibrate(model, find(model), (part for part in x.split(3)), positions=5)
    assert_same(sites, calibrate(model, find(model), [x], positions=5))
    # Nothing tells how many samples come: rather too many rows.
    many = calibrate(model, find(model), iter(x.split(3)), rows=128)
    assert many["0"].statistics.input.count == 8 * 2


def test_the_error_that_a_plan_states_is_that_of_the_calibration_samples():
    x = torch.randn(128, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x @ torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    conv = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)).eval()
    stated = {}
    for size in (128, 32, 8):
        result = st.compress(
            conv, list(x.split(size)), st.Budget(parameters=0.3), methods=[st.ActivationSVD()], sensitivity=False,
            reconstruct=False,
        )  # fmt: skip
        (entry,) = result.plan
        with torch.no_grad():
            want, have = conv(x), result.model(x)
        lost = float((want - have).square().sum() / (want - want.mean((0, 2, 3), keepdim=True)).square().sum())
        assert entry.error == pytest.approx(lost, rel=0.1)
        stated[size] = (str(entry.choice), pytest.approx(entry.error, rel=1e-5))
    assert stated[128] == stated[32] == stated[8]


@pytest.mark.parametrize(
    ("samples", "rows", "cure"), [(3, "auto", "calibrate on more samples"), (40, 40, "ask for more with rows=")]
)
def test_a_note_says_what_to_do_about_too_few_rows(samples, rows, cure):
    model, x = nn.Sequential(nn.Linear(16, 4)).eval(), torch.randn(samples, 3, 16)
    *_, note = few_rows(calibrate(model, find(model), [x], rows=rows))
    assert "1 of 1 layers" in note
    assert cure in note
    assert not list(few_rows(calibrate(model, find(model), [torch.randn(40, 3, 16)])))
    result = st.compress(model, [x], st.Budget(parameters=0.9), rows=rows)
    assert note in result.report.notes


def test_few_samples_are_told_however_many_rows_they_have():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 4)).eval()
    sites = calibrate(model, find(model), [torch.randn(8, 3, 32, 32)])
    first, *_ = few_rows(sites)
    assert "8 calibration samples are too few" in first
    assert not any("calibration samples" in note for note in few_rows(dataclasses.replace(sites, samples=100)))


def test_few_rows_of_what_is_kept_in_parts_are_told(monkeypatch):
    monkeypatch.setattr(watchers, "FULL_PATCH", 20)
    monkeypatch.setattr(watchers, "FULL_LINEAR", 10)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 6)).eval()
    (note,) = few_rows(calibrate(model, find(model), [torch.randn(40, 12)]))
    assert "1 of 2 layers" in note
    assert "40 rows for vectors of 30 numbers" in note


def test_padding_counts_nothing_in_the_error_of_outputs():
    class Tokens(Texts):
        def forward(self, input_ids, attention_mask):
            return self.out(torch.tanh(self.query(self.embed(input_ids))))

    dense, other = Tokens(), Tokens()
    short = output_error(dense, other, [texts(30)])
    assert output_error(dense, other, [texts(90, left=True)]) == pytest.approx(short, rel=1e-4)
    assert output_error(dense, other, [texts(90)], mask=lambda batch: None) != pytest.approx(short, rel=0.1)


def test_rows_that_are_alike_within_samples_are_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    rows = torch.randn(24, 64, 8)
    for alike in (False, True):
        x = rows[:, :1].expand(-1, 64, -1) + 0.1 * rows if alike else rows
        notes = [calibrate(model, find(model), list(x.split(cut))).notes for cut in (1, 24)]
        assert notes[0] == notes[1]
        told = [note for note in notes[0] if "24 calibration samples are few" in note]
        assert len(told) == alike
        assert all("rows tell as much as " in note and "a few hundred" in note for note in told)


def test_a_network_costs_the_same_in_whatever_order_batches_of_several_lengths_come():
    torch.manual_seed(0)
    batches = [texts(width) for width in (30, 40, 35)]
    model = Texts().eval()
    found = [st.compress(model, order, "macs=60%") for order in (batches, batches[::-1], batches[1:] + batches[:1])]
    assert {result.plan.dense_costs["macs"] for result in found} == {found[0].plan.dense_costs["macs"]}
    assert found[0].plan.dense_costs["macs"] == st.compress(model, [texts(40)], "macs=60%").plan.dense_costs["macs"]
    for result in found:
        assert result.plan.costs["macs"] <= result.plan.budget["macs"]
        assert any("differ in size, from 30 to 40 numbers each" in note for note in result.report.notes)
    same = st.compress(model, [texts(40), texts(40, left=True)], "macs=60%")
    assert not any("differ in size" in note for note in same.report.notes)


def test_rows_that_are_independent_are_not_called_alike():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    for count in (126, 128, 130):
        sites = calibrate(net, find(net), list(torch.randn(count, 32).split(16)))
        assert not any("so alike" in note for note in sites.notes)
