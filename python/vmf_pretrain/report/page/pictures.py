"""The pictures that lie in a run's folder, in the page: each with what it shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmf_pretrain.report.page.curves import absent
from vmf_pretrain.report.page.markup import Html, png_source, text
from vmf_pretrain.report.page.run_data import RunData

LARGEST = 16 * 2**20  # bytes of a picture that a page holds


@dataclass(frozen=True)
class Kind:
    """What a picture of a name shows.

    Attributes:
        file: its name without ending.
        title: for people.
        alt: for who cannot see it.
        note: how to read it.
        without: why a run may have none.
    """

    file: str
    title: str
    alt: str
    note: str
    without: str


KINDS = (
    Kind(
        "neighbours",
        "Nearest neighbours",
        "Rows of images: one of the run's images at the left, and the training images with the most similar features.",
        "At the left an image, beside it the most similar training images; a class in red is another one.",
        "no images could be read",
    ),
    Kind(
        "attention",
        "Attention of the class token",
        "Rows of images with maps of the class token's attention in the last block, the mean first, then each head.",
        "Where the class token looks in the last block.",
        "the network has no class token",
    ),
    Kind(
        "pca",
        "Patches by their first three principal components",
        "Images, and the same with each patch coloured by the first three principal components of its features.",
        "A colour means the same in every image; parts that are alike to the network have one colour.",
        "the network gives no features of patches",
    ),
    Kind(
        "reconstructions",
        "Reconstructions",
        "Rows of images: the whole image, what the encoder sees of it, and what the decoder makes of that.",
        "Hidden patches are as the decoder predicts them.",
        "the method reconstructs nothing",
    ),
)
VIEWS = Kind(
    "views",
    "Views, as the network sees them",
    "Rows of images: each row has the views that training draws of one image.",
    "A row is an image of the first epoch: its large views, then its small ones, with their colours and blurs.",
    "no image could be read",
)


def gallery(runs: Sequence[RunData], failure: str = "") -> Html:
    """The section of pictures; ``failure`` says why they could not be drawn now."""
    parts = [absent(failure)] if failure else []
    return Html("".join([*parts, *(_shown(kind, run, several=len(runs) > 1) for kind in KINDS for run in runs)]))


def views(run: RunData, *, several: bool) -> Html:
    """Examples of what is trained on."""
    return _shown(VIEWS, run, several=several)


def newest(run: RunData, file: str) -> Path | None:
    """The newest picture of a name: drawn by command, by a task of an evaluation, or at the end of the run."""
    folder = run.folder
    places = [folder.pictures, *folder.path.glob("evaluation/*"), folder.plots]
    found = [path for place in places if (path := place / f"{file}.png").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _shown(kind: Kind, run: RunData, *, several: bool) -> Html:
    title = f"{kind.title}: {run.name}" if several else kind.title
    path = newest(run, kind.file)
    if path is None:
        command = "vmf-pretrain report draws it from the newest weights"
        return absent(f"{title}: not drawn. Either {kind.without}, or it has not been asked for: {command}.")
    if path.stat().st_size > LARGEST:
        return absent(f"{title}: {path} is too large for a page.")
    source = png_source(path.read_bytes())
    if source is None:
        return absent(f"{title}: {path} is no PNG.")
    where = path.relative_to(run.folder.path)
    return Html(
        f'<figure class="picture"><figcaption><strong>{text(title)}</strong> <span class="note">{text(kind.note)} '
        f"({text(where)})</span></figcaption>"
        f'<button type="button" class="enlarge" aria-expanded="false" title="larger or smaller">'
        f'<img src="{source}" alt="{text(kind.alt)}"></button></figure>'
    )
