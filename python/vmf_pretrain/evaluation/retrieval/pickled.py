"""Plain values out of a pickle, without unpickling it.

A pickle is a program. Here its instructions are read one by one, and those that build numbers, texts, lists, tuples, dicts and
arrays of numbers are followed; what a call would name is never imported, let alone called.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.retrieval.pickled_arrays import BUILDERS, Holder, Name

MOST_BYTES = 64 * 2**20  # the published ground truths are below 1 MiB
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# opcodes whose argument is the value
NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
VALUES = NUMBERS | TEXTS | BYTES
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
IGNORED = {"PROTO", "FRAME", "STOP"}
# what following a damaged pickle can raise: too few values, values of another type, numbers that do not fit
DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, AssertionError)


def plain_values(encoded: bytes, name: str) -> Any:
    """What a pickle of plain values holds: None, bool, int, float, str, bytes, list, tuple, dict, and ``Holder`` of numbers.

    Args:
        encoded: the bytes of the file; any protocol, of Python 2 or 3.
        name: what errors call the file.

    Raises:
        PretrainError: it is longer than 64 MiB, damaged, or names anything but arrays of numbers.
    """
    if len(encoded) > MOST_BYTES:
        raise PretrainError(f"{name} has {len(encoded)} bytes; expected a ground truth of at most {MOST_BYTES}.")
    machine = _Machine([], {})
    try:
        for opcode, argument, _ in pickletools.genops(encoded):
            machine.follow(opcode.name, argument)
        (value,) = machine.stack
    except PretrainError as error:
        raise PretrainError(f"{name} {error}") from None
    except DAMAGE as error:
        raise PretrainError(f"{name} is no whole pickle ({type(error).__name__}: {error}).") from None
    return value


class _Mark:
    """The place in the stack from which a container takes its parts."""


@dataclass
class _Machine:
    """The stack of a pickle, and the values that it refers to again."""

    stack: list[Any]
    memo: dict[int, Any]

    def follow(self, opcode: str, argument: Any) -> None:
        """Follow one instruction."""
        if opcode in IGNORED:
            return
        if opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode])
        elif opcode in VALUES:
            self.stack.append(argument)
        elif opcode in PUTS or opcode == "MEMOIZE":
            self.memo[len(self.memo) if opcode == "MEMOIZE" else argument] = self.stack[-1]
        elif opcode in GETS:
            self.stack.append(self.memo[argument])
        elif opcode in STEPS:
            STEPS[opcode](self)
        elif opcode == "GLOBAL":
            self.stack.append(_known(*argument.split(" ", 1)))
        else:
            raise PretrainError(f"uses the instruction {opcode}, which plain values do not need; nothing was run.")

    def since_mark(self) -> list[Any]:
        """Take the values above the last mark, and the mark."""
        parts = []
        while (value := self.stack.pop()) is not _Mark:
            parts.append(value)
        return parts[::-1]

    def last(self, count: int) -> list[Any]:
        """Take the last values."""
        if len(self.stack) < count:
            raise IndexError(f"{count} values of {len(self.stack)}")
        parts = self.stack[-count:]
        del self.stack[-count:]
        return parts

    def extend(self, parts: list[Any]) -> None:
        """Add to the list on the stack."""
        if type(self.stack[-1]) is not list:
            raise TypeError("append to what is no list")
        self.stack[-1].extend(parts)

    def update(self, parts: list[Any]) -> None:
        """Add keys and values to the dict on the stack."""
        if type(self.stack[-1]) is not dict:
            raise TypeError("a key of what is no dict")
        self.stack[-1].update(zip(parts[::2], parts[1::2], strict=True))

    def call(self) -> None:
        """What a call would give, if it is one of those that make arrays of numbers."""
        called, arguments = self.last(2)
        if type(called) is not Name or type(arguments) is not tuple:
            raise TypeError("a call of what is no name")
        self.stack.append(BUILDERS[called](*arguments))

    def build(self) -> None:
        """Give an array or a type of numbers its state."""
        (state,) = self.last(1)
        if not isinstance(self.stack[-1], Holder):
            raise TypeError("a state of what is no array")
        self.stack[-1].take(state)


def _known(module: str, attribute: str) -> Name:
    name = Name(module.replace("numpy._core", "numpy.core"), attribute)  # numpy 2 has renamed it
    if name not in BUILDERS:
        raise PretrainError(
            f"names {module}.{attribute}, which is no array of numbers; it may run code when it is unpickled. "
            "Nothing was run; expected the published ground truth."
        )
    return name


def _appended(machine: _Machine) -> None:
    machine.extend(machine.last(1))


def _dict(machine: _Machine) -> None:
    parts = machine.since_mark()
    machine.stack.append({})
    machine.update(parts)


STEPS: dict[str, Callable[[_Machine], None]] = {
    "MARK": lambda machine: machine.stack.append(_Mark),
    "EMPTY_LIST": lambda machine: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine: machine.stack.append(()),
    "EMPTY_DICT": lambda machine: machine.stack.append({}),
    "LIST": lambda machine: machine.stack.append(machine.since_mark()),
    "TUPLE": lambda machine: machine.stack.append(tuple(machine.since_mark())),
    "DICT": _dict,
    "TUPLE1": lambda machine: machine.stack.append(tuple(machine.last(1))),
    "TUPLE2": lambda machine: machine.stack.append(tuple(machine.last(2))),
    "TUPLE3": lambda machine: machine.stack.append(tuple(machine.last(3))),
    "APPEND": _appended,
    "APPENDS": lambda machine: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine: machine.update(machine.last(2)),
    "SETITEMS": lambda machine: machine.update(machine.since_mark()),
    "STACK_GLOBAL": lambda machine: machine.stack.append(_known(*machine.last(2))),
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}
