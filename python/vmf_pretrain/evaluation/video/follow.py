"""Objects of a first frame followed through a video.

Legend: C objects and the background, H x W pixels, h x w patches, F features.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vmf_pretrain.evaluation.video.protocols import Protocol

PatchFeatures = Callable[[Tensor], Tensor]


def follow(
    frames: Iterable[Tensor], first_mask: NDArray[np.uint8], patches: PatchFeatures, patch: int, protocol: Protocol
) -> Iterator[NDArray[np.uint8]]:
    """Yields [H, W] uint8 numbers of objects for each frame, the first mask for the first.

    A frame is read, and its mask made, when it is asked for; of earlier ones the features of a few patches are kept.

    Args:
        frames: [3, H, W] uint8 each, of one size.
        first_mask: [H, W] numbers of objects, 0 for the background.
        patches: [3, height, width] pixels in [0, 1] to [h, w, F] features of the patches.
        patch: side of a patch, pixels.
        protocol: how.

    Raises:
        ValueError: a frame has another size than the mask.
    """
    height, width = first_mask.shape
    size = protocol.size(height, width, patch)
    labels = int(first_mask.max()) + 1
    small = torch.from_numpy(protocol.shrunk(first_mask, (size[0] // patch, size[1] // patch)).astype(np.int64))
    sources: deque[tuple[Tensor, Tensor]] = deque(maxlen=protocol.earlier)
    first: tuple[Tensor, Tensor] | None = None
    for frame in frames:
        if tuple(frame.shape[1:]) != (height, width):
            raise ValueError(
                f"a frame has {tuple(frame.shape[1:])} pixels; expected {first_mask.shape}, as its mask has"
            )
        features = functional.normalize(patches(protocol.resized(frame, size)).float(), dim=-1)
        if first is None:
            first = features, functional.one_hot(small, labels).to(features)
            yield first_mask
            continue
        near = [first, *sources]
        soft = protocol.propagation.labels(
            features, torch.stack([found for found, _ in near]), torch.stack([found for _, found in near])
        )
        sources.append((features, soft))
        yield protocol.enlarged(soft.permute(2, 0, 1), patch, (height, width))
