"""Soft labels of a frame's patches from those of earlier frames, without the matrix of all affinities.

Only the largest affinities of a patch have a weight, and only near places are looked at. So the frame is done in tiles, a tile
is multiplied with the source patches that it can reach, and the largest cosines are found before any exponential.

Legend: T source frames, H x W patches, F features, C labels (0 is the background), n patches of a tile, S x V the places in
its reach, k neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vmf_pretrain.evaluation.video.reach import Reach

# A tile of a reach of 12 has 72 x T x 30 x 36 affinities, 2.4 MiB for 8 frames, whatever the frame's size. Larger tiles
# multiply more in vain, smaller ones are slower per product: half and double are both slower on an AMD EPYC 7003.
TILE_ROWS, TILE_COLUMNS = 6, 12


@dataclass(frozen=True)
class Propagation:
    """Which earlier patches give a patch its labels, and with what weight.

    Attributes:
        neighbours: k, of all source frames together; others as near as the last one count too.
        temperature: of the softmax over their cosines.
        reach: how far away they may be.
    """

    neighbours: int
    temperature: float
    reach: Reach

    def labels(self, target_HWF: Tensor, sources_THWF: Tensor, labels_THWC: Tensor) -> Tensor:
        """[H, W, C] float32 soft labels of a frame.

        Args:
            target_HWF: features of the frame, of length 1, float32.
            sources_THWF: features of earlier frames, of length 1.
            labels_THWC: their soft labels, float32.

        Raises:
            ValueError: the shapes do not fit.
        Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, section 4.2.2, after
        Jabri et al., "Space-time correspondence as a contrastive random walk", NeurIPS 2020.
        """
        _check(target_HWF, sources_THWF, labels_THWC)
        height, width, _ = target_HWF.shape
        found = torch.empty(height, width, labels_THWC.shape[-1], device=labels_THWC.device)
        for columns, near_columns in spans(width, TILE_COLUMNS, self.reach.rows):
            sources = sources_THWF[:, :, near_columns].contiguous()  # [T, H, V, F], so that its rows are views
            labels = labels_THWC[:, :, near_columns]
            for rows, near_rows in spans(height, TILE_ROWS, self.reach.rows):
                near = self.reach.within(rows, columns, near_rows, near_columns).to(found.device)
                target = target_HWF[rows, columns].flatten(0, 1)
                cosines = target @ sources[:, near_rows].flatten(1, 2).transpose(1, 2)  # [T, n, S V]
                cosines = cosines.view(*cosines.shape[:2], *near.shape[1:]).masked_fill_(~near, -torch.inf)
                tile = self._weighed(cosines, labels[:, near_rows].flatten(0, 2))
                found[rows, columns] = tile.view(*found[rows, columns].shape)
        return found

    def _weighed(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """[n, C] of cosines [T, n, S, V] and labels [T S V, C]."""
        values, places = largest(cosines, self.neighbours + 1)
        kept = min(self.neighbours, values.shape[1])
        weights = ((values[:, :kept] - values[:, :1]) / self.temperature).exp()
        weights /= weights.sum(dim=1, keepdim=True)
        found = torch.einsum("nk,nkc->nc", weights, labels[places[:, :kept]])
        if values.shape[1] > kept:
            # as near as the last that counts, so that this one counts too, and perhaps more of them
            tied = ((values[:, kept] == values[:, kept - 1]) & values[:, kept].isfinite()).nonzero()[:, 0]
            found[tied] = self._with_ties(cosines[:, tied], values[tied, kept - 1], labels)
        return found

    def _with_ties(self, cosines: Tensor, smallest: Tensor, labels: Tensor) -> Tensor:
        """[n, C] where all cosines [T, n, S, V] from the smallest on count."""
        rows = cosines.transpose(0, 1).flatten(1)
        return (rows.masked_fill(rows < smallest[:, None], -torch.inf) / self.temperature).softmax(dim=1) @ labels


def spans(length: int, tile: int, reach: int) -> list[tuple[slice, slice]]:
    """Tiles of a side, and what each can reach."""
    starts = range(0, length, tile)
    return [
        (slice(at, min(at + tile, length)), slice(max(0, at - reach), min(at + tile + reach, length))) for at in starts
    ]


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[n, count] largest of values [T, n, S, V], descending, and their places among the T S V; fewer where there are no more.

    The largest values lie in the groups with the largest maxima; so those are chosen first, at the speed of a maximum.
    """
    frames, rows, height, width = values.shape
    maxima = values.amax(dim=3).transpose(0, 1).flatten(1)
    chosen = maxima.topk(min(count, frames * height), dim=1, sorted=False).indices
    among = values[chosen // height, torch.arange(rows, device=values.device)[:, None], chosen % height].flatten(1)
    found, at = among.topk(min(count, among.shape[1]), dim=1)
    return found, chosen.gather(1, at // width) * width + at % width


def _check(target_HWF: Tensor, sources_THWF: Tensor, labels_THWC: Tensor) -> None:
    if target_HWF.shape != sources_THWF.shape[1:] or sources_THWF.shape[:3] != labels_THWC.shape[:3]:
        raise ValueError(
            f"the frame has shape {tuple(target_HWF.shape)}, the sources {tuple(sources_THWF.shape)} and their labels "
            f"{tuple(labels_THWC.shape)}; expected [H, W, F], [T, H, W, F] and [T, H, W, C]"
        )
