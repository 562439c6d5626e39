"""Training batches as a pure function of the step: the seed determines the order of the images and every view.

So no state of a worker is saved: a run that starts at step n asks for batch n and gets the same batch as any other run.
"""

import signal
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.digit_views import digit_view
from vmf_pretrain.data.images import DigitImages, Images
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.data.photo_views import photo_view
from vmf_pretrain.data.plan import Plan
from vmf_pretrain.data.randomness import DATA_ORDER, VIEW, generator_for


@dataclass(frozen=True)
class ViewBatches(Dataset[Batch | PretrainError]):
    """Batch ``step`` is one tensor [B, C, side, side] for each view; the two global views come first."""

    images: Images
    config: Config
    plan: Plan
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise PretrainError(
                f"data.batch_size is {self.config.data.batch_size} but there are {len(self.images)} training images; "
                "a batch must not be larger."
            )
        if self.config.data.batch_size % self.ranks:
            raise PretrainError(
                f"data.batch_size is {self.config.data.batch_size} but there are {self.ranks} ranks; expected a multiple: it "
                "is the batch of all ranks together."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the images left over are not used in that epoch."""
        return len(self.images) // self.config.data.batch_size

    def __len__(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs

    def __getitem__(self, step: int) -> Batch | PretrainError:
        """The views, or the error of an unreadable image: an error raised in a worker would arrive as a traceback."""
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self.config.data.batch_size
        mine = size // self.ranks
        start = place * size + self.rank * mine
        indices = self.order(epoch)[start : start + mine].tolist()
        try:
            return Batch(self.views(epoch, indices), indices=indices)
        except PretrainError as error:
            return error

    def order(self, epoch: int) -> Tensor:
        """[N] permutation of the images in an epoch."""
        return torch.randperm(len(self.images), generator=generator_for(self.config.seed, DATA_ORDER, epoch))

    def views(self, epoch: int, indices: list[int]) -> list[Tensor]:
        """One network input [B, C, side, side] per view; its row b depends only on (seed, epoch, indices[b], view)."""
        return [network_input(self.config).of(pixels) for pixels in self._pixels(epoch, indices)]

    def _pixels(self, epoch: int, indices: list[int]) -> list[Tensor]:
        """The views as pixels in [0, 1]; the noise of digits may leave that range."""
        chosen, seed = self.config.views, self.config.seed
        sides = [chosen.global_size] * self.plan.global_views + [chosen.local_size] * self.plan.local_views
        if isinstance(self.images, DigitImages):
            digits = self.images.canvases[indices], self.images.middles[indices]
            return [
                digit_view(*digits, seed=seed, epoch=epoch, indices=indices, view=view, side=side, config=chosen.digits)
                for view, side in enumerate(sides)
            ]
        rows = []
        for index in indices:
            image = self.images.decode(index)
            streams = (generator_for(seed, VIEW, epoch, index, view) for view in range(len(sides)))
            drawn = zip(range(len(sides)), sides, streams, strict=True)
            rows.append([photo_view(image, view, side, chosen.photos, stream) for view, side, stream in drawn])
        return [torch.stack(views) for views in zip(*rows, strict=True)]


def _ignore_signals(worker: int) -> None:
    """Ctrl-C at a terminal reaches workers too; they ignore it, and the training process ends them when it is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def load_from(batches: ViewBatches, step: int) -> DataLoader[Batch | PretrainError]:
    """Loader of the batches from ``step`` to the end of the run, in order."""
    workers = batches.config.data.workers
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(step, len(batches)),
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
