"""Pages opened in a browser, each in a frame as wide as a phone, in dark mode: what is wrong with them, and what they show."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.browser import DARK, dumped

PHONE = 390  # pixels
LOOK = Path(__file__).with_name("opened.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Opened:
    """What a browser found.

    Attributes:
        pages: by name, what ``LOOK`` returns.
        console: lines of the browser's console.
    """

    pages: Mapping[str, dict[str, Any]]
    console: list[str]


def opened(pages: Mapping[str, Path], folder: Path) -> Opened:
    """Open pages side by side in one browser; ``folder`` takes the browser's own files."""
    frames = "".join(
        f'<iframe name="{html.escape(name)}" src="{html.escape(path.as_uri())}" width="{PHONE}" height="844"></iframe>'
        for name, path in pages.items()
    )
    frame = folder / "frames.html"
    frame.write_text(
        f"<!doctype html><meta charset='utf-8'><body>{frames}<script>{LOOK}</script></body>", encoding="utf-8"
    )
    reads = "--allow-file-access-from-files"  # the frames are other origins
    document, said = dumped(frame, reads, DARK, "--enable-logging=stderr", "--window-size=1200,900")
    (written,) = re.findall(r'<pre id="found">(.*?)</pre>', document, flags=re.DOTALL)
    console = [line for line in said.splitlines() if "CONSOLE" in line]
    return Opened(json.loads(html.unescape(written)), console)
