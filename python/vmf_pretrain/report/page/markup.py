"""Text as HTML, tables, and data as links: whatever a file, a label or a setting is called, it is text."""

import csv
import io
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute
PNG = b"\x89PNG\r\n\x1a\n"
DIGITS = 4
LARGE = 1e7  # from here on, and below SMALL, a number has an exponent
SMALL = 1e-4


class Html(str):
    """Markup, in contrast to text, which is escaped."""


def text(value: object) -> Html:
    """A value as text, also in an attribute between double quotes."""
    plain = str(value).encode("utf-8", "replace").decode()  # names of files may hold bytes that are no text
    return Html(escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", plain), quote=True))


def name(value: object) -> Html:
    """The name of a file or a class; letters that run from right to left stay within it."""
    return Html(f"<bdi>{text(value)}</bdi>")


def number(value: object) -> str:
    """A number for people; a dash for None and for what is not finite."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if not math.isfinite(value):
        return "-"
    if isinstance(value, int) or (value == round(value) and abs(value) < LARGE):
        return f"{value:,.0f}"
    if abs(value) >= LARGE or abs(value) < SMALL:
        return f"{value:.{DIGITS - 1}g}"
    return (
        f"{value:.{max(0, DIGITS - 1 - math.floor(math.log10(abs(value))))}f}" if abs(value) < 1e4 else f"{value:,.0f}"
    )


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str, *, numbers: bool = True) -> Html:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        head: titles of the columns.
        rows: cells, the first of each names its row; ``Html`` stays markup.
        caption: what the table shows, above it.
        numbers: whether all columns but the first hold numbers, which stand at the right.
    """
    titles = "".join(f'<th scope="col">{_cell(title)}</th>' for title in head)
    body = "".join(
        f'<tr><th scope="row">{_cell(first)}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    kind = ' class="numbers"' if numbers else ""
    inner = f"<caption>{text(caption)}</caption><thead><tr>{titles}</tr></thead><tbody>{body}</tbody>"
    label = text(caption)  # a region that scrolls can be reached by the keyboard
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table{kind}>{inner}</table></div>'
    )


def csv_link(file: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """A link that saves a table as CSV; what is None or not finite is empty."""
    written = io.StringIO()
    out = csv.writer(written, lineterminator="\n")
    out.writerow([_plain(" ".join(title.split())) for title in head])
    out.writerows([_plain(cell) for cell in row] for row in rows)
    return _download(file, "text/csv", written.getvalue(), "data as CSV")


def text_link(file: str, content: str, label: str) -> Html:
    """A link that saves a text."""
    return _download(file, "text/plain", content, label)


def png_source(content: bytes) -> str | None:
    """A PNG as the source of a picture; None if it is none."""
    return f"data:image/png;base64,{b64encode(content).decode()}" if content.startswith(PNG) else None


def _download(file: str, kind: str, content: str, label: str) -> Html:
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", file).strip("-.") or "data"
    source = f"data:{kind};charset=utf-8,{quote(content.encode('utf-8', 'replace'))}"
    return Html(f'<a class="save" download="{safe}" href="{source}">{text(label)}</a>')


def _cell(value: object) -> str:
    return value if isinstance(value, Html) else text(number(value) if isinstance(value, int | float | None) else value)


def _plain(cell: Any) -> Any:
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return ""
    words = isinstance(cell, str) and cell.startswith(FORMULA)
    return f"'{cell}" if words else cell
