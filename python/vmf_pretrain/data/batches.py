"""Training batches as a pure function of the step: the seed determines the order of the images and every view.

So no state of a worker is saved: a run that starts at step n asks for batch n and gets the same batch as any other run,
and several ranks read the parts of the batch that one would read.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.bad_images import UnreadableImageError, first_names
from vmf_pretrain.data.batch import BadImage, Batch
from vmf_pretrain.data.bundled import Drawings
from vmf_pretrain.data.clips import Clips, clip_view
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.data.photo_views import least_pixels, photo_view
from vmf_pretrain.data.placed_views import placed_view
from vmf_pretrain.data.plan import Plan
from vmf_pretrain.data.randomness import CLIP, DATA_ORDER, MASK, REPLACEMENT, VIEW, generator_for, stream_seed

TRIES = 10  # images read for one place of a batch; at 1 % of bad images, ten in a row happen once in 10^20


@dataclass(frozen=True)
class ViewBatches(Dataset[Batch | PretrainError]):
    """Batch ``step`` of one rank: rows ``rank * b`` to ``(rank + 1) * b`` of the global batch, b = batch_size / ranks.

    Args:
        images: what is trained on.
        config: the run; its data.batch_size is that of the global batch.
        plan: views and masks of an image.
        rank: of this process.
        ranks: how many there are.

    Raises:
        PretrainError: the global batch is larger than the images or cannot be divided among the ranks.
    """

    images: Images
    config: Config
    plan: Plan
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        size = self.config.data.batch_size
        if self.steps_per_epoch == 0:
            raise PretrainError(
                f"data.batch_size is {size} but there are {len(self.images)} training images; a batch must not be larger."
            )
        if size % self.ranks:
            raise PretrainError(f"data.batch_size is {size} but must be a multiple of the {self.ranks} ranks.")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the images left over are not used in that epoch."""
        return len(self.images) // self.config.data.batch_size

    @property
    def rows(self) -> int:
        """Images of this rank in a step."""
        return self.config.data.batch_size // self.ranks

    @property
    def sides(self) -> list[int]:
        """The side of each view, pixels."""
        sizes = self.config.views
        return [sizes.global_size] * self.plan.global_views + [sizes.local_size] * self.plan.local_views

    @property
    def bytes(self) -> int:
        """Bytes of the views of a batch of this rank."""
        pixels = sum(side**2 for side in self.sides) * network_input(self.config).channels * math.prod(self._frames)
        return self.rows * pixels * torch.float32.itemsize

    def __len__(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs

    def __getitem__(self, step: int) -> Batch | PretrainError:
        """The batch, or the error that ends the run: one that is raised in a worker would arrive as a traceback."""
        try:
            return self.batch(step)
        except PretrainError as error:
            return error

    def batch(self, step: int) -> Batch:
        """This rank's batch of a step.

        Raises:
            PretrainError: TRIES images in a row cannot be read.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self.config.data.batch_size
        together = self.order(epoch)[place * size : (place + 1) * size].tolist()
        mine = slice(self.rank * self.rows, (self.rank + 1) * self.rows)
        pixels, indices, bad = self._pixels(epoch, together[mine])
        fed = network_input(self.config)
        return Batch([fed.of(view) for view in pixels], self._masks(epoch, together, mine), indices, bad)

    def order(self, epoch: int) -> Tensor:
        """[N] permutation of the images in an epoch."""
        return _order(len(self.images), self.config.seed, epoch)

    def views(self, epoch: int, indices: list[int]) -> list[Tensor]:
        """One network input [B, ..., C, side, side] per view; its row b depends only on (seed, epoch, indices[b], view)."""
        return [network_input(self.config).of(pixels) for pixels in self._pixels(epoch, indices)[0]]

    def _masks(self, epoch: int, together: list[int], mine: slice) -> dict[str, Tensor]:
        """The rows of this rank of the masks of the global batch."""
        if self.plan.masks is None:
            return {}
        seed = self.config.seed
        drawn = self.plan.masks.draw([generator_for(seed, MASK, epoch, index) for index in together])
        return {name: mask[mine].contiguous() for name, mask in drawn.items()}

    def _pixels(self, epoch: int, indices: list[int]) -> tuple[list[Tensor], list[int], list[BadImage]]:
        """The views as pixels in [0, 1], the images that they show, and those that could not be read.

        The noise of bundled images may leave that range.
        """
        if isinstance(self.images, Drawings):
            return self._drawn_pixels(self.images, epoch, indices), indices, []
        views = [torch.empty(len(indices), *self._frames, 3, side, side) for side in self.sides]
        shown: list[int] = []
        bad: list[BadImage] = []
        for row, index in enumerate(indices):
            image, found = self._readable(epoch, index, bad)
            shown.append(found)
            # a replacement gets the random numbers of its place, so that it is not seen twice alike
            for view, pixels in enumerate(views):
                stream = generator_for(self.config.seed, VIEW, epoch, index, view)
                pixels[row] = self._photo_view(image, view, stream)
        return views, shown, bad

    def _photo_view(self, image: Tensor, view: int, stream: torch.Generator) -> Tensor:
        chosen, count = self.config.views.photos, self.plan.global_views
        if isinstance(self.images, Clips):
            return clip_view(image, self.sides[view], chosen, stream)
        return photo_view(image, view, self.sides[view], chosen, stream, global_views=count)

    def _readable(self, epoch: int, index: int, bad: list[BadImage]) -> tuple[Tensor, int]:
        """An image and its number: ``index``, or a replacement that is a function of (seed, epoch, index, attempt)."""
        tried = []
        for attempt in range(TRIES):
            number = index if attempt == 0 else self._replacement(epoch, index, attempt)
            try:
                return self._decode(epoch, index, number), number
            except UnreadableImageError as error:
                tried.append(BadImage(self.images.name(number), str(error)))
                bad.append(tried[-1])
        raise PretrainError(
            f"{TRIES} images in a row cannot be read: {first_names([image.name for image in tried])}; "
            f"the first because {tried[0].reason}."
        )

    def _decode(self, epoch: int, index: int, number: int) -> Tensor:
        """Image ``number``; the clip of a video begins where the place of image ``index`` says."""
        if not isinstance(self.images, Clips):
            return self.images.decode(number, self._least_pixels)
        place = torch.rand((), generator=generator_for(self.config.seed, CLIP, epoch, index))
        return self.images.clip(number, float(place))

    @property
    def _frames(self) -> tuple[int, ...]:
        """(T,) of clips, () of images."""
        return (self.config.clips.frames,) if isinstance(self.images, Clips) else ()

    def _replacement(self, epoch: int, index: int, attempt: int) -> int:
        return stream_seed(self.config.seed, REPLACEMENT, epoch, index, attempt) % len(self.images)

    @property
    def _least_pixels(self) -> int:
        sizes = self.config.views
        return least_pixels(sizes.photos, sizes.global_size, sizes.local_size if self.plan.local_views else None)

    def _drawn_pixels(self, images: Drawings, epoch: int, indices: list[int]) -> list[Tensor]:
        placed, chosen = images.placed(indices), images.view_config(self.config.views)
        seed = self.config.seed
        return [
            placed_view(placed, seed=seed, epoch=epoch, indices=indices, view=view, side=side, config=chosen)
            for view, side in enumerate(self.sides)
        ]


@lru_cache(maxsize=2)  # a million images take 15 ms to permute, as long as one takes to prepare
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator_for(seed, DATA_ORDER, epoch))
