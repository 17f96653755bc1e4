"""Shared factors in a sentence encoder (J6): what layers lose on held-out text, joint against separate.

Needs the folder of a BERT-like encoder with its tokenizer (``--minilm``) and a long English text (``--text``).
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks.run import claim
from spectrim.linalg.moments import Moments
from spectrim.linalg.unfold import unfolding
from spectrim.methods import Method
from spectrim.network.choices import Choice
from spectrim.network.sites import Site, Sites, Statistics

# What layers of one block see together, and what stands at one place of every block.
_LEAVES = {
    "q, k, v": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "feed-forward up": ("intermediate.dense",),
    "feed-forward down": ("output.dense",),
}


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Errors of the layers of every group at equal parameters, and of the whole encoder's embeddings."""
    before = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    try:
        return _run(config, paths["minilm"], paths["text"])
    finally:
        torch.set_num_threads(before)


def _run(config: dict[str, Any], folder: Path, text: Path) -> dict[str, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = windows(tokenizer, text.read_text(encoding="utf-8"), config)
    sites = st.calibrate(model, st.find(model, only=["*.layer.*"]), seen["calibration"][:1], statistics=False)
    groups = _groups(sites, config["spans"])
    names = sorted({name for members, _ in groups.values() for name in members})
    held = {part: inputs(model, names, batches) for part, batches in seen.items()}
    rows: list[dict[str, Any]] = []
    for (kind, span), found in _by_kind(groups).items():
        for data, statistic in (("data-free", None), ("activation-aware", held["calibration"])):
            joined = [_joined(sites, members, statistic) for members in found]
            for share in config["shares"]:
                rows += _compared(config, kind, span, data, share, joined, held["held_out"])
    claims = {"J6": _claim(rows)}
    notes = [
        f"{config['windows']['calibration']} windows of {config['length']} tokens for calibration, "
        f"{config['windows']['held_out']} from the other half of the text held out; no padding.",
        "error is the mean over the layers of what is lost on held-out text of the energy of a layer's outputs around "
        "their mean, the inputs being those of the dense encoder. least and most are the best and the worst group; "
        "to_separate is error over that of the better separate method with the same data.",
        "Separate layers have equal ranks. A shared rank is the largest that has no more parameters than the separate "
        "pairs; parameters is the share of the dense layers' weights and biases.",
        "macs is the share of the dense layers' multiply-accumulates: a first factor that q, k and v share is computed "
        "once.",
    ]
    result = {"claims": claims, "rows": rows, "seeds": [config["seed"]], "notes": notes}
    if config["budgets"]:
        result["embeddings"] = _embeddings(config, model, sites, seen, held["calibration"])
        notes.append(
            "embeddings: the whole encoder under a budget for the parameters of its blocks' layers, by the table; mean "
            "over tokens, normalised, dense against compressed on held-out windows."
        )
    return result


def windows(tokenizer: Any, text: str, config: Mapping[str, Any]) -> dict[str, list[dict[str, Tensor]]]:
    """Batches of windows of equal length: calibration from the first half of a text, held-out ones from the second."""
    length, found = config["length"], {}
    starts = {"calibration": 0, "held_out": len(text) // 2}
    for part, count in config["windows"].items():
        # A token has four letters or so; what is too much is cut off.
        some = text[starts[part] : starts[part] + 12 * length * count]
        tokens = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        inner = length - 2
        if len(tokens) < inner * count:
            raise ValueError(f"the text has {len(tokens)} tokens for {part}; expected {inner * count} or more")
        rows = [
            [tokenizer.cls_token_id, *tokens[n * inner : (n + 1) * inner], tokenizer.sep_token_id] for n in range(count)
        ]
        ids = torch.tensor(rows)
        found[part] = [
            {"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids.split(config["batch"])
        ]
    return found


@torch.inference_mode()
def inputs(model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Moments]:
    """Mean and second moment of what every named linear layer sees, over all tokens."""
    held: dict[str, Moments] = {}
    handles = []
    for name in names:
        layer: Any = model.get_submodule(name)
        held[name] = Moments(1, layer.in_features)

        def hook(_: nn.Module, args: tuple[Tensor, ...], moments: Moments = held[name]) -> None:
            moments.update(args[0].flatten(0, -2).unsqueeze(0))

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return held


def _groups(sites: Sites, spans: Sequence[int]) -> dict[str, tuple[tuple[str, ...], tuple[str, int]]]:
    """Names of the layers of every group, with its kind and the number of blocks it goes over."""
    names = [site.name for site in sites]
    blocks = sorted({name.partition(".layer.")[2].partition(".")[0] for name in names}, key=int)
    stem = names[0].partition(".layer.")[0]
    found: dict[str, tuple[tuple[str, ...], tuple[str, int]]] = {}
    for kind, leaves in _LEAVES.items():
        for span in [1] if len(leaves) > 1 else spans:
            for first in range(0, len(blocks) - span + 1, span):
                some = [f"{stem}.layer.{b}.{leaf}" for b in blocks[first : first + span] for leaf in leaves]
                found[f"{kind} {first} {span}"] = tuple(some), (kind, span)
    return found


def _by_kind(
    groups: Mapping[str, tuple[tuple[str, ...], tuple[str, int]]],
) -> dict[tuple[str, int], list[tuple[str, ...]]]:
    found: dict[tuple[str, int], list[tuple[str, ...]]] = {}
    for members, key in groups.values():
        found.setdefault(key, []).append(members)
    return found


def _joined(sites: Sites, members: Sequence[str], statistic: Mapping[str, Moments] | None) -> Site:
    """The site of a group, calibrated or not."""
    return _with(sites, statistic).together("group", members)


def _with(sites: Sites, statistic: Mapping[str, Moments] | None) -> Sites:
    if statistic is None:
        return sites
    found = tuple(
        dataclasses.replace(site, statistics=Statistics(input=statistic[site.name])) if site.name in statistic else site
        for site in sites
    )
    return dataclasses.replace(sites, sites=found)


def _compared(
    config: Mapping[str, Any],
    kind: str,
    span: int,
    data: str,
    share: float,
    joined: Sequence[Site],
    held_out: Mapping[str, Moments],
) -> list[dict[str, Any]]:
    """A row a method, over the groups of one kind."""
    shares = config["shared_sides"][kind]
    separate: list[tuple[str, Method]] = [("WeightSVD", st.WeightSVD(multiple_of=1))]
    if data != "data-free":
        separate.append(("ActivationSVD", st.ActivationSVD(multiple_of=1)))
    joint = [(f"JointSVD {side}", st.JointSVD(side, multiple_of=1, sweeps=config["sweeps"])) for side in shares]
    rows: list[dict[str, Any]] = []
    for label, method in [*separate, *joint]:
        errors, counts, work, ranks = [], [], [], []
        for site in joined:
            before, dense_work = st.parameters(site.layers), st.macs(site.layers)
            limits = [_rank_alone(part, share) for part in site.parts]
            if isinstance(method, st.JointSVD):
                most = sum(
                    st.parameters(part.spec.factor(unfolding((), "channel"), rank))
                    for part, rank in zip(site.parts, limits, strict=True)
                )
                choice = _largest(method, site, most)
                made = method.factorize(site, choice)
                weights, shifts = made.dense(), made.shifts
                specs = method.layers(site, choice)
                ranks.append(choice["rank"])
            else:
                weights, shifts, specs = (), (), ()
                for part, rank in zip(site.parts, limits, strict=True):
                    choice = method.choice(part, unfolding((), "channel"), rank, bias=True)
                    factors = method.factorize(part, choice)
                    weights, shifts = (*weights, *factors.dense()), (*shifts, factors.shift)
                    specs = (*specs, *method.layers(part, choice))
                ranks.append(limits[0])
            lost = [
                _lost(part, weight, shift, held_out[part.name])
                for part, weight, shift in zip(site.parts, weights, shifts, strict=True)
            ]
            errors.append(statistics.mean(lost))
            counts.append(st.parameters(specs) / before)
            work.append(st.macs(specs) / dense_work)
        rows.append(
            {
                "layers": kind,
                "blocks": span,
                "share": share,
                "data": data,
                "method": label,
                "rank": ranks[0],
                "parameters": round(statistics.mean(counts), 4),
                "macs": round(statistics.mean(work), 4),
                "error": round(statistics.mean(errors), 5),
                "least": round(min(errors), 5),
                "most": round(max(errors), 5),
            }
        )
    best = min(row["error"] for row in rows[: len(separate)])
    for row in rows:
        row["to_separate"] = round(row["error"] / best, 3)
        print(row, flush=True)
    return rows


def _rank_alone(part: Site, share: float) -> int:
    _, o, i = part.spec.shape
    return max(1, int(share * o * i / (o + i)))


def _largest(method: st.JointSVD, site: Site, most: float) -> Choice:
    """The choice of the largest rank within a number of parameters."""
    how = unfolding((), "channel")
    low, high = 1, method.full_rank(site, how) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if st.parameters(method.layers(site, method.choice(site, how, middle, bias=True))) <= most:
            low = middle
        else:
            high = middle
    return method.choice(site, how, low, bias=True)


def _lost(part: Site, weight: Tensor, shift: Tensor | None, held: Moments) -> float:
    """Share of the centred energy of a linear layer's outputs that other weights and another bias lose."""
    whole = part.weight[0].double()
    missing = whole - weight[0].double()
    covariance, mean = held.covariance[0], held.mean[0]
    offset = missing @ mean
    if shift is not None:
        offset = offset - shift.double()
    lost = float(((missing @ covariance) * missing).sum()) + float(offset.square().sum())
    return lost / float(((whole @ covariance) * whole).sum())


def _embeddings(
    config: Mapping[str, Any],
    model: nn.Module,
    sites: Sites,
    seen: Mapping[str, list[dict[str, Tensor]]],
    statistic: Mapping[str, Moments],
) -> list[dict[str, Any]]:
    """The encoder under budgets, by tables with and without groups."""
    known = _with(sites, statistic)
    some = tuple(site for site in known if site.statistics)
    left = tuple(site.spec for site in known if not site.statistics)
    known = dataclasses.replace(known, sites=some, untouched=(*known.untouched, *left))
    grouped = st.group(known)
    alone: list[Method] = [st.ActivationSVD(), st.WeightSVD()]
    tables = {
        "separate": st.tabulate(dataclasses.replace(known, groups={}), alone),
        "separate or joint": st.tabulate(grouped, [*alone, st.JointSVD("left"), st.JointSVD("right")]),
    }
    with torch.inference_mode():
        dense = torch.cat([_pooled(model, batch) for batch in seen["held_out"]])
    whole = st.parameters([site.spec for site in known])
    rows = []
    for share in config["budgets"]:
        for name, table in tables.items():
            limit = table.dense["parameters"] - (1 - share) * whole
            plan = st.select(table, st.Budget(parameters=str(int(limit))))
            small = st.apply(model, grouped, plan, reconstruct=False, batchnorm=False)
            with torch.inference_mode():
                made = torch.cat([_pooled(small, batch) for batch in seen["held_out"]])
            cosine = nn.functional.cosine_similarity(dense, made)
            rows.append(
                {
                    "share": share,
                    "table": name,
                    "parameters": round((plan.costs["parameters"] - table.dense["parameters"]) / whole + 1, 4),
                    "joined": sum(len(e.members) for e in plan if e.members and not e.choice.is_dense),
                    "loss": round(plan.loss, 4),
                    "cosine": round(float(cosine.mean()), 4),
                    "least_cosine": round(float(cosine.min()), 4),
                    "relative_error": round(float((made - dense).square().sum() / dense.square().sum()), 4),
                }
            )
            print(rows[-1], flush=True)
    return rows


def _pooled(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Sentence embeddings: mean over tokens, of length 1."""
    return nn.functional.normalize(model(**batch).last_hidden_state.mean(1), dim=-1)


def _claim(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["method"].startswith("JointSVD"):
            key = (row["layers"], row["blocks"], row["share"], row["data"])
            best[key] = min(best.get(key, row["to_separate"]), row["to_separate"])
    return claim(
        round(statistics.geometric_mean(best.values()), 3),
        "error of the better shared side / error of separate SVD, geometric mean of all cases",
        "stated in a table, at equal parameters",
        bool(best),
        f"lower in {sum(value < 1 for value in best.values())} of {len(best)} cases; "
        + "; ".join(f"{k} over {b} blocks, {s:.0%}, {d}: {value:.2f}" for (k, b, s, d), value in best.items()),
    )
