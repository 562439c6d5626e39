"""The weights that a new run starts from, and what is said of them."""

import functools
from collections.abc import Callable
from pathlib import Path

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.start_from import StartFromConfig
from vmf_pretrain.data.network_input import NetworkInput, network_input
from vmf_pretrain.methods.method import Method
from vmf_pretrain.networks.loaded import begin_with
from vmf_pretrain.networks.published_names import Network, UnfitWeightsError, network_in
from vmf_pretrain.storage.named_tensors import Unread, opened, whole


def beginning(config: Config, say: Callable[[str], None]) -> Callable[[Method], None] | None:
    """What gives a method the weights that the configuration names, and says so; None if it names none."""
    return functools.partial(_begin, config, say) if config.start_from.weights is not None else None


def _begin(config: Config, say: Callable[[str], None], method: Method) -> None:
    chosen, trained = config.start_from, method.trained
    path, scale = _found(chosen, network_input(config))
    try:
        with opened(path) as tensors:
            found: Network[Unread] = network_in(tensors, chosen.network)
            parts = {
                part: {name: whole(value) for name, value in named.items()}
                for part, named in found.parts.items()
                if chosen.parts == "all" or part == "backbone"
            }
        loaded = begin_with(trained, parts, chosen)
    except UnfitWeightsError as error:
        raise PretrainError(f"start_from.weights {chosen.weights}: {error}.") from None
    loaded.left.extend([*(part for part in found.parts if part not in parts), *found.others])
    method.begin()
    of = f", network {found.name}" if found.name else ""
    say(f"Starts from {chosen.weights}{of}: {loaded.told()}.{scale}")


def _found(chosen: StartFromConfig, fed: NetworkInput) -> tuple[Path, str]:
    """The file or folder, and what is to be said of the scale of its network's input."""
    if chosen.hub_name is None:
        return Path(str(chosen.weights)), ""
    from vmf_pretrain.networks.hub import hub_weights  # the hub's client is slow to import

    weights = hub_weights(chosen.hub_name)
    if (weights.mean, weights.deviation) == (fed.mean, fed.deviation):
        return weights.path, ""
    expects = f"the mean {weights.mean} and deviation {weights.deviation}; here they are {fed.mean} and {fed.deviation}"
    return weights.path, f" Its own input had {expects}."
