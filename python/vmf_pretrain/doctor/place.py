"""Where a run would be written: room for its checkpoints, and what is there already."""

import shutil
from pathlib import Path

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.doctor.finding import Finding, fine, note, problem, size_text
from vmf_pretrain.storage.manifest import DamagedError, read_manifest
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.step_folders import newest_first

SUBJECT = "output folder"


def judge_run(folder: Path) -> Finding:
    """A folder that holds a run already: whether this version can go on with it."""
    checkpoints = newest_first(RunFolder(folder).checkpoints)
    if not checkpoints:
        return problem(SUBJECT, f"{folder} holds a run without a checkpoint", "choose another with --out")
    try:
        step = read_manifest(checkpoints[0]).step
    except PretrainError as error:  # of a newer version
        return problem(SUBJECT, str(error).rstrip("."))
    except DamagedError as error:
        words = f"the newest checkpoint, {checkpoints[0]}, is damaged ({error})"
        return note(SUBJECT, words, "vmf-pretrain fit --resume takes the one before, if that is whole")
    words = f"{folder} holds a run at step {step}, and a new one needs a folder of its own"
    return note(SUBJECT, words, "go on with --resume, or choose another with --out")


def judge_room(folder: Path, needed: int) -> Finding:
    """Whether checkpoints fit on the disk of a folder that may not exist yet.

    Args:
        folder: of the run.
        needed: bytes of all checkpoints that are on the disk at once, and of weights.
    """
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(above).free
    words = f"checkpoints and weights need {size_text(needed)}, and {size_text(free)} are free on the disk of {above}"
    if needed > free:
        return problem("disk", words, "make room, lower train.keep_checkpoints, or choose another disk with --out")
    return fine("disk", words)
