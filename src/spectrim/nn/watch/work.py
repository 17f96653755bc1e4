"""Work beside the layers that sites are made of: whose it is, and what of it could not be counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from spectrim.errors import first_few
from spectrim.network.layer import LayerSpec
from spectrim.network.sites import Sites


def beside(work: Mapping[str, float], layers: Iterable[LayerSpec]) -> dict[str, float]:
    """MACs by the path of a module, without the modules that are layers of their own."""
    names = {name for spec in layers for name in spec.names}
    return {path: macs for path, macs in work.items() if path not in names}


def uncounted_work(sites: Sites) -> Iterator[str]:
    """What a user should know of operations whose work is in no cost."""
    if not sites.uncounted:
        return
    named = [f"{name} in {path or 'the model itself'}" for name, path in sites.uncounted.items()]
    yield f"not counted in the MACs, since there is no formula for it: {first_few(named, 5)}"
