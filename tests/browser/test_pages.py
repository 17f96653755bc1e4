"""Reports and the documentation in headless Chromium, on a desk and on a phone, light and dark: `make browser-check`.

Every page: it does not scroll sideways, writes no error, asks for nothing elsewhere, and breaks no rule of axe-core
(contrast, alternative texts, names of what can be reached by keyboard). Skipped where there is no chromium or node.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import browser, pages

SITE = Path(__file__).parents[2] / "site"

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "there is a browser")


@pytest.mark.parametrize("kind", pages.REPORTS)
def test_a_report_is_as_it_should_be(kind: str, tmp_path: Path):
    file = pages.REPORTS[kind](tmp_path)
    seen = browser.look([browser.Shown.of_file(kind, file)])
    assert [(each.width, each.scheme) for each in seen] == [(w, s) for w in browser.WIDTHS for s in browser.SCHEMES]
    assert [fault for each in seen for fault in each.faults] == []


def test_the_documentation_is_as_it_should_be():
    if not (SITE / "index.html").exists():
        pytest.skip("the documentation is not built: `make docs` does it")
    with browser.served(SITE) as home:
        seen = [each for page in browser.site(SITE, home) for each in browser.look([page])]
    assert len(seen) >= 4 * 10
    wrong = [f"{each.page} {each.width} {each.scheme}: sideways {each.sideways}" for each in seen if each.sideways > 0]
    wrong += [f"{each.page}: {error}" for each in seen for error in [*each.errors, *each.outside]]
    wrong += [f"{each.page} {each.scheme}: {rule['rule']}, {rule['first']}" for each in seen for rule in each.axe]
    assert wrong == []


def test_faults_are_seen(tmp_path: Path):
    file = tmp_path / "bad.html"
    file.write_text(
        "<!doctype html><html><head><title>bad</title></head><body><main><h1>bad</h1>"
        "<img src='https://example.invalid/a.png'>"
        "<div style='width:2000px'>wide</div><p style='color:#eee;background:#fff'>pale</p>"
        "<script>undefinedName</script></main></body></html>"
    )
    (seen,) = browser.look([browser.Shown.of_file("bad", file)], widths=[1280], schemes=["light"])
    assert seen.sideways > 700
    assert seen.outside == ["https://example.invalid/a.png"]
    assert any("undefinedName" in error for error in seen.errors)
    assert {"color-contrast", "image-alt", "html-has-lang"} <= {rule["rule"] for rule in seen.serious}
