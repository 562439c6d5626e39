"""Tensor files: the library of safetensors reads what we write, we read what it writes, and neither is misled."""

from __future__ import annotations

import hashlib
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pretrain.saved import assert_same_bits
from tests.pretrain.tiny import one_sentence
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.tensor_file import DTYPES, LONGEST_HEADER, read_header, read_tensors, write_tensors

pytestmark = pytest.mark.quick

TENSORS = {
    **{str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES.values()},
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 5),
    "strided": torch.arange(12.0).reshape(3, 4).T,
    "ünïcode / name": torch.tensor([float("nan"), -0.0]),
}
MOST_MEMORY = 2**20  # bytes, for a file of less than a kilobyte


def same(got: dict[str, torch.Tensor]) -> None:
    as_bytes = {name: tensor.contiguous().reshape(-1).view(torch.uint8) for name, tensor in got.items()}
    expected = {name: tensor.contiguous().reshape(-1).view(torch.uint8) for name, tensor in TENSORS.items()}
    assert_same_bits(as_bytes, expected)
    assert {name: (t.shape, t.dtype) for name, t in got.items()} == {n: (t.shape, t.dtype) for n, t in TENSORS.items()}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    sha256 = write_tensors(tmp_path / "x", TENSORS, {"format": "pt"})
    assert sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    same(load_file(tmp_path / "x"))


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "x", {"note": "mine"})
    tensors, metadata = read_tensors(tmp_path / "x")
    same(tensors)
    assert metadata == {"note": "mine"}
    specs = {name: (tensor.shape, tensor.dtype) for name, tensor in read_header(tmp_path / "x").specs().items()}
    assert specs == {name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}


def entry(begin: int, end: int, shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(header: Any, data: int = 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


class RunsCode:
    """Makes a file when it is unpickled."""

    marker = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.marker),)


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has 0 bytes"),
    "no header": (b"\x02\0\0\0", "it has 4 bytes"),
    "longest header": (b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615 bytes"),
    "header beyond the file": (file_of({}, length=10**9), "claims a header of 1000000000 bytes"),
    "header beyond the limit": (file_of(b" " * (LONGEST_HEADER + 1)), "claims a header of 10485761 bytes"),
    "not JSON": (file_of(b"{,}"), "is not JSON"),
    "not text": (file_of(b"\xff\xfe{}"), "is not JSON"),
    "nested": (file_of(b"[" * 100_000), "nested too deeply|is not JSON"),
    "endless number": (file_of(b'{"x": ' + b"9" * 10_000 + b"}"), "Exceeds the limit"),
    "list": (file_of([1]), "is no JSON object"),
    "name twice": (
        file_of(b'{"x": %s, "x": %s}' % ((json.dumps(entry(0, 16, [4])).encode(),) * 2)),
        "has 'x' twice",
    ),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "__metadata__ does not hold texts"),
    "entry": (file_of({"x": 3}), "lacks one of dtype"),
    "field": (file_of({"x": {**entry(0, 16, [4]), "more": 1}}), "or has more"),
    "dtype": (file_of({"x": entry(0, 16, [4], "F99")}), "has the dtype 'F99'"),
    "negative": (file_of({"x": entry(0, 16, [-4])}), "expected whole numbers"),
    "not whole": (file_of({"x": entry(0, 16, [4.0])}), "expected whole numbers"),
    "boolean": (file_of({"x": entry(0, 16, [True, 4])}), "expected whole numbers"),
    "offsets": (file_of({"x": {**entry(0, 16, [4]), "data_offsets": [0, 8, 16]}}), "expected whole numbers"),
    "length": (file_of({"x": entry(0, 16, [5])}), "cannot lie in bytes 0 to 16"),
    "huge": (file_of({"x": entry(0, 16, [2**40])}), "cannot lie in bytes 0 to 16"),
    "huge and empty": (file_of({"x": entry(0, 0, [0, 2**63])}, 0), "too large"),
    "backwards": (file_of({"x": entry(16, 0, [4])}), "cannot lie"),
    "overlapping": (file_of({"x": entry(0, 16, [4]), "y": entry(8, 16, [2])}), "'y' begins at byte 8; expected 16"),
    "hole": (file_of({"x": entry(0, 4, [1]), "y": entry(8, 16, [2])}), "'y' begins at byte 8; expected 4"),
    "surplus": (file_of({"x": entry(0, 16, [4])}, 20), "end at byte 16 but 20 bytes follow"),
    "cut short": (file_of({"x": entry(0, 16, [4])}, 12), "end at byte 16 but 12 bytes follow"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_refused_without_much_memory(kind: str, tmp_path: Path) -> None:
    content, said = MALFORMED[kind]
    (tmp_path / "x.safetensors").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(PretrainError, match=said) as caught:
        read_tensors(tmp_path / "x.safetensors")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < MOST_MEMORY, f"took {most} bytes of memory for a file of {len(content)}"
    assert one_sentence(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("protocol", [0, 2, 5, "torch"])
def test_a_pickle_by_the_name_of_a_tensor_file_is_refused_and_not_run(protocol: Any, tmp_path: Path) -> None:
    bomb, path = RunsCode(), tmp_path / "x.safetensors"
    bomb.marker = str(tmp_path / "ran")
    if protocol == "torch":
        torch.save({"x": torch.ones(2)}, path)
    else:
        RunsCode.marker = str(tmp_path / "ran")
        path.write_bytes(pickle.dumps(bomb, protocol))
    with pytest.raises(PretrainError, match="no well-formed safetensors file") as caught:
        read_tensors(path)
    assert protocol == 0 or "looks like a pickle" in str(caught.value), str(caught.value)
    assert not (tmp_path / "ran").exists(), "the pickle was run"
    if protocol != "torch":
        pickle.loads(path.read_bytes())  # negative control: it would have
        assert (tmp_path / "ran").exists()


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match="absent cannot be read: No such file"):
        read_tensors(tmp_path / "absent")
