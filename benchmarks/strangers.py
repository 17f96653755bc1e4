"""What strangers bring (N1 to N6): every claim is measured by itself and kept in ``results/strangers.json``.

    python -m benchmarks.strangers [CLAIM ...] [--force] [--more] [--work DIR]

As :mod:`benchmarks.door`: claims that stand in the file are passed over. N1, N2 and N4 keep their rows in the work
folder as they come, so that a run that was stopped goes on in the middle of a claim. With ``--more`` rows of the file
count as such: only what is missing there, or was wrong or unclear, is measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import door

CLAIMS = {
    "N1": "situations",
    "N2": "architectures",
    "N3": "mutated_files",
    "N4": "killed_writes",
    "N5": "proof_cost",
    "N6": "hugging_face",
}
KEYS = {"N1": ("situation", "arm"), "N2": ("network", "arm"), "N4": ("action",)}
TARGET = Path(__file__).parent / "results" / "strangers.json"


def main(arguments: list[str] | None = None, target: Path = TARGET) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if "--more" in words:
        words = [word for word in words if word != "--more"] + ["--force", "--work", tempfile.mkdtemp()]
        work = Path(words[-1])
        whole = json.loads(target.read_text())
        for name in KEYS.keys() & set(words):
            (work / name).mkdir()
            text = "".join(json.dumps(line) + "\n" for line in standing(name, whole))
            (work / name / f"{CLAIMS[name]}.jsonl").write_text(text)
    return door.main(words, target, CLAIMS, __doc__)


def standing(name: str, whole: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Rows of a claim that need not be measured again, as :mod:`benchmarks.resumed` keeps them."""
    commit = whole["measured"].get(name, {}).get("code", {}).get("commit", "")
    for row in whole.get(CLAIMS[name], ()):
        if not row.get("wrong") and row.get("outcome") not in ("wrong", "unclear"):
            yield {"key": {key: row[key] for key in KEYS[name]}, "commit": row.get("commit", commit), "row": row}


if __name__ == "__main__":
    sys.exit(main())
