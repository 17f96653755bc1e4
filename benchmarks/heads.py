"""Heads of attention and feed-forward widths as coupled channels: claim A7, on MiniLM, a ViT and a small Llama.

Half of every attention's heads and half of every feed-forward width are removed, by what their loss costs, without any
correction. The network that is left is held against the dense one in which the columns that read what is gone are
zero, in float64; what the plan counts against the MACs that the finished network runs; and its time against the dense
network's, in turns, in float32. MiniLM has its weights, the others random ones.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from benchmarks.run import claim
from spectrim.cost.counted import macs, parameters
from spectrim.cost.whole import Network
from spectrim.methods import PrincipalFilters
from spectrim.network.coupling import IN, axes_left
from spectrim.nn.channels.narrow import narrow
from spectrim.nn.counting import counting
from spectrim.nn.watch.nesting import output_tensors

# Rounding of float64 through a network, as a share of the outputs.
_EQUAL = 1e-9


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """All networks."""
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        rows = [row(name, config, paths.get("minilm")) for name in config["networks"]]
    finally:
        torch.set_num_threads(threads)
    worst = max(each["gap"] for each in rows)
    counted = max(abs(each["macs"] / each["macs_counted"] - 1) for each in rows)
    every = all(each["attentions"] == each["layers"] == each["widths"] for each in rows)
    met = worst <= _EQUAL and counted <= 1e-6 and every and all(each["changed"] > 1e3 * _EQUAL for each in rows)
    times = ", ".join(f"{each['network']} {each['time_ratio']:.2f}" for each in rows)
    note = f"MACs as counted within {counted:.1g}; time of the dense network's: {times}"
    return {
        "claims": {
            "A7": claim(
                worst, "of the outputs, against zeroed heads and widths", f"<= {_EQUAL} of the outputs", met, note
            )
        },
        "rows": rows,
        "seeds": [config["seed"]],
        "versions": {"transformers": transformers.__version__},
        "notes": [
            "gap: largest difference between the outputs of the network without half of the heads and widths and the "
            "dense one in which what reads them is zero, as a share of the largest output, in float64. changed: the "
            "same between the zeroed and the dense network. spread: quartiles of the ratios of single runs in turns.",
            "parameters: the plan counts a bias for layers without one that read what is gone, which `apply` gives "
            "them for the mean that they miss; here nothing is corrected, and the Llama has none.",
            "The weights of ViT and Llama are random: what is claimed is that nothing else changes, not how good the "
            "networks are.",
        ],
    }


def made(name: str, config: dict[str, Any], folder: Path | None) -> tuple[Any, dict[str, Tensor]]:
    """A network with a batch for it."""
    import transformers

    torch.manual_seed(config["seed"])
    sizes, batch = config["sizes"].get(name, {}), config["batch"]
    if name == "minilm":
        assert folder is not None
        model: Any = transformers.AutoModel.from_pretrained(folder)
    elif name == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**sizes))
        return model.eval(), {"pixel_values": torch.randn(batch, 3, sizes["image_size"], sizes["image_size"])}
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    words = torch.randint(0, model.config.vocab_size, (batch, config["length"]))
    return model.eval(), {"input_ids": words}


def row(name: str, config: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """What is left of one network."""
    model, batch = made(name, config, folder)
    start = time.process_time()
    sites = st.couple(model, st.find(model), batch)
    seconds = time.process_time() - start
    sites = st.calibrate(model, sites, [batch])
    heads = [coupling for coupling in sites.couplings if coupling.products]
    method = PrincipalFilters(multiple_of=1)
    kept: dict[str, tuple[int, ...]] = {}
    for site in sites.coupled():
        order = method.elimination(site)[0]
        kept[site.name] = method.choice(site, order[: site.coupling.channels // 2]).kept
    axes = axes_left(sites.couplings, kept)
    planned = Network(sites, {"macs": macs, "parameters": parameters}).cost(
        widths={name: len(channels) for name, channels in kept.items()}
    )
    small = copy.deepcopy(model)
    narrow(small, axes)
    wanted, given, dense = (_outputs(each, batch) for each in (_zeroed(model, sites, kept), small, model))
    with counting(small) as work, torch.no_grad():
        small(**batch)
    times = _in_turns(lambda: model(**batch), lambda: small(**batch), config["repeats"])
    low, middle, high = statistics.quantiles([b / a for a, b in times], n=4)
    return {
        "network": name, "layers": model.config.num_hidden_layers, "attentions": len(heads),
        "widths": len(sites.couplings) - len(heads), "heads": [c.channels for c in heads],
        "heads_left": [len(kept[c.name]) for c in heads], "couple_seconds": round(seconds, 2),
        "gap": _gap(wanted, given), "changed": _gap(dense, wanted),
        "macs_dense": Network(sites, {"macs": macs}).cost()["macs"], "macs": planned["macs"],
        "macs_counted": work.macs / config["batch"], "parameters": planned["parameters"],
        "parameters_counted": sum(p.numel() for p in small.parameters()),
        "milliseconds_dense": 1e3 * statistics.median(a for a, _ in times),
        "milliseconds": 1e3 * statistics.median(b for _, b in times), "time_ratio": middle, "spread": [low, high],
    }  # fmt: skip


def _zeroed(model: nn.Module, sites: st.Sites, kept: dict[str, tuple[int, ...]]) -> nn.Module:
    """A copy in which what reads channels that are not kept is zero."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for coupling in sites.couplings:
            gone = [n for n in range(coupling.channels) if n not in set(kept[coupling.name])]
            for side in coupling.on(IN):
                weight: Any = copied.get_submodule(side.name).weight
                weight[:, side.positions[gone].flatten()] = 0
    return copied


def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        return output_tensors(exact(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}))


def _gap(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(a, b, strict=True))


def _in_turns(dense: Callable[[], Any], small: Callable[[], Any], repeats: int) -> list[tuple[float, float]]:
    """Seconds of both, one after the other; the first turn warms up."""
    found = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            times = []
            for call in (dense, small):
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
            found.append((times[0], times[1]))
    return found[1:]
