"""What a person reads when a run ends by a fault of the program or of the machine: a sentence, and a file to send."""

import errno
import os
import platform
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

from vmf_pretrain.config.resume import resume_command
from vmf_pretrain.launch import many_ranks, rank
from vmf_pretrain.storage.durable import replace_durably

LOST = ("Connection closed by peer", "Connection reset by peer", "Read error", "remote process exited", "Broken pipe")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # errors of the disk, which only a person can mend


def explained(error: BaseException, folder: Path | None) -> str:
    """A sentence on an unexpected error: what happened, what to change, how to go on.

    Args:
        error: what was raised.
        folder: of the run, if it is known; ``crash.txt`` is written there, or to a temporary folder if there is no run.

    Returns:
        The sentence; it names the file with the traceback.
    """
    begun = folder is not None and (folder / "config.yaml").is_file()
    go_on = resume_command(folder) if begun and folder is not None else None
    where = _written(error, folder if begun else None)
    details = f"the traceback is in {where}" if where else "its traceback could not be written"
    first_line = " ".join(str(error).split("\n")[0].split())
    if out_of_memory(error):
        less = "--train.accumulate 2 (or more) computes the batch in parts, --train.activation_checkpointing true keeps less"
        again = (
            f"go on with: {go_on} --train.accumulate 2"
            if go_on
            else "add one of them, or take a smaller head and backbone"
        )
        return f"memory ran out ({first_line}); {less}; {again}; {details}."
    if isinstance(error, OSError) and error.errno in DISK:
        at = "" if error.filename is None else f", at {error.filename}"
        again = f", and go on with: {go_on}" if go_on else ""
        return f"the disk refuses ({error.strerror}{at}); make room, or choose another folder{again}; {details}."
    if many_ranks() and any(word in str(error) for word in LOST):
        return (
            f"another rank has ended or cannot be reached ({first_line}); look for what it said. The run goes on from its last "
            f"checkpoint with --resume, or by itself under torchrun --max-restarts 1; {details}."
        )
    said = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    again = f"; the run goes on from its last checkpoint with: {go_on}" if go_on else ""
    return f"an unexpected error ended the run ({said}){again}; {details}."


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of the host's or the GPU's memory; torch's is known by name, so that torch is not imported."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def _written(error: BaseException, folder: Path | None) -> Path | None:
    """The file that holds the traceback, the command and the versions; None if it cannot be written."""
    lines = [
        f"command: {shlex.join(sys.argv)}\n",
        f"python {platform.python_version()} on {platform.platform()}, process {os.getpid()}, rank {rank()}\n",
        *traceback.format_exception(error),
    ]
    name = f"crash_rank{rank()}.txt" if many_ranks() else "crash.txt"
    try:
        path = Path(tempfile.mkdtemp(prefix="vmf-pretrain-")) / name if folder is None else folder / name
        replace_durably(path, "".join(lines).encode("utf-8", "backslashreplace"))
    except OSError:
        return None
    return path
