"""Checkpoints of training runs, read without running pickled code and loaded strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vmf_kernels.compat.tensor_file import Placeholder, UnreadTensor, open_entries

NETWORKS = ("teacher", "student")
# Entries that may hold the whole state of a run: fvcore's and lightning's. Without them the checkpoint itself is that state.
WHOLE = ("model", "state_dict")
# Names that torch.compile, FSDP and activation checkpointing put into keys. DDP's "module" is removed only at a key's start.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
MOST_NAMES = 12  # names of a checkpoint that an error lists
WHOLE_TENSORS = (
    "expected a whole tensor: save FSDP's FULL_STATE_DICT, or get_model_state_dict with full_state_dict=True; for DINOv2, the "
    "teacher_checkpoint.pth of an evaluation has the teacher's tensors"
)


def load_networks(
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    network: str,
    modules: Mapping[str, nn.Module | None],
    losses: Mapping[str, nn.Module | None],
) -> None:
    """Load parts of one network, and losses, strictly. If something is missing from the checkpoint, nothing is loaded.

    Args:
        checkpoint: its path, or its mapping of entries, already loaded. A network is an entry, or the keys that start with its
            name in the entry ``model`` or ``state_dict``, or in the checkpoint itself. Keys may contain the names of wrappers:
            ``module.`` (DDP), ``_orig_mod.`` (torch.compile), those of FSDP and of activation checkpointing.
        network: "teacher" or "student".
        modules: by the prefix of their keys in the network ("backbone.", "head."); None is skipped.
        losses: by the name of their entry; None is skipped.

    Raises:
        ValueError: ``network`` is unknown, ``torch.save`` did not write the file, a value is not a whole tensor, or the
            checkpoint lacks an entry or prefix; the text lists those that it has.
        OSError: the file cannot be opened; FileNotFoundError if it does not exist.
        RuntimeError: a tensor is missing, left over or of another shape (from ``load_state_dict``).
    """
    if network not in NETWORKS:
        raise ValueError(f"network is {network!r}; expected one of {', '.join(NETWORKS)}")
    with _opened(checkpoint, network) as entries:
        found = [
            (module, _of_module(_entry(entries, network), prefix, module, f"the {network} entry"))
            for prefix, module in modules.items()
            if module is not None
        ]
        found += [
            (loss, _of_module(_entry(entries, name), "", loss, f"the {name} entry"))
            for name, loss in losses.items()
            if loss is not None
        ]
    for module, state in found:
        module.load_state_dict(state)


def load_modules(checkpoint: str | PathLike[str] | Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Load modules by their names in the saved module, strictly. If one is missing, nothing is loaded.

    Args:
        checkpoint: its path, or its mapping, already loaded: a state dict, or entries with a state dict in ``state_dict``
            (lightning) or ``model``. Reading a file runs no pickled code. Keys may contain the names of wrappers, such as
            ``module.`` (DDP) and ``_orig_mod.`` (torch.compile).
        modules: by the attribute that held them, dotted if it is nested: {"teacher_head": head, "criterion": loss}.

    Raises:
        ValueError: ``torch.save`` did not write the file, a value is not a whole tensor, or no key starts with a name; the
            text lists the names that there are.
        OSError: the file cannot be opened; FileNotFoundError if it does not exist.
        RuntimeError: a tensor is missing, left over or of another shape (from ``load_state_dict``).

    Example:
        >>> saved, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> run = {"state_dict": {f"student_head.{key}": value for key, value in saved.state_dict().items()}}  # or a path
        >>> load_checkpoint(run, {"student_head": head})
        >>> torch.equal(head.weight, saved.weight)
        True
    """
    with _opened(checkpoint, "state_dict") as entries:
        state = next((entries[name] for name in WHOLE if isinstance(entries.get(name), Mapping)), entries)
        found = [(m, _of_module(state, f"{name}.", m, "the state dict")) for name, m in modules.items()]
    for module, of_module in found:
        module.load_state_dict(of_module)


@contextmanager
def _opened(checkpoint: str | PathLike[str] | Mapping[str, Any], expected: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(checkpoint, Mapping):
        yield checkpoint
        return
    with open_entries(checkpoint) as entries:
        if not isinstance(entries, Mapping):
            raise ValueError(f"checkpoint holds {_kind(entries)}; expected a mapping with the entry {expected!r}")
        yield entries


def _entry(entries: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The entry, or the values under its name in the state of the whole run."""
    if name in entries:
        entry = entries[name]
        if not isinstance(entry, Mapping):
            raise ValueError(f"checkpoint entry {name!r} is {_kind(entry)}; expected a mapping of names to tensors")
        return entry
    prefix = f"{name}."
    for state in (*(entries.get(whole) for whole in WHOLE), entries):
        if isinstance(state, Mapping):
            plain = ((_unwrapped(str(key)), value) for key, value in state.items())
            found = {key.removeprefix(prefix): value for key, value in plain if key.startswith(prefix)}
            if found:
                return found
    raise ValueError(f"checkpoint has the entries {_names(entries)}; expected {name!r} among them")


def _of_module(state: Mapping[str, Any], prefix: str, module: nn.Module, place: str) -> dict[str, Tensor]:
    """The tensors under the prefix, with the keys of ``module``."""
    own = {_unwrapped(key): key for key in module.state_dict()} if _is_wrapped(module) else {}
    found: dict[str, Tensor] = {}
    for full, value in state.items():
        key = _unwrapped(str(full))
        if key.startswith(prefix):
            name = _unwrapped(key.removeprefix(prefix))
            found[own.get(name, name)] = _tensor(value, str(full), place)
    if prefix and not found:
        raise ValueError(f"{place} has keys under {_names(state)}; expected some under {prefix!r}")
    return found


def _tensor(value: object, key: str, place: str) -> Tensor:
    shard = key.endswith("flat_param") or (isinstance(value, Placeholder) and ".distributed." in value.stands_for)
    if shard:
        raise ValueError(f"{place} has one rank's part of {key}; {WHOLE_TENSORS}")
    if isinstance(value, UnreadTensor):
        try:
            return value.read()
        except ValueError as error:
            raise ValueError(f"{place}, {key}: {error}") from None
    if not isinstance(value, Tensor):
        raise ValueError(f"{place} has {_kind(value)} under {key}; expected a tensor")
    return value


def _unwrapped(key: str) -> str:
    """The key without the names of wrappers."""
    names = [name for name in key.split(".") if name not in WRAPPERS]
    while len(names) > 1 and names[0] == "module":
        del names[0]
    return ".".join(names)


def _is_wrapped(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel) or any(
        not WRAPPERS.isdisjoint(name.split(".")) for name, _ in module.named_modules()
    )


def _names(state: Mapping[str, Any]) -> str:
    """The first parts of the keys, in order."""
    names = list(dict.fromkeys(_unwrapped(str(key)).split(".")[0] for key in state))
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def _kind(value: object) -> str:
    if isinstance(value, Placeholder):
        return value.stands_for
    return "Tensor" if isinstance(value, UnreadTensor) else type(value).__name__
