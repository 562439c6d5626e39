"""Files made to run code when they are read: nothing runs, nothing is imported, nothing of the process changes."""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compat.test_tensor_file import WEIGHT, Reduced, as_file, read
from vmf_kernels.compat.tensor_file import open_entries

pytestmark = pytest.mark.quick


class Armed:
    """Its ``__setstate__`` writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["target"].write_text("ran")


def attacks(target: Path) -> dict[str, bytes]:
    """Pickles that write ``target``, each by a way of its own."""
    command, code = f"echo ran > {target}", f"open({str(target)!r}, 'w')"
    text = command.encode()
    of_getattr = Reduced(getattr, (target, "touch"))
    return {
        "reduce eval": pickle.dumps(Reduced(eval, (code,)), protocol=2),
        "reduce exec": pickle.dumps(Reduced(exec, (code,)), protocol=4),
        "getattr": pickle.dumps(Reduced(functools.partial, (of_getattr,)), protocol=2)[:-1] + b")R.",
        "setstate": pickle.dumps(Armed(target), protocol=2),
        "reduce": b"cos\nsystem\n(V" + text + b"\ntR.",
        "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93(V" + text + b"\ntR.",
        "inst": b"(V" + text + b"\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nV" + text + b"\no.",
        "reduce a class": b"\x80\x02csubprocess\nPopen\n(V" + text + b"\nK\xffNNNNNI01\nI01\ntR.",
        "through a tensor": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN(V" + text + b"\ntNtR.",
        "through a list": b"(cos\nsystem\nl0(lp0\n0cos\nsystem\n(V" + text + b"\ntR.",
    }  # fmt: skip


@pytest.mark.parametrize("way", ["zip", "stream"])
@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_a_malicious_file_runs_nothing(attack: str, way: str, tmp_path: Path) -> None:
    target = tmp_path / "proof"
    program = attacks(target)[attack]
    with contextlib.suppress(ValueError), open_entries(as_file(program, tmp_path / "bad.pth", way)) as entries:
        str(entries)
    assert not target.exists(), "the file's code ran"
    with contextlib.suppress(Exception):
        process = pickle.loads(program)
        process.wait()
    assert target.exists(), "the negative control, an unguarded load, did not run it"


def test_a_file_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_a_file.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    program = b"cimported_by_a_file\nvalue\n."
    with open_entries(as_file(program, tmp_path / "file.pth", "zip")):
        assert "imported_by_a_file" not in sys.modules
    assert pickle.loads(program) == 1, "the negative control could not import it"


STATE = b"N}Vchanged\nI1\ns\x86b."  # sets the attribute "changed" of what comes before it


NAMES = (
    "torch._utils\n_rebuild_tensor_v2",
    "torch\nFloatStorage",
    "torch\nfloat32",
    "collections\nOrderedDict",
    "os\nsystem",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_changes_no_object_of_the_process(name: str, tmp_path: Path) -> None:
    with (
        contextlib.suppress(ValueError),
        open_entries(as_file(b"\x80\x02c" + name.encode() + b"\n" + STATE, tmp_path / "f", "zip")),
    ):
        pass
    torch.save({"weight": WEIGHT}, tmp_path / "good.pth")
    assert torch.equal(read(tmp_path / "good.pth"), WEIGHT)
    module, attribute = name.split("\n")
    assert not hasattr(getattr(sys.modules[module], attribute), "changed")
