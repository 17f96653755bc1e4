"""Pages whose code blocks are followed by what they print: run, and written into the page.

python -m benchmarks.printed [PAGE ...]
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

from benchmarks.environment import ROOT

PAGES = tuple(ROOT / "docs" / "tutorials" / f"{name}.md" for name in ("what-each-method-is-for", "tolerance"))
_BLOCK = re.compile(r"^(```python\n(.*?)^```\n)(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def shown(text: str) -> list[tuple[str, str]]:
    """Each block of code of a page with the output that stands below it, empty where none does."""
    return [(source, output or "") for _, source, output in _BLOCK.findall(text)]


def printed(text: str) -> str:
    """A page with what its blocks print, run in turn in one namespace."""
    namespace: dict[str, object] = {"__name__": "__main__"}

    def run(block: re.Match[str]) -> str:
        output = output_of(block[2], "page", namespace)
        return f"{block[1]}\n```text\n{output}```\n" if output else block[1]

    return _BLOCK.sub(run, text)


def output_of(source: str, where: str, namespace: dict[str, object]) -> str:
    """What code prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, where, "exec"), namespace)
    return out.getvalue()


if __name__ == "__main__":
    for page in [Path(name) for name in sys.argv[1:]] or PAGES:
        page.write_text(printed(page.read_text(encoding="utf-8")), encoding="utf-8")
