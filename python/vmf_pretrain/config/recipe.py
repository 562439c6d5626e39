"""What a recipe says of itself, in the section ``recipe`` at the top of its file; it is no setting of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RecipeHeader:
    """What a recipe says of itself.

    Attributes:
        title: what it trains, for whom.
        stands_for: the published result that its settings belong to, with its source; or that there is none.
        memory: what one device needs at how many images, and where that is from.
        time: how long it takes on what, and where that is from.
    """

    title: str
    stands_for: str
    memory: str
    time: str
