"""Images that cannot be read."""

from collections.abc import Sequence

NAMED = 10  # names in the error that ends a run


class UnreadableImageError(Exception):
    """One image cannot be read; its text is the reason, without the name."""


def first_names(names: Sequence[str]) -> str:
    """The first ten different names, and how many more there are."""
    different = list(dict.fromkeys(names))
    more = f" and {len(different) - NAMED} more" if len(different) > NAMED else ""
    return ", ".join(different[:NAMED]) + more
