"""What the step numbers of a run mean, and what may change when it goes on from a checkpoint.

Step 1000 is the state after certain images were seen in certain views. If a run goes on there with other images or batches, it
skips some and sees others twice. So that is refused, unless allowed.
"""

import subprocess
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmf_kernels import __version__
from vmf_pretrain.config.errors import PretrainError

ALLOWABLE = {
    "data": "the images",
    "batch": "the global batch",
    "views": "the views of an image",
    "seed": "the seed, and with it the order of the images",
}
MOST_SHAPES = 5  # that a sentence lists
GIT_SECONDS = 5  # after which git is not waited for


@dataclass(frozen=True)
class Fingerprint:
    """What a run depends on, as plain values that JSON can hold.

    Attributes:
        images: of the training images: for example count, and a hash of sorted names and sizes.
        held_out: the same of the held-out images; None if there are none.
        batch: images in the global batch of an optimizer step: ranks and accumulation do not change it.
        views: the plan: how many views, how large, which masks.
        seed: of initialisation, order and augmentation.
        method: its name.
        optimizer: its name.
        network: shapes of the trained module's parameters, by name.
        code: version of this package, with the commit where it is a git checkout.
        torch: version.
    """

    images: Mapping[str, Any]
    held_out: Mapping[str, Any] | None
    batch: int
    views: Mapping[str, Any]
    seed: int
    method: str
    optimizer: str
    network: Mapping[str, list[int]]
    code: str
    torch: str

    @classmethod
    def of(cls, *, network: Mapping[str, Tensor], **facts: Any) -> "Fingerprint":
        """The fingerprint of this run in this installation; ``network`` is a state dict, the rest as above."""
        shapes = {name: list(tensor.shape) for name, tensor in network.items()}
        return cls(network=shapes, code=code_version(), torch=str(torch.__version__), **facts)

    def plain(self) -> dict[str, Any]:
        """For a checkpoint's state."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """Something that has changed.

    Attributes:
        kind: "data", "batch", "views" or "seed", which can be allowed; "method", "optimizer" or "network", which cannot;
            "code", which is only said.
        sentence: what it was and what it is.
    """

    kind: str
    sentence: str


def differences(before: Mapping[str, Any], now: Fingerprint) -> list[Difference]:
    """What differs between the fingerprint in a checkpoint (``plain()``, as JSON has it) and this run's.

    A field that the checkpoint lacks, as a later version may have added it, is not compared; nor is one inside of a field.
    """
    kinds = {"images": "data", "held_out": "data", "torch": "code"}
    found = []
    for name, value in _as_json(now.plain()).items():
        if name not in before or before[name] == value:
            continue
        kind, was = kinds.get(name, name), before[name]
        if name == "network":
            found.append(Difference(kind, f"The network has other shapes: {_shapes(was, value)}."))
        elif isinstance(value, dict) and isinstance(was, dict):
            found += [Difference(kind, f"{name}: {change}") for change in changes(was, _known(was, value))]
        else:
            found.append(Difference(kind, _changed(name, was, value)))
    return found


def require_resumable(
    before: Mapping[str, Any] | None, now: Fingerprint, *, step: int, steps: int, allowed: Collection[str] = ()
) -> list[str]:
    """What to tell the user before a run goes on from a checkpoint.

    Args:
        before: the fingerprint in the checkpoint's state, or None if it is from a version that wrote none.
        now: this run's.
        step: of the checkpoint.
        steps: that this run has in all.
        allowed: kinds of differences that the user allows (``--allow-changed``), of ``ALLOWABLE``.

    Raises:
        PretrainError: the step numbers would mean something else and that is not allowed, or the step is beyond the end, or the
            tensors cannot fit; the error says all of it.
    """
    unknown = sorted(set(allowed) - set(ALLOWABLE))
    if unknown:
        raise PretrainError(f"--allow-changed {unknown[0]} is unknown; expected some of {', '.join(ALLOWABLE)}.")
    said = (
        [] if before is not None else ["The checkpoint does not say which images and batches it counts; not compared."]
    )
    refused, kinds = [], []
    for difference in differences(before or {}, now):
        if difference.kind == "code" or difference.kind in allowed:
            said.append(difference.sentence)
        else:
            refused.append(difference.sentence.rstrip("."))
            kinds.append(difference.kind)
    if refused:
        raise PretrainError(f"The checkpoint is of another run: {'; '.join(refused)}. {_advice(kinds)}")
    if step > steps:
        raise PretrainError(
            f"The checkpoint is of step {step}, but this run has only {steps} steps; raise train.epochs, or start a new run."
        )
    return said


def config_changes(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """A sentence for every field that differs between the configuration in a checkpoint's state and this one.

    Args:
        before: nested plain values, or None if the checkpoint holds none.
        now: nested plain values.
    """
    return [] if before is None else changes(before, _as_json(now))


def changes(before: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> list[str]:
    """A sentence for every value that differs between two nested mappings of plain values."""
    found = []
    for name in [*now, *(name for name in before if name not in now)]:
        was, value = before.get(name), now.get(name)
        if was == value and (name in before) == (name in now):
            continue
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            found += changes(was, value, f"{section}{name}.")
        elif name not in before:
            found.append(f"{section}{name} is {value!r} and was not known before.")
        elif name not in now:
            found.append(f"{section}{name} was {was!r} and is no longer known.")
        else:
            found.append(_changed(f"{section}{name}", was, value))
    return found


def _known(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What of nested values was there before; the settings themselves are compared by ``config.resume``."""
    return {
        name: _known(before[name], value) if isinstance(value, Mapping) and isinstance(before[name], Mapping) else value
        for name, value in now.items()
        if name in before
    }


def code_version() -> str:
    """Version of the package, and the commit if this file belongs to a git checkout ("-dirty" if it is changed)."""
    here = Path(__file__)
    # a package may be installed inside a checkout of something else, so git is first asked whether it knows this file
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    commit = _git(here.parent, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if tracked else None
    return __version__ if commit is None else f"{__version__} at {commit}"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if there is no git or no such thing."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _advice(kinds: list[str]) -> str:
    fixed = [kind for kind in kinds if kind not in ALLOWABLE]
    if fixed:
        return "Set it back, or start a new run with another --out."
    named = sorted(set(kinds))
    meaning = " and ".join(ALLOWABLE[kind] for kind in named)
    flags = " ".join(f"--allow-changed {kind}" for kind in named)
    return f"Its step numbers count by {meaning}: set it back, or go on all the same with {flags}."


def _changed(name: str, was: Any, value: Any) -> str:
    if name == "names_and_sizes":
        return "some names or sizes of files have changed."
    return f"{name} was {was!r} and is {value!r}."


def _shapes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first names whose shapes differ."""
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    listed = [f"{name} was {was.get(name, 'absent')} and is {now.get(name, 'absent')}" for name in names[:MOST_SHAPES]]
    rest = len(names) - len(listed)
    return ", ".join(listed) + (f" and {rest} more" if rest else "")


def _as_json(value: Any) -> Any:
    """Plain values as they come back from JSON: tuples as lists, keys as texts."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value
