"""Compressed models of transformers ship: claim N6, on models from configurations with random weights.

Every model is compressed under every budget by one call, and then saved and loaded in shards, trained by the Trainer in
one go and resumed, given LoRA adapters by the names of its layers, made to generate, and merged into a folder that
needs no Spectrim. What transformers says of a folder without Spectrim is asked of a process that never imports it.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import spectrim as st
from benchmarks.run import claim
from spectrim.nn.checkpoint import same_weights

QUERIES = {"bert": "query", "vit": "q_proj", "llama": "q_proj", "t5": "q"}


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """All models under all budgets."""
    import peft
    import transformers

    import spectrim.hf  # noqa: F401

    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    try:
        for name in config["models"]:
            for budget in config["budgets"]:
                rows.append(_row(name, budget, config, paths["work"] / f"{name}-{budget}"))
                print(rows[-1], flush=True)
    finally:
        torch.set_num_threads(before)
    checks = [value for row in rows for value in row["checks"].values()]
    held = sum(bool(value) for value in checks)
    worst = max(row["errors"]["folded"] / row["errors"]["compressed"] for row in rows)
    what = "save and load, Trainer resumed, LoRA by name, generate"
    return {
        "claims": {
            "N6": claim(held, "checks", f"{what}: bit-equal, all run ({len(checks)} checks)", held == len(checks)),
        },
        "rows": rows,
        "measured": {"folded over compressed": worst},
        "seeds": [config["seed"]],
        "versions": {"transformers": transformers.__version__, "peft": peft.__version__},
        "notes": [
            "Models have random weights: what is claimed is that nothing is lost on the way, not how good they are.",
            "errors: relative, of the logits on inputs that were not calibrated on, against the dense model. `dropped` "
            "is a merged model loaded into the dense architecture, which has no place for the biases that it got; "
            "`folded` is what merge(model, calibration) gives instead.",
        ],
    }


def _row(name: str, budget: str, config: dict[str, Any], work: Path) -> dict[str, Any]:
    torch.manual_seed(config["seed"])
    dense = _model(name, config["size"])
    data = [_inputs(name, config["size"], seed) for seed in range(config["batches"])]
    methods, groups = METHODS[budget]
    limit = st.Budget(**{budget: config["budgets"][budget]})
    result = st.compress(dense, data, limit, methods=methods, groups=groups)
    small: Any = result.model
    rest = _inputs(name, config["size"], 99)
    checks: dict[str, bool] = {}
    small.save_pretrained(work / "small", max_shard_size=config["shard"])
    back = type(small).from_pretrained(work / "small")
    checks["saved and loaded"] = same_weights(back, small) and torch.equal(_logits(back, rest), _logits(small, rest))
    checks["trainer resumed"] = _resumed(small, name, config, work)
    checks["lora by name"] = _lora(small, name, rest, work)
    if dense.can_generate():
        given = {key: value for key, value in rest.items() if key != "decoder_input_ids"}
        answers = [model.generate(**given, max_new_tokens=8, do_sample=False) for model in (small, back)]
        checks["generates"] = torch.equal(*answers)
    checks["refused without spectrim"] = "import spectrim.hf" in _elsewhere(type(small).__name__, work / "small")
    folded, errors = _merged(dense, small, data, rest)
    folded.save_pretrained(work / "folded")
    checks["merged folder needs no spectrim"] = _elsewhere(type(small).__name__, work / "folded") == "loaded"
    stored = sum(file.stat().st_size for file in (work / "small").glob("*.safetensors"))
    return {
        "model": name,
        "budget": budget,
        "share": result.plan.costs[budget] / result.plan.dense_costs[budget],
        "kinds": sorted({entry.choice.kind for entry in result.plan}),
        "shards": len(list((work / "small").glob("*.safetensors"))),
        "bytes": {"plan": result.plan.costs["bytes"], "files": stored},
        "checks": checks,
        "errors": errors,
    }


METHODS: dict[str, tuple[Any, bool]] = {
    "macs": (None, False),
    "parameters": ([st.JointSVD("left"), st.JointSVD("right"), st.ActivationSVD()], True),
    "bytes": ([st.LowRankPlusSparse()], False),
}


def _model(name: str, size: dict[str, int]) -> Any:
    import transformers as hf

    width, layers, heads, words = (size[key] for key in ("width", "layers", "heads", "words"))
    common: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 2 * width
    }  # fmt: skip
    match name:
        case "bert":
            shape: Any = hf.BertConfig(vocab_size=words, max_position_embeddings=64, num_labels=3, **common)
            return hf.BertForSequenceClassification(shape).eval()
        case "vit":
            shape = hf.ViTConfig(image_size=16, patch_size=4, num_labels=3, **common)
            return hf.ViTForImageClassification(shape).eval()
        case "llama":
            shape = hf.LlamaConfig(vocab_size=words, num_key_value_heads=heads // 2, **common)
            return hf.LlamaForCausalLM(shape).eval()
        case _:
            shape = hf.T5Config(
                vocab_size=words, d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=layers,
                num_heads=heads, decoder_start_token_id=0,
            )  # fmt: skip
            return hf.T5ForConditionalGeneration(shape).eval()


def _inputs(name: str, size: dict[str, int], seed: int, count: int = 16) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(count, 3, 16, 16, generator=drawn)}
    tokens = torch.randint(3, size["words"], (count, 12), generator=drawn)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {**given, "decoder_input_ids": tokens[:, :8].contiguous()} if name == "t5" else given


def _labels(name: str, given: dict[str, Tensor]) -> Tensor:
    first = next(iter(given.values()))
    if name in ("bert", "vit"):
        return torch.arange(len(first)) % 3
    return given["decoder_input_ids" if name == "t5" else "input_ids"]


@torch.no_grad()
def _logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    return model(**given).logits


def _resumed(small: Any, name: str, config: dict[str, Any], work: Path) -> bool:
    """Whether training in one go and training resumed from a checkpoint give the same bits, and another model."""
    steps = config["steps"]
    one, two = copy.deepcopy(small), copy.deepcopy(small)
    _trainer(one, name, config, work / "runs").train()
    half = work / "runs" / f"checkpoint-{steps // 2}"
    _trainer(two, name, config, work / "runs").train(resume_from_checkpoint=str(half))
    last = type(small).from_pretrained(work / "runs" / f"checkpoint-{steps}")
    return same_weights(one, two) and same_weights(one, last) and not same_weights(one, small)


def _trainer(model: Any, name: str, config: dict[str, Any], folder: Path) -> Any:
    import transformers as hf

    given = _inputs(name, config["size"], 7, 32)
    given = {**given, "labels": _labels(name, given)}
    rows = [{key: value[i] for key, value in given.items()} for i in range(32)]
    steps = config["steps"]
    arguments = hf.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=steps // 2, per_device_train_batch_size=8,
        learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=config["seed"],
    )  # fmt: skip
    return hf.Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]


def _lora(small: Any, name: str, rest: dict[str, Tensor], work: Path) -> bool:
    """Whether adapters find all queries, their loss falls, and they come back with the loaded model."""
    import peft

    target = QUERIES[name]
    wanted = sum(path.endswith(f".{target}") for path, _ in small.named_modules())
    adapted = peft.get_peft_model(copy.deepcopy(small), peft.LoraConfig(target_modules=[target], r=4, lora_alpha=8))
    found = sum(path.endswith(f".{target}") and hasattr(m, "lora_A") for path, m in adapted.named_modules())
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(**rest, labels=_labels(name, rest)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    adapted.eval().save_pretrained(work / "adapter")
    base = type(small).from_pretrained(work / "small")
    back = peft.PeftModel.from_pretrained(base, work / "adapter").eval()
    same = torch.equal(_logits(back, rest), _logits(adapted, rest))
    return wanted == found > 0 and losses[-1] < losses[0] and same


def _merged(dense: Any, small: Any, data: list[Any], rest: dict[str, Tensor]) -> tuple[Any, dict[str, float]]:
    """A merged model that fits the dense architecture, and relative errors of the logits."""
    want = _logits(dense, rest)
    merged, folded = st.merge(small), st.merge(small, data)
    dropped = copy.deepcopy(dense)
    dropped.load_state_dict(merged.state_dict(), strict=False)
    models = {"compressed": small, "merged": merged, "folded": folded, "dropped": dropped}
    return folded, {name: float((_logits(m, rest) - want).norm() / want.norm()) for name, m in models.items()}


def _elsewhere(kind: str, folder: Path) -> str:
    """What a process without Spectrim says when it loads a folder."""
    code = (
        f"import transformers\ntry:\n    transformers.{kind}.from_pretrained({str(folder)!r})\n    print('loaded')\n"
        "except Exception as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
