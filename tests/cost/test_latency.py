from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression
from torch import nn

from spectrim.cost import chains
from spectrim.cost.chains import calls, describe, measure
from spectrim.cost.counted import macs, rank_multiple
from spectrim.cost.latency import Latency, default_cache, interpolate
from spectrim.linalg.unfold import unfolding, unfoldings
from spectrim.network.layer import LayerSpec
from spectrim.network.structure import Apart, Chain

CONV = LayerSpec(("conv",), 128, 96, (3, 3), (2, 1), (1, 1), (1, 1), (0, 0), padding_mode="zeros", inputs=((16, 16),))
LINEAR = LayerSpec(("head",), 256, 192, inputs=((3,),))
SPATIAL = unfolding((3, 3), "height-first")


class Clock:
    """A timer that knows the time of each chain: so much for each layer and for each MAC."""

    def __init__(self, time=lambda chain: 1.0 * len(chain) + macs(chain) * 1e-7):
        self.time, self.asked, self.options = time, [], {}

    def __call__(self, chains, **options):
        self.options = options
        self.asked += [describe(chain) for chain in chains]
        return [self.time(chain) for chain in chains]


@pytest.fixture
def clock():
    return Clock()


def latency(clock, **options):
    return Latency(**{"cache": None, "threads": 2, "timer": clock, **options})


def test_a_layer_costs_its_time(clock):
    cost = latency(clock)
    assert cost([CONV]) == clock.time((CONV,))
    assert cost(Apart((Chain((CONV,)), Chain((LINEAR,))))) == clock.time((CONV,)) + clock.time((LINEAR,))
    assert len(clock.asked) == 2


def test_calls_add_up_and_equal_shapes_are_measured_once(clock):
    twice = CONV.at(((16, 16), (8, 8), (16, 16)))
    expected = 2 * clock.time((CONV,)) + clock.time((CONV.at(((8, 8),)),))
    assert latency(clock)([twice]) == pytest.approx(expected)
    assert len(clock.asked) == len(set(clock.asked)) == 2


def test_names_owners_and_types_do_not_matter_but_shapes_do(clock):
    cost = latency(clock)
    cost([CONV])
    cost([dataclasses.replace(CONV, names=("other",), shared=1, index_bytes=8, dtype=torch.float64)])
    assert len(clock.asked) == 1
    changes = {
        "in_channels": 64,
        "out_channels": 64,
        "kernel": (3, 1),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (2, 1),
        "groups": 2,
        "padding_mode": "reflect",
        "bias": False,
        "inputs": ((16, 15),),
        "transposed": True,
    }
    for field, value in changes.items():
        cost([dataclasses.replace(CONV, **{field: value})])
    transposed = dataclasses.replace(CONV, transposed=True, output_padding=(1, 0))
    cost([transposed])
    assert len(set(clock.asked)) == len(clock.asked) == 2 + len(changes)


@pytest.mark.table
@pytest.mark.parametrize("how", unfoldings((3, 3)), ids=lambda how: how.name)
def test_a_family_is_measured_at_few_ranks_up_to_break_even(clock, how, register_width):
    cost = latency(clock)
    dense = macs([CONV])
    ranks = range(1, 97)
    times = [cost(CONV.factor(how, rank)) for rank in ranks]
    assert 2 <= len(clock.asked) <= 5
    assert times == sorted(times)
    assert len(set(times)) > 4
    rows, columns = how.sizes((3, 3))
    multiple = rank_multiple("cpu", torch.float32, min(128 * rows, 96 * columns))
    widths = sorted(int(key.split(">")[1].split()[0].removesuffix("+bias")) for key in clock.asked)
    assert all(width % multiple == 0 for width in widths)
    largest = macs(CONV.factor(how, widths[-1]))
    assert 0.9 * dense < largest < 1.1 * dense
    for rank in widths:  # exact at the knots
        assert cost(CONV.factor(how, rank)) == pytest.approx(clock.time(calls(CONV.factor(how, rank))[0]), rel=1e-12)


def test_a_time_linear_in_the_rank_is_interpolated_exactly(clock, register_width):
    for spec, how, full in ((CONV, SPATIAL, 288), (LINEAR, unfolding((), "channel"), 192)):
        multiple = rank_multiple("cpu", torch.float32, full)
        errors = latency(clock).interpolation_error(spec, how, [multiple * n for n in (1, 3, 7, 15)])
        assert list(errors) == [multiple * n for n in (1, 3, 7, 15)]
        assert max(map(abs, errors.values())) < 1e-12


def test_interpolation_error_is_measured_apart_from_the_table(tmp_path, register_width):
    # No multiple of any register, so that it is not measured for the table.
    bumpy = Clock(lambda chain: 1.0 + (5.0 if chain[0].out_channels == 20 and len(chain) == 2 else 0.0))
    cost = latency(bumpy, cache=tmp_path)
    assert cost.interpolation_error(CONV, SPATIAL, [20])[20] == pytest.approx(1 / 6 - 1)
    assert not list(tmp_path.iterdir())
    asked = len(bumpy.asked)
    cost(CONV.factor(SPATIAL, 20))
    assert len(bumpy.asked) > asked


def test_ranks_between_multiples_cost_the_next_multiple(clock, register_width):
    cost = latency(clock)
    spec = dataclasses.replace(CONV, in_channels=512, out_channels=512)
    multiple = cost.register_width
    assert multiple == register_width
    assert cost(spec.factor(SPATIAL, multiple + 1)) == cost(spec.factor(SPATIAL, 2 * multiple))
    assert cost(spec.factor(SPATIAL, multiple + 1)) > cost(spec.factor(SPATIAL, multiple))


def test_groups_and_narrow_layers_have_families_too(clock):
    grouped = dataclasses.replace(CONV, groups=4)
    narrow = dataclasses.replace(CONV, in_channels=3, out_channels=2)
    for spec in (grouped, narrow):
        for how in unfoldings((3, 3)):
            pair, cost = spec.factor(how, 1), latency(clock, register_width=1)
            assert cost(pair) == pytest.approx(clock.time(pair))


# Tucker-2 of CONV: 1 x 1, the kernel between fewer channels, 1 x 1.
TUCKER = (
    dataclasses.replace(CONV, out_channels=32, kernel=(1, 1), stride=(1, 1), padding=(0, 0), bias=False),
    dataclasses.replace(CONV, in_channels=32, out_channels=24, bias=False),
    dataclasses.replace(CONV, in_channels=24, kernel=(1, 1), stride=(1, 1), padding=(0, 0), inputs=((8, 16),)),
)


@pytest.mark.parametrize("layers", [TUCKER, list(TUCKER), Chain(TUCKER)], ids=["tuple", "list", "chain"])
def test_three_layers_in_a_row_are_timed_as_the_chain_they_are(clock, layers):
    cost = latency(clock)
    assert cost(layers) == clock.time(TUCKER)
    assert clock.asked == [describe(TUCKER)]
    twice = [spec.at((*spec.inputs, *spec.inputs)) for spec in TUCKER]
    assert cost(twice) == 2 * clock.time(TUCKER)
    assert len(clock.asked) == 1


def test_only_what_factor_makes_is_a_family_of_ranks(clock):
    pair = CONV.factor(SPATIAL, 20)
    assert latency(clock)(tuple(pair)) == clock.time(tuple(pair))
    assert clock.asked == [describe(pair)]


@pytest.mark.parametrize(
    "after",
    [
        LINEAR,
        dataclasses.replace(TUCKER[2], in_channels=12),
        dataclasses.replace(LINEAR, in_channels=96),
        dataclasses.replace(TUCKER[2], in_channels=96, inputs=((8, 16), (8, 16))),
    ],
    ids=["another layer", "channels", "linear", "calls"],
)
def test_layers_that_cannot_follow_each_other_are_no_chain(clock, after):
    with pytest.raises(ValueError, match=r"cannot take what 'conv' gives .*Apart"):
        latency(clock)([CONV, after])
    assert clock.asked == []


def test_prepare_measures_all_at_once_and_nothing_twice(clock, register_width):
    cost = latency(clock, rounds=4, budget=3.0, batch=2)
    wanted = [[CONV], [CONV], CONV.factor(SPATIAL, 8), CONV.factor(SPATIAL, 9), [LINEAR]]
    count = cost.prepare(iter(wanted))
    assert count == len(clock.asked) == len(set(clock.asked))
    assert clock.options["rounds"] == 4
    assert clock.options["budget"] == 3.0
    assert clock.options["batch"] == 2
    assert cost.prepare(wanted) == 0
    for specs in wanted:
        cost(specs)
    assert len(clock.asked) == count


def test_unknown_inputs_name_the_layer(clock):
    with pytest.raises(ValueError, match="'conv'"):
        latency(clock)([CONV.at(())])


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_format": "nhwc"}, {"batch": 0}, {"threads": 0}, {"rounds": "9"}, {"register_width": 0},
        {"device": "gpu"}, {"dtype": "float32"}, {"cache": 3},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Latency(**{"cache": None} | wrong)


# --- the table on disk


def test_the_table_is_read_back(tmp_path, clock, register_width):
    first = latency(clock, cache=tmp_path)
    value = first(CONV.factor(SPATIAL, 10))
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    again = Clock()
    assert latency(again, cache=tmp_path)(CONV.factor(SPATIAL, 10)) == value
    assert again.asked == []


def test_other_facts_are_other_tables(tmp_path, clock, monkeypatch):
    base = {"cache": tmp_path, "threads": 2}
    paths = {latency(clock, **base).path}
    changes = {"dtype": torch.bfloat16, "threads": 1, "batch": 4, "memory_format": "channels_last", "register_width": 8}
    for change in ({name: value} for name, value in changes.items()):
        paths.add(latency(clock, **{**base, **change}).path)
    paths.add(latency(clock, **base, device="meta").path)
    monkeypatch.setattr("spectrim.cost.latency.device_name", lambda device: "another")
    paths.add(latency(clock, **base).path)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "99.0")
    paths.add(latency(clock, **base).path)
    assert len(paths) == 9
    # Effort is no fact.
    assert latency(clock, **base, rounds=3, budget=1.0).path in paths


def test_facts_are_plain_values(clock):
    facts = latency(clock).facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["dtype"] == "float32"
    assert facts["threads"] == 2
    assert facts["device_name"]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"version": 1}',
        b'{"version": 1, "facts": {}, "timings": {}}',
        b"[" * 100_000,
        "cut",
        "negative",
        "text",
        "list",
    ],
    ids=lambda damage: str(damage[:20]),
)
def test_a_damaged_table_is_ignored_and_written_again(tmp_path, clock, damage):
    cost = latency(clock, cache=tmp_path)
    value = cost([CONV])
    whole = cost.path.read_text()
    content = json.loads(whole)
    if damage == "cut":
        damage = whole[: len(whole) // 2].encode()
    elif isinstance(damage, str):
        bad = {"negative": {"a": -1.0}, "text": {"a": "fast"}, "list": [1.0]}[damage]
        damage = json.dumps({**content, "timings": bad}).encode()
    cost.path.write_bytes(damage)
    with pytest.warns(UserWarning, match="cannot be used"):
        fresh = latency(clock, cache=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fresh([CONV]) == value
    assert cost.path.read_text() == whole


def test_two_writers_keep_what_the_other_wrote(tmp_path, clock):
    one, two = latency(clock, cache=tmp_path), latency(clock, cache=tmp_path)
    one([CONV])
    two([LINEAR])
    assert set(json.loads(one.path.read_text())["timings"]) == {describe((CONV,)), describe((LINEAR,))}


def test_writers_at_once_leave_a_whole_file(tmp_path, clock):
    def work(start):
        for n in range(start, start + 8):
            latency(clock, cache=tmp_path)([CONV.at(((n, n),))])

    workers = [threading.Thread(target=work, args=(8 + 10 * i,)) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["timings"]


def test_a_table_that_cannot_be_stored_stays_in_memory(tmp_path, clock):
    (tmp_path / "file").write_text("")
    cost = latency(clock, cache=tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match="stay in memory"):
        value = cost([CONV])
    assert cost([CONV]) == value
    assert len(clock.asked) == 1


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECTRIM_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("SPECTRIM_CACHE")
    base = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    monkeypatch.setenv(base, str(tmp_path / "cache"))
    assert default_cache() == tmp_path / "cache" / "spectrim"
    monkeypatch.delenv(base)
    assert default_cache() == Path.home() / ".cache" / "spectrim"


# --- interpolation


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_interpolation_never_falls(values):
    points = [(8 * (i + 1), value) for i, value in enumerate(values)]
    line = [interpolate(points, at) for at in range(1, 80)]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(line))
    pooled = isotonic_regression(values)
    assert [interpolate(points, x) for x, _ in points] == pytest.approx(list(pooled), rel=1e-9)
    assert all(y >= pooled[0] * x / 8 * (1 - 1e-9) for x, y in enumerate(line[:8], 1))


def test_falling_values_are_pooled():
    points = [(8, 1.0), (16, 4.0), (24, 2.0), (32, 5.0)]
    assert [interpolate(points, x) for x in (8, 16, 24, 32)] == [1.0, 3.0, 3.0, 5.0]


def test_interpolation_goes_on_beyond_the_ends():
    assert interpolate([(8, 2.0), (16, 3.0)], 4) == 1.5
    assert interpolate([(8, 2.0), (16, 6.0)], 4) == 1.0  # the line to the origin
    assert interpolate([(8, 2.0), (16, 3.0)], 32) == 5.0
    assert interpolate([(8, 2.0)], 4) == 2.0
    assert interpolate([(8, 2.0)], 16) == 4.0


# --- running and timing


def modules():
    return {
        "linear": (nn.Linear(6, 4), (3,)),
        "conv1d": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (8,)),
        "reflect": (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), padding_mode="reflect", bias=False), (8, 7)),
        "same": (nn.Conv2d(4, 6, (3, 4), padding="same", dilation=(2, 1), padding_mode="replicate"), (8, 8)),
        "zeros": (nn.Conv2d(4, 6, 3, padding="same", groups=2), (8, 8)),
        "conv3d": (nn.Conv3d(2, 4, 3, padding=1), (4, 4, 4)),
        "up1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (5,)),
        "up2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2), (5, 6)),
        "up3d": (nn.ConvTranspose3d(2, 4, 2), (3, 3, 3)),
    }


def described(module, shape):
    if isinstance(module, nn.Linear):
        return LayerSpec(("m",), module.in_features, module.out_features, inputs=(shape,))
    names = ("stride", "padding", "dilation", "output_padding", "groups", "transposed", "padding_mode")
    options = {name: getattr(module, name) for name in names}
    return LayerSpec(
        ("m",),
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        bias=module.bias is not None,
        inputs=(shape,),
        **options,
    )


@pytest.mark.table
@pytest.mark.parametrize("name", modules())
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_timed_is_what_the_module_computes(name, channels_last):
    module, shape = modules()[name]
    spec = described(module, shape)
    pool = chains.number_pool([(spec,)], torch.float32, "cpu", 2)
    run = chains.dense_run((spec,), pool, 2, channels_last)
    seen = []
    for _ in range(2):
        seen.append(run())
    # Find the weights the runner used: the first copy starts at the pool's first number.
    weight = chains._weight_shape(spec)
    numel = math.prod(weight)
    if channels_last and len(weight) > 3:
        values = pool[:numel].view(weight[0], *weight[2:], weight[1]).movedim(-1, 1)
    else:
        values = pool[:numel].view(weight)
    shape = chains._input_shape(spec, 2)
    x = pool[: math.prod(shape)]
    last = channels_last and len(shape) > 3
    x = x.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if last else x.view(shape)
    with torch.no_grad():
        module.weight.copy_(values)
        if module.bias is not None:
            start = chains._aligned(numel)
            module.bias.copy_(pool[start : start + spec.out_channels])
        expected = module(x)
    torch.testing.assert_close(seen[0], expected)
    assert not torch.equal(seen[0], seen[1])  # the weights rotate
    if last:
        assert seen[0].is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def test_a_chain_of_three_is_run_as_the_modules_would_be():
    chain = Chain(TUCKER)
    pool = chains.number_pool([chain], torch.float32, "cpu", 2)
    net = nn.Sequential(
        nn.Conv2d(128, 32, 1, bias=False),
        nn.Conv2d(32, 24, 3, stride=(2, 1), padding=1, bias=False),
        nn.Conv2d(24, 96, 1),
    )
    start = 0
    for layer, spec in zip(net, chain, strict=True):
        layer.weight.data = pool[start : start + layer.weight.numel()].view(layer.weight.shape)
        start += chains._aligned(layer.weight.numel())
        if spec.bias:
            layer.bias.data = pool[start : start + spec.out_channels]
        start += chains._aligned(spec.out_channels)
    x = pool[: 2 * 128 * 16 * 16].view(2, 128, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(chains.dense_run(chain, pool, 2, False)(), net(x))


def test_measure_takes_turns_and_restores_the_threads():
    before = torch.get_num_threads()
    done = []
    (pair,) = calls(LINEAR.factor(unfolding((), "channel"), 8))
    times = measure([(LINEAR,), pair], threads=1, rounds=3, progress=lambda n, total: done.append((n, total)))
    assert len(times) == 2
    assert all(0 < time < math.inf for time in times)
    assert done == [(n, 6) for n in range(1, 7)]
    assert torch.get_num_threads() == before


def test_at_least_three_rounds_are_taken_within_any_budget():
    done = []
    measure([(LINEAR,)], rounds=5, budget=0.0, progress=lambda n, total: done.append(n))
    assert done == [1, 2, 3]


def test_the_real_thing(tmp_path):
    cost = Latency(cache=tmp_path, rounds=3, threads=1, batch=2, memory_format="channels_last")
    spec = dataclasses.replace(CONV, in_channels=16, out_channels=16, inputs=((4, 4),))
    dense, pair = cost([spec]), cost(spec.factor(SPATIAL, 3))
    kept = json.loads(cost.path.read_text())
    assert kept["facts"]["threads"] == 1
    assert kept["timings"][describe([spec])] == dense
    # A pair lies between those of its family that were measured, which come from the file another time.
    assert 0 < pair <= max(kept["timings"].values())
    again = dataclasses.replace(cost, timer=lambda *_, **__: pytest.fail("measured again"))
    assert (again([spec]), again(spec.factor(SPATIAL, 3))) == (dense, pair)


def test_facts_are_plain_values_that_a_plan_can_be_written_with() -> None:
    facts = Latency(cache=None).facts()
    assert {type(value) for value in facts.values()} <= {str, int, float, bool}


def test_times_are_neither_read_from_a_pipe_nor_written_to_one(tmp_path, clock):
    cost = latency(clock, cache=tmp_path)
    os.mkfifo(cost.path)
    with (
        pytest.warns(UserWarning, match="cannot be used and are measured anew: .* it is a pipe"),
        pytest.warns(UserWarning, match="cannot be stored in .* it is a pipe"),
    ):
        assert cost(CONV.factor(SPATIAL, 10)) > 0
