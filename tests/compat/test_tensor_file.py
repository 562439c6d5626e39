"""Files of ``torch.save``: tensors as torch reads them, beside values of any class; damage is named."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import functools
import inspect
import io
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import omegaconf
import pytest
import torch
from torch import Tensor, nn

from vmf_kernels.compat.tensor_file import Placeholder, UnreadTensor, open_entries

pytestmark = pytest.mark.quick

WEIGHT = torch.arange(6.0).reshape(2, 3)


def read(path: Path, name: str = "weight") -> Tensor:
    with open_entries(path) as entries:
        value = entries[name]
        assert isinstance(value, UnreadTensor), f"{name} is {value!r}"
        return value.read()


class Settings(dict[str, Any]):
    """A mapping with attributes, as many configurations are."""


class Steps(list[int]):
    """A list of another class."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A dataclass with a class inside."""

    rate: float

    class Kind(enum.Enum):
        """An enum inside a class, which pickle finds by getattr."""

        COSINE = "cosine"


class Owner:
    """State set by ``__setstate__``, items appended and set."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Owner, (), {"a": 1}, iter([1, 2]), iter([("key", "value")])


class MarkedTensor(Tensor):
    """A subclass of Tensor, with an attribute."""


def marked(value: Tensor) -> Tensor:
    subclass = value.as_subclass(MarkedTensor)
    subclass.origin = "here"  # type: ignore[attr-defined]
    return subclass


VALUES: dict[str, Callable[[], Any]] = {
    "numpy scalars": lambda: [np.float64(1e-3), np.float32(2), np.int64(3), np.bool_(True), np.str_("x")],
    "numpy arrays": lambda: [np.linspace(0, 1, 5), np.array([None, "x"], dtype=object), np.zeros(3, dtype="f4,i8")],
    "numpy dtypes": lambda: [np.dtype("float64"), np.float32],
    "random states": lambda: [
        np.random.get_state(),
        np.random.default_rng(0),
        random.getstate(),
        torch.get_rng_state(),
    ],
    "command line": lambda: argparse.Namespace(path=Path("a"), rate=1e-3),
    "enums": lambda: {Recipe.Kind.COSINE: 1, "key": Recipe.Kind.COSINE},
    "dataclass": lambda: Recipe(0.1),
    "partial": lambda: functools.partial(Recipe, rate=0.2),
    "function": lambda: [inspect.getsource, torch.nn.functional.gelu, len],
    "bound method": lambda: Recipe(0.1).__eq__,
    "other containers": lambda: [{1, 2}, frozenset({3}), collections.deque([4]), collections.Counter("ab"), range(3)],
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "subclasses of containers": lambda: [Settings(a=Settings(b=1)), Steps([1, 2])],
    "omegaconf": lambda: omegaconf.OmegaConf.create({"optim": {"lr": 0.1, "betas": [0.9, 0.999]}, "name": "x"}),
    "every kind of reduction": Owner,
    "dates and decimals": lambda: [datetime.datetime.now(datetime.UTC), datetime.timedelta(1), decimal.Decimal("0.1")],
    "bytes": lambda: [b"abc", bytearray(b"abc"), 1 + 2j, 2**70],
    "values of torch": lambda: [torch.Size([1]), torch.device("cpu"), torch.float32, torch.strided, torch.nn.Parameter],
    "tensors of other layouts": lambda: [WEIGHT.to_sparse(), torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)],
    "conjugated tensor": lambda: torch.randn(2, dtype=torch.complex64).conj(),
    "meta tensor": lambda: torch.empty(2, device="meta"),
    "whole module": lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
    "whole optimizer": lambda: torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=np.float64(0.1)),
    "exceptions and types": lambda: [ValueError("x"), dict, type(None), NotImplemented, ...],
}
WAYS: dict[str, dict[str, Any]] = {
    "zip": {},
    "zip-protocol-5": {"pickle_protocol": 5},
    "stream": {"_use_new_zipfile_serialization": False},
    "stream-protocol-4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_values_of_any_class_keep_nobody_from_the_tensors(way: str, tmp_path: Path) -> None:
    failed = {}
    for name, make in VALUES.items():
        with contextlib.ExitStack() as stack:
            if name == "whole module" and way.startswith("stream"):
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            torch.save({"before": make(), "weight": WEIGHT, "after": make()}, tmp_path / "file.pth", **WAYS[way])
        try:
            same = torch.equal(read(tmp_path / "file.pth"), WEIGHT)
        except ValueError as error:
            failed[name] = str(error)
        else:
            assert same, name
    assert not failed, failed


def test_those_values_are_what_torch_refuses(tmp_path: Path) -> None:
    """Negative control, and what a run of DINO comes to: its schedules put numpy's numbers into the optimizer."""
    torch.save({"lr": np.linspace(0, 1, 5)[2], "weight": WEIGHT}, tmp_path / "file.pth")
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        torch.load(tmp_path / "file.pth", weights_only=True)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64, torch.float8_e4m3fn),
]


@pytest.mark.parametrize("way", WAYS)
def test_tensors_are_those_that_torch_reads(way: str, tmp_path: Path) -> None:
    base = torch.randn(5, 4)
    dtypes = DTYPES if way.startswith("zip") else DTYPES[:-3]  # torch cannot read back the last ones from a stream
    tensors = {f"{dtype}": (10 * torch.rand(3, 2)).to(dtype) for dtype in dtypes}
    tensors |= {
        "transposed": base.T,
        "part": base[1:4, ::2],
        "scalar": base[2, 3],
        "empty": base[:0],
        "none": torch.empty(0),
    }
    tensors |= {"expanded": base[:, :1].expand(5, 3), "parameter": nn.Parameter(base), "subclass": marked(base)}
    tensors["annotated parameter"] = nn.Parameter(torch.randn(2))
    tensors["annotated parameter"].is_last_layer = True  # type: ignore[attr-defined]
    torch.save(tensors, tmp_path / "file.pth", **WAYS[way])
    expected = torch.load(tmp_path / "file.pth", weights_only=False)
    with open_entries(tmp_path / "file.pth") as entries:
        got = {name: value.read() for name, value in entries.items()}
    assert list(got) == list(expected)
    for name, tensor in got.items():
        want = expected[name].detach().as_subclass(Tensor)
        assert (tensor.dtype, tensor.stride()) == (want.dtype, want.stride()), name
        raw = [t.contiguous().flatten().view(torch.uint8) for t in (tensor.clone(), want.clone()) if t.numel()]
        assert not raw or torch.equal(*raw), name


def test_nested_entries_and_metadata_stay(tmp_path: Path) -> None:
    torch.save({"model": nn.BatchNorm1d(2).state_dict(), "epoch": 3}, tmp_path / "file.pth")
    with open_entries(tmp_path / "file.pth") as entries:
        assert entries["epoch"] == 3
        assert list(entries["model"]) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
        assert entries["model"]._metadata[""] == {"version": 2}


def test_a_placeholder_says_what_it_stands_for(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "file.pth")
    with open_entries(tmp_path / "file.pth") as entries:
        assert isinstance(entries["args"], Placeholder)
        assert entries["args"].stands_for == "argparse.Namespace"


class Reduced:
    """Unpickling it calls what it was given."""

    def __init__(self, *reduction: Any) -> None:
        self.reduction = reduction

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduction


def as_file(program: bytes, path: Path, way: str) -> Path:
    """A file of ``torch.save`` with another pickle in it."""
    if way == "zip":
        torch.save({"weight": WEIGHT}, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, program if name.endswith("data.pkl") else data)
    else:
        head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(x, protocol=2) for x in head) + program + pickle.dumps([], protocol=2))
    return path


def located(key: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of one tensor, wherever it is said to lie."""
    file, storage = io.BytesIO(), object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", 6) if value is storage else None

    hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()
    given = (storage, offset, size, stride, False, hooks)
    Pickler(file, protocol=2).dump({"weight": Reduced(torch._utils._rebuild_tensor_v2, given)})
    return file.getvalue()


@pytest.mark.parametrize(
    ("key", "offset", "size", "stride"),
    [
        ("0", 1, (2, 3), (3, 1)),
        ("0", -1, (2, 2), (3, 1)),
        ("0", 0, (2, 3), (1 << 62, 1)),
        ("0", 0, (-2,), (1,)),
        ("0", 0, (2,), (1, 1)),
        ("0", "x", (2,), (1,)),
        ("../0", 0, (2,), (1,)),
        ("7", 0, (2,), (1,)),
    ],
)
def test_a_tensor_outside_the_file_is_refused(key: str, offset: Any, size: Any, stride: Any, tmp_path: Path) -> None:
    path = as_file(located(key, offset, size, stride), tmp_path / "file.pth", "zip")
    with pytest.raises(ValueError, match=r"a tensor of size .* cannot be read, .*; the file is damaged"):
        read(path)
    assert torch.equal(read(as_file(located("0", 0, (2, 3), (3, 1)), path, "zip")), WEIGHT), (
        "the sound one was not read"
    )


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(2))


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")


def compressed(path: Path) -> None:
    torch.save({"weight": WEIGHT}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def other_endian(path: Path) -> None:
    with torch.serialization.safe_globals([]):
        torch.save({"weight": WEIGHT}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "EOFError"),
    "text": (lambda path: path.write_text("teacher: 1\n"), "expected a whole file that torch.save wrote"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), "expected a whole file that torch.save wrote"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"teacher": 1})), "a pickle, but not of torch.save"),
    "npz": (npz, "a zip archive without a data.pkl"),
    "TorchScript": (scripted, "a TorchScript archive, which holds a program"),
    "tar": (tar, "expected a whole file that torch.save wrote"),
    "compressed": (compressed, "is compressed"),
    "other endianness": (other_endian, "its bytes are big-endian and those of this machine little-endian"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_and_named(kind: str, tmp_path: Path) -> None:
    write, message = FOREIGN[kind]
    write(tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message) as caught, open_entries(tmp_path / "file.pth"):
        pass
    assert "file.pth cannot be read" in str(caught.value)


@pytest.mark.parametrize("way", ["zip", "stream"])
def test_a_file_cut_short_is_refused_and_named(way: str, tmp_path: Path) -> None:
    torch.save(
        {"weight": torch.randn(300), "args": argparse.Namespace(a=np.float64(1))}, tmp_path / "whole.pth", **WAYS[way]
    )
    whole, path = (tmp_path / "whole.pth").read_bytes(), tmp_path / "cut.pth"
    for length in (*range(1, len(whole), 61), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="expected a whole file that torch"), open_entries(path):
            pytest.fail(f"{length} of {len(whole)} bytes were taken for the whole file")


def test_changed_bytes_of_a_tensor_are_found(tmp_path: Path) -> None:
    torch.save({"weight": WEIGHT}, tmp_path / "file.pth")
    data, changed = (tmp_path / "file.pth").read_bytes(), bytearray((tmp_path / "file.pth").read_bytes())
    changed[data.index(WEIGHT.numpy().tobytes()) + 5] ^= 1
    (tmp_path / "file.pth").write_bytes(changed)
    with pytest.raises(ValueError, match=r"Bad CRC-32 .*; the file is damaged"):
        read(tmp_path / "file.pth")


def test_a_directory_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"is a directory; expected a file .* dcp_to_torch_save"),
        open_entries(tmp_path),
    ):
        pass
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"), open_entries(tmp_path / "gone.pth"):
        pass


@pytest.mark.parametrize("way", ["zip", "stream"])
def test_what_nobody_asks_for_is_not_read(way: str, tmp_path: Path) -> None:
    torch.save({"weight": WEIGHT, "moments": torch.randn(1000)}, tmp_path / "file.pth", **WAYS[way])
    with open_entries(tmp_path / "file.pth") as entries:
        storages = entries["weight"].storages
        read = mock.Mock(wraps=storages._read)
        storages._read = read
        assert torch.equal(entries["weight"].read(), WEIGHT)
        read.assert_called_once_with(entries["weight"].storage.key)
        assert entries["moments"].read().shape == (1000,)
