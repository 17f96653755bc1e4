"""Compressed models of transformers are saved and loaded by transformers."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.nn.checkpoint import same_weights
from spectrim.nn.modules import Factored, FactoredHead, FactoredTable
from spectrim.nn.shipping import rewritten

pytest.importorskip("transformers")

import spectrim.hf  # noqa: I001
from tests.hf.nets import BUDGETS, METHODS, NAMES, compressed, inputs, logits, make
from transformers import (
    AutoConfig, AutoModel, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig,
    LlamaForCausalLM, PreTrainedModel,
)  # fmt: skip


TIED = [
    ("gpt2", "transformer.wte", "lm_head"),
    ("llama", "model.embed_tokens", "lm_head"),
    ("words", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
]


def again(model: Any, folder: Path, **options: Any) -> Any:
    """Saved and loaded."""
    model.save_pretrained(folder, **options)
    return type(model).from_pretrained(folder)


def tabled(model: PreTrainedModel, budget: str) -> st.Result:
    """Compressed at its tables of words alone."""
    methods = st.ActivationSVD(multiple_of=1)
    return st.compress(model, [inputs("llama")], budget, only="*embed*", methods=methods)


def test_a_narrower_table_is_saved_loaded_merged_and_generates(tmp_path: Path) -> None:
    model = make("llama")
    result = tabled(model, "parameters=97%")
    table = result.model.get_submodule("model.embed_tokens")
    assert isinstance(table, FactoredTable)
    back = again(result.model, tmp_path / "one")
    assert torch.equal(logits(back, "llama"), logits(result.model, "llama"))
    prompt = torch.tensor([[1, 5, 6]])
    wanted = result.model.generate(prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(back.generate(prompt, max_new_tokens=3, do_sample=False), wanted)
    merged = again(st.merge(back), tmp_path / "two")
    assert type(merged.model.embed_tokens) is nn.Embedding
    assert torch.allclose(logits(merged, "llama"), logits(back, "llama"), atol=1e-5)


def test_a_tied_head_is_told_and_its_cure_holds(tmp_path: Path) -> None:
    model = make("llama", tie_word_embeddings=True)
    with pytest.raises(st.PlanError, match="tied to lm_head.*give one of them a copy of its own") as told:
        tabled(model, "parameters=97%")
    assert "a copy is counted, too" in str(told.value)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    result = tabled(model, "parameters=97%")
    assert result.plan.costs["parameters"] == sum(p.numel() for p in result.model.parameters())
    back = again(result.model, tmp_path)
    assert torch.equal(logits(back, "llama"), logits(result.model, "llama"))


@pytest.mark.table(every=2)
@pytest.mark.parametrize(("name", "table", "head"), TIED)
def test_a_tied_head_is_saved_loaded_and_merged(name: str, table: str, head: str, tmp_path: Path) -> None:
    model, given = make(name, **({"tie_word_embeddings": True} if name == "llama" else {})), inputs("llama")
    result = st.compress(model, [given], "parameters=97%", only=[table, head], methods=st.TiedSVD(multiple_of=1))
    small: Any = result.model
    assert isinstance(small.get_submodule(head), FactoredHead)
    with torch.no_grad():
        wanted = small(**given).logits
        for number, each in enumerate((small, st.merge(small))):
            back = again(each, tmp_path / str(number))
            assert torch.equal(back(**given).logits, each(**given).logits)
            # Both readers hold the same parameters, also where transformers ties them.
            assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in each.parameters())
            assert torch.allclose(back(**given).logits, wanted, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) == result.plan.costs["parameters"]
    assert back.get_submodule(head).weight is back.get_submodule(table).weight


@pytest.mark.slow
def test_a_model_without_the_tied_head_has_the_table_alone(tmp_path: Path) -> None:
    model, given = make("llama", tie_word_embeddings=True), inputs("llama")
    names = ["model.embed_tokens", "lm_head"]
    small: Any = st.compress(model, [given], "parameters=97%", only=names, methods=st.TiedSVD(multiple_of=1)).model
    small.save_pretrained(tmp_path / "whole")
    small.model.save_pretrained(tmp_path / "alone")
    with torch.no_grad():
        wanted = small.model(**given).last_hidden_state
        for folder in ("whole", "alone"):
            back = AutoModel.from_pretrained(tmp_path / folder)
            assert isinstance(back.embed_tokens, FactoredTable)
            assert torch.equal(back(**given).last_hidden_state, wanted)


@pytest.mark.slow
def test_transposed_linear_layers_lose_heads_and_come_back(tmp_path: Path) -> None:
    model: Any = st.with_linear_layers(make("gpt2"))
    assert torch.equal(logits(model, "gpt2"), logits(make("gpt2"), "gpt2"))
    batch = inputs("gpt2")
    sites = st.couple(model, st.find(model, only="transformer.h.*"), batch)
    assert sum(coupling.unit == "head" for coupling in sites.couplings) == 2
    result = st.compress(model, [batch], {"macs": 0.8}, methods=[st.PrincipalFilters()], only="transformer.h.*")
    small: Any = result.model
    assert {entry.kind for entry in result.plan if entry.of_channels} >= {"4 heads"}
    for number, saved in enumerate((small, model)):
        saved.save_pretrained(tmp_path / str(number))
        again = type(saved).from_pretrained(tmp_path / str(number))
        assert torch.equal(logits(again, "gpt2"), logits(saved, "gpt2"))
        assert rewritten(again) == rewritten(model)


@pytest.mark.table
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_is_the_same_bit_for_bit(name: str, budget: str, tmp_path: Path) -> None:
    small, plan = compressed(name, budget)
    assert any(not entry.choice.is_dense for entry in plan)
    back = again(small, tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    assert same_weights(back, small)
    # Shared tensors are one again, so that they are counted and trained once.
    assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in small.parameters())
    assert torch.equal(logits(back, name), logits(small, name))
    assert torch.equal(logits(again(back, tmp_path / "two"), name), logits(small, name))
    # It is an ordinary model: not quantised, cast as any other.
    assert not hasattr(back.config, "quantization_config")
    assert back.half().dtype == torch.float16


def test_files_hold_the_bytes_of_the_plan(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for budget in BUDGETS:
        small, plan = compressed("llama", budget)
        small.save_pretrained(tmp_path / budget)
        stored = load_file(tmp_path / budget / "model.safetensors").values()
        assert sum(t.numel() * t.element_size() for t in stored) == plan.costs["bytes"]


def test_the_plan_lies_in_the_configuration(tmp_path: Path) -> None:
    small, plan = compressed("bert", "macs")
    small.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record["quant_method"] == "spectrim"
    (read,) = [st.Plan.from_json(json.dumps(text)) for text in record["plans"]]
    kept = [entry for entry in plan if not entry.choice.is_dense]
    assert list(read.entries) == kept
    # The model's own configuration stays that of its architecture.
    assert not hasattr(small.config, "quantization_config")
    assert logits(type(small)(small.config).eval(), "bert").shape == logits(small, "bert").shape


def test_without_spectrim_loading_fails_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    small, _ = compressed("llama", "macs")
    small.save_pretrained(tmp_path)
    # As if spectrim.hf had not been imported.
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "spectrim")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "spectrim")
    with pytest.raises(ValueError, match=r"import spectrim\.hf.*compressed by Spectrim"):
        type(small).from_pretrained(tmp_path)


def test_a_dense_model_is_saved_as_ever(tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_automatic_classes_find_it(tmp_path: Path) -> None:
    small, _ = compressed("llama", "parameters")
    small.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"
    back = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        want, got = (m(**inputs("llama")).last_hidden_state for m in (small.model, back))
    assert torch.equal(got, want)


def test_without_its_head_and_with_a_new_one(tmp_path: Path) -> None:
    small, _ = compressed("bert", "bytes")
    small.save_pretrained(tmp_path / "whole")
    small.bert.save_pretrained(tmp_path / "part")
    with torch.no_grad():
        want = small.bert(**inputs("bert")).last_hidden_state
        for folder in ("whole", "part"):
            assert torch.equal(BertModel.from_pretrained(tmp_path / folder)(**inputs("bert")).last_hidden_state, want)
    head = BertForSequenceClassification.from_pretrained(tmp_path / "part", num_labels=3)
    with torch.no_grad():
        assert torch.equal(head.bert(**inputs("bert")).last_hidden_state, want)


def test_a_model_that_ties_nothing_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = compressed("llama", "parameters")
    # As Wav2Vec2ForCTC does.
    monkeypatch.setattr(type(small), "tie_weights", lambda self, **_: None)
    back = again(small, tmp_path)
    assert same_weights(back, small)
    assert len(list(back.parameters())) == len(list(small.parameters()))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(64, 16)

    def forward(self, **given: Any) -> Any:
        return self.last(self.inner(**given).logits)


def test_a_model_inside_of_another_module(tmp_path: Path) -> None:
    net = Wrapped(make("llama"))
    sites = st.find(net)
    plan = st.select(st.tabulate(sites, [st.WeightSVD()]), st.Budget(parameters=0.8))
    small: Any = st.apply(net, sites, plan)
    assert torch.equal(logits(again(small.inner, tmp_path), "llama"), logits(small.inner, "llama"))


def test_a_part_whose_factors_lie_outside_is_refused(tmp_path: Path) -> None:
    model = make("t5")
    sites = st.group(
        st.find(model), {"both": ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]}
    )
    plan = st.select(st.tabulate(sites, [st.JointSVD("left")]), st.Budget(parameters=0.97))
    small: Any = st.apply(model, sites, plan)
    assert torch.equal(logits(again(small, tmp_path / "whole"), "t5"), logits(small, "t5"))
    with pytest.raises(st.CheckpointError, match=r"layer 'block.0.layer.0.SelfAttention.q'.*save the whole model"):
        small.encoder.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_compressed_twice(tmp_path: Path) -> None:
    small, _ = compressed("llama", "macs")
    sites = st.find(small, only="*.0.self_attn.q_proj.*", parts=True)
    plan = st.select(st.tabulate(sites, METHODS["bytes"]), st.Budget(bytes=0.995))
    twice: Any = st.apply(small, sites, plan)
    assert any(entry.site.endswith(("proj.0", "proj.1")) for entry in plan if not entry.choice.is_dense)
    assert torch.equal(logits(again(twice, tmp_path), "llama"), logits(twice, "llama"))
    assert torch.equal(logits(again(small, tmp_path), "llama"), logits(small, "llama"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_pairs_of_pairs_and_of_single_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 64, (8, 12))} for _ in range(4)]
    if name == "gpt2":
        config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
        model, once, then, more = st.with_linear_layers(GPT2LMHeadModel(config)), "bytes=50%", "bytes=80%", {}
    else:
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        model, once, then = LlamaForCausalLM(config), "parameters=70%", "parameters=90%"
        more = {"methods": st.LowRankPlusSparse()}
    small = st.compress(model.eval(), batches, once, **more).model
    twice: Any = st.compress(small, batches, then, **more).model
    assert any(isinstance(pair, Factored) and getattr(pair.first, "bias", None) is not None for pair in twice.modules())
    loaded = again(twice, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, twice(**batches[0]).logits)


@pytest.mark.parametrize("budget", BUDGETS)
def test_copies_and_pickles_save_themselves(budget: str, tmp_path: Path) -> None:
    small, _ = compressed("llama", budget)
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    for number, other in enumerate((copy.deepcopy(small), torch.load(buffer, weights_only=False))):
        with torch.no_grad():
            other.model.norm.weight.mul_(2)
        assert torch.equal(logits(again(other, tmp_path / str(number)), "llama"), logits(other, "llama"))
        assert not torch.equal(logits(other, "llama"), logits(small, "llama"))


def test_a_state_that_is_given_is_what_is_saved(tmp_path: Path) -> None:
    small, _ = compressed("llama", "bytes")
    state = {name: t * 2 if t.is_floating_point() else t for name, t in small.state_dict().items()}
    small.save_pretrained(tmp_path, state_dict=state)
    back = type(small).from_pretrained(tmp_path)
    assert all(torch.equal(t, state[name]) for name, t in back.state_dict().items())


def test_from_spectrims_own_file(tmp_path: Path) -> None:
    small, plan = compressed("llama", "bytes")
    st.save(small, plan, tmp_path / "small.safetensors")
    loaded: Any = st.load(make("llama"), tmp_path / "small.safetensors")
    assert torch.equal(logits(again(loaded, tmp_path / "folder"), "llama"), logits(small, "llama"))


def test_other_dtypes(tmp_path: Path) -> None:
    small, _ = compressed("llama", "bytes")
    small = small.to(torch.bfloat16)
    small.save_pretrained(tmp_path)
    back = type(small).from_pretrained(tmp_path, dtype="auto")
    assert back.dtype == torch.bfloat16
    assert same_weights(back, small)


def merged(name: str) -> tuple[Any, Any]:
    """A merged model whose layers have got biases, and what it came from."""
    model = make(name)
    sites = st.calibrate(model, st.find(model), [inputs(name, seed) for seed in range(4)])
    plan = st.select(st.tabulate(sites, [st.ActivationSVD()]), st.Budget(macs=0.75))
    return st.merge(st.apply(model, sites, plan)), model


@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", NAMES)
def test_merging_loses_no_bias_on_the_way(name: str, tmp_path: Path) -> None:
    dense, model = merged(name)
    spare = dense.state_dict().keys() - model.state_dict().keys()
    assert bool(spare) == (name in ("llama", "t5"))
    assert torch.equal(logits(again(dense, tmp_path), name), logits(dense, name))
    record = json.loads((tmp_path / "config.json").read_text()).get("quantization_config")
    # Where the architecture has a place for all of them, the folder is that of an ordinary model.
    assert (record is not None) == bool(spare)


@pytest.mark.slow
@pytest.mark.table(every=2)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_biases_without_a_place_are_folded_into_the_weights(name: str, tmp_path: Path) -> None:
    model = make(name)
    batches = [inputs(name, seed, 16) for seed in range(4)]
    sites = st.calibrate(model, st.find(model), batches)
    plan = st.select(st.tabulate(sites, [st.ActivationSVD()]), st.Budget(macs=0.75))
    small = st.apply(model, sites, plan)
    folded: Any = st.merge(small, batches)
    want = logits(model, name, seed=9)

    def error(other: Any) -> float:
        return float((logits(other, name, seed=9) - want).norm() / want.norm())

    dropped = make(name)
    dropped.load_state_dict(st.merge(small).state_dict(), strict=False)
    assert error(folded) < min(1.05 * error(small), error(dropped))
    # An ordinary folder, which needs no Spectrim.
    folded.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), name), logits(folded, name))


def test_channels_that_went(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    model = make("vit")
    sites = st.couple(model, st.find(model), inputs("vit"))
    sites = st.calibrate(model, sites, [inputs("vit")])
    plan = st.select(st.tabulate(sites, [st.PrincipalFilters()]), st.Budget(macs=0.9))
    small: Any = st.apply(model, sites, plan)
    assert any(entry.choice.kind == "kept_channels" and entry.choice.gone for entry in plan)
    assert torch.equal(logits(again(small, tmp_path), "vit"), logits(small, "vit"))


@pytest.mark.parametrize("change", ["version", "plans", "site", "lost"])
def test_what_does_not_fit_is_named(change: str, tmp_path: Path) -> None:
    small, plan = compressed("llama", "macs")
    small.save_pretrained(tmp_path)
    site = next(entry.site for entry in plan if not entry.choice.is_dense)
    path = tmp_path / "config.json"
    if change == "version":
        path.write_text(path.read_text().replace('"format_version": "1"', '"format_version": "7"'))
        match = "format version '7'"
    elif change == "plans":
        record = json.loads(path.read_text())
        record["quantization_config"]["plans"] = []
        path.write_text(json.dumps(record))
        match = "it has no plan, .* saved with them"
    elif change == "site":
        path.write_text(path.read_text().replace(site, f"{site}x").replace("layers_sha256", "of_before"))
        match = f"{site}x"
    else:
        from safetensors.torch import load_file, save_file

        state = load_file(tmp_path / "model.safetensors")
        state.pop(f"{site}.0.weight")
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        match = f"lack 1 tensors of compressed layers, first '{site}.0.weight'"
    with pytest.raises(st.CheckpointError, match=match):
        type(small).from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["cut", "all", "renamed", "rank", "bias", "dense"])
def test_layers_that_were_changed_in_a_shipped_plan_are_no_other_network(change: str, tmp_path: Path) -> None:
    small, _ = compressed("llama", "macs")
    small.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    entries = record["quantization_config"]["plans"][0]["entries"]
    settings = entries[0]["choice"]["settings"]
    if change in ("cut", "all"):
        del entries[: 1 if change == "cut" else None]
    elif change == "renamed":
        entries[0]["site"] = "lm_head"
    elif change == "dense":
        entries[0]["choice"] = {"kind": "dense", "method": "", "settings": {}}
    else:
        settings[change] = settings["rank"] + 1 if change == "rank" else not settings["bias"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(st.CheckpointError, match="the layers that it names are not those that were saved"):
        type(small).from_pretrained(tmp_path)
