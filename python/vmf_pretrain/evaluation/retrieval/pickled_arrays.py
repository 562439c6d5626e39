"""Arrays of numbers as a pickle describes them: by name, from their bytes, with nothing of numpy's own unpickling."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vmf_pretrain.config.errors import PretrainError

NUMBER = re.compile(r"[<>=|]?([biuf][1248])")
BYTE_ORDERS = ("<", ">", "=", "|")


class Name(NamedTuple):
    """What a pickle names instead of a value."""

    module: str
    attribute: str


class Holder:
    """What gets its state after it is made."""

    def take(self, state: Any) -> None:
        """Set the state."""
        raise NotImplementedError


class Kind(Holder):
    """A type of numbers."""

    def __init__(self, code: Any) -> None:
        found = NUMBER.fullmatch(code) if isinstance(code, str) else None
        if found is None:
            raise PretrainError(f"holds an array of {code!r}; expected arrays of numbers.")
        self.type: np.dtype[Any] = np.dtype(found[1])

    def take(self, state: Any) -> None:
        """The byte order, of a state that says nothing else about plain numbers."""
        if state[1] not in BYTE_ORDERS:
            raise ValueError(f"byte order {state[1]!r}")
        self.type = self.type.newbyteorder(state[1])


class PlainArray(Holder):
    """An array of numbers, empty until its state is set."""

    def __init__(self) -> None:
        self.values: NDArray[Any] = np.zeros(0)

    def take(self, state: Any) -> None:
        """Version, shape, type, whether columns come first, and the bytes."""
        _, shape, kind, columns_first, content = state
        self.fill(content, kind, shape, "F" if columns_first else "C")

    def fill(self, content: Any, kind: Any, shape: Any, order: str) -> "PlainArray":
        """Set the numbers from their bytes; Python 2 wrote these as text."""
        encoded = content.encode("latin-1") if isinstance(content, str) else bytes(content)
        if type(kind) is not Kind or len(encoded) != math.prod(shape) * kind.type.itemsize:
            raise ValueError(f"{len(encoded)} bytes of an array of shape {shape}")
        self.values = np.frombuffer(encoded, kind.type).reshape(shape, order=order)  # type: ignore[call-overload]
        return self


def _reconstruct(kind: Any, *_: Any) -> PlainArray:
    if kind != Name("numpy", "ndarray"):
        raise ValueError(f"an array of the kind {kind}")
    return PlainArray()


def _scalar(kind: Any, content: Any) -> Any:
    return PlainArray().fill(content, kind, (), "C").values.item()


def _encoded(text: Any, encoding: Any) -> bytes:
    """Bytes as Python 3 writes them for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes as {encoding!r}")
    return bytes(text.encode("latin-1"))


def _no_bytes() -> bytes:
    return b""


def _never(*_: Any) -> Any:
    raise TypeError("an array made without its bytes")


BUILDERS: dict[Name, Callable[..., Any]] = {
    Name("numpy", "ndarray"): _never,
    Name("numpy", "dtype"): lambda code, *_: Kind(code),
    Name("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    Name("numpy.core.multiarray", "scalar"): _scalar,
    Name("numpy.core.numeric", "_frombuffer"): lambda *parts: PlainArray().fill(*parts),
    Name("_codecs", "encode"): _encoded,
    Name("__builtin__", "bytes"): _no_bytes,
    Name("builtins", "bytes"): _no_bytes,
}
