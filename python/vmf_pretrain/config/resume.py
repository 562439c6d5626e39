"""Which settings a run may go on with changed: those that say where and how fast it is computed, not what."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import read_config
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.typed import shown

MAY_CHANGE: frozenset[str] = frozenset(
    {
        "data.folder",  # moved; that its images are the same is checked when the run goes on
        "data.max_bad_share",
        "data.start_method",
        "data.workers",
        "log.mlflow",
        "log.project",
        "log.tensorboard",
        "log.wandb",
        "train.accumulate",
        "train.activation_checkpointing",
        "train.checkpoint_every",
        "train.compile",
        "train.device",
        "train.keep_checkpoints",
        "train.log_every",
        "train.max_skipped",
        "train.parallel",
        "train.stop_on_collapse",
    }
)
# what --allow-changed permits beside: steps then mean something else than before
KINDS: dict[str, tuple[str, ...]] = {
    "batch": ("data.batch_size",),
    "data": ("data.cache", "data.dataset", "data.folder", "data.held_out", "data.kind"),
    "seed": ("seed",),
    "views": ("views.",),
}


def kinds_of(names: Iterable[str]) -> frozenset[str]:
    """The kinds of changes that a person permits.

    Raises:
        PretrainError: one is not a name of ``KINDS``.
    """
    kinds = frozenset(names)
    unknown = sorted(kinds - KINDS.keys())
    if unknown:
        raise PretrainError(f"--allow-changed {shown(unknown[0])} is not known; expected {', '.join(KINDS)}.")
    return kinds


def refuse_changes(before: Config, after: Config, allowed: frozenset[str]) -> None:
    """A resumed run differs from what it was only in what may change.

    Args:
        before: the run's settings.
        after: those it is to go on with.
        allowed: names of ``KINDS``.

    Raises:
        PretrainError: a field differs that may not; names it, and what would permit it.
    """
    permitted = tuple(name for kind in allowed for name in KINDS[kind])
    for name, (old, new) in differences(before, after).items():
        if name in MAY_CHANGE or name.startswith(permitted):
            continue
        kind = next((kind for kind, names in KINDS.items() if name.startswith(names)), None)
        hint = "start a new run for another" if kind is None else f"start a new run, or add --allow-changed {kind}"
        raise PretrainError(
            f"{name} is {shown(old)} in this run but {shown(new)} is given, which would change what it "
            f"computes; {hint}."
        )


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Both values of each setting that differs, by its dotted name."""
    old, new = flat(asdict(before)), flat(asdict(after))
    names = sorted(old.keys() | new.keys())
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def resume_command(folder: Path, now: Config | None = None) -> str:
    """What a person types to go on with a run.

    Args:
        folder: of the run.
        now: its settings, if some may be given to this start alone: those that the folder has otherwise are repeated.
    """
    words = ["vmf-pretrain", "fit", "--resume", "--out", str(folder)]
    changed = {} if now is None else differences(read_config(folder / "config.yaml"), now)
    for name, (_, value) in changed.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return result
