"""SmolLM2-135M-Instruct, a language model with a head that is tied to its embedding: perplexity on two texts."""

from __future__ import annotations

import json
import math
import os
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.headline.arms import MATRICES
from benchmarks.headline.network import Figure, Metric, Network, run_on

LENGTH = 256


class Plugin(Network):
    """Paths: ``smollm2``, the folder with the GGUF file; ``books``, one with datasets-moby-dick and datasets-sotu."""

    name = "smollm2"
    title = "SmolLM2-135M language model"
    metric = Metric("perplexity, Moby-Dick", "", better="lower")
    needs = ("smollm2", "books")
    budgets = ("macs=70%", "macs=50%", "bytes=70%")
    arms = ("auto", "low rank", "shared factors", "low rank + sparse", "filters", *MATRICES)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**self.source)

    @property
    def source(self) -> dict[str, Any]:
        file = next(self.paths["smollm2"].glob("*.gguf"))
        return {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}

    def build(self) -> nn.Module:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(**self.source, dtype=torch.float32)
        model.config.use_cache = False
        return model.eval()

    def chapters(self, first: int, last: int) -> str:
        folder = self.paths["books"] / "datasets-moby-dick" / "data"
        files = (folder / f"chapter_{number}.json" for number in range(first, last + 1))
        return "\n".join(json.loads(file.read_text("utf-8"))["text"] for file in files)

    def addresses(self) -> str:
        folder = self.paths["books"] / "datasets-sotu" / "data"
        return "\n".join(path.read_text("utf-8") for path in sorted(folder.glob("19[5-9]*.txt"))[:4])

    def windows(self, text: str, count: int) -> list[dict[str, Tensor]]:
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return [{"input_ids": part} for part in ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:count].split(4)]

    def calibration(self, count: int) -> list[dict[str, Tensor]]:
        # A window has 256 tokens; 64 of them are 16,384 rows for layers of at most 1,536 inputs.
        return self.windows(self.chapters(1, 60), min(count, 64))

    def held_out(self, model: nn.Module) -> float:
        return self.perplexity(model, self.windows(self.chapters(61, 80), 24)).value

    def test(self, model: nn.Module) -> dict[str, Figure]:
        moby, sotu = self.windows(self.chapters(100, 135), 40), self.windows(self.addresses(), 40)
        return {self.metric.name: self.perplexity(model, moby), "perplexity, addresses": self.perplexity(model, sotu)}

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits, ids = run_on(model, batch).logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:]
        return nn.functional.cross_entropy(logits, ids, reduction="none").mean(1)

    def perplexity(self, model: nn.Module, windows: list[dict[str, Tensor]]) -> Figure:
        mean = Figure.mean(torch.cat([self.scores(model, batch) for batch in windows]))
        # The standard error of exp(x) is exp(x) times that of x.
        return Figure(math.exp(mean.value), mean.n, math.exp(mean.value) * mean.standard_error)
