"""The page: sections in the order in which they are read, with everything that they need inside.

No script and no style but those of the page's own files run in it, and nothing is loaded, whatever its texts say: its policy
names them by their hashes.
"""

import hashlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from vmf_pretrain.report.page import curves, facts
from vmf_pretrain.report.page.markup import Html, text
from vmf_pretrain.report.page.pictures import gallery
from vmf_pretrain.report.page.run_data import RunData, read_runs
from vmf_pretrain.report.page.state import headline, verdicts
from vmf_pretrain.storage.durable import replace_durably

Runs = Sequence[RunData]

SECTIONS: dict[str, tuple[str, Callable[[Runs], Html]]] = {
    "figures": ("Figures at the end", facts.figures),
    "curves": ("Curves", curves.curves),
    "features": ("Features", curves.features),
    "prototypes": ("Prototypes", curves.prototypes),
    "pictures": ("Pictures", gallery),
    "evaluations": ("Evaluations", facts.evaluations),
    "data": ("Data", facts.data),
    "speed": ("Speed", curves.speed),
    "machine": ("Command and machine", facts.surroundings),
    "settings": ("Settings", facts.settings),
}


def write_page(runs: Sequence[Path], out: Path, *, undrawn: str = "") -> None:
    """Write the page of one run or several, whole or not at all.

    Args:
        runs: their folders.
        out: the file.
        undrawn: why pictures could not be drawn now, or nothing.

    Raises:
        PretrainError: a folder is none of a run.
        OSError: the file cannot be written.
    """
    replace_durably(out, page(read_runs(runs), undrawn=undrawn).encode("utf-8", "replace"))


def page(runs: Runs, *, undrawn: str = "") -> str:
    """HTML of one run or several."""
    style, script = (_own(kind) for kind in ("css", "js"))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    links = "".join(f'<li><a href="#{key}">{text(called)}</a></li>' for key, (called, _) in SECTIONS.items())
    body = "".join(
        _section(key, called, gallery(runs, undrawn) if key == "pictures" else make(runs))
        for key, (called, make) in SECTIONS.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}; form-action \'none\'">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{text(title)} · vmf-pretrain</title><style>{style}</style></head><body>"
        f"<header>{headline(runs)}</header><main>{_section('verdict', 'Verdict', verdicts(runs))}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>{body}</main><script>{script}</script></body></html>\n'
    )


def _section(key: str, title: str, inner: Html) -> str:
    return f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{text(title)}</h2>{inner}</section>'


def _own(kind: str) -> str:
    """A file of the page."""
    return resources.files("vmf_pretrain.report.page").joinpath(f"page.{kind}").read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """How a policy names what stands in the page."""
    return f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
