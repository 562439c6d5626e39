"""The state of a torch optimizer as flat tensors, and the way back: "<index>.<name>" for each parameter and entry.

An entry is a tensor as large as its parameter, a tensor of one number, or a Python number, whose type follows its name
("3.trust:float"). That is what Adam, AdamW, AMSGrad, SGD and RMSprop keep.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError

NUMBERS = {"bool": (bool, torch.bool), "int": (int, torch.int64), "float": (float, torch.float64)}


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every entry of the state by ``"<index>.<name>"``, where ``index`` counts the parameters of all groups.

    A parameter that has not been updated yet has no entry. Tensors are the optimizer's own, not copies.

    Raises:
        ValueError: an entry is neither a tensor as described above nor a number.
    """
    flat: dict[str, Tensor] = {}
    for index, (parameter, _) in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                flat.update([_entry(index, name, value)])
    faults = _faults([parameter for parameter, _ in _parameters(optimizer)], flat)
    if faults:
        raise ValueError(f"the state of {type(optimizer).__name__} cannot be saved: {'; '.join(faults)}")
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that ``flatten_optimizer`` returned, bit for bit; parameters without entries have no state then.

    Args:
        optimizer: with the same parameters.
        tensors: as ``flatten_optimizer`` returned them; whole tensors, or DTensors sharded as the parameters are.

    Raises:
        PretrainError: names, shapes or dtypes do not fit the optimizer's parameters; the error lists them, nothing changes.
    """
    parameters = _parameters(optimizer)
    _require_fit(parameters, tensors)
    states: dict[int, dict[str, Any]] = {}
    for full_name, tensor in tensors.items():
        index, name, number = _told_apart(full_name)
        parameter, group = parameters[index]
        value = NUMBERS[number][0](tensor.item()) if number else _as_kept(name, tensor, parameter, group)
        states.setdefault(index, {})[name] = value
    for place, (parameter, _) in enumerate(parameters):
        optimizer.state.pop(parameter, None)
        if place in states:
            optimizer.state[parameter] = states[place]


def optimizer_targets(optimizer: torch.optim.Optimizer, specs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Empty tensors to load the state into: each like its parameter (so sharded as it is), or of one number on the CPU.

    Args:
        optimizer: of the run that loads.
        specs: the checkpoint's tensors by name; the meta device will do.

    Raises:
        PretrainError: as ``restore_optimizer``.
    """
    parameters = _parameters(optimizer)
    _require_fit(parameters, specs)
    targets = {}
    for name, spec in specs.items():
        parameter, _ = parameters[_told_apart(name)[0]]
        alike = spec.shape == parameter.shape
        targets[name] = torch.empty_like(parameter, requires_grad=False) if alike else torch.empty((), dtype=spec.dtype)
    return targets


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Every parameter with its group, in the order of the optimizer's own state dict."""
    return [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]


def _told_apart(name: str) -> tuple[int, str, str]:
    """The parameter's index, the entry's name, and the type of a Python number or ""."""
    index, _, rest = name.partition(".")
    entry, _, number = rest.partition(":")
    return int(index), entry, number


def _entry(index: int, name: str, value: Any) -> tuple[str, Tensor]:
    if isinstance(value, Tensor):
        return f"{index}.{name}", value
    for number, (kind, dtype) in NUMBERS.items():
        if type(value) is kind:
            return f"{index}.{name}:{number}", torch.tensor(value, dtype=dtype)
    raise ValueError(f"{index}.{name} is a {type(value).__name__}; expected a tensor or a number")


def _as_kept(name: str, tensor: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A copy of ``tensor`` where torch's optimizers keep it."""
    if tensor.ndim == parameter.ndim:
        return torch.empty_like(parameter, requires_grad=False, dtype=tensor.dtype).copy_(tensor)
    # the step count is on the host unless the update itself reads it on the device
    on_device = name != "step" or group.get("capturable") or group.get("fused")
    return tensor.to(parameter.device if on_device else "cpu", copy=True)


def _require_fit(parameters: list[tuple[Tensor, dict[str, Any]]], tensors: Mapping[str, Tensor]) -> None:
    faults = _faults([parameter for parameter, _ in parameters], tensors)
    if faults:
        raise PretrainError(f"The checkpoint's optimizer state does not fit this model: {'; '.join(faults)}.")


def _faults(parameters: list[Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Why ``tensors`` cannot be the state of ``parameters``: one text per fault, which names the tensor."""
    faults = []
    entries: dict[str, dict[int, Tensor]] = {}  # by name, then by parameter
    for full_name, tensor in tensors.items():
        index, _, name = full_name.partition(".")
        if index.isdecimal() and int(index) < len(parameters) and name.partition(":")[2] in {"", *NUMBERS}:
            entries.setdefault(name, {})[int(index)] = tensor
        else:
            faults.append(f"{full_name} belongs to none of the {len(parameters)} parameters")
    updated = sorted({index for named in entries.values() for index in named})
    for name, named in entries.items():
        faults += [f"{place}.{name} is missing" for place in updated if place not in named]
        # what most optimizers keep once is known by its being so for some parameter with more than a number
        single = any(tensor.ndim == 0 and parameters[place].ndim > 0 for place, tensor in named.items())
        for place, got in named.items():
            shape = () if single else tuple(parameters[place].shape)
            dtype = got.dtype if single else parameters[place].dtype
            if tuple(got.shape) != shape or got.dtype != dtype:
                found = f"{got.dtype} of shape {tuple(got.shape)}"
                faults.append(f"{place}.{name} is {found} but must be {dtype} of shape {shape}")
    return faults
