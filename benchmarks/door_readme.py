"""D1: how long the README is, where its first code stands, and which of its terms nobody explains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.run import claim

LIMITS = {"lines": 150, "words": 700, "first_code": 25, "unexplained": 0}

# Terms of the field, and what explains each: an explanation must stand within REACH characters of the first use.
REACH = 160
TERMS = {
    r"\bMACs?\b|\bmacs\b": r"multiply-accumulates",
    r"\bFLOPs?\b": r"operations",
    r"\bSVD\b(?!-LLM)": r"singular value",
    r"\bPCA\b": r"principal component",
    r"\bONNX\b": r"exchange format",
    r"\blow[- ]rank\b(?! (Compression|and Sparse|Factorization))": r"thin",
    r"\bfactors?\b": r"thin layer|share a factor",
    r"\bquantis": r"smaller numbers",
    r"\bcalibrat": r"batches|your data",
    r"\bunfold": r"matrix",
    r"\bBatchNorm\b": r"normalisation",
    r"\bsensitivity\b": r"weigh",
    r"\bdepthwise\b": r"MobileNet",
    r"\bheld[- ]out\b": r"not fitted|samples",
    r"\beigen|\bspectr(a|um)\b|\bcovariance\b|\bmoments?\b|\bC step\b|\bLagrangian\b": r"(?!)",
    # Codes of claims and findings, which mean something to those who wrote them.
    r"(?<![-\w])[A-Z]\d{1,2}\b": r"(?!)",
}


def measured(text: str) -> dict[str, Any]:
    """Lines, words before the references, the line of the first code, and terms that are not explained."""
    body = text.partition("\n## References")[0]
    prose = words_of(body)
    return {
        "lines": len(text.splitlines()),
        "words": len(prose.split()),
        "first_code": text[: text.index("```")].count("\n") + 1 if "```" in text else 0,
        "unexplained": unexplained(body),
    }


def words_of(text: str) -> str:
    """What a reader reads: without code blocks, tags, comments, addresses and the rules of tables."""
    text = re.sub(r"^```.*?^```$", " ", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|<[^>]+>", " ", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "] ", text)
    return re.sub(r"[|#*`\[\]]|\B-+\B|(?<=\|)[-:]+(?=\|)", " ", text)


def unexplained(text: str) -> list[str]:
    """The first use of each term that has no explanation beside it, in text and code alike."""
    text = re.sub(r"<!--.*?-->|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    found = []
    for term, explanation in TERMS.items():
        first = re.search(term, text)
        if first and not re.search(explanation, text[max(0, first.start() - REACH) : first.end() + REACH]):
            found.append(first[0])
    return found


def run(config: dict[str, Any], paths: dict[str, Any], readme: Path = ROOT / "README.md") -> dict[str, Any]:
    """Measure the README."""
    found = measured(readme.read_text(encoding="utf-8"))
    counts = {**found, "unexplained": len(found["unexplained"])}
    over = [name for name, limit in LIMITS.items() if counts[name] > limit]
    shown = "; ".join(f"{name.replace('_', ' ')} {counts[name]}" for name in LIMITS)
    target = "; ".join(f"{name.replace('_', ' ')} <= {limit}" for name, limit in LIMITS.items())
    notes = [
        "D1: words are those of text and tables before the references; code, addresses and comments do not count. "
        "Terms that need an explanation are listed in benchmarks/door_readme.py."
    ]
    return {
        "claims": {"D1": claim(len(over), "of 4 figures above target; all in turn", target, not over, shown)},
        "readme": [{**counts, "unexplained_terms": ", ".join(found["unexplained"]) or None}],
        "notes": notes,
    }
