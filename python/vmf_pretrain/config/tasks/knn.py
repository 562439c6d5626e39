"""The k-NN task."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class KnnTask:
    """k-NN on the class feature, as DINO and DINOv2 have it.

    Attributes:
        neighbours: the values of k; a k above the number of training images is that number.
        temperature: of the votes exp(cosine / temperature).
        per_class: training images of each class that are kept, a list of counts; empty keeps all of them. With n of each
            class, the values of k are those up to n, and n itself.
        tries: draws of those images, for each count.
        resize: shorter side that an image is resized to before the central square is cut, as a multiple of the square.
    """

    neighbours: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    per_class: tuple[int, ...] = ()
    tries: int = 5
    resize: float = 256 / 224

    def __post_init__(self) -> None:
        require(len(self.neighbours) > 0, "knn.neighbours is empty; expected at least one k.")
        for name, counts in (("neighbours", self.neighbours), ("per_class", self.per_class)):
            require(
                all(count > 0 for count in counts) and len(set(counts)) == len(counts),
                f"knn.{name} is {list(counts)}; expected different numbers greater than 0.",
            )
        require_positive("knn", temperature=self.temperature, tries=self.tries)
        require(self.resize >= 1, f"knn.resize is {self.resize} but must be at least 1, the cut square itself.")
