"""Networks whose parameters are shared out over ranks together."""

from torch import nn


class Unit(nn.Module):
    """Beside vision transformers and heads, what FSDP2 shards; its parameters are read in its own ``forward`` only."""
