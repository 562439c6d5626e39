"""A network applied to a batch in parts, so that only one part's activations are in memory: gradient accumulation, exactly.

The features of all parts meet before the loss. So the loss, its centre, KoLeo and batch normalisation in the head see the
whole batch, which is not so if each part has a loss of its own. The price is a second forward pass of the network in the
backward pass, as in activation checkpointing.

Legend: V views, B images of this rank, R = V * B rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmf_pretrain.networks.stochastic_depth import depths_of, draw_depths


def in_parts(
    network: nn.Module,
    rows: Tensor,
    *,
    images: int,
    parts: int,
    call: Callable[[Tensor, slice], Tensor] | None = None,
) -> Tensor:
    """[R, ...] outputs of ``network`` for the rows [R, ...], computed for R / parts rows at a time.

    Args:
        network: each output row depends on its input row only (no batch normalisation); its stochastic depth is drawn here.
        rows: view-major.
        images: B.
        parts: 1 or more; 1 stores the activations of all rows.
        call: computes some of the rows, given them and their place among all; None calls the network with them.
    """
    depths = depths_of(network)
    drawn = draw_depths(depths, rows, images) if depths else []
    pieces = [piece for piece in torch.tensor_split(rows, parts) if len(piece)]
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))

    def run(part: int) -> Tensor:
        place = slice(starts[part], starts[part + 1])
        for depth, kept in zip(depths, drawn, strict=True):
            depth.kept = kept[place]
        try:
            output: Tensor = network(pieces[part]) if call is None else call(pieces[part], place)
        finally:
            for depth in depths:
                depth.kept = None
        return output

    if len(pieces) == 1:
        return run(0)
    if not torch.is_grad_enabled():
        return torch.cat([run(part) for part in range(len(pieces))])
    # nothing random is left to draw in a part, so no generator has to be saved
    again = [checkpoint(run, part, use_reentrant=False, preserve_rng_state=False) for part in range(len(pieces))]
    return torch.cat(again)
