"""What a compiled launch was made from, as a short digest: two launches with the same one compile to the same machine code.

It covers the code of the kernel and of every ``@triton.jit`` function that it calls, the values of the module-level constants
that these read, and what Triton specialises a launch by. Comments, docstrings, formatting and the module that something stands
in do not count; nor do the part and the version of Triton, which a report names once.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import json
import textwrap
from types import ModuleType
from typing import Any

import torch

from bench.ahead_of_time import Launch

DIGITS = 16  # hexadecimal: among a thousand launches two agree by chance once in 10^13
PLAIN = (bool, int, float, str, type(None))
MODULES = ("triton", "triton.language")  # that kernels may read, beside constants and functions of their own


def digest_of(launch: Launch) -> str:
    """Of one recorded launch."""
    return _hashed([code_digest(launch.kernel), key_of(launch)])[:DIGITS]


def key_of(launch: Launch) -> str:
    """What makes two launches the same kernel: constants, and of other arguments dtype and divisibility."""
    parameters = inspect.signature(launch.kernel.fn).parameters
    arguments = {
        name: f"{value!r}" if "constexpr" in str(parameters[name].annotation) else _kind(value)
        for name, value in launch.arguments.items()
    }
    return f"{launch.name} {arguments} {launch.options}"


@functools.cache
def code_digest(kernel: Any) -> str:
    """Of a Triton function with all that it calls and reads, whichever modules that stands in.

    Raises:
        TypeError: it reads something whose content is not known to be covered.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0]
    read = {name: kernel.fn.__globals__[name] for name in sorted(_names(tree)) if name in kernel.fn.__globals__}
    return _hashed([_code(tree), {name: _meaning(name, value) for name, value in read.items()}])


def _names(tree: ast.AST) -> set[str]:
    """Those that a function reads and does not set."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    own = {node.id for node in nodes if not isinstance(node.ctx, ast.Load)}
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return {node.id for node in nodes} - own - set(dir(builtins))


def _meaning(name: str, value: Any) -> str:
    """What stands behind a module-level name."""
    if hasattr(value, "fn"):  # compiled, or under the interpreter
        return f"function {code_digest(value)}"
    if isinstance(value, ModuleType) and value.__name__ in MODULES:
        return f"module {value.__name__}"
    value = getattr(value, "value", value)  # of a ``tl.constexpr``, whose repr is Triton's to change
    elements = value if isinstance(value, (tuple, list)) else [value]
    if all(isinstance(element, PLAIN) for element in elements):
        return f"constant {value!r}"
    raise TypeError(
        f"a kernel reads {name}, {value!r}: neither a constant nor a Triton function, so no digest covers it"
    )


def _code(node: Any) -> Any:
    """A syntax tree as nested lists, without docstrings and what is empty: some versions of Python have more such fields."""
    if isinstance(node, list):
        return [_code(element) for element in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    values = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        values["body"] = node.body[1:]
    return [type(node).__name__, *([name, _code(value)] for name, value in values.items() if value not in (None, []))]


def _kind(value: Any) -> str:
    """What Triton compiles for, of an argument whose value it does not know: a pointer, a number or a tensor descriptor."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}" if value.data_ptr() % 16 == 0 else f"{value.dtype} off 16 bytes"
    if hasattr(value, "block_shape"):
        return f"{value.base.dtype} {value.block_shape}"
    if isinstance(value, int) and not isinstance(value, bool):
        return "1" if value == 1 else "16 n" if value % 16 == 0 else "n"
    return type(value).__name__


def _hashed(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
