"""The network that is evaluated: of a run, of a file of weights, or of timm."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import config_of, read_config
from vmf_pretrain.config.former import renewed
from vmf_pretrain.config.paths import expanded
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.start_from import HUB, StartFromConfig
from vmf_pretrain.config.typed import fitted
from vmf_pretrain.data.network_input import PHOTOGRAPHS, NetworkInput
from vmf_pretrain.methods.method import Method, Place
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks.loaded import begin_with
from vmf_pretrain.networks.published_names import MARK, Network, UnfitWeightsError, network_in
from vmf_pretrain.networks.published_shape import published_network
from vmf_pretrain.storage.named_tensors import Unread, opened, whole
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.tensor_file import read_header
from vmf_pretrain.storage.weights import FACTS, described_weights

WEIGHTS = ".safetensors"


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A network with frozen weights, and where it is from.

    Attributes:
        network: network inputs [B, C, H, W] to features [B, F], in evaluation mode.
        fed: the input it was trained on.
        name: for people.
        facts: the same as JSON holds it.
        fingerprint: SHA-256 of the weights, of the kind of network and of the scale of its input.
        config: of the run, if it is of one.
        method: of the run, with the weights of the exported module; the rest of it is as it was at the start of the run.
        run: the run's folder, if it is known.
    """

    network: nn.Module
    fed: NetworkInput
    name: str
    facts: Mapping[str, Any]
    fingerprint: str
    config: Config | None = None
    method: Method | None = None
    run: RunFolder | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device


def load_evaluated(
    wanted: str, *, device: torch.device, weights: str = "last", size: int | None = None, allow_code: bool = False
) -> Evaluated:
    """The network that a person names. Nothing in a file is run.

    Args:
        wanted: the folder of a run; a file of weights of ours, or of ``torch.save`` or safetensors as DINO, iBOT, DINOv2, MAE
            and I-JEPA publish them; ``timm:NAME``, with timm's published weights; or ``timm:NAME=FILE``, with those of a file.
        device: where it is to compute.
        weights: of a run: "last" or "best".
        size: side of the square that the network is to see, pixels; None takes that of its training.
        allow_code: whether the settings of a run may name a module to import.

    Raises:
        PretrainError: there is no such network, or its weights do not fit: one sentence that says what was expected.
    """
    if wanted.startswith(HUB):
        found = _of_timm(wanted.removeprefix(HUB))
    else:
        found = _of_path(expanded(wanted, "the network"), weights, allow_code)
    found.network.eval().requires_grad_(False).to(device)
    return found if size is None else replace(found, fed=replace(found.fed, size=size))


def _of_path(path: Path, weights: str, allow_code: bool) -> Evaluated:
    if (path / "config.yaml").is_file():
        run = RunFolder(path)
        return _of_file(run.weights / f"{weights}{WEIGHTS}", run, allow_code)
    if not path.is_file():
        raise PretrainError(
            f"{path} is nothing to evaluate; expected the folder of a run, a file of weights, timm:NAME, or timm:NAME=FILE "
            "with the weights of that network."
        )
    ours = path.suffix == WEIGHTS and (FACTS in read_header(path).metadata or path.with_suffix(".json").is_file())
    return _of_file(path, None, allow_code) if ours else _of_published(path)


def _of_file(path: Path, run: RunFolder | None, allow_code: bool) -> Evaluated:
    if run is not None and not path.is_file():
        raise PretrainError(
            f"run {run.path} has no {path.relative_to(run.path)} yet; there is one after its first save."
        )
    tensors, facts = described_weights(path)
    config = _config_of(facts, path)
    with torch.random.fork_rng(devices=[]):  # the initialisation, which the weights replace
        method = method_class(config, allow_code=allow_code)(config, Place(0, 1, config.train.epochs))
    _load(method.exported, tensors, path)
    fed = NetworkInput.from_facts(facts["input"])
    said = {"file": str(path), "method": config.method, "step": facts.get("step"), "network": "the evaluated backbone"}
    name = f"{path}, step {facts.get('step')} of {config.method}"
    print_ = fingerprint_of(method.evaluated, fed)
    return Evaluated(method.evaluated, fed, name, said, print_, config, method, run or _run_around(path))


def _config_of(facts: Mapping[str, Any], path: Path) -> Config:
    """The run's settings, from the weights, or from the run around them."""
    if isinstance(facts.get("config"), Mapping):
        return config_of(fitted(Config, renewed(facts["config"])))
    run = _run_around(path)
    if run is None:
        raise PretrainError(f"weights {path} do not hold the settings of their run; evaluate the run's folder instead.")
    return read_config(run.config)


def _run_around(path: Path) -> RunFolder | None:
    around = RunFolder(path.absolute().parent.parent)
    return around if around.config.is_file() else None


def _of_timm(wanted: str) -> Evaluated:
    name, _, file = wanted.partition("=")
    network = _timm_network(name, pretrained=not file)
    if file:
        _fill(network, expanded(file, "the file of weights"))
    told: dict[str, Any] = resolve_model_data_config(network)
    fed = NetworkInput(int(told["input_size"][-1]), tuple(told["mean"]), tuple(told["std"]))
    facts = {"timm": name, "file": file or None, "tag": network.pretrained_cfg.get("tag") or None}
    return Evaluated(network, fed, f"{HUB}{wanted}", facts, fingerprint_of(network, fed))


def _of_published(path: Path) -> Evaluated:
    """The network that a file holds, seen at the size of its positions, with the scale that all known sources have."""
    try:
        with opened(path) as tensors:
            found: Network[Unread] = network_in(tensors)
            backbone = {key: whole(tensor) for key, tensor in found.parts["backbone"].items()}
        network, kind = published_network(backbone)
        begin_with(nn.ModuleDict({"backbone": network}), {"backbone": backbone}, StartFromConfig(str(path)))
    except UnfitWeightsError as error:
        raise PretrainError(
            f"the weights in {path} are of no known network: {error.reason}; say which it is with {HUB}NAME=FILE."
        ) from None
    fed = NetworkInput(int(network.patch_embed.img_size[0]), *PHOTOGRAPHS)
    facts = {"file": str(path), "network": found.name or None, "kind": kind}
    named = f"{path}, {found.name}" if found.name else str(path)
    said = f"{named}, as {kind} that sees {fed.size} pixels"  # its number of heads is that of the kind
    return Evaluated(network, fed, said, facts, fingerprint_of(network, fed))


def _fill(network: Any, path: Path) -> None:
    """Give timm's network the weights in a file: by the names of a published transformer, or by timm's."""
    classifiers = network.pretrained_cfg.get("classifier") or ()
    ends = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    try:
        with opened(path) as tensors:
            kept = {
                key: tensor for key, tensor in tensors.items() if not key.startswith(ends)
            }  # no feature passes there
            if not any(key.endswith(MARK) for key in kept):
                _load(network, {key: whole(tensor) for key, tensor in kept.items()}, path)
                return
            found = {key: whole(tensor) for key, tensor in network_in(kept).parts["backbone"].items()}
        begin_with(nn.ModuleDict({"backbone": network}), {"backbone": found}, StartFromConfig(str(path)))
    except UnfitWeightsError as error:
        raise PretrainError(f"the weights in {path} are not those of its network: {error.reason}.") from None


def _timm_network(name: str, *, pretrained: bool) -> Any:
    """timm's network without its classifier; of any input size where it can be."""
    if ":" in name or not timm.is_model(name):
        raise PretrainError(f"timm knows no network {name}; expected a name of timm.list_models().")
    try:
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        except TypeError:  # a network without positions takes any size, and no such argument
            return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PretrainError(
            f"the weights of {HUB}{name} cannot be had ({reason}); without a network, give them as {HUB}{name}=FILE."
        ) from None


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise PretrainError(
            f"the weights in {path} are not those of its network: {' '.join(str(error).split())}"
        ) from None


def fingerprint_of(network: nn.Module, fed: NetworkInput) -> str:
    """SHA-256 of a network: its kind, every tensor, and the scale of its input; not the size of its input."""
    scale = {name: value for name, value in fed.facts().items() if name != "size"}
    digest = hashlib.sha256(json.dumps([type(network).__name__, scale], sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
