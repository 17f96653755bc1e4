"""Small models of transformers from configurations, with random weights, and ways to compress them fast."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import spectrim as st
from spectrim.selection.plan import make_plan

NAMES = ("bert", "vit", "llama", "t5")
BUDGETS = ("macs", "parameters", "bytes")
LORA = {"bert": "query", "vit": "q_proj", "llama": "q_proj", "t5": "q"}
"""The name of attention's queries."""


def make(name: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    match name:
        case "bert":
            common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
            config = BertConfig(vocab_size=64, max_position_embeddings=32, num_labels=3, **common, **options)
            return BertForSequenceClassification(config).eval()
        case "words":
            common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
            return BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=32, **common)).eval()
        case "gpt2":
            special = {"bos_token_id": 1, "eos_token_id": 2}
            return GPT2LMHeadModel(
                GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, **special)
            ).eval()
        case "vit":
            common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
            config = ViTConfig(image_size=16, patch_size=4, num_labels=3, **common, **options)
            return ViTForImageClassification(config).eval()
        case "llama":
            common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
            config = LlamaConfig(
                vocab_size=64, num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
                **common, **options,
            )  # fmt: skip
            return LlamaForCausalLM(config).eval()
        case _:
            config = T5Config(
                vocab_size=64,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_decoder_layers=1,
                num_heads=4,
                decoder_start_token_id=0,
                **options,
            )
            return T5ForConditionalGeneration(config).eval()


def inputs(name: str, seed: int = 0, count: int = 4) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(count, 3, 16, 16, generator=made)}
    tokens = torch.randint(3, 64, (count, 8), generator=made)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {**given, "decoder_input_ids": tokens[:, :5]} if name == "t5" else given


def labels(name: str, count: int = 4) -> Tensor:
    if name in ("bert", "vit"):
        return torch.arange(count) % 3
    return inputs(name, count=count)["decoder_input_ids" if name == "t5" else "input_ids"].contiguous()


METHODS = {
    "macs": [st.WeightSVD()],
    "parameters": [st.JointSVD("left"), st.JointSVD("right")],
    "bytes": [st.LowRankPlusSparse(share=0.4, densities=(0.5,), turns=10)],
}
PARTS = {
    "bert": "*.0.attention.self.*",
    "vit": "*.0.attention.*",
    "llama": "*.0.self_attn.*",
    "t5": "encoder.block.0.layer.0.*",
}
"""Layers that get low rank plus sparse weights: not all, for speed."""


@functools.cache
def _compressed(name: str, budget: str) -> tuple[PreTrainedModel, st.Plan]:
    model = make(name)
    sites = st.find(model, only=PARTS[name] if budget == "bytes" else "*")
    if budget == "macs":
        sites = st.calibrate(model, sites, [inputs(name)])
    elif budget == "parameters":
        sites = st.group(sites)
    table = st.tabulate(sites, METHODS[budget])
    plan = make_plan(table, _picks(table), budget={}, selector="by hand")
    small: Any = st.apply(model, sites, plan)
    return small, plan


def _picks(table: st.Candidates) -> dict[int, int]:
    """For every layer what a method has to offer, where there are groups with others."""
    order = sorted(enumerate(table.rows), key=lambda pair: -len(pair[1].sites))
    picks: dict[int, int] = {}
    covered: set[str] = set()
    for number, row in order:
        if not covered.intersection(row.sites):
            covered.update(row.sites)
            picks[number] = (len(row.options) + 1) // 2 if len(row.options) > 1 else 0
    return picks


def compressed(name: str, budget: str) -> tuple[PreTrainedModel, st.Plan]:
    """A copy of a model with what such budgets lead to: factors, shared ones, low rank plus sparse; and its plan."""
    small, plan = _compressed(name, budget)
    return copy.deepcopy(small), plan


@torch.no_grad()
def logits(model: Any, name: str, **options: Any) -> Tensor:
    return model(**inputs(name, **options)).logits
