"""Random numbers as pure functions of a seed and of their use, so that no generator's state is ever saved.

Legend: a stream is named by a seed and a tuple of integers such as (epoch, index, view).
"""

import hashlib
import struct

import torch

# One number per use, so that two uses with the same integers never share a stream. Never renumber: it changes every run.
DATA_ORDER = 1
VIEW = 2
TRAINING_STEP = 3
PLACEMENT = 4
INITIALISATION = 5
JUDGED_ORDER = 6
MASK = 7
REPLACEMENT = 8
CLIP = 9


def stream_seed(seed: int, use: int, *place: int) -> int:
    """63-bit seed of the stream for ``use`` at ``place``: a hash, so that neighbouring places are unrelated."""
    words = (seed, use, *place)
    digest = hashlib.blake2b(struct.pack(f"<{len(words)}q", *words), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(seed: int, use: int, *place: int) -> torch.Generator:
    """A fresh CPU generator at the start of the stream for ``use`` at ``place``; the global generator is untouched."""
    return torch.Generator().manual_seed(stream_seed(seed, use, *place))
