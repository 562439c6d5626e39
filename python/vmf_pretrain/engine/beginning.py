"""The weights that a new run starts from, and what is said of them."""

import functools
from collections.abc import Callable
from pathlib import Path

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.start_from import StartFromConfig
from vmf_pretrain.methods.method import Method
from vmf_pretrain.networks.loaded import begin_with
from vmf_pretrain.networks.published_names import Network, UnfitWeightsError, network_in
from vmf_pretrain.storage.named_tensors import Unread, opened, whole


def beginning(config: Config, say: Callable[[str], None]) -> Callable[[Method], None] | None:
    """What gives a method the weights that the configuration names, and says so; None if it names none."""
    return functools.partial(_begin, config.start_from, say) if config.start_from.weights is not None else None


def _begin(chosen: StartFromConfig, say: Callable[[str], None], method: Method) -> None:
    trained, source = method.trained, str(chosen.weights)
    try:
        with opened(_path(chosen)) as tensors:
            found: Network[Unread] = network_in(tensors, chosen.network)
            parts = {
                part: {name: whole(value) for name, value in named.items()}
                for part, named in found.parts.items()
                if chosen.parts == "all" or part == "backbone"
            }
        unread = [part for part in found.parts if part not in parts]
        loaded = begin_with(trained, parts, chosen)
    except UnfitWeightsError as error:
        raise PretrainError(f"start_from.weights {source}: {error}.") from None
    loaded.left.extend([*unread, *found.others])
    method.begin()
    of = f", network {found.name}" if found.name else ""
    say(f"Starts from {source}{of}: {loaded.told()}.")


def _path(chosen: StartFromConfig) -> Path:
    if chosen.hub_name is None:
        return Path(str(chosen.weights))
    from vmf_pretrain.networks.hub import hub_file  # the hub's client is slow to import

    return hub_file(chosen.hub_name)
