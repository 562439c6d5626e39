"""Python processes in which nothing may be unpickled, whoever starts them: the servers and workers of a data loader too.

A ``sitecustomize.py`` on PYTHONPATH is run by every interpreter that starts. An audit hook sees each class or function that any
pickle names, also in C. Only what the processes of one run say to each other is exempt, by the file that asks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUARD = """
import pickle, sys

LOG = {log!r}

def of_the_run(frame):
    # whether multiprocessing itself, Python's or torch's, reads what another process of the run has sent
    while frame.f_code.co_filename in (__file__, pickle.__file__):
        frame = frame.f_back
    return "/multiprocessing/" in frame.f_code.co_filename

def note(what):
    if not of_the_run(sys._getframe(1)):
        with open(LOG, "a") as file:
            file.write(what + "\\n")
        raise RuntimeError("unpickled: " + what)

def hear(event, arguments):
    if event == "pickle.find_class":
        note(".".join(map(str, arguments)))

sys.addaudithook(hear)

class Refused(pickle.Unpickler):
    def __init__(self, *arguments, **options):
        note("pickle.Unpickler")
        super().__init__(*arguments, **options)

def refusing(name, real):
    def call(*arguments, **options):
        note(name)
        return real(*arguments, **options)
    return call

for name in ("load", "loads"):
    setattr(pickle, name, refusing("pickle." + name, getattr(pickle, name)))
pickle.Unpickler = Refused
"""
POISON = """
import torch
def refuse(*arguments, **options):
    raise RuntimeError("torch.load")
torch.load = torch.save = refuse
"""


def run_guarded(folder: Path, program: str) -> tuple[int, str, list[str]]:
    """Run a program; its exit code, what it printed, and what was unpickled in it and in all that it started."""
    log = folder / "unpickled"
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD.format(log=str(log)))
    (folder / "program.py").write_text(program)
    path = os.pathsep.join([str(folder / "guard"), str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(folder / "program.py")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, log.read_text().splitlines() if log.exists() else []
