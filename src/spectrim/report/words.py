"""Plain words for the terms of a report: those that occur in it. Choices have the words that are printed elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from spectrim.network.printing import legend

_SELECTORS = {
    "exact": "of all choices within the budget the one that loses least, proven by an optimiser up to a small gap",
    "lagrangian": "a price per unit of cost is set, and each layer takes what is best at that price",
    "greedy": "steps that lose least for what they save are taken until the budget is met",
    "energy": "every layer may lose the same share of its energy",
    "uniform": "every layer may cost the same share of what it cost before",
}
_WORDS = {
    "MACs": "multiply-accumulate operations for one sample: a count of the work, not a time",
    "parameters": "the numbers that the network stores",
    "dense": "as it was before compression",
    "output energy": "the sum of squares of a layer's answers, less their mean, on the calibration data",
    "weighted output energy": "output energy in which each answer counts as much as the network's loss depends on it",
    "weight energy": "the sum of squares of a layer's weights; used where there are no data",
    "held out": "samples that the layers were not fitted to",
    "C step": "a step of learning ranks in which the weights are rounded to low rank",
    "latency p50": "the median time of one batch",
    "latency p90": "the time that nine in ten runs do not exceed",
    "peak memory": "the most memory that one run takes beside the weights and the input",
    "proven gap": "how much less, as a share, any other plan within the budget can lose at most; 0: none loses less",
    "standard error": "how far an accuracy on so many samples is off by chance, typically: sqrt(p (1 - p) / n)",
}


def glossary(text: str, choices: Iterable[str] = (), selector: str = "") -> Iterator[tuple[str, str]]:
    """Terms that are used, with what they mean. ``text`` is without names of layers, which may be any words."""
    for term, meaning in _WORDS.items():
        # "weighted output energy" is not "output energy".
        if re.search(rf"(?<![\w-])(?<!weighted ){re.escape(term)}(?![\w-])", text):
            yield term, meaning
    yield from ((term, meaning) for term, meaning in legend(choices) if term not in _WORDS)
    if selector in _SELECTORS:
        yield selector, _SELECTORS[selector]
