"""D3: reports and the documentation in headless Chromium, at two widths and in two colour schemes.

Counted are pages that scroll sideways, errors on the console, requests that leave the page, and rules of axe-core that
are broken seriously or critically; rules broken less than that stand in the rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.run import claim
from tests.browser import browser, pages

_TARGET = "sideways scroll, console errors, outside requests, serious axe violations: 0, 0, 0, 0"


def run(config: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Write the reports, build the documentation, and open every page."""
    if why := browser.missing():
        raise SystemExit(f"D3 needs a browser: {why}")
    work: Path = paths["work"]
    reports = [browser.Shown.of_file(f"report: {kind}", write(work)) for kind, write in pages.REPORTS.items()]
    seen = browser.look(reports)
    site = work / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(build, cwd=ROOT, check=True, env=browser.environment())
    style = b"".join(file.read_bytes() for file in sorted(site.rglob("*.css")))
    with browser.served(site) as home:
        pages_ = sorted(browser.site(site, home), key=lambda page: (site / page.url.removeprefix(home)).stat().st_size)
        left = len(pages_)
        with contextlib.suppress(KeyboardInterrupt):  # what was seen until then is told, and what was not
            for page in pages_:
                content = (site / page.url.removeprefix(home)).read_bytes()
                seen += _looked_at(page, work / f"{hashlib.sha256(content + style).hexdigest()}.json")
                left -= 1
    return found(seen, left)


def _looked_at(page: browser.Shown, kept: Path) -> list[browser.Seen]:
    """What is seen of a page; where the same page was looked at before, what was kept of that."""
    if not kept.exists():
        seen = browser.look([page])
        print("\n".join([page.name, *(fault for each in seen for fault in each.faults)]), file=sys.stderr, flush=True)
        kept.write_text(json.dumps([vars(each) for each in seen]))
    return [browser.Seen(**{**record, "page": page.name}) for record in json.loads(kept.read_text())]


def found(seen: Sequence[browser.Seen], left: int = 0) -> dict[str, Any]:
    """The claim and a row a page, from what was seen; ``left`` pages were not."""
    rows = []
    for name in dict.fromkeys(each.page for each in seen):
        views = [each for each in seen if each.page == name]
        rows.append(
            {
                "page": name,
                "views": len(views),
                "sideways": sum(each.sideways > 0 for each in views),
                "console errors": sum(len(each.errors) for each in views),
                "outside requests": sum(len(each.outside) for each in views),
                "axe serious": sum(len(each.serious) for each in views),
                "axe other": ", ".join(
                    sorted({r["rule"] for each in views for r in each.axe if r not in each.serious})
                ),
            }
        )
    sums = [sum(row[key] for row in rows) for key in ("sideways", "console errors", "outside requests", "axe serious")]
    note = (
        ", ".join(map(str, sums))
        + f" in {len(seen)} views of {len(rows)} pages"
        + f", {left} not looked at" * bool(left)
    )
    widths = " and ".join(map(str, browser.WIDTHS))
    return {
        "claims": {"D3": claim(sum(sums), "faults", _TARGET, not any(sums) and not left, note)},
        "pages": rows,
        "notes": [f"D3: pages at {widths} px, light and dark, in headless Chromium with axe-core."],
    }
