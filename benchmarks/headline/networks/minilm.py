"""MiniLM-L6, a sentence encoder: similarity of texts as people see it, and to the dense network's embeddings."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from benchmarks.headline.arms import MATRICES
from benchmarks.headline.network import Figure, Metric, Network, run_on


class Plugin(Network):
    """Paths: ``minilm``, the folder with weights and tokenizer; ``texts``, gensim's folder ``test_data``."""

    name = "minilm"
    title = "MiniLM-L6 sentence encoder"
    metric = Metric("cosine to dense", "")
    needs = ("minilm", "texts")
    budgets = ("macs=70%", "macs=50%", "macs=33%", "bytes=70%")
    # Without convolutions there are no chains; SVD-LLM and plain SVD are what users take.
    arms = ("auto", "low rank", "shared factors", "low rank + sparse", "filters", *MATRICES)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.paths["minilm"])

    def build(self) -> nn.Module:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.paths["minilm"]).eval()

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    def lines(self, name: str) -> list[str]:
        return (self.paths["texts"] / name).read_text("latin-1").splitlines()

    def calibration(self, count: int) -> list[dict[str, Tensor]]:
        # Windows of 64 tokens, without padding; the last 60 documents are held out.
        text = " ".join(self.lines("lee_background.cor")[:-60])
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ends = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        rows = torch.tensor([[ends[0], *ids[at : at + 62], ends[1]] for at in range(0, len(ids) - 62, 62)][:count])
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(32)]

    def embedded(self, model: nn.Module, texts: list[str]) -> Tensor:
        found = []
        for batch in (self.tokens(texts[start : start + 32]) for start in range(0, len(texts), 32)):
            seen = batch["attention_mask"].unsqueeze(-1)
            found.append((run_on(model, batch).last_hidden_state * seen).sum(1) / seen.sum(1))
        return nn.functional.normalize(torch.cat(found), dim=-1)

    def cosine(self, model: nn.Module, texts: list[str]) -> Tensor:
        return (self.embedded(model, texts) * self.embedded(self.build(), texts)).sum(1)

    def held_out(self, model: nn.Module) -> float:
        return float(self.cosine(model, self.lines("lee_background.cor")[-60:]).mean())

    def test(self, model: nn.Module) -> dict[str, Figure]:
        texts, upper = self.lines("lee.cor")[:50], np.triu_indices(50, 1)
        near = self.embedded(model, texts)
        human = np.loadtxt(self.paths["texts"] / "similarities0-1.txt")[upper]
        rows = [line.split("\t") for line in self.lines("wordsim353.tsv") if not line.startswith("#")]
        means = [float(row[2]) for row in rows]
        left, right = (self.embedded(model, [row[side] for row in rows]) for side in (0, 1))
        return {
            "cosine to dense": Figure.mean(self.cosine(model, texts)),
            "Lee-50": Figure.correlation(human, (near @ near.T).numpy()[upper]),
            "WordSim-353": Figure.correlation(rankdata(means), rankdata((left * right).sum(1).numpy())),
        }
