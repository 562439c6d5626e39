"""Training views of labelled images: timm's augmentations, drawn for each image and epoch from a seed of its own.

Legend: N images, B of a part, C channels, S side of the network's input.
"""

import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.finetune import Protocol
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.data.randomness import DATA_ORDER, VIEW, generator_for, stream_seed
from vmf_pretrain.evaluation.finetuning.posterize import keep_black

SEED = 0
COLOURS = 3  # of the images that timm augments

Place = tuple[int, int]  # number of the view in all of the training, and place of the image


@contextlib.contextmanager
def drawing_from(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Python's, numpy's and torch's global generators, which timm draws from, at the start of a stream; restored at the end.

    Args:
        seed: of the stream.
        device: a GPU whose generator is one of them.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        start_stream(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def start_stream(seed: int) -> None:
    """The same generators at the start of another stream, inside ``drawing_from``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Views(Dataset[Tensor]):
    """[C, S, S] network inputs of augmented images, by the number of the view and the image's place.

    Args:
        images: readable ones.
        fed: the network's input.
        protocol: the augmentation.
    """

    def __init__(self, images: Images, fed: NetworkInput, protocol: Protocol) -> None:
        self.images, self.fed = images, fed
        colours = fed.mean if fed.channels == COLOURS else fed.mean * COLOURS
        crops, colouring, _ = create_transform(
            fed.size,
            is_training=True,
            auto_augment=protocol.augment,
            interpolation="bicubic",
            mean=colours,  # what a shifted image is filled up with
            separate=True,
        )
        keep_black(colouring.transforms)
        self.augment = (crops, colouring)
        self.erase = RandomErasing(protocol.erase, mode="pixel", device="cpu")

    def __getitem__(self, key: Place) -> Tensor:
        number, place = key
        try:
            pixels = self.images.decode(place)
        except UnreadableImageError as error:
            raise PretrainError(f"{self.images.name(place)} can no longer be read ({error}).") from None
        pixels = pixels if pixels.dtype == torch.uint8 else pixels.mul(255).round().to(torch.uint8)
        with drawing_from(stream_seed(SEED, VIEW, number)):
            picture = functional.to_pil_image(pixels.expand(COLOURS, -1, -1))
            for step in self.augment:
                picture = step(picture)
            inputs = self.fed.of(functional.pil_to_tensor(picture)[: self.fed.channels])
            erased: Tensor = self.erase(inputs)
        return erased


@dataclass(frozen=True)
class Course:
    """Which views make up each batch of a training.

    Attributes:
        count: N, of which what is left of whole batches is dropped in each epoch.
        size: images of a batch, at most N.
        protocol: epochs, repeated views, images of a part.
        done: epochs that are left out, as they were trained on before.
    """

    count: int
    size: int
    protocol: Protocol
    done: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return self.count // self.size

    def batches(self) -> Iterator[list[list[Place]]]:
        """The parts of each batch, an epoch at a time in memory. Every view has a number of its own."""
        part = self.protocol.part // 2 * 2  # images are mixed in pairs
        for epoch in range(self.done, self.protocol.epochs):
            order = order_of(self.count, self.protocol, epoch).tolist()
            for step in range(self.steps_per_epoch):
                places = [(epoch * self.count + n, order[n]) for n in range(step * self.size, (step + 1) * self.size)]
                yield [places[start : start + part] for start in range(0, self.size, part)]

    def __iter__(self) -> Iterator[list[Place]]:
        """All parts in order, as a loader takes them."""
        return itertools.chain.from_iterable(self.batches())


def order_of(count: int, protocol: Protocol, epoch: int) -> Tensor:
    """Places of the N images of an epoch, each ``repeats`` times in a row and so many images fewer."""
    numbers = generator_for(SEED, DATA_ORDER, epoch)
    return torch.randperm(count, generator=numbers).repeat_interleave(protocol.repeats)[:count]


def parts_of(views: Views, course: Course, workers: int) -> Iterator[Tensor]:
    """[B, C, S, S] of each part, in order, the same for any number of worker processes."""
    loader: DataLoader[Tensor] = DataLoader(views, batch_sampler=course, num_workers=workers)
    return iter(loader)
