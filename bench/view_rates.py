"""Images a second on one thread: from a JPEG to DINO's 2 + 8 views on the network's scale, ours and others'.

``python -m bench.view_rates [--repeats N]``, with OMP_NUM_THREADS=1. The photographs are scikit-learn's two of 427 x 640
pixels, and both enlarged to 12 megapixels. Every way draws DINO's published augmentation and ends in normalised float32:

- ours: ``vmf_pretrain.data``;
- lightly: its ``DINOTransform``, on PIL images, its only way;
- torchvision: plain v2 transforms, on PIL images and on uint8 tensors with channels last; its own row is the faster one.

Ways take turns, image by image, and processor time is counted, so that what else the machine does falls on all of them
and matters little. Medians.
"""

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from vmf_bench.machine import machine
from vmf_pretrain import with_torchvision  # noqa: F401 -- before torchvision or lightly is imported
from vmf_pretrain.config.views import PhotoViewConfig
from vmf_pretrain.data.decode import decode
from vmf_pretrain.data.network_input import PHOTOGRAPHS, NetworkInput
from vmf_pretrain.data.photo_views import least_pixels, photo_view
from vmf_pretrain.data.randomness import VIEW, generator_for

LARGE, SMALL, GLOBAL_VIEWS, LOCAL_VIEWS = 224, 96, 2, 8
SIDES = [LARGE] * GLOBAL_VIEWS + [SMALL] * LOCAL_VIEWS
ENLARGED = (4000, 3000)
QUALITY = 90
FED = NetworkInput(LARGE, *PHOTOGRAPHS)
Way = Callable[[bytes, int], object]


def jpegs(size: tuple[int, int] | None) -> list[bytes]:
    encoded = []
    for pixels in load_sample_images().images:
        image, file = Image.fromarray(pixels), io.BytesIO()
        (image if size is None else image.resize(size, Image.Resampling.BICUBIC)).save(file, "JPEG", quality=QUALITY)
        encoded.append(file.getvalue())
    return encoded


def views_of(image: torch.Tensor, index: int) -> list[torch.Tensor]:
    config = PhotoViewConfig()
    return [photo_view(image, v, side, config, generator_for(0, VIEW, 0, index, v)) for v, side in enumerate(SIDES)]


def ours(encoded: bytes, index: int) -> object:
    return [FED.of(view) for view in views_of(decode(encoded, least_pixels(PhotoViewConfig(), LARGE, SMALL)), index)]


def lightly() -> Way:
    from lightly.transforms import DINOTransform

    transform = DINOTransform(n_local_views=LOCAL_VIEWS, cj_strength=0.5)
    return lambda encoded, index: transform(Image.open(io.BytesIO(encoded)).convert("RGB"))


def torchvision(*, tensors: bool) -> Way:
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    def view(side: int, area: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
        jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
        return v2.Compose(
            [
                v2.RandomResizedCrop(side, area, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([jitter], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(*map(list, PHOTOGRAPHS)),
            ]
        )

    parts = [view(LARGE, (0.4, 1.0), 1.0, 0.0), view(LARGE, (0.4, 1.0), 0.1, 0.2)]
    parts += [view(SMALL, (0.05, 0.4), 0.5, 0.0)] * LOCAL_VIEWS

    def run(encoded: bytes, index: int) -> object:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        return [part(functional.pil_to_tensor(image) if tensors else image) for part in parts]

    return run


def milliseconds(ways: dict[str, Way], encoded: list[bytes], repeats: int) -> dict[str, float]:
    """Median of an image, the ways taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(-len(encoded), repeats):  # the first ones only warm up
        for name, way in ways.items():
            begun = time.process_time()
            way(encoded[index % len(encoded)], index % repeats)
            if index >= 0:
                taken[name].append(1e3 * (time.process_time() - begun))
    return {name: float(np.median(numbers)) for name, numbers in taken.items()}


def reduced_difference(encoded: list[bytes]) -> tuple[float, float]:
    """By how much views of an image decoded smaller differ from those of the whole, in bytes: mean, and worst view."""
    apart = []
    for index, data in enumerate(encoded * 4):
        small = decode(data, least_pixels(PhotoViewConfig(), LARGE, SMALL))
        pairs = zip(views_of(small, index), views_of(decode(data), index), strict=True)
        apart += [255 * (one - other).abs().mean().item() for one, other in pairs]
    return float(np.mean(apart)), max(apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40, help="images of each size for each way")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{machine()['cpu']}, torch {torch.__version__}, 1 thread, 2 + 8 views, median of {repeats} images\n")
    ways = {
        "ours": ours,
        "lightly": lightly(),
        "torchvision, PIL": torchvision(tensors=False),
        "torchvision, uint8": torchvision(tensors=True),
    }
    print("| photograph | way | ms an image | images a second | ours over it |\n|---|---|---|---|---|")
    for name, size in (("427 x 640", None), ("3000 x 4000", ENLARGED)):
        taken = milliseconds(ways, jpegs(size), repeats)
        for way, ms in taken.items():
            print(f"| {name} | {way} | {ms:.1f} | {1e3 / ms:.1f} | {ms / taken['ours']:.2f}x |")
    mean, largest = reduced_difference(jpegs(ENLARGED))
    print(
        f"\nViews of a JPEG decoded at a quarter of its size: {mean:.2f} of 255 apart on average, {largest:.2f} in the worst."
    )


if __name__ == "__main__":
    main()
