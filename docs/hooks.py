"""Small repairs while the site is built: docstrings are written with reStructuredText roles, pages in Markdown."""

import re

_ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data|exc):(<code>)~?(?:[\w.]+\.)?([\w]+)(</code>)")
_TITLED = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data|exc):<code>([^<]*?)\s*&lt;[\w.]+&gt;</code>")


def on_page_content(html: str, **_: object) -> str:
    """Show ``:func:`unfold``` as code."""
    return _ROLE.sub(r"\1\2\3", _TITLED.sub(r"<code>\1</code>", html))


def on_post_page(output: str, **_: object) -> str:
    """Name the search for those who hear the page."""
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )
