"""Which files of the library, of the trainer and of vmf-bench have no function that the quick loop runs.

    python -m tests.quick_coverage

Runs ``pytest -m quick`` in this process and notes the file of every function that is entered. Exits 1 where a file that defines
functions has none that ran, unless ``ELSEWHERE`` says why.
"""

from __future__ import annotations

import ast
import inspect
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("vmf_kernels", "python/vmf_pretrain", "python/vmf_bench")
# files whose functions no Python of this process enters, and what the quick loop does about them
ELSEWHERE = {
    "vmf_kernels/backends/contract.py": "a protocol, whose methods have no body",
    "vmf_kernels/backends/stored/contract.py": "a protocol, whose methods have no body",
    "python/vmf_pretrain/data/plan.py": "a protocol, whose method has no body",
    "python/vmf_pretrain/engine/sharded.py": "of ranks, which are processes of their own: tests/pretrain/engine/test_ranks.py",
    "python/vmf_pretrain/storage/shard_writer.py": "of ranks: tests/pretrain/storage/test_sharded.py",
    "python/vmf_pretrain/storage/shards.py": "of ranks: tests/pretrain/storage/test_sharded.py",
    "python/vmf_pretrain/export/onnx_form.py": "torch's exporter takes ten seconds: tests/pretrain/export/test_onnx.py",
}


def files_with_functions() -> Iterator[str]:
    """Paths relative to the root."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            kinds = {type(node) for node in ast.walk(ast.parse(path.read_text()))}
            if kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda}:
                yield str(path.relative_to(ROOT))


class Entered:
    """Crosses off the files that functions come from; the bodies of modules and classes, which run on import, are none."""

    def __init__(self) -> None:
        self.missing = {str(ROOT / name): name for name in files_with_functions()}

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if code.co_flags & inspect.CO_OPTIMIZED:
            self.missing.pop(code.co_filename, None)


def main() -> int:
    """Run the quick loop; 1 if a file is not touched, or a test fails."""
    entered = Entered()
    threading.settrace(entered)
    sys.settrace(entered)
    code = pytest.main(["-m", "quick", "-q", "-p", "no:cacheprovider"])
    sys.settrace(None)
    missing = sorted(entered.missing.values())
    for name in missing:
        print(f"{name}: {ELSEWHERE.get(name, 'no function of it ran')}")
    print(f"{len(missing)} files of {len(list(files_with_functions()))} are not touched")
    return int(code != 0 or not set(missing) <= ELSEWHERE.keys())


if __name__ == "__main__":
    sys.exit(main())
