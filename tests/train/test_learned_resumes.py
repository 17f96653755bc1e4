"""Faults of learned ranks in checkpoints, starts and generators that were found once, one test each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.errors import CheckpointError
from spectrim.methods import WeightSVD
from spectrim.train import LearnedRanks, Recipe, learn_ranks
from tests.train.learned import fake_latency
from tests.train.learning_script import Residual, options
from tests.train.small import loader


@pytest.mark.table(every=2)
@pytest.mark.parametrize("learning", [Recipe(epochs=1), Recipe(epochs=0)])
def test_the_plan_of_another_run_is_not_taken_over(tmp_path, learning) -> None:
    settings = options(learning=learning, tuning=Recipe(epochs=1), checkpoint=tmp_path)
    learn_ranks(Residual(), loader(), st.Budget(parameters=0.4), **settings)
    (tmp_path / "learning.safetensors").unlink(missing_ok=True)  # as the error about it says
    (tmp_path / "tuning.safetensors").unlink()
    try:
        result = learn_ranks(Residual(), loader(), st.Budget(parameters=0.7), **settings)
    except CheckpointError:
        return
    assert result.plan.budget == result.trajectory.budget


def test_finish_after_a_start_with_the_same_method_and_other_options() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 3))
    w = torch.randn(6 * 3, 1) @ torch.randn(1, 6 * 3)  # rank one, height first
    model[0].weight.data = w.reshape(6, 3, 6, 3).permute(2, 0, 1, 3).contiguous()
    ranks = LearnedRanks(
        model,
        st.find(model),
        multiplier=1e-4,
        cost="parameters",
        start=[WeightSVD()],
        methods=[WeightSVD(("channel",))],
    )
    assert ranks.trajectory.records[0].choices == ("height-first, rank 1",)
    _, plan = ranks.finish()
    assert plan["0"].choice.is_dense or plan["0"].choice["unfolding"] == "channel"


def test_dense_latency_may_be_given() -> None:
    result = learn_ranks(
        Residual(),
        loader(),
        st.Budget(parameters=0.5),
        latency=fake_latency(),
        dense_latency=9.0,
        **options(learning=Recipe(epochs=0), tuning=Recipe(epochs=0)),
    )
    assert result.plan.dense_costs["latency"] == pytest.approx(9.0)


@pytest.mark.slow
def test_dense_latency_is_measured_in_the_layout_of_the_others(monkeypatch) -> None:
    from spectrim.nn.timing import Timing

    seen = []

    def measure(models, example, **_):
        seen.append(
            [
                next(p for p in m.parameters() if p.ndim == 4 and p.shape[1] > 1).is_contiguous(
                    memory_format=torch.channels_last
                )
                for m in models.values()
            ]
        )
        return {k: Timing((1.0,) * 3) for k in models}

    monkeypatch.setattr("spectrim.search.measured.measure_latency", measure)
    monkeypatch.setattr("spectrim.preparation.measure_latency", measure)
    clock = st.Latency(cache=None, memory_format="channels_last", timer=fake_latency().timer)
    learn_ranks(
        Residual(),
        loader(),
        st.Budget(latency=0.9),
        latency=clock,
        **options(learning=Recipe(epochs=0), tuning=Recipe(epochs=0), skip="stem"),
    )
    assert all(all(flags) for flags in seen), seen


def test_a_generator_of_calibration_batches_moves_no_generator() -> None:
    settings = options(learning=Recipe(epochs=0), tuning=Recipe(epochs=0)) | {"calibration": (b for b in loader())}
    net, data = Residual(), loader()
    before = torch.get_rng_state()
    learn_ranks(net, data, st.Budget(parameters=0.5), **settings)
    assert torch.equal(torch.get_rng_state(), before)
