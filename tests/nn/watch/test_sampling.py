from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from spectrim.errors import CalibrationError
from spectrim.nn.layers import spec_of
from spectrim.nn.watch.layout import Layout
from spectrim.nn.watch.samples import Samples, spread
from spectrim.nn.watch.sampling import Extent, choose, directions, mean_rows

LINEAR = spec_of(nn.Linear(4, 3), ["layer"])
CONV = spec_of(nn.Conv2d(3, 5, 3, padding=1), ["layer"])


def places(chosen, each):
    """What is chosen of each sample: positions by the sample's number, where rows lie sample by sample."""
    found = {}
    for row, sample in zip(chosen.index.tolist(), chosen.sample.tolist(), strict=True):
        assert row // each == sample
        found.setdefault(sample, []).append(row % each)
    return found


def texts(lengths, width, *, left=False):
    """Token numbers that depend on the text alone, padded on one side."""
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width)
    for number, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        ids[number, place] = torch.randint(1, 1000, (length,), generator=torch.Generator().manual_seed(number))
        mask[number, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("spec", "shape"), [(LINEAR, (12, 4)), (CONV, (3, 4, 6))], ids=["linear", "conv"])
def test_order_and_cut_do_not_change_what_is_chosen_of_a_sample(spec, shape):
    x = torch.randn(6, *shape)
    each = 12 if spec.is_linear else 24
    whole = places(choose(spec, tuple(x.shape), 5, Samples.of(x)), each)
    assert all(len(rows) == 5 for rows in whole.values())
    order = torch.randperm(6)
    seen = 0
    for part in order.split([1, 3, 2]):
        found = places(choose(spec, (len(part), *shape), 5, Samples.of(x[part])), each)
        assert [found[n] for n in range(len(part))] == [whole[n] for n in part.tolist()]
        seen += len(part)
    assert seen == 6
    assert len({tuple(rows) for rows in whole.values()}) > 1


def test_positions_are_spread_evenly_and_are_drawn_alike():
    samples = Samples.of(torch.randn(4000, 3))
    index = choose(LINEAR, (4000, 20, 4), 5, samples).index.reshape(4000, 5) % 20
    assert torch.equal(index // 4, torch.arange(5).expand(4000, 5))
    counts = index.flatten().bincount(minlength=20)
    # Each of four positions is drawn one time in four: 1,000 on average, standard deviation 27.
    assert 860 < counts.min() <= counts.max() < 1140
    other = choose(LINEAR, (4000, 20, 4), 5, samples, seed=1).index.reshape(4000, 5) % 20
    assert 0.2 < (other == index).double().mean() < 0.3


@pytest.mark.parametrize("positions", [None, 12, 40])
def test_all_rows_where_there_are_no_more(positions):
    chosen = choose(LINEAR, (3, 12, 4), positions, Samples.of(torch.randn(3, 2)))
    assert torch.equal(chosen.index, torch.arange(36))
    assert torch.equal(chosen.sample, torch.arange(36) // 12)


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_neither_keys_nor_what_is_chosen(left):
    lengths = [9, 3, 30, 1, 17]
    short, long = texts(lengths, 32), texts(lengths, 128, left=left)
    few, many = Extent([short]).see(short), Extent([long]).see(long)
    assert torch.equal(few.keys, many.keys)
    for positions in (4, None):
        here, there = (places(choose(LINEAR, (5, w, 4), positions, s), w) for s, w in [(few, 32), (many, 128)])
        for number, length in enumerate(lengths):
            shift = 128 - length if left else 0
            assert [row - shift for row in there.get(number, [])] == here.get(number, [])
            assert all(row < length for row in here.get(number, []))
        if positions is None:
            assert [len(here[n]) for n in range(5)] == lengths


def test_long_samples_give_more_rows_in_proportion():
    lengths = [10, 30] * 500
    batch = texts(lengths, 30)
    chosen = choose(LINEAR, (1000, 30, 4), 5, Extent([batch]).see(batch))
    counts = chosen.sample.bincount(minlength=1000).double()
    # The mean length is 20, so that 5 rows of it are 2.5 and 7.5.
    assert counts[::2].mean() == pytest.approx(2.5, abs=0.1)
    assert counts[1::2].mean() == pytest.approx(7.5, abs=0.1)


def test_a_mask_says_nothing_of_a_layer_with_another_number_of_rows():
    batch = texts([9, 3, 30], 32)
    chosen = choose(LINEAR, (3, 4), 2, Extent([batch]).see(batch))
    assert chosen.index.tolist() == [0, 1, 2]


WAYS = {
    "in front": ((6, 10, 4), lambda s, p: s * 10 + p),
    "flattened": ((60, 4), lambda s, p: s * 10 + p),
    "windows": ((12, 5, 4), lambda s, p: s * 10 + p),
    "positions in front": ((10, 6, 4), lambda s, p: p * 6 + s),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_in_any_order_belong_to_their_samples(way, masked):
    shape, row = WAYS[way]
    batch = texts([10, 7, 3, 10, 1, 4], 10)
    samples = Samples.of(batch if masked else batch["input_ids"])
    standard = choose(LINEAR, (6, 10, 4), 3, samples)
    chosen = choose(LINEAR, shape, 3, samples)
    positions = standard.index - standard.sample * 10
    assert torch.equal(chosen.sample, standard.sample)
    assert torch.equal(chosen.index, row(standard.sample, positions))


def test_positions_in_front_are_known_by_the_length_of_the_batch():
    samples = Samples.of(torch.randn(4, 8, 3))
    assert choose(LINEAR, (8, 4, 2), None, samples).sample.tolist() == [
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        *[1] * 8,
        *[2] * 8,
        *[3] * 8,
    ]
    assert choose(LINEAR, (8, 4, 2), None, samples).index[:8].tolist() == list(range(0, 32, 4))
    # Windows of as many tokens as there are samples, which no size of the batch explains.
    windows = choose(LINEAR, (12, 4, 2), 3, samples)
    assert torch.equal(windows.index // 12, windows.sample)


def test_data_without_its_padding():
    batch = texts([4, 2, 6], 6)
    chosen = choose(LINEAR, (12, 4), None, Samples.of(batch))
    assert chosen.index.tolist() == list(range(12))
    assert chosen.sample.tolist() == [0] * 4 + [1] * 2 + [2] * 6


@pytest.mark.parametrize("shape", [(7, 4), (1, 12, 4)])
def test_rows_that_belong_to_no_sample_are_taken_as_one(shape):
    chosen = choose(LINEAR, shape, 1, Samples.of(torch.randn(3, 2)))
    assert len(chosen.index) == 3
    assert len(chosen.index.unique()) == 3
    assert chosen.sample.max() < 3


def test_images_folded_into_the_batch_axis():
    chosen = choose(CONV, (6, 3, 4, 4), 5, Samples.of(torch.randn(2, 3, 3, 4, 4)))
    assert chosen.sample.tolist() == [0] * 5 + [1] * 5
    assert torch.equal(chosen.index // 48, chosen.sample)
    assert mean_rows(CONV, (6, 3, 4, 4), Samples.of(torch.randn(2, 3, 3, 4, 4))) == 48


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.bool, torch.complex64])
def test_keys_tell_samples_apart_by_their_inputs_alone(dtype):
    x = torch.randint(0, 2, (50, 3, 20)).to(dtype)
    x[7] = x[3]
    keys = Samples.of(x).bits
    assert keys[7] == keys[3]
    assert len(keys.unique()) == 49
    assert torch.equal(Samples.of((x, torch.arange(50))).bits, keys)
    assert torch.equal(Samples.of(x.flip(0)).bits.flip(0), keys)


def test_masks_by_name_and_by_function():
    batch = texts([3, 1], 4)
    batch["real"] = batch.pop("attention_mask")
    assert Samples.of(batch).mask is None
    assert Samples.of(batch, Layout(mask="real")).mask.tolist() == [[True] * 3 + [False], [True, False, False, False]]
    assert torch.equal(
        Samples.of((batch, 0), Layout(mask=lambda b: b[0]["real"])).mask, Samples.of(batch, Layout(mask="real")).mask
    )
    assert Samples.of({**batch, "attention_mask": torch.ones(2, 4)}, Layout(mask=lambda b: None)).mask is None


@pytest.mark.parametrize(
    ("batch", "mask", "message"),
    [
        ({"x": torch.ones(2, 3)}, "other", "mask='other': the batch holds no such tensor, but 'x'"),
        (torch.ones(2, 3), "other", "mask='other': .* but a Tensor"),
        ({"x": torch.ones(2, 3), "attention_mask": torch.ones(3, 3)}, None, r"'attention_mask' has shape \(3, 3"),
        (torch.ones(2, 3), lambda b: torch.ones(3, 2), r"has shape \(3, 2\): expected \(2 samples"),
        (torch.ones(2, 3), lambda b: [1, 0], "has type list"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(batch, mask, message):
    with pytest.raises(CalibrationError, match=message):
        Samples.of(batch, Layout(mask=mask))


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.ones(5, 2)


@dataclasses.dataclass
class Told:
    samples: int

    def __iter__(self):
        yield torch.ones(2, 2)


DATA = TensorDataset(torch.ones(10, 2))


@pytest.mark.parametrize(
    ("batches", "samples"),
    [
        ([torch.ones(3, 2), torch.ones(2, 2)], 5),
        (DataLoader(DATA, batch_size=4), 10),
        (DataLoader(DATA, batch_size=4, drop_last=True), 8),
        (DataLoader(DATA, batch_size=4, sampler=range(6)), 6),
        (DataLoader(Stream(), batch_size=2), None),
        (iter([torch.ones(3, 2)]), None),
        (Told(7), 7),
    ],
)
def test_how_many_samples_a_run_has(batches, samples):
    run = Extent(batches)
    assert run.samples == samples
    assert run.positions(20) == -(-20 // (samples or 64))


def test_the_lengths_of_a_list_are_known_beforehand():
    batches = [torch.ones(2, 3, 8, 8), torch.ones(4, 3, 4, 4)]
    shares = [Extent(batches).see(batch).share for batch in batches]
    assert [share[0].item() for share in shares] == pytest.approx([2.0, 0.5])


def test_directions_are_those_of_their_seed_whatever_was_drawn_and_written_before():
    samples, outputs = Samples.of(torch.randn(3, 4)), torch.zeros(3, 5)
    first, other = (directions(outputs, samples, seed) for seed in (1, 2))
    assert not torch.equal(first, other)
    kept = first.clone()
    first.zero_()
    directions(outputs, samples, 3)
    torch.testing.assert_close(directions(outputs, samples, 1), kept, rtol=0, atol=0)


def test_batches_whose_inputs_hold_no_number_are_named():
    run = Extent(iter([torch.ones(2, 3), torch.ones(2, 0)]))
    run.see(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match=r"calibration batch 1 is empty: its inputs have the shape \(2, 0\)"):
        run.see(torch.ones(2, 0))


def test_of_samples_that_are_there_several_times_their_share_is_chosen():
    x = torch.cat([torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), torch.full((200, 3), 0.5)])
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    one, two = (torch.cat(spread(each.split(size), 100, Layout())) for each, size in ((x, 400), (x[order], 30)))
    assert 35 <= int((one == 0.5).all(1).sum()) <= 65
    assert sorted(one.tolist()) == sorted(two.tolist())
