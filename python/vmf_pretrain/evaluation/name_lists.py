"""Published lists of images: which of those at hand they name.

Legend: N images at hand, n of a list.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError


def read_names(path: Path) -> list[str]:
    """The names in a text file, one a line; empty lines are ignored.

    Raises:
        PretrainError: it cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PretrainError(f"the list {path} cannot be read ({error}).") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise PretrainError(f"the list {path} names no image; expected one a line.")
    return names


def listed_places(path: Path, names: Sequence[str], unreadable: Collection[str]) -> Tensor:
    """[n] int64 ascending places of the images that a list names, by path or by file name alone, as MSN and SimCLR do.

    Args:
        path: the list.
        names: [N] paths of the images at hand.
        unreadable: paths of images that are there but left out; the list may name them.

    Raises:
        PretrainError: it names an image that is not there, or whose file name several have.
    """
    at_hand = [*names, *unreadable]
    places = {name: place for place, name in enumerate(at_hand)}
    often = Counter(PurePath(name).name for name in at_hand)
    by_file = {PurePath(name).name: place for name, place in places.items()}
    found, missing = set[int](), list[str]()
    for wanted in read_names(path):
        if wanted not in places and often[wanted] > 1:
            raise PretrainError(f"{path} names {wanted}, which {often[wanted]} training images are called.")
        place = places.get(wanted, by_file.get(wanted))
        if place is None:
            missing.append(wanted)
        elif place < len(names):
            found.add(place)
    if missing:
        raise PretrainError(
            f"{path} names {len(missing)} images that are not among the training images; the first is {missing[0]}."
        )
    return torch.tensor(sorted(found), dtype=torch.int64)
