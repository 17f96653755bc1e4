"""Plain words for the terms of a report: only those that occur in it."""

from __future__ import annotations

import re
from collections.abc import Iterator

_WORDS = {
    "MACs": "multiply-accumulate operations for one sample: a count of the work, not a time",
    "MMAC": "a million MACs (GMAC: a thousand million)",
    "parameters": "the numbers that the network stores",
    "dense": "as it was before compression",
    "output energy": "the sum of squares of a layer's answers, less their mean, on the calibration data",
    "weighted output energy": "output energy in which each answer counts as much as the network's loss depends on it",
    "weight energy": "the sum of squares of a layer's weights; used where there are no data",
    "rank": "how many directions of a layer are kept: the number of channels between the two layers that replace it",
    "channel": "two layers in place of one: one with the whole kernel to few channels, then one of 1 x 1",
    "input": "two layers in place of one: one of 1 x 1 to few channels, then one with the whole kernel",
    "height-first": "two layers in place of one: one with the kernel's height only, then one with its width",
    "width-first": "two layers in place of one: one with the kernel's width only, then one with its height",
    "first factor shared": "several layers use the first of their two layers together; it is stored once",
    "second factor shared": "several layers use the second of their two layers together; it is stored once",
    "both factors shared": "several layers share a part of both of their two layers; it is stored once",
    "computed once": "the shared first layer runs once, and its answer goes to all",
    "unstructured": "single weights are kept, wherever they are large; the others are zero and not stored",
    "2:4": "of every four weights in a row at most two are kept",
    "channels": "outputs of a layer; of those that go, all that makes or reads them goes along",
    "exact": "of all choices within the budget the one that loses least, proven by an optimiser up to a small gap",
    "lagrangian": "a price per unit of cost is set, and each layer takes what is best at that price",
    "greedy": "steps that lose least for what they save are taken until the budget is met",
    "energy": "every layer may lose the same share of its energy",
    "uniform": "every layer may cost the same share of what it cost before",
    "held out": "samples that the layers were not fitted to",
    "C step": "a step of learning ranks in which the weights are rounded to low rank",
    "latency p50": "the median time of one batch",
    "latency p90": "the time that nine in ten runs do not exceed",
    "peak memory": "the most memory that one run takes beside the weights and the input",
    "standard error": "how far an accuracy on so many samples is off by chance, typically: sqrt(p (1 - p) / n)",
}
# Terms that other words contain or that are common words: only said of these, and nowhere else.
_WHOLE = ("exact", "lagrangian", "greedy", "energy", "uniform")


def glossary(text: str, selector: str = "") -> Iterator[tuple[str, str]]:
    """Terms that a text uses, with what they mean.

    Parameters
    ----------
    text
        Without names of layers, which may be any words.
    selector
        Of the plan; its name is a common word.
    """
    for term, meaning in _WORDS.items():
        found = term == selector if term in _WHOLE else re.search(rf"(?<![\w-]){re.escape(term)}(?![\w-])", text)
        # "weighted output energy" is not "output energy".
        if found and not (term == "output energy" and "weighted output energy" in text):
            yield term, meaning
