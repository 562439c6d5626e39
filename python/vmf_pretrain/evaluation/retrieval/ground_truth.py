"""Which images answer which query: the ground truth of a retrieval benchmark, as JSON or out of the published pickle.

The JSON is ``{"images": [names], "queries": [{"image": name, "box": [left, top, right, bottom] or null, "easy": [places among
the images, from 0], "hard": [...], "junk": [...]}]}``.

Legend: N images of the database, Q queries.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.retrieval.pickled import plain_values
from vmf_pretrain.evaluation.retrieval.pickled_arrays import PlainArray

GRADES = ("easy", "hard", "junk")


@dataclass(frozen=True)
class Query:
    """A query, and what answers it.

    Attributes:
        image: name of the query's image.
        box: left, top, right and bottom of what is sought in it, pixels; None for all of it.
        easy: places among the database's images of those that show it clearly.
        hard: of those that show it badly.
        junk: of those that hardly show it, which count neither for nor against.
    """

    image: str
    box: tuple[float, ...] | None
    easy: tuple[int, ...]
    hard: tuple[int, ...]
    junk: tuple[int, ...]


@dataclass(frozen=True)
class GroundTruth:
    """The images of a database, N names, and Q queries to it.

    Raises:
        PretrainError: a query names an image beyond the database, or gives one image two grades.
    """

    images: tuple[str, ...]
    queries: tuple[Query, ...]

    def __post_init__(self) -> None:
        for query in self.queries:
            places = [*query.easy, *query.hard, *query.junk]
            if len(set(places)) != len(places):
                raise PretrainError(f"query {query.image} grades an image twice; expected easy, hard or junk once.")
            if places and not 0 <= min(places) <= max(places) < len(self.images):
                raise PretrainError(
                    f"query {query.image} grades images {min(places)} to {max(places)}, "
                    f"but the database has {len(self.images)}, from 0."
                )
            if query.box is not None and len(query.box) != 4:
                raise PretrainError(f"query {query.image} has the box {query.box}; expected left, top, right, bottom.")

    def json(self) -> str:
        """This ground truth as JSON."""
        return json.dumps({"images": self.images, "queries": [asdict(query) for query in self.queries]}, indent=1)


def read_ground_truth(path: Path) -> GroundTruth:
    """The ground truth in a JSON file, or in a pickle as published (``gnd_roxford5k.pkl``), which is read but never run.

    Raises:
        PretrainError: the file cannot be read, or holds something else.
    """
    try:
        encoded = path.read_bytes()
        facts = json.loads(encoded) if path.suffix == ".json" else _published(plain_values(encoded, "it"))
        queries = [_query(facts["queries"][place], place) for place in range(len(facts["queries"]))]
        return GroundTruth(tuple(map(_text, facts["images"])), tuple(queries))
    except PretrainError as error:
        raise PretrainError(f"{path}: {error}") from None
    except OSError as error:
        raise PretrainError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PretrainError(
            f"{path} holds no ground truth of images and queries ({type(error).__name__}: {error})."
        ) from None


def ground_truth_of_classes(names: Sequence[str], labels: Sequence[int]) -> GroundTruth:
    """Each image as a query for the others of its class; the image itself is junk. The classes' images are all easy."""
    queries = []
    for place, (name, label) in enumerate(zip(names, labels, strict=True)):
        same = tuple(other for other, found in enumerate(labels) if found == label and other != place)
        queries.append(Query(name, None, same, (), (place,)))
    return GroundTruth(tuple(names), tuple(queries))


def _published(facts: Any) -> dict[str, Any]:
    """The published names as ours."""
    queries = [
        {"image": image, "box": found["bbx"], **{grade: found[grade] for grade in GRADES}}
        for image, found in zip(facts["qimlist"], facts["gnd"], strict=True)
    ]
    return {"images": facts["imlist"], "queries": queries}


def _query(facts: Any, place: int) -> Query:
    box = None if facts["box"] is None else tuple(float(side) for side in _numbers(facts["box"]))
    grades = [tuple(_place(number, place) for number in _numbers(facts[grade])) for grade in GRADES]
    return Query(_text(facts["image"]), box, *grades)


def _numbers(values: Any) -> list[Any]:
    found = values.values.ravel().tolist() if isinstance(values, PlainArray) else values
    if not isinstance(found, list | tuple):
        raise TypeError(f"{type(found).__name__} in place of a list of numbers")
    return list(found)


def _place(number: Any, query: int) -> int:
    if isinstance(number, bool) or not float(number).is_integer():
        raise PretrainError(f"query {query} grades image {number!r}; expected a whole number.")
    return int(number)


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{type(name).__name__} in place of a name")
    return name
