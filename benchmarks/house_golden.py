"""The golden set on the source of an earlier commit and on the present one (H1): that of a change of structure."""

from __future__ import annotations

from typing import Any

from benchmarks import golden
from benchmarks.run import claim


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Compare all cases."""
    compared = golden.compare_with(config["base"])
    equal, cases = compared["equal"], compared["cases"]
    made = claim(equal, f"of {cases} plans and models equal", f"{cases} of {cases}", equal == cases, str(compared))
    return {"claims": {"H1": made}, "rows": [compared], "seeds": [0], "notes": []}
