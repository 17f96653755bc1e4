"""What strangers bring (N1 to N6): every claim is measured by itself and kept in ``results/strangers.json``.

    python -m benchmarks.strangers [CLAIM ...] [--force] [--work DIR]

As :mod:`benchmarks.door`: claims that stand in the file are passed over. N1, N2 and N4 keep their rows in the work
folder as they come, so that a run that was stopped goes on in the middle of a claim too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import door

CLAIMS = {
    "N1": "situations",
    "N2": "architectures",
    "N3": "mutated_files",
    "N4": "killed_writes",
    "N5": "proof_cost",
    "N6": "hugging_face",
}
TARGET = Path(__file__).parent / "results" / "strangers.json"


def main(arguments: list[str] | None = None) -> int:
    return door.main(arguments, TARGET, CLAIMS, __doc__)


if __name__ == "__main__":
    sys.exit(main())
