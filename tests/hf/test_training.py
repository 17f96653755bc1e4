"""Compressed models of transformers in its Trainer, in PEFT, and generating."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim as st
from spectrim.nn.checkpoint import same_weights

pytest.importorskip("transformers")

import spectrim.hf  # noqa: I001
from tests.hf.nets import BUDGETS, LORA, NAMES, compressed, inputs, labels, logits, make
from transformers import Trainer, TrainingArguments


@pytest.fixture(autouse=True)
def _own_accelerate() -> Iterator[None]:
    """A Trainer settles accelerate on a device for the whole process, and other tests must not inherit it."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def trainer(model: Any, name: str, folder: Path, steps: int) -> Trainer:
    pytest.importorskip("accelerate")
    batch = {**inputs(name, count=12), "labels": labels(name, 12)}
    rows = [{key: value[i] for key, value in batch.items()} for i in range(12)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=0.01,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]


@pytest.mark.table
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_the_trainer_saves_and_resumes(name: str, budget: str, tmp_path: Path) -> None:
    whole, _ = compressed(name, budget)
    dense = make(name)
    trainer(whole, name, tmp_path / "whole", 4).train()
    resumed, _ = compressed(name, budget)
    trainer(resumed, name, tmp_path / "whole", 4).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_weights(resumed, whole)
    assert not same_weights(compressed(name, budget)[0], whole)
    last = type(whole).from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert same_weights(last, whole)
    assert sum(p.numel() for p in last.parameters()) < sum(p.numel() for p in dense.parameters()) or budget == "bytes"


@pytest.mark.table(every=3)
@pytest.mark.parametrize("budget", BUDGETS)
def test_what_was_loaded_is_trained(budget: str, tmp_path: Path) -> None:
    small, _ = compressed("llama", budget)
    small.save_pretrained(tmp_path / "small")
    back = type(small).from_pretrained(tmp_path / "small")
    trainer(small, "llama", tmp_path / "one", 2).train()
    trainer(back, "llama", tmp_path / "two", 2).train()
    assert same_weights(back, small)


@pytest.mark.table
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generating(name: str, budget: str, tmp_path: Path) -> None:
    small, _ = compressed(name, budget)
    small.save_pretrained(tmp_path)
    back = type(small).from_pretrained(tmp_path)
    given = {k: v for k, v in inputs(name).items() if k != "decoder_input_ids"}
    answers = [model.generate(**given, max_new_tokens=6, do_sample=False) for model in (small, back)]
    assert torch.equal(*answers)
    # Step by step with a cache, as all at once.
    with torch.no_grad():
        steps = small.generate(**given, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(steps, answers[0])


@pytest.mark.table
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", NAMES)
def test_adapters_find_layers_by_name_and_train(name: str, budget: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    small, plan = compressed(name, budget)
    small.save_pretrained(tmp_path / "small")
    target = LORA[name]
    assert any(site.endswith(f".{target}") for e in plan if not e.choice.is_dense for site in e.sites)
    adapted = peft.get_peft_model(small, peft.LoraConfig(target_modules=[target], r=2, lora_alpha=4))
    found = [n for n, m in adapted.named_modules() if n.endswith(f".{target}") and hasattr(m, "lora_A")]
    assert len(found) == sum(n.endswith(f".{target}") for n, _ in make(name).named_modules())
    loss = adapted(**inputs(name), labels=labels(name)).loss
    loss.backward()
    trained = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in n for n in trained)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    back = peft.PeftModel.from_pretrained(type(small).from_pretrained(tmp_path / "small"), tmp_path / "adapter").eval()
    assert torch.equal(logits(back, name), logits(adapted, name))


def test_all_linear_layers_take_adapters_without_their_parts() -> None:
    peft = pytest.importorskip("peft")
    small, plan = compressed("llama", "parameters")
    assert any("q_proj" in site for entry in plan if not entry.choice.is_dense for site in entry.sites)
    want = logits(small, "llama")
    config = peft.LoraConfig(
        target_modules="all-linear", exclude_modules=["0", "1", "layer"], r=2, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(small, config).eval()
    taken = {n.rpartition(".")[2] for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"} <= taken
    assert not taken & {"0", "1", "layer"}
    torch.testing.assert_close(logits(adapted, "llama"), want)


def test_adapters_are_merged_into_a_merged_model() -> None:
    peft = pytest.importorskip("peft")
    small, plan = compressed("llama", "parameters")
    assert any("q_proj" in site for entry in plan if not entry.choice.is_dense for site in entry.sites)
    adapted = peft.get_peft_model(small, peft.LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=4)).eval()
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    want = logits(adapted, "llama")
    with pytest.raises(RuntimeError, match=r"cannot be written: it is multiplied out of .*spectrim\.merge"):
        adapted.merge_and_unload()
    plain = st.merge(adapted).merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(logits(plain, "llama"), want, rtol=1e-4, atol=1e-5)
    assert plain.state_dict().keys() == make("llama").state_dict().keys()
