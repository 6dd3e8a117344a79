"""One HTML page that loads nothing, in the reader's choice of dark or light."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

_CONTROL = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_STYLE = """
:root { color-scheme: light dark; --grid: #8884;
  --c0: #2563eb; --c1: #dc2626; --c2: #16a34a; --c3: #d97706;
  --c4: #9333ea; --c5: #0891b2; --c6: #db2777; --c7: #78716c; }
@media (prefers-color-scheme: dark) { :root {
  --c0: #60a5fa; --c1: #f87171; --c2: #4ade80; --c3: #fbbf24;
  --c4: #c084fc; --c5: #22d3ee; --c6: #f472b6; --c7: #a8a29e; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--grid); vertical-align: top;
  overflow-wrap: anywhere; }
pre { overflow-x: auto; white-space: pre-wrap; }
svg { width: 100%; height: auto; }
svg text { font-size: 11px; fill: currentColor; }
.grid { stroke: var(--grid); } .line { fill: none; stroke: var(--c0); stroke-width: 2; }
.dot { fill: var(--c0); } .marked { fill: var(--c1); }
.curve { fill: none; stroke: currentColor; stroke-width: 2; } .faint { opacity: 0.35; stroke-width: 1; }
.names { font-size: 13px; margin: 0; } .names span { margin-right: 1em; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The page, whose heading is ``title``; ``parts`` are HTML."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>',
            '<meta name="viewport" content="width=device-width"/>',
            f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


def text(value: str) -> str:
    """Plain text as HTML; control characters, which no page may hold, are shown as unknown ones."""
    return escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", value))


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Rows of plain text, below ``head`` where there is one."""
    cells = [_row("th", head)] if head else []
    body = "\n".join([*cells, *(_row("td", row) for row in rows)])
    return f"<table>\n{body}\n</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"
