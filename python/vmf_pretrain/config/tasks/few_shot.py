"""The task of classification with few labelled images."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class FewShotTask:
    """Classification with few labelled images, as MSN has it, and in episodes of few classes.

    Attributes:
        per_class: labelled training images of each class, a list of counts.
        shares: the same as shares of each class, at least one image of it; a list.
        lists: text files that name labelled training images, one a line, by path or by file name, as MSN and SimCLR publish
            them; those of one file name in several folders are draws of one figure. A list of paths.
        draws: of those images, for each count and share.
        classifier: "msn": the class token before the last norm, less its own mean, at unit length; logistic regression without
            intercepts. "ibot": the class feature at unit length, with the same regression.
        penalty: lambda, of half the squared weights against the summed losses: 1 / C. MSN 0.00025, iBOT 0.01, 0.1 or 1.
        episodes: of ``ways`` classes of the test images each; 0 for none.
        ways: classes of an episode.
        shots: labelled images of each class in an episode.
        queries: images of each class that are classified in an episode, each by the nearest mean of a class.
        resize: shorter side that an image is resized to before the central square is cut, as a multiple of the square.
    """

    per_class: tuple[int, ...] = (1, 2, 5)
    shares: tuple[float, ...] = (0.01, 0.1)
    lists: tuple[str, ...] = ()
    draws: int = 3
    classifier: Literal["msn", "ibot"] = "msn"
    penalty: float = 0.00025
    episodes: int = 600
    ways: int = 5
    shots: int = 5
    queries: int = 15
    resize: float = 256 / 224

    def __post_init__(self) -> None:
        require(
            len(self.per_class) + len(self.shares) + len(self.lists) + self.episodes > 0,
            "few_shot.per_class, .shares, .lists and .episodes are empty; expected at least one of them.",
        )
        for name, values in (("per_class", self.per_class), ("shares", self.shares)):
            require(
                len(set(values)) == len(values) and all(value > 0 for value in values),
                f"few_shot.{name} is {list(values)}; expected different numbers greater than 0.",
            )
        require(all(share < 1 for share in self.shares), f"few_shot.shares is {list(self.shares)}; expected below 1.")
        require_positive(
            "few_shot", draws=self.draws, penalty=self.penalty, shots=self.shots, queries=self.queries, ways=self.ways
        )
        require(self.episodes >= 0, f"few_shot.episodes is {self.episodes} but must be 0 or greater.")
        require(self.ways >= 2, f"few_shot.ways is {self.ways} but must be at least 2.")
        require(self.resize >= 1, f"few_shot.resize is {self.resize} but must be at least 1, the cut square itself.")
