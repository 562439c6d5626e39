"""A run's training, with what is wanted afterwards: how it started and ended, and its page, also if it fails."""

import datetime
import os
import platform
import shlex
import signal
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.images import Found
from vmf_pretrain.engine.run import Run
from vmf_pretrain.engine.votes import AgreedError
from vmf_pretrain.networks import ranks
from vmf_pretrain.report.page.page import write_page
from vmf_pretrain.report.views import draw_views
from vmf_pretrain.storage.history import History, How

LIBRARIES = ("vmf_kernels", "torch", "torchvision", "timm", "numpy", "pillow")
OF_SIGNALS = 128  # exit codes above it
COMMAND = "vmf-pretrain"
MOST_TRACEBACK = 20_000  # letters that are kept, of its end


def trained(run: Run) -> int:
    """Train a run; its exit code. The first rank writes history.jsonl and, whatever ends the run, report.html.

    Raises:
        What ``Run.train`` raises, and nothing else.
    """
    try:
        return _trained(run)
    except AgreedError:
        # torchrun ends all ranks as soon as one has failed: not before the first has written its summary and its page
        ranks.from_first("")
        raise


def _trained(run: Run) -> int:
    if not run.first:
        return run.train()
    history = History(run.folder, run.tolerant)
    history.started(run.step, _facts(run))
    try:
        code = run.train()
    except KeyboardInterrupt:
        _end(run, history, "stopped", "by KeyboardInterrupt")
        raise
    except BaseException as error:
        _end(run, history, "failed", _reason(error), traceback=_traceback(error))
        raise
    if code > OF_SIGNALS:
        _end(run, history, "stopped", f"by {signal.Signals(code - OF_SIGNALS).name}")
    else:
        _end(run, history, "finished", "")
    return code


def _end(run: Run, history: History, how: How, reason: str, *, traceback: str = "") -> None:
    history.ended(run.step, how, reason, _now(), traceback=traceback)
    path = run.folder.report
    try:
        views = run.folder.plots / "views.png"
        if not views.is_file():
            draw_views(run.batches, views)
        write_page([run.folder.path], path)
    except Exception as error:  # a page that cannot be written must hide neither the end of a run nor its error
        again = f"{COMMAND} report {shlex.quote(str(run.folder.path))} tries again"
        _say(run, f"{path} could not be written ({_reason(error)}); {again}.")
    else:
        _say(run, f"Report: {path}")


def _facts(run: Run) -> dict[str, Any]:
    """When, how and on what the run starts, and on which images."""
    found = run.found
    return {
        "time": _now(),
        "command": _command(),
        "folder": str(Path.cwd()),
        "device": _device(run.loop.device),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ranks": ranks.count(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "images": _images(found),
    }


def _images(found: Found) -> dict[str, Any]:
    return {
        "where": found.where,
        "images": found.images,
        "classes": len(found.classes),
        "held_out": found.held_out,
        "skipped": dict(found.skipped),
        "notes": list(found.notes),
    }


def _command() -> str:
    """What was typed, without the place of the program."""
    program, *arguments = sys.argv
    known = Path(program).name.startswith(COMMAND) or Path(program).parent.name == "vmf_pretrain"
    return shlex.join([COMMAND if known else program, *arguments])


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _reason(error: BaseException) -> str:
    """An error in a line; one of ours is a sentence already."""
    said = " ".join(str(error).split())
    return said if isinstance(error, PretrainError) else f"{type(error).__name__}: {said}"


def _traceback(error: BaseException) -> str:
    """Where an error of the program or the machine was raised; nothing of one that a person can correct."""
    return "" if isinstance(error, PretrainError) else "".join(traceback.format_exception(error))[-MOST_TRACEBACK:]


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _say(run: Run, text: str) -> None:
    run.console.print(text, soft_wrap=True, highlight=False, markup=False)
