"""The three levels of the revisited benchmarks: which answers count for, and which not at all."""

from collections.abc import Sequence
from typing import NamedTuple

from vmf_pretrain.evaluation.retrieval.ground_truth import GRADES, Query


class Level(NamedTuple):
    """Grades that are positive, and grades that are removed from the ranking."""

    name: str
    positive: tuple[str, ...]
    removed: tuple[str, ...]

    def positives(self, query: Query) -> list[int]:
        """Places of the images that answer the query."""
        return _places(query, self.positive)

    def junk(self, query: Query) -> list[int]:
        """Places of the images that are removed."""
        return _places(query, self.removed)


EASY = Level("easy", ("easy",), ("junk", "hard"))
MEDIUM = Level("medium", ("easy", "hard"), ("junk",))
HARD = Level("hard", ("hard",), ("junk", "easy"))
LEVELS = (EASY, MEDIUM, HARD)


def _places(query: Query, grades: Sequence[str]) -> list[int]:
    return [place for grade in GRADES if grade in grades for place in getattr(query, grade)]
