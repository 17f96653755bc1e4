from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from spectrim.cost import chains, rounds
from spectrim.cost.chains import Variant, calls, csr_product, describe, measure, variants
from spectrim.cost.latency import Latency
from spectrim.linalg import csr
from spectrim.linalg.patterns import NofM, Taps, Unstructured, WholeChannels
from spectrim.linalg.unfold import unfolding
from spectrim.network.layer import LayerSpec
from spectrim.network.structure import Addend, Apart, Chain, Pair, Sum

CONV = LayerSpec(("conv",), 24, 16, (3, 3), (2, 1), (1, 1), (1, 1), (0, 0), inputs=((8, 8),))
LINEAR = LayerSpec(("head",), 32, 16, inputs=((3,),))
SPATIAL = unfolding((3, 3), "height-first")
CHANNEL = unfolding((), "channel")
needs_csr = pytest.mark.skipif(not csr.is_available(), reason="this torch has no fast CSR products")


def with_sum(spec, how, rank, density, pattern=None):
    """The layers of a low-rank pair plus a sparse weight."""
    return Sum((spec.factor(how, rank), Chain((spec.sparse(pattern or Unstructured(), density, bias=False),))))


def test_keys_of_dense_layers_are_those_of_tables_on_disk():
    assert describe((CONV,)) == "conv 24>16+bias @8x8 k3x3 s2x1 p1x1 d1x1 g1 zeros"
    (pair,) = calls(LINEAR.factor(CHANNEL, 4))
    assert describe(pair) == "linear 32>4 @3; linear 4>16+bias @3"
    transposed = dataclasses.replace(CONV, transposed=True, bias=False)
    assert describe((transposed,)) == "transposed 24>16 @8x8 k3x3 s2x1 p1x1 d1x1 o0x0 g1 zeros"


def test_keys_tell_densities_apart_to_two_digits():
    keys = {d: describe((CONV.sparse(Unstructured(), d),)) for d in (0.05, 0.0502, 0.052, 0.5, 1.0)}
    assert keys[0.05] == keys[0.0502] == "conv 24>16+bias @8x8 density 0.05 k3x3 s2x1 p1x1 d1x1 g1 zeros"
    assert len(set(keys.values())) == 4
    assert keys[1.0] == describe((CONV,))
    assert describe((LINEAR.sparse(NofM(2, 4), 0.5),)) == "linear 32>16+bias @3 density 0.5"


@pytest.mark.parametrize("pattern", [Unstructured(), WholeChannels(), Taps((1, 3), (1, 0))])
def test_a_sum_is_the_pair_and_the_added_sparse_layer(pattern):
    pair, added = calls(with_sum(CONV, SPATIAL, 4, 0.25, pattern))
    assert isinstance(pair, Pair)
    assert [describe(pair)] == [describe(c) for c in calls(CONV.factor(SPATIAL, 4))]
    alone = CONV.sparse(pattern, 0.25, bias=False)
    assert added == Addend((alone,))
    assert describe(added).replace(" added", "") == describe((alone,)) != describe(added)


def test_keys_of_added_layers_are_those_of_tables_on_disk():
    _, added = calls(with_sum(CONV, SPATIAL, 4, 0.25))
    assert describe(added) == "conv 24>16 @8x8 density 0.25 added k3x3 s2x1 p1x1 d1x1 g1 zeros"
    _, added = calls(with_sum(LINEAR, CHANNEL, 4, 0.25))
    assert describe(added) == "linear 32>16 @3 density 0.25 added"


def test_every_call_of_what_stands_apart_is_there():
    twice = CONV.at(((8, 8), (6, 6)))
    called = calls(Apart((with_sum(twice, SPATIAL, 4, 0.25), Chain((LINEAR,)))))
    assert [chain[0].inputs for chain in called] == [((8, 8),), ((6, 6),), ((8, 8),), ((6, 6),), ((3,),)]
    assert [type(chain) for chain in called] == [Pair, Pair, Addend, Addend, Chain]


def test_a_sum_costs_its_pair_at_any_rank_and_its_sparse_layer():
    asked = []

    def timer(asking, **_):
        asked.extend(describe(chain) for chain in asking)
        return [100.0 * chain[0].density if len(chain) == 1 else 1.0 for chain in asking]

    cost = Latency(cache=None, threads=1, timer=timer)
    chosen = [with_sum(CONV, SPATIAL, rank, density) for rank in (2, 5, 9) for density in (0.1, 0.2)]
    cost.prepare(chosen)
    alone = {rank: cost(CONV.factor(SPATIAL, rank)) for rank in (2, 5, 9)}
    assert sum("added" in key for key in asked) == 2
    assert len(asked) == len(set(asked)) <= 7
    for (rank, density), specs in zip([(r, d) for r in (2, 5, 9) for d in (0.1, 0.2)], chosen, strict=True):
        stored = specs[-1].density
        assert cost(specs) == pytest.approx(alone[rank] + 100.0 * stored)
        assert stored == pytest.approx(density, abs=1e-3)


# --- running


def pool_for(*found, dtype=torch.float32):
    return chains.number_pool([tuple(c) for c in found], dtype, "cpu", 2)


@pytest.mark.table(every=2)
@needs_csr
@pytest.mark.parametrize(
    ("spec", "several"),
    [
        (LINEAR, True),
        (CONV, True),
        (dataclasses.replace(CONV, kernel=(1, 1), padding=(0, 0)), True),
        (dataclasses.replace(CONV, stride=(1, 1), padding="same"), True),
        (dataclasses.replace(CONV, stride=(1, 1), padding="same", kernel=(2, 3)), False),
        (dataclasses.replace(CONV, groups=2), False),
        (dataclasses.replace(CONV, padding_mode="reflect"), False),
        (dataclasses.replace(CONV, transposed=True), False),
    ],
)
def test_csr_is_timed_where_it_is_possible(spec, several):
    sparse = spec.sparse(Unstructured(), 0.2)
    pool = pool_for([sparse])
    assert len(variants((sparse,), pool, 2, False)) == 1 + several
    assert (csr_product(spec) is not None) == several
    assert len(variants((spec,), pool, 2, False)) == 1
    assert len(variants((sparse,), pool_for([sparse], dtype=torch.bfloat16), 2, False)) == 1
    assert len(variants((sparse, spec), pool, 2, False)) == 1


@pytest.mark.table
@needs_csr
@pytest.mark.parametrize("kind", [Chain, Addend])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_timed_in_csr_is_a_sparse_layer(kind, channels_last, monkeypatch):
    packs = []
    pack = csr.pack
    monkeypatch.setattr(csr, "pack", lambda weight: packs.append(weight) or pack(weight))
    same = dataclasses.replace(CONV, stride=(1, 1), padding="same")
    for spec in (LINEAR, CONV, same, dataclasses.replace(CONV, bias=False)):
        sparse = spec.sparse(Unstructured(), 0.2)
        with torch.inference_mode():
            pool = pool_for([sparse])
            _, run = variants(kind((sparse,)), pool, 2, channels_last)
            weight = packs[-1]
            x = chains._view(pool, 0, chains._input_shape(sparse, 2), channels_last)
            bias = pool[: spec.out_channels] if spec.bias else None
            if spec.is_linear:
                wanted = F.linear(x, weight, bias)
            else:
                whole = weight.view(spec.out_channels, spec.in_channels, 3, 3)
                wanted = F.conv2d(x, whole, bias, spec.stride, spec.padding)
            for turn in (1, 2):
                run.chill()
                torch.testing.assert_close(run(), wanted * (turn if kind is Addend else 1))
        share = float((weight != 0).double().mean())
        assert abs(share - 0.2) < 4 * math.sqrt(0.16 / weight.numel())


def test_an_addition_is_timed_with_the_dense_layer_too():
    pool = pool_for([LINEAR])
    plain = chains.dense_run((LINEAR,), pool, 2, False)
    added = chains.dense_run(Addend((LINEAR,)), pool, 2, False)
    assert torch.equal(plain(), chains.dense_run((LINEAR,), pool, 2, False)())
    plain()
    first = plain()  # the third copy; the first one was run to learn the shape of the output
    added()
    torch.testing.assert_close(added(), first)


def test_the_fastest_way_counts_and_weights_are_cold(monkeypatch):
    clock = [0.0]
    calls: list[str] = []

    class Time:
        @staticmethod
        def perf_counter():
            return clock[0]

    def run(name, seconds, chilled):
        def call():
            calls.append(name)
            clock[0] += seconds

        return Variant(call, (lambda: calls.append("chill")) if chilled else None)

    found = {16: [run("slow", 0.004, False), run("fast", 0.001, True)], 8: [run("other", 0.003, False)]}
    monkeypatch.setattr(chains, "time", Time)
    monkeypatch.setattr(rounds, "time", Time)
    monkeypatch.setattr(chains, "variants", lambda chain, *_: found[chain[0].out_channels])
    times = measure([(LINEAR,), (dataclasses.replace(LINEAR, out_channels=8),)], rounds=3)
    assert times == pytest.approx([1.0, 3.0])
    fast = [i for i, name in enumerate(calls) if name == "fast"]
    assert all(calls[i - 1] == "chill" for i in fast[1:])


@needs_csr
def test_the_real_thing(tmp_path):
    cost = Latency(cache=tmp_path, rounds=3, threads=1, batch=2)
    linear = dataclasses.replace(LINEAR, in_channels=256, out_channels=256)
    value = cost(with_sum(linear, CHANNEL, 16, 0.05))
    assert value > cost(linear.factor(CHANNEL, 16)) > 0
    assert cost(with_sum(CONV, SPATIAL, 4, 0.1)) > 0
    again = Latency(cache=tmp_path, threads=1, batch=2, timer=lambda *_, **__: pytest.fail("measured again"))
    assert again(with_sum(linear, CHANNEL, 16, 0.05)) == value
