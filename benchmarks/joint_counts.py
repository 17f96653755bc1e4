"""Ranks, compression factors and FLOPs of the paper of joint decomposition (J1, J2), and the honest ratio beside them.

Counted from the layers of built networks. The experiment file holds the published figures that they are compared with.
"""

from __future__ import annotations

from typing import Any

import torch

import spectrim as st
from benchmarks.paper_resnets import PaperResNet
from benchmarks.run import claim
from spectrim.network.groups import residual
from spectrim.network.sites import Sites
from spectrim.search.published_ranks import Assignment, choices_at_rate

# Label, scheme and proportion of what the paper compares.
_SCHEMES = [
    ("SVD", "svd", 0.5), ("LJSVD", "ljsvd", 0.5), ("RJSVD-1", "rjsvd-1", 0.5), ("RJSVD-2", "rjsvd-2", 0.5),
    ("Bi-JSVD 0.3", "bi-jsvd", 0.3), ("Bi-JSVD 0.5", "bi-jsvd", 0.5), ("Bi-JSVD 0.7", "bi-jsvd", 0.7),
]  # fmt: skip


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Count every network at every rate in every scheme."""
    torch.manual_seed(config["seed"])
    rows: list[dict[str, Any]] = []
    ranks: list[dict[str, Any]] = []
    dense: list[dict[str, Any]] = []
    for case in config["cases"]:
        sites = _sites(case)
        whole = 2 * _macs(sites, None) / 1e8
        dense.append(
            {
                "network": case["network"],
                "data": case["data"],
                "parameters": int(st.parameters([site.spec for site in sites]) + _others(sites)),
                "flops_e8": round(whole, 4),
                "published_flops_e8": case.get("dense_flops_e8"),
            }
        )
        for rate, asked in case["rates"].items():
            found, named = _at_rate(case, sites, float(rate), asked)
            rows += found
            ranks += [_ranks(case, rate, place, expected, named) for place, expected in asked.get("ranks", {}).items()]
    factors = [row for row in rows if row["published_factor"] is not None]
    wrong = sum(row["factor"] != row["published_factor"] for row in factors)
    count = sum(row["figures"] for row in ranks)
    wrong += count - sum(row["equal"] for row in ranks)
    fifty = [row for row in rows if (row["network"], row["data"], row["scheme"]) == ("resnet50", "cifar10", "SVD")]
    flops = [row for row in [*dense, *rows] if row["published_flops_e8"] is not None]
    unequal = [row for row in flops if _printed(row) != row["published_flops_e8"]]
    cifar = [row for row in flops if row["data"] == "cifar10"]
    amiss = [row for row in cifar if row in unequal]
    claims = {
        "J1": claim(
            wrong,
            "figures that differ",
            f"0 of {len(factors)} compression factors (4 decimals) and {count} ranks",
            not wrong,
            "; ".join(
                f"ResNet-50 at {r['rate']:g}: paper {r['factor']:.2f}, all weights counted once "
                f"{r['weights_ratio']:.2f}, with BatchNorm {r['ratio']:.2f}"
                for r in fifty
            ),
        ),
        "J2": claim(
            len(amiss),
            "figures that differ",
            f"0 of {len(cifar)} FLOPs of the CIFAR-10 table, to the digits printed",
            not amiss,
            _elsewhere([row for row in flops if row["data"] != "cifar10" and "rate" in row], unequal),
        ),
    }
    notes = [
        "factor is the paper's: weights and the classifier's bias, shared factors once, without BatchNorm. Of "
        "ResNet-50 the released code counts the first 3 x 3 convolution of the first stage twice in the dense network "
        "and none of the three in the decomposed one, which is repeated for factor alone.",
        "weights_ratio counts the same without that slip; ratio counts every parameter of the network, BatchNorm too.",
        "FLOPs are two for every multiply-accumulate of convolutions and the classifier, shortcuts included, positions "
        "in the padding too; BatchNorm, activations, pooling and additions are not counted. The whole network counts.",
        "The paper's ImageNet table prints factors of the rates 0.075 and 0.2 beside FLOPs of the rates 0.04 and 0.08: "
        "its figures are in the rows of both.",
    ]
    return {
        "claims": claims, "rows": rows, "ranks": ranks, "dense": dense, "seeds": [config["seed"]], "notes": notes
    }  # fmt: skip


def _sites(case: dict[str, Any]) -> Sites:
    """What the paper decomposes of a network, with the shapes of its inputs."""
    imagenet = case["data"] == "imagenet"
    model = PaperResNet(case["network"], case["classes"], imagenet=imagenet).eval()
    example = torch.zeros(1, 3, *((224, 224) if imagenet else (32, 32)))
    return st.calibrate(model, residual(st.find(model)), [example], statistics=False)


def _at_rate(
    case: dict[str, Any], sites: Sites, rate: float, asked: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, tuple[Assignment, ...]]]:
    """A row a scheme, and the choices of each."""
    rows, named = [], {}
    for label, scheme, proportion in _SCHEMES:
        found = choices_at_rate(sites, rate, scheme, proportion=proportion)
        named[label] = found
        before = st.parameters([site.spec for site in sites])
        after = sum(st.parameters(a.layers) for a in found)
        rest = st.parameters(sites.untouched)
        numerator, denominator = _slip(sites) if case["network"] == "resnet50" else (0.0, 0.0)
        others = _others(sites)
        rows.append(
            {
                "network": case["network"],
                "data": case["data"],
                "rate": rate,
                "scheme": label,
                "factor": round((before + rest + numerator) / (after + rest + denominator), 4),
                "published_factor": asked["factors"].get(label),
                "weights_ratio": round((before + rest) / (after + rest), 4),
                "ratio": round((before + others) / (after + others), 4),
                "parameters": int(after + others),
                "flops_e8": round(2 * _macs(sites, found) / 1e8, 4),
                "published_flops_e8": asked.get("flops_e8", {}).get(label),
            }
        )
    return rows, named


def _slip(sites: Sites) -> tuple[float, float]:
    """What the released code adds to the dense and to the decomposed count of ResNet-50."""
    stage = [spec for spec in sites.untouched if spec.name.startswith("layer1.") and spec.name.endswith(".conv2")]
    return st.parameters(stage[:1]), -st.parameters(stage)


def _others(sites: Sites) -> float:
    """Parameters of the rest of the network, BatchNorm included."""
    return st.parameters(sites.untouched) + sites.other_parameters


def _macs(sites: Sites, found: tuple[Assignment, ...] | None) -> float:
    chosen = [site.layers for site in sites] if found is None else [a.layers for a in found]
    return sum(st.macs(layers) for layers in chosen) + st.macs(sites.untouched)


def _ranks(
    case: dict[str, Any], rate: str, place: str, expected: dict[str, Any], named: dict[str, tuple[Assignment, ...]]
) -> dict[str, Any]:
    """Ranks at one place of a stage, by scheme; ``left + right`` for both."""
    stage, leaf = place.split("/")
    given = {}
    for label, found in named.items():
        here = [a for a in found if _place(a) == (stage, leaf)]
        joined = [a.choice for a in here if len(a.site.layers) > 1]
        if label == "SVD":
            given[label] = [a.choice["rank"] for a in here]
        elif joined:
            (choice,) = joined
            both = [choice["left_rank"], choice["rank"] - choice["left_rank"]]
            given[label] = both if label.startswith("Bi") else choice["rank"]
    return {
        "network": case["network"],
        "rate": float(rate),
        "place": place,
        **{label: " ".join(map(str, value)) if isinstance(value, list) else value for label, value in given.items()},
        "figures": len(expected),
        "equal": sum(given.get(label) == value for label, value in expected.items()),
    }


def _place(assigned: Assignment) -> tuple[str, str]:
    stage, _, leaf = assigned.site.layers[0].name.split(".")
    return stage, leaf


def _elsewhere(rows: list[dict[str, Any]], unequal: list[dict[str, Any]]) -> str:
    """How the FLOPs of the ImageNet table compare, at the rates of its factors and at others."""
    said = []
    for rate in sorted({row["rate"] for row in rows}):
        here = [row for row in rows if row["rate"] == rate]
        count = sum(row not in unequal for row in here)
        said.append(f"{count} of {len(here)} FLOPs of the ImageNet table are those of rate {rate:g}")
    return "; ".join(said)


def _printed(row: dict[str, Any]) -> float:
    """To the digits of the paper's tables: two decimals of 1e8, or of 1e9 for ImageNet."""
    return round(row["flops_e8"], 1 if row["data"] == "imagenet" else 2)
