"""Weights that timm publishes: their file, from the cache of earlier downloads or from the network."""

from dataclasses import dataclass
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from vmf_pretrain.config.errors import PretrainError

FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are wanted


@dataclass(frozen=True)
class HubWeights:
    """Published weights.

    Attributes:
        path: of their file.
        mean: of each channel, which their network expects to be subtracted from pixels in [0, 1].
        deviation: of each channel, by which it expects the difference to be divided.
    """

    path: Path
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def hub_weights(name: str) -> HubWeights:
    """The weights of a timm model, such as "vit_small_patch14_reg4_dinov2.lvd142m".

    Raises:
        PretrainError: timm publishes none by that name, or it is not in the cache and there is no network.
    """
    try:
        published = timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        published = None
    if published is None or not published.hf_hub_id:
        raise PretrainError(
            f"start_from.weights timm:{name} is no model whose weights timm publishes; expected a name with its tag."
        )
    repository, files = published.hf_hub_id, (published.hf_hub_filename,) if published.hf_hub_filename else FILES
    lacking: Exception | None = None
    for file in files:
        try:
            path = Path(hf_hub_download(repository, file))
            return HubWeights(path, tuple(published.mean), tuple(published.std))
        except EntryNotFoundError as error:  # first, for those of a server and of a cache are OSErrors too
            lacking = error
        except OSError as error:
            lacking = error
            break
    said = " ".join(str(lacking).split()).partition(". ")[0].rstrip(".")
    raise PretrainError(
        f"start_from.weights timm:{name} is not in the cache and cannot be fetched ({said}); fetch {files[0]} of {repository} "
        "elsewhere and give its path as start_from.weights."
    )
