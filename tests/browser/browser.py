"""Pages opened in headless Chromium: what scrolls sideways, fails, asks elsewhere, or cannot be read."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")


@dataclass(frozen=True)
class Shown:
    """A page to open.

    Attributes
    ----------
    home
        What the address of every request that it makes has to begin with.
    paper
        Whether it is made to be printed.
    """

    name: str
    url: str
    home: str
    paper: bool = False

    @classmethod
    def of_file(cls, name: str, path: Path) -> Shown:
        """A report: a file that may ask for nothing but itself."""
        return cls(name, path.resolve().as_uri(), path.resolve().as_uri(), paper=True)


@dataclass(frozen=True)
class Seen:
    """What is wrong with a page at one width in one colour scheme.

    Attributes
    ----------
    sideways
        Pixels that it scrolls.
    errors, outside
        Errors on the console, and requests that leave the page.
    axe
        Rules of axe-core that are broken.
    mute
        Dots of charts that do not show their values when the keyboard reaches them.
    paper
        What is folded, cut or dark in print.
    """

    page: str
    width: int
    scheme: str
    sideways: int
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    axe: list[dict[str, Any]] = field(default_factory=list)
    mute: list[str] = field(default_factory=list)
    paper: list[str] = field(default_factory=list)

    @property
    def serious(self) -> list[dict[str, Any]]:
        """Rules of axe-core that are broken seriously or critically."""
        return [each for each in self.axe if each["impact"] in ("serious", "critical")]

    @property
    def faults(self) -> list[str]:
        """In words; empty for a page that is as it should be."""
        where = f"{self.page} at {self.width} px, {self.scheme}"
        found = [f"scrolls sideways by {self.sideways} px"] if self.sideways > 0 else []
        found += [f"console: {each}" for each in self.errors] + [f"asks for {each}" for each in self.outside]
        found += [f"says no values: {each}" for each in self.mute] + [f"on paper: {each}" for each in self.paper]
        found += [f"{each['rule']} ({each['impact']}), {each['count']} times, first {each['first']}: {each['why']}"
                  for each in self.axe]  # fmt: skip
        return [f"{where}: {each}" for each in found]


def missing() -> str:
    """Why there can be no browser here; empty if there can be one."""
    if _chromium() is None:
        return "there is no chromium on this machine (Debian: apt install chromium), and CHROMIUM names none"
    if shutil.which("node") is None:
        return "there is no node on this machine"
    if not (HERE / "node_modules" / "axe-core").is_dir():
        return "the npm packages are not installed: `make browser-check` does it"
    return ""


def _chromium() -> str | None:
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def environment() -> dict[str, str]:
    """Of processes that build pages: mkdocs says nothing of its next version."""
    return {**os.environ, "NO_MKDOCS_2_WARNING": "1"}


def look(
    pages: Sequence[Shown],
    *,
    widths: Sequence[int] = WIDTHS,
    schemes: Sequence[str] = SCHEMES,
    pictures: Path | None = None,
) -> list[Seen]:
    """Open pages at every width in every scheme.

    Parameters
    ----------
    pictures
        A folder for a picture of each.
    """
    asked = {
        "chromium": _chromium(), "pages": [vars(page) for page in pages], "widths": list(widths),
        "schemes": list(schemes), "pictures": None if pictures is None else str(pictures),
    }  # fmt: skip
    done = subprocess.run(
        ["node", "look.mjs"],
        input=json.dumps(asked),
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(f"the browser failed: {done.stderr[-2000:]}")
    return [Seen(**record) for record in json.loads(done.stdout)]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are served meanwhile."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def site(folder: Path, home: str) -> list[Shown]:
    """The pages of a built documentation, served at ``home``."""
    files = sorted(folder.rglob("*.html"))
    return [
        Shown("docs/" + f.relative_to(folder).as_posix(), home + f.relative_to(folder).as_posix(), home) for f in files
    ]
