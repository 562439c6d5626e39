"""Reads files that ``torch.save`` wrote, without running or importing anything that they name.

A pickle is a program that calls what it names. Here a name stands for one of three things: ``OrderedDict``, a function that
records where a tensor lies, or a placeholder that accepts everything and does nothing. So numpy scalars, command lines and
configurations of any class do not prevent reading the tensors beside them. Tensors are read only when needed: an optimizer's
state, for example, costs neither time nor memory.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from os import SEEK_END, PathLike
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "QInt32Storage": torch.qint32,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
ZIP_START = b"PK\x03\x04"  # torch.save since 1.6; before, it wrote a sequence of pickles and then the raw tensors
STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # the first of those pickles
# errors of zipfile and pickle for a damaged or foreign file; encrypted archives and deep recursion raise RuntimeError
FAULTS = (
    *(
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
    ),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
)


class Placeholder(type):
    """Stands for anything that a file names besides tensors, and for any object made from it; it stores nothing.

    It is a class, because a pickle may create an instance of it; the instance is the class itself.

    Attributes:
        stands_for: the dotted name in the file.
    """

    stands_for: str

    def __call__(cls, *args: object, **kwargs: object) -> Placeholder:
        """Returns itself, for any arguments."""
        return cls

    def __setstate__(cls, state: object) -> None:
        pass

    def __setitem__(cls, key: object, value: object) -> None:
        pass

    def append(cls, value: object) -> None:
        """Do nothing."""

    extend = add = append


class Storages:
    """The raw memory in a file; the storage that was read last is kept, because tensors may share it."""

    def __init__(self) -> None:
        self._last: tuple[str, bytearray] | None = None

    def read(self, key: str) -> bytearray:
        """All bytes of one storage."""
        if self._last is None or self._last[0] != key:
            self._last = key, self._read(key)
        return self._last[1]

    def _read(self, key: str) -> bytearray:
        raise NotImplementedError


class Storage(NamedTuple):
    """A storage in a file, with elements of one dtype; a view of it begins at element ``start``."""

    key: str
    dtype: torch.dtype
    start: int


class UnreadTensor(NamedTuple):
    """Where a tensor lies in a file. Nothing here is checked before ``read``."""

    storages: Storages
    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, on the CPU; its memory may be that of another tensor of the file.

        Raises:
            ValueError: the file is damaged there.
        """
        try:
            raw = self.storages.read(self.storage.key)
            flat = (
                torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8, device="cpu")
            ).view(self.dtype)
            return flat.as_strided(self.size, self.stride, self.storage.start + self.offset)  # checks the bounds
        except FAULTS as error:
            raise ValueError(
                f"a tensor of size {self.size} cannot be read, {_said(error)}; the file is damaged"
            ) from None


@contextmanager
def open_entries(path: str | PathLike[str]) -> Iterator[Any]:
    """The object that was saved, with ``UnreadTensor`` and ``Placeholder`` in it. Tensors can be read inside ``with`` only.

    Raises:
        ValueError: ``path`` is a directory, or not a whole file of ``torch.save``.
        OSError: it cannot be opened; FileNotFoundError if it does not exist.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except IsADirectoryError:
        raise ValueError(
            f"{path} is a directory; expected a file that torch.save wrote. The function dcp_to_torch_save of "
            "torch.distributed.checkpoint.format_utils makes one of a distributed checkpoint"
        ) from None
    with file:
        try:
            entries = _archive_entries(file) if file.read(len(ZIP_START)) == ZIP_START else _stream_entries(file)
        except FAULTS as error:
            raise ValueError(
                f"{path} cannot be read, {_said(error)}; expected a whole file that torch.save wrote"
            ) from None
        yield entries


class _Archive(Storages):
    """Storages of a zip archive, each of which is a member."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__()
        self.archive, self.folder = archive, folder

    def _read(self, key: str) -> bytearray:
        return bytearray(self.member(f"data/{key}"))

    def member(self, name: str) -> bytes:
        member = self.archive.getinfo(self.folder + name)
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed, as torch.save never does")
        return self.archive.read(member)


class _Stream(Storages):
    """Storages one after the other behind the pickles, each with a length of 8 bytes and the raw memory."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self.file = file
        self.places: dict[str, tuple[int, int]] = {}

    def _read(self, key: str) -> bytearray:
        place, size = self.places[key]
        self.file.seek(place)
        raw = bytearray(size)
        if self.file.readinto(raw) != size:  # type: ignore[attr-defined]
            raise EOFError(f"storage {key} ends early")
        return raw

    def locate(self, keys: list[str], dtypes: dict[str, torch.dtype]) -> None:
        """Record where each storage lies, starting at the current position in the file."""
        place = self.file.tell()
        end = self.file.seek(0, SEEK_END)
        for key in keys:
            self.file.seek(place)
            (length,) = struct.unpack("<q", self.file.read(8))
            self.places[key] = place + 8, length * dtypes[key].itemsize
            place = sum(self.places[key])
            if length < 0 or place > end:
                raise EOFError(f"the file ends at byte {end}, its storage {key} at {place}")


def _archive_entries(file: IO[bytes]) -> Any:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    folders = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(folders) != 1:
        raise ValueError("a zip archive without a data.pkl")
    storages = _Archive(archive, folders[0])
    if folders[0] + "constants.pkl" in names:
        raise ValueError("a TorchScript archive, which holds a program")
    if folders[0] + "byteorder" in names:
        _check_byteorder(storages.member("byteorder").decode())
    return _Unpickler(io.BytesIO(storages.member("data.pkl")), storages).load()


def _stream_entries(file: IO[bytes]) -> Any:
    file.seek(0)
    storages = _Stream(file)
    if _Unpickler(file, storages).load() != STREAM_MAGIC:
        raise ValueError("a pickle, but not of torch.save")
    _Unpickler(file, storages).load()  # the protocol; there is only one
    system = _Unpickler(file, storages).load()
    _check_byteorder("little" if system["little_endian"] else "big")
    unpickler = _Unpickler(file, storages)
    entries = unpickler.load()
    storages.locate(_Unpickler(file, storages).load(), unpickler.dtypes)
    return entries


def _check_byteorder(order: str) -> None:
    if order != sys.byteorder:
        raise ValueError(f"its bytes are {order}-endian and those of this machine {sys.byteorder}-endian")


class _Unpickler(pickle.Unpickler):
    """An unpickler in which every name of the file is harmless; the objects that it returns belong to this file only."""

    def __init__(self, file: Any, storages: Storages) -> None:
        # latin1 can read everything that Python 2 wrote
        super().__init__(file, encoding="latin1")
        self.storages = storages
        self.dtypes: dict[str, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module.partition(".")[0] == "torch":
            if name in DTYPES:
                return DTYPES[name]
            if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
                return vars(torch)[name]
            if (module, name) in REBUILDERS:
                # a file may set attributes of the returned object: so return a new partial, not the function itself
                return partial(REBUILDERS[module, name], self.storages)
        return _placeholder(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, _, int(), *view):
                self.dtypes.setdefault(key, dtype)
                # the stream of torch before 0.4 had views of storages: (key, start, size)
                return Storage(key, dtype, view[0][1] if view and view[0] else 0)
            case ("storage", Placeholder() as kind, *_):
                return kind
            case ("module", made, *_):
                return made
        raise pickle.UnpicklingError(f"the file refers to {pid!r}; expected a storage")


def _placeholder(stands_for: str) -> Placeholder:
    return Placeholder("Placeholder", (), {"stands_for": stands_for, "__new__": _same})


def _same(cls: Placeholder, *args: object, **kwargs: object) -> Placeholder:
    return cls


def _rebuild_tensor(
    storages: Storages, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> UnreadTensor | Placeholder:
    """``rest`` is requires_grad, hooks, sometimes a dtype that differs from the storage's, sometimes a dict of set bits."""
    if any(type(value) is dict and value for value in rest):
        return _placeholder("torch.Tensor with a conjugation or negation still to be done")
    if not isinstance(storage, Storage):
        return _placeholder("torch.Tensor whose memory is not a part of the file")
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), storage.dtype)
    return UnreadTensor(storages, storage, dtype, offset, size, stride)


def _rebuild_parameter(storages: Storages, data: Any, *rest: object) -> Any:
    return data


def _rebuild_subclass(storages: Storages, rebuild: Callable[..., Any], kind: object, given: Any, state: object) -> Any:
    made = rebuild(*given)
    return kind if isinstance(made, Placeholder) else made  # the class says more than the function that made it


REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
