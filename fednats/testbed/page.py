"""The pieces of a self-contained HTML page: tables, figures, text."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from io import StringIO

from matplotlib.figure import Figure

from fednats.testbed.plots import INK

CSS = """
:root { color-scheme: light dark; --line: #d9dce1; --soft: #5c6470; --mark: #eaf3fb; }
@media (prefers-color-scheme: dark) { :root { --line: #3a3f47; --soft: #a3abb6; --mark: #182c3d; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
figcaption, .note { color: var(--soft); font-size: .9rem; } .wide + .note { margin-top: .4rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: .3rem; font-weight: inherit; }
th:first-child { min-width: 8.5rem; max-width: 20rem; overflow-wrap: anywhere; }
thead th { font-weight: 600; vertical-align: bottom; }
.text td, .text th { text-align: left; } .text td { white-space: normal; overflow-wrap: anywhere; } .text td, .text th { vertical-align: top; }
tr.federation { background: var(--mark); font-weight: 600; }
.wide { overflow-x: auto; }
.side { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .5rem 1.5rem; align-items: start; }
figure { margin: 1rem 0; } .side svg { width: 100%; max-width: 29rem; height: auto; display: block; }
@media (max-width: 30rem) { th, td { padding: .3rem .5rem; } }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; } svg, tr { break-inside: avoid; } }
"""


def html(title: str, body: str) -> str:
    """Return a whole page; ``title`` is text, ``body`` HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(
    headings: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], caption: str = "", style: str = ""
) -> str:
    """Return a table of text; each row has a CSS class and cells, the first of which is its heading."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr class="{kind}"><th scope="row">{escape(cells[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
        + "</tr>\n"
        for kind, cells in rows
    )
    whole = f'<table class="{style}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>'
    return f'<div class="wide">{whole}</div>{note(caption) if caption else ""}'


def figures(name: str, plots: Sequence[Figure], caption: str) -> str:
    """Return plots side by side where the page is wide enough; ``name`` must be unique on the page."""
    drawn = "\n".join(_svg(f"{name}-{index}", plot, caption) for index, plot in enumerate(plots))
    return f'<figure><div class="side">{drawn}</div><figcaption>{escape(caption)}</figcaption></figure>'


def note(text: str) -> str:
    """Return a note below a table or figure, or in its place."""
    return f'<p class="note">{escape(text)}</p>'


def count(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _svg(name: str, plot: Figure, label: str) -> str:
    """Return an <svg> element for a page, without namespaces, with unique ids and in the page's text colour."""
    buffer = StringIO()
    plot.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
