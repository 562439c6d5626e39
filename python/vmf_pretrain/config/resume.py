"""Which settings a run may go on with changed: those that say where and how fast it is computed, not what."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from vmf_pretrain.config.errors import PretrainError
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
    old, new = flat(asdict(before)), flat(asdict(after))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name) or name in MAY_CHANGE or name.startswith(permitted):
            continue
        kind = next((kind for kind, names in KINDS.items() if name.startswith(names)), None)
        hint = "start a new run for another" if kind is None else f"start a new run, or add --allow-changed {kind}"
        raise PretrainError(
            f"{name} is {shown(old.get(name))} in this run but {shown(new.get(name))} is given, which would change what it "
            f"computes; {hint}."
        )


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return result
