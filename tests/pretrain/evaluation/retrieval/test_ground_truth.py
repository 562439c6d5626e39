"""Published pickles are read as numpy and pickle read them, run nothing, and say what was refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.retrieval.convert import main
from vmf_pretrain.evaluation.retrieval.ground_truth import GroundTruth, Query, read_ground_truth
from vmf_pretrain.evaluation.retrieval.pickled import plain_values
from vmf_pretrain.evaluation.retrieval.pickled_arrays import PlainArray

pytestmark = pytest.mark.quick

TRUTH = GroundTruth(
    ("a", "b", "c", "d"),
    (Query("q1", (1.0, 2.5, 30.0, 40.0), (0,), (1, 2), ()), Query("q2", (0.0, 0.0, 5.0, 5.0), (), (), (3,))),
)


def published(places: Any) -> dict[str, Any]:
    """The layout of the published file, with each list of places as ``places`` makes it."""
    return {
        "imlist": list(TRUTH.images),
        "qimlist": [query.image for query in TRUTH.queries],
        "gnd": [
            {"bbx": list(q.box or ()), "easy": places(q.easy), "hard": places(q.hard), "junk": places(q.junk)}
            for q in TRUTH.queries
        ],
    }


# As Python 2 with numpy 1 writes it: arrays' bytes are text, and modules have their former names.
PYTHON_2 = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntRp0\n"
    b"(I1\n(I2\ntcnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
    b"U\x10\x01\x00\x00\x00\x00\x00\x00\x00\xff\x00\x00\x00\x00\x00\x00\x00tb."
)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("places", [list, lambda p: np.array(p, np.int64), lambda p: [np.int32(n) for n in p]])
def test_a_pickle_is_read_by_every_protocol(places: Any, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(published(places), protocol))
    assert read_ground_truth(path) == TRUTH


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_values_and_arrays_are_those_of_unpickling(protocol: int) -> None:
    values: list[Any] = [
        None,
        True,
        -(2**70),
        1.5,
        "é",
        b"\x00\xff",
        (),
        (1,),
        (1, 2, 3, 4),
        {"k": [0] * 1200},
        {1: {}},
    ]
    assert plain_values(pickle.dumps(values, protocol), "f") == values
    for array in (np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.eye(3)[:, :2]), np.zeros((0, 4), bool)):
        held = plain_values(pickle.dumps(array, protocol), "f")
        assert isinstance(held, PlainArray)
        np.testing.assert_array_equal(held.values, array)


def test_arrays_of_python_2() -> None:
    held = plain_values(PYTHON_2, "f")
    assert held.values.tolist() == pickle.loads(PYTHON_2, encoding="latin1").tolist() == [1, 255]


class Runs:
    """Unpickling calls what this names."""

    def __init__(self, called: Any, *arguments: Any) -> None:
        self.called, self.arguments = called, arguments

    def __reduce__(self) -> Any:
        return self.called, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda path: Runs(open, path, "w"), r"names \w+\.open, which is no array of numbers"),
        (lambda path: Runs(eval, f"open({path!r}, 'w')"), r"names \w+\.eval, "),
        (lambda path: Path(path), "names pathlib"),
        (lambda path: np.array([path], object), "an array of 'O8'"),
        (lambda path: np.array(["a"]), "an array of 'U1'"),
    ],
)
def test_everything_else_is_refused_and_not_run(value: Any, said: str, protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "written"
    with pytest.raises(PretrainError, match=said):
        plain_values(pickle.dumps(value(str(target)), protocol), "gnd.pkl")
    assert not target.exists()


def test_every_cut_of_a_pickle_is_damage() -> None:
    whole = pickle.dumps(published(np.array), 2)
    for length in range(len(whole)):
        with pytest.raises(PretrainError, match="is no whole pickle"):
            plain_values(whole[:length], "gnd.pkl")


@pytest.mark.parametrize(
    "content",
    [
        b"(lp0\nh",
        b"cnumpy\nndarray\n)R.",
        b"]q\x00b.",
        b"]\x88\x88s.",
        b"(NN.",
        b"\x88(.",
        b"j\xff\xff\xff\x7f.",
        b"Q.",
    ],
)
def test_instructions_that_fit_nothing(content: bytes) -> None:
    with pytest.raises(PretrainError):
        plain_values(content, "gnd.pkl")


def test_a_published_file_is_converted_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, written = tmp_path / "gnd_x.pkl", tmp_path / "gnd.json"
    given.write_bytes(pickle.dumps(published(np.array), 2))
    assert main([str(given), str(written)]) == 0
    assert read_ground_truth(written) == TRUTH
    given.write_bytes(pickle.dumps(Runs(print, "run")))
    assert main([str(given), str(written)]) == 2
    said = capsys.readouterr()
    assert "2 queries to 4 images" in said.out
    assert "\nrun" not in said.out
    assert "names builtins.print" in said.err


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "gnd.json"
    path.write_text(TRUTH.json())
    assert read_ground_truth(path) == TRUTH


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"images": ["a"], "queries": [{"image": "q", "box": null, "easy": [1], "hard": [], "junk": []}]}', "from 0"),
        ('{"images": ["a"], "queries": [{"image": "q", "box": null, "easy": [0], "hard": [0], "junk": []}]}', "twice"),
        ('{"images": ["a"], "queries": [{"image": "q", "box": [1], "easy": [0], "hard": [], "junk": []}]}', "the box"),
        ('{"images": ["a"], "queries": [{"image": "q", "box": null, "easy": [0.5], "hard": [], "junk": []}]}', "whole"),
        ('{"images": "a", "queries": 3}', "holds no ground truth"),
        ("[" * 100_000, "holds no ground truth"),
    ],
)
def test_a_ground_truth_that_fits_nothing(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "gnd.json"
    path.write_text(content)
    with pytest.raises(PretrainError, match=said):
        read_ground_truth(path)
