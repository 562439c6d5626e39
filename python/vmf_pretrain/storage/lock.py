"""One process at a time in a run folder.

The lock is a file that names its holder. A holder that is killed leaves it behind; the next run sees that and takes it over.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.tolerant import warn

LOCK = ".lock"
CLAIM = f"{LOCK}-claim-"  # who wants to replace a dead holder's lock makes this file first, named after that lock
UNREADABLE_FOR = 2.0  # seconds after which a lock without a holder's name is no lock that is just being written
PAUSE = 0.05  # seconds between two looks at it
State = Literal["dead", "alive", "another machine", "in another container"]  # of the process that holds a lock
START_TIME = 19  # place of the start time among the fields of /proc/PID/stat that follow the command's name


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        pid: number of its process.
        host: the machine that it runs on.
        dead: whether that process is known to have ended.
        seen: whether this process can see whether it has: not on another machine or in another container.
    """

    pid: int
    host: str
    dead: bool
    seen: bool


def holder_of(folder: Path) -> Holder | None:
    """Who holds the lock of a run folder; None if nobody does, or the lock does not say."""
    holder = _read(folder / LOCK)
    if holder is None:
        return None
    state = _state(holder)
    return Holder(holder["pid"], str(holder["host"]), dead=state == "dead", seen=state in ("dead", "alive"))


class RunLock:
    """A held lock; ``take`` makes one, ``release`` or leaving the ``with`` block gives it up."""

    def __init__(self, path: Path, holder: dict[str, Any]) -> None:
        self.path = path
        self._holder = holder

    @classmethod
    def take(cls, folder: Path, say: Callable[[str], None] = warn) -> "RunLock":
        """Lock a run folder, which is made if it is missing, for this process. One process of a run takes it: rank 0.

        Args:
            folder: of the run.
            say: takes a sentence if the lock of a dead process was taken over.

        Raises:
            PretrainError: another process holds the lock, or perhaps does, or the folder cannot be written to.
        """
        path = folder / LOCK
        holder = {**_identity(os.getpid()), "token": uuid.uuid4().hex}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not _created(path, holder):
                other = _holder_of(path)
                if other is None:
                    continue  # it was given up just now
                _require_dead(other, path)
                if _taken_over(path, other, holder):
                    say(f"Took over the lock of {folder}: process {other['pid']}, which held it, has ended.")
                    break
        except OSError as error:
            raise PretrainError(f"run folder {folder} cannot be locked: {error.strerror or error}.") from None
        return cls(path, holder)

    def release(self) -> None:
        """Give the lock up. A child process, or one whose lock was taken over, changes nothing."""
        if os.getpid() == self._holder["pid"] and _read(self.path) == self._holder:
            with contextlib.suppress(OSError):  # a lock that stays behind is taken over by the next run, which says so
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _identity(pid: int) -> dict[str, Any]:
    """What tells this process from any other: also from one that gets its number later, or has it in another container."""
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "started": _started(pid),
        "boot": _text(Path("/proc/sys/kernel/random/boot_id")),
        "container": _link(Path("/proc/self/ns/pid")),
    }


def _created(path: Path, holder: dict[str, Any]) -> bool:
    """Make the file, unless it is there already."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(holder) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _holder_of(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; None if it is gone. Raises PretrainError if it does not say."""
    until = time.monotonic() + UNREADABLE_FOR
    while path.exists():
        holder = _read(path)
        if holder is not None:
            return holder
        if time.monotonic() > until:
            raise PretrainError(
                f"{path} does not say which process holds it; if no run is using the folder, remove that file."
            )
        time.sleep(PAUSE)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None
    if not isinstance(holder, dict) or not {"pid", "host", "token", "started"} <= set(holder):
        return None
    # the token becomes part of a file's name
    return holder if type(holder["pid"]) is int and str(holder["token"]).isalnum() else None


def _require_dead(other: dict[str, Any], path: Path) -> None:
    """Raise PretrainError unless the process that holds a lock is known to have ended."""
    state = _state(other)
    if state == "dead":
        return
    in_use = f"run folder {path.parent} is in use by process {other['pid']} on {other['host']}"
    if state == "alive":
        raise PretrainError(
            f"{in_use}; stop it first, or choose another folder with --out (if it has ended, remove {path})."
        )
    raise PretrainError(
        f"{in_use}, {state}, where this one cannot see whether it still runs; if it has ended, remove {path}."
    )


def _state(other: dict[str, Any]) -> State:
    """Whether the process that holds a lock runs, or why that cannot be seen from here."""
    mine = _identity(os.getpid())
    if other["host"] != mine["host"]:
        return "another machine"
    if other.get("boot") != mine["boot"]:
        return "dead"  # the machine has started anew since
    if other.get("container") != mine["container"]:
        return "in another container"
    # Windows has no way to ask that is in Python's library
    return "alive" if os.name == "nt" or _alive(other["pid"], other["started"]) else "dead"


def _alive(pid: int, started: str | None) -> bool:
    """Whether the process runs that had this number at that time."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs, for another user
    return started is None or _started(pid) == started


def _started(pid: int) -> str | None:
    """When a process started, in a unit of the system; None where it has ended or that cannot be known."""
    stat = _text(Path(f"/proc/{pid}/stat"))
    if stat is None:
        return None
    fields = stat.rpartition(")")[2].split()  # the command's name before it may hold anything
    return None if fields[0] in "ZX" else fields[START_TIME]  # a zombie has ended


def _taken_over(path: Path, dead: dict[str, Any], holder: dict[str, Any]) -> bool:
    """Put this process's lock in the place of a dead one's; False if another process was faster.

    Whoever has made the claim, whose name is that of the dead lock, is alone: it may look at the lock and then replace it.
    """
    claim = path.with_name(f"{CLAIM}{dead['token']}")
    if not _created(claim, holder):
        claimant = _holder_of(claim)
        if claimant is not None:
            _require_dead(claimant, claim)
            # not removed here: two processes that both do could then both believe to be alone
            raise PretrainError(
                f"process {claimant['pid']} ended while it took over {path}; remove {claim} and try again."
            )
        return False
    if _read(path) != dead:  # whoever had the claim before has replaced it
        claim.unlink(missing_ok=True)
        return False
    try:
        os.replace(claim, path)
    except OSError:
        claim.unlink(missing_ok=True)
        raise
    return True


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
