"""Public verbs that are called with what was not meant: the sentence says what was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.train import Distillation, Recipe

ANY: Any = st


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


BATCH = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: ANY.compress(m, [BATCH], "macs=50%", method=st.WeightSVD()), "Did you mean 'methods'?"),
        (lambda m: ANY.compress(m, [BATCH], buget="macs=50%"), "Did you mean 'budget'?"),
        (lambda m: ANY.compress(m, budget="macs=50%"), "Write compress(model, batches, 'macs=50%')"),
        (lambda m: ANY.find(m, BATCH), "batches go to calibrate(model, sites, batches)"),
        (
            lambda m: ANY.save(st.Plan((), {}, {}), m, "x.safetensors"),
            "save got Plan, Sequential, str: write save(result",
        ),
        (lambda m: st.fine_tune(m, [BATCH], epoch=1), "Did you mean 'epochs'?"),
        (lambda m: ANY.compress(m, [BATCH], {1: 2}), "the budget is {1: 2}: expected Budget(macs=0.5), text such as"),
        (
            lambda m: ANY.compare(m, net(), BATCH, evaluate=lambda _: None, repeats=0),
            "evaluate returned None for 'dense': expected one number",
        ),
        (
            lambda m: ANY.fine_tune(m, [(BATCH, torch.arange(8))], epochs=1, evaluate=lambda _: "good"),
            "evaluate returned 'good' for the network in training: expected one number",
        ),
        (
            lambda m: st.learn_ranks(m, [BATCH], "macs=50%", energi="output"),
            "no option 'energi'. Did you mean 'energy'?",
        ),
    ],
)
def test_other_arguments_than_a_verb_has(call: Callable[[nn.Module], object], said: str) -> None:
    with pytest.raises(TypeError) as caught:
        call(net())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda m, s, t, p: ANY.calibrate(m, [BATCH]),
            "sites is a list: expected a Sites. Write calibrate(model, find(",
        ),
        (lambda m, s, t, p: ANY.calibrate(m, s), "Write calibrate(model, find(model), batches)"),
        (
            lambda m, s, t, p: ANY.calibrate(sites=m, model=s, batches=[BATCH]),
            "sites is a Sequential: expected a Sites",
        ),
        (lambda m, s, t, p: ANY.couple(s, m, BATCH), "Write couple(model, find(model), example)"),
        (lambda m, s, t, p: ANY.group(m), "Write group(sites)"),
        (
            lambda m, s, t, p: ANY.tabulate(m, st.WeightSVD()),
            "sites is a Sequential: expected a Sites. Write tabulate(",
        ),
        (lambda m, s, t, p: ANY.select(s, "macs=50%"), "candidates is a Sites: expected a Candidates. Write select("),
        (lambda m, s, t, p: ANY.select(t), "Write select(table, 'macs=50%')"),
        (lambda m, s, t, p: ANY.apply(m, p, s), "sites is a Plan: expected a Sites. Write apply(model, sites, plan"),
        (lambda m, s, t, p: ANY.apply(m, s, t), "plan is a Candidates: expected a Plan"),
        (lambda m, s, t, p: ANY.apply(m, s), "Write apply(model, sites, plan, batches)"),
        (
            lambda m, s, t, p: ANY.compare(m, "small", BATCH),
            "compressed is a str: expected a Module or a Mapping. Write",
        ),
        (lambda m, s, t, p: ANY.recommend(m, "macs=50%"), "sites is a Sequential: expected a Sites. Write recommend("),
        (lambda m, s, t, p: ANY.recommend(s), "Write recommend(sites, Energy(0.9)), with"),
        (
            lambda m, s, t, p: ANY.sensitivity(m, [BATCH]),
            "sites is a list: expected a Sites. Write sensitivity(model, ",
        ),
        (
            lambda m, s, t, p: ANY.agreement(m, p, [BATCH]),
            "small is a Plan: expected a Module. Write agreement(dense, ",
        ),
        (lambda m, s, t, p: ANY.choose_kernels(p, BATCH), "model is a Plan: expected a Module. Write choose_kernels("),
        (lambda m, s, t, p: ANY.LearnedRanks(m, "macs=50%"), "sites is a str: expected a Sites. Write LearnedRanks("),
        (lambda m, s, t, p: ANY.merge(p), "model is a Plan: expected a Module. Write merge(model)"),
        (lambda m, s, t, p: ANY.fine_tune(p, [BATCH]), "model is a Plan: expected a Module. Write fine_tune(model, ba"),
        (lambda m, s, t, p: ANY.learn_ranks(p, [BATCH], "macs=50%"), "model is a Plan: expected a Module. Write learn"),
        (lambda m, s, t, p: ANY.export_program(p, BATCH, "p"), "model is a Plan: expected a Module. Write export_pro"),
        (lambda m, s, t, p: ANY.export_onnx(p, BATCH, "p"), "model is a Plan: expected a Module. Write export_onnx("),
        (lambda m, s, t, p: ANY.load("m", "small.safetensors"), "model is a str: expected a Module. Write load(make_"),
    ],
)
def test_steps_that_are_given_what_another_takes(call: Callable[..., object], said: str) -> None:
    model = net()
    sites = st.find(model)
    table = st.tabulate(sites, st.WeightSVD())
    with pytest.raises(TypeError) as caught:
        call(model, sites, table, st.select(table, "parameters=90%"))
    assert said in str(caught.value)


LABELLED = [(BATCH, torch.arange(8))]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher": net}, "teacher is a function: expected a Module, such as the dense model; of a"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, r"loss= returned a tensor of shape \(8,\): expected"),
        ({"loss": lambda a, b: a.sum().item()}, "loss= returned a float: expected a tensor of one number"),
        ({"loss": lambda a, b: a.detach().sum()}, "cut off from the outputs: expected a tensor of one number"),
        ({"optimizer": lambda groups: torch.optim.LBFGS(groups[0]["params"])}, "LBFGS runs the model several times"),
        ({"optimizer": lambda groups: "adam"}, "optimizer= returned a str: expected an optimizer of torch"),
    ],
)  # fmt: skip
def test_parts_of_a_training_are_what_they_are_to_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        ANY.fine_tune(net(), LABELLED, epochs=1, **options)
    if "optimizer" not in options:
        with pytest.raises(TypeError, match=said):
            ANY.learn_ranks(net(), LABELLED, "macs=90%", learning=Recipe(epochs=1), **options)


def test_an_optimizer_in_place_of_a_function_is_told_in_a_line() -> None:
    with pytest.raises(ValueError, match="or give a function from parameter groups to an optimizer") as caught:
        ANY.fine_tune(net(), LABELLED, epochs=1, optimizer=torch.optim.SGD(net().parameters(), lr=0.1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "clip", "warmup", "temperature", "weight"])
def test_numbers_of_a_training_are_numbers(name: str) -> None:
    make = Distillation if name in ("temperature", "weight") else Recipe
    with pytest.raises(ValueError, match=f"{name}='a' "):
        cast(Any, make)(**{name: "a"})


def test_an_optimizer_is_not_emptied_for_a_network_it_has_nothing_to_do_with() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no parameter of this Linear has come from"):
        st.carry_optimizer(optimizer, model, nn.Linear(2, 2))
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    with pytest.raises(TypeError, match=r"new is a Report: expected a Module. Write carry_optimizer\("):
        ANY.carry_optimizer(optimizer, model, st.compress(model, [BATCH], "macs=90%").report)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seconds": 5, "groups": False}, "give methods='auto' too"),
        ({"methods": "auto", "groups": True}, "takes no groups=True"),
        ({"methods": "Auto"}, "methods='auto', in small letters"),
        ({"budget": None, "min_agreement": 0.9, "cost": "params"}, "cost= names params, which the table does not hold"),
    ],
)
def test_options_of_a_search(options: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        ANY.compress(net(), [BATCH], **{"budget": "macs=50%", **options})
    assert said in str(caught.value)


def test_results_are_no_models_to_compare() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"'a' is a Result: expected a model; of a result it is result.model"):
        ANY.compare(model, {"a": st.compress(model, [BATCH], "macs=90%")}, BATCH)


def test_errors_of_a_verb_itself_stay_as_they_are() -> None:
    with pytest.raises(TypeError, match="^the model is a str: expected a torch.nn.Module, [^.]*result.model$"):
        ANY.compress("resnet18", [BATCH], "macs=50%")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (BATCH.to(torch.uint8), "by batch.float() / 255"),
        (BATCH.long(), "by batch.float()"),
        (BATCH[:, :1], "Give batches of the shape that the model was trained on"),
    ],
)
def test_batches_that_the_model_was_not_trained_on(batch: torch.Tensor, said: str) -> None:
    with pytest.raises(st.ForwardError) as caught:
        st.compress(net(), [batch], "macs=50%")
    assert said in str(caught.value)
    assert "forward=" not in str(caught.value)


def test_labels_without_an_output() -> None:
    with pytest.raises(ValueError, match=r"a batch of 8 has labels from 12 to 12, .* for classes 0 to 9"):
        st.fine_tune(net(), [(BATCH, torch.full((8,), 12))], epochs=1, progress=False)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.long),
            r"of shape \(2, 1, 4, 4\) .* outputs .*write labels.squeeze\(1\)",
        ),
        (
            torch.zeros(2, 8, 8, dtype=torch.long),
            r"resize the labels .* to \(2, 4, 4\), or the outputs .* loss=",
        ),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), r"torch.uint8 .*write labels.long\(\)"),
        (torch.zeros(2, 4, 4), r"torch.float32 .*write labels.long\(\)"),
        (torch.zeros(2, 4, dtype=torch.long), r"give labels of shape \(2, 4, 4\), or pass loss="),
        (torch.tensor([-100, 255]).repeat(2, 4, 2), r"labels from 255 to 255.*\(-100 is ignored; loss=.*ignore_index"),
    ],
)
def test_labels_that_do_not_belong_to_maps(labels: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        st.fine_tune(torch.nn.Conv2d(2, 3, 1), [(torch.ones(2, 2, 4, 4), labels)], epochs=1, progress=False)


def test_labels_that_are_no_tensor() -> None:
    with pytest.raises(TypeError, match="targets are a list, not a tensor of labels: convert them or pass loss="):
        st.fine_tune(net(), [(BATCH, [3] * 8)], epochs=1, progress=False)


def test_a_batch_without_a_label_that_counts_teaches_nothing() -> None:
    model = torch.nn.Conv2d(2, 3, 1)
    before = model.weight.clone()
    ignored = torch.full((2, 4, 4), -100)
    trained = st.fine_tune(model, [(torch.ones(2, 2, 4, 4), ignored)], epochs=1, weight_decay=0.0, progress=False)
    assert trained.history[0].loss == 0
    torch.testing.assert_close(model.weight, before)


def test_a_result_is_saved_as_a_whole(tmp_path: Path) -> None:
    model = net()
    result = st.compress(model, [BATCH], "macs=90%")
    st.save(result, tmp_path / "small.safetensors")
    loaded = st.load(net(), tmp_path / "small.safetensors")
    torch.testing.assert_close(loaded.eval()(BATCH), result.model.eval()(BATCH))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    with pytest.raises(st.CheckpointError, match=r"torch.save wrote it: give the file that spectrim.save wrote"):
        st.load(net(), tmp_path / "x.pt")


@pytest.mark.parametrize("path", ["a\0b.json", "", "\ud800", 3, b"ab", Path("a\0b")])
def test_a_path_that_no_file_has_is_quoted(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan, batches = st.Plan((), {}, {}), [(BATCH, torch.zeros(8, dtype=torch.long))]
    for call in (
        lambda: plan.write(path),
        lambda: st.Plan.read(path),
        lambda: st.Sweep((), "macs").write(path),
        lambda: st.Sweep.read(path),
        lambda: st.save(net(), plan, path),
        lambda: st.load(net(), path),
        lambda: st.fine_tune(net(), batches, epochs=1, checkpoint=path),
        lambda: st.learn_ranks(net(), batches, "macs=50%", checkpoint=path),
        lambda: st.Latency(cache=path),
        lambda: st.export_program(net(), BATCH, path),
    ):
        with pytest.raises((TypeError, ValueError), match="path|folder|checkpoint|cache|save got|the plan") as caught:
            call()
        assert "embedded" not in str(caught.value)
        assert "surrogates not allowed" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_cost_of_ones_own_is_no_cost_of_the_library_and_can_be_written_in_a_budget() -> None:
    for name, said in {
        "macs": "costs has 'macs', which the library counts or measures itself: give it another name",
        "Latency": "costs has 'Latency', which",
        "": "costs has '': give a name without spaces, = and commas",
        "a=b": "costs has 'a=b': give a name",
    }.items():
        for verb in (st.compress, st.sweep, st.learn_ranks):
            with pytest.raises(ValueError, match=said):
                verb(net(), [BATCH], "parameters=50%" if verb is not st.sweep else "parameters", costs={name: len})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_cost_of_ones_own_that_is_no_amount_is_told_with_its_layer(value: float) -> None:
    with pytest.raises(ValueError, match=f"cost 'joules' gave {value} for layer '0': expected a finite number"):
        st.compress(net(), [BATCH], "macs=60%", costs={"joules": lambda layers: value})


def test_what_would_be_ignored_is_refused() -> None:
    for verb, budget in ((st.compress, "macs=60%"), (st.sweep, "macs")):
        with pytest.raises(
            ValueError, match="better='lower' is of the number that evaluate= returns, and there is none"
        ):
            verb(net(), [BATCH], budget, better="lower")
    with pytest.raises(ValueError, match="write the budget as 'parameters=50%', or give max_drop"):
        st.compress(net(), [BATCH], "macs=60%", cost="parameters")
