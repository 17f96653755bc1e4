"""Small repairs while the site is built: docstrings are written with reStructuredText roles, pages in Markdown."""

import re

_ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data|exc):(<code>)~?(?:[\w.]+\.)?([\w]+)(</code>)")
_TITLED = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data|exc):<code>([^<]*?)\s*&lt;[\w.]+&gt;</code>")

# Blocks without a colour are those of no language.
_PRINTED = re.compile(r'<div class="highlight"><pre>(<span></span><code>[^<]*</code>)')

# A name or an option; what is longer has to be cut on a phone.
_SHORT = re.compile(r"<code>([^<\s]{1,20})</code>")

_CONTENTS = re.compile(r'(<nav class="md-nav" aria-label=)"([^"]*)"')

_TABLE = re.compile(r"<table>(.*?)</table>", re.DOTALL)


def _reached(table: re.Match[str]) -> str:
    """A table that the keyboard reaches: by its links, or else itself, since a wide one scrolls."""
    return table[0] if "<a " in table[0] else f'<table tabindex="0">{table[1]}</table>'


def on_page_content(html: str, **_: object) -> str:
    """Show ``:func:`unfold``` as code, names in one piece; let printed tables, which scroll, be reached by keyboard."""
    html = _ROLE.sub(r"\1\2\3", _TITLED.sub(r"<code>\1</code>", html))
    html = _SHORT.sub(r'<code class="short">\1</code>', html)
    html = _TABLE.sub(_reached, html)
    return _PRINTED.sub(r'<div class="highlight printed"><pre tabindex="0">\1', html)


def on_post_page(output: str, **_: object) -> str:
    """Name the search for those who hear the page, and tell parts of the contents that have one name apart."""
    seen: dict[str, int] = {}

    def numbered(nav: re.Match[str]) -> str:
        name = nav[2].lower()  # what differs in capitals sounds alike
        number = seen[name] = seen.get(name, 0) + 1
        return f'{nav[1]}"{nav[2]}{f" ({number})" if number > 1 else ""}"'

    return _CONTENTS.sub(numbered, output).replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def on_post_template(output_content: str, **_: object) -> str:
    """The same for the page of what is not found."""
    said = "<p>There is no such page. The menu has them all, and the search finds the words of each.</p>"
    return on_post_page(output_content).replace("<h1>404 - Not found</h1>", f"<h1>Not found</h1>{said}")
