"""Colours and blurs of small views, as DINO's, on float32 planes in place of Pillow's bytes: the same to a rounding of bytes.

Legend: [3, S, S] float32 in [0, 1]. NumPy, because an operation on a view is so short that torch's dispatch is half of it.
"""

import math

import numpy as np
from numpy.typing import NDArray

Planes = NDArray[np.float32]

GRAY = (np.float32(0.299), np.float32(0.587), np.float32(0.114))  # ITU-R 601-2 luma, as Pillow has it
SOLARIZE_ABOVE = 0.5  # from byte 128, as Pillow has it
BLUR_PASSES = 3  # box blurs that Pillow takes for a Gaussian


def brightness(image: Planes, factor: float) -> Planes:
    """The image times ``factor``, in place."""
    image *= np.float32(factor)
    return np.clip(image, 0, 1, out=image)


def contrast(image: Planes, factor: float) -> Planes:
    """Blended with its mean gray, in place."""
    shade = np.float32(gray(image).mean())
    image *= np.float32(factor)
    image += np.float32((1 - factor) * shade)
    return np.clip(image, 0, 1, out=image)


def saturation(image: Planes, factor: float) -> Planes:
    """Blended with its gray, in place."""
    shade = gray(image)
    shade *= np.float32(1 - factor)
    image *= np.float32(factor)
    image += shade
    return np.clip(image, 0, 1, out=image)


def hue(image: Planes, turns: float) -> Planes:
    """Every pixel's hue moved by ``turns`` of the colour circle; its largest and smallest channel stay.

    With c the chroma and h the hue in sixths of a turn, channel n is ``max - c clip(2 - |(n + h) mod 6 - 2|, 0, 1)`` for
    n = 5, 3, 1. Here all of it is multiplied by c, so that no pixel is divided by its chroma.
    """
    red, green, blue = image
    largest = np.maximum(np.maximum(red, green), blue)
    chroma = largest - np.minimum(np.minimum(red, green), blue)
    twice = chroma * np.float32(2)
    # chroma times hue, between -chroma and 5 chroma
    of_blue = red - green
    of_blue += twice
    of_blue += twice
    of_green = blue - red
    of_green += twice
    angle = np.where(largest == red, green - blue, np.where(largest == green, of_green, of_blue))
    moved, away, other = np.empty_like(image), np.empty_like(chroma), np.empty_like(chroma)
    for channel, place in enumerate((5.0, 3.0, 1.0)):
        start = (place + 6 * turns) % 6
        # the distance to 2 on a circle of 6, for angles from -1 to 11
        for centre, distance in ((2, away), (8, other)):
            np.multiply(chroma, np.float32(start - centre), out=distance)
            distance += angle
            np.abs(distance, out=distance)
        np.minimum(away, other, out=away)
        np.subtract(twice, away, out=away)
        np.maximum(away, 0, out=away)
        np.minimum(away, chroma, out=away)
        np.subtract(largest, away, out=moved[channel])
    return moved


def gray(image: Planes) -> NDArray[np.float32]:
    """[S, S] luma."""
    shade: NDArray[np.float32] = image[0] * GRAY[0]
    shade += image[1] * GRAY[1]
    shade += image[2] * GRAY[2]
    return shade


def grayscale(image: Planes) -> Planes:
    """The luma in all channels, in place."""
    image[:] = gray(image)
    return image


def solarize(image: Planes) -> Planes:
    """Bright values inverted, in place."""
    np.subtract(1, image, out=image, where=image > SOLARIZE_ABOVE)
    return image


def blur(image: Planes, radius: float) -> Planes:
    """Blurred as by Pillow's ``GaussianBlur(radius)``, ``radius`` being the deviation in pixels.

    The three box blurs are one kernel. Beyond an edge its pixels repeat; Pillow repeats them anew in each pass, so the
    outermost six pixels differ: by at most 3 of 255 in smooth pictures, by up to 20 in noise.
    """
    kernel = blur_kernel(radius)
    return _convolved(_convolved(image, kernel, 1), kernel, 2)


def _convolved(image: Planes, kernel: list[float], axis: int) -> Planes:
    """The image convolved with the half of a symmetric kernel, its middle first."""
    reach, side = len(kernel) - 1, image.shape[axis]
    padded = np.empty([extent + 2 * reach * (place == axis) for place, extent in enumerate(image.shape)], np.float32)
    along = padded.swapaxes(1, axis)  # np.pad takes as long as the blur of a small view
    inside = image.swapaxes(1, axis)
    along[:, reach : reach + side] = inside
    along[:, :reach], along[:, reach + side :] = inside[:, :1], inside[:, -1:]

    def shifted(by: int) -> Planes:
        window = slice(reach + by, reach + by + side)
        return padded[:, window] if axis == 1 else padded[:, :, window]

    out = shifted(0) * np.float32(kernel[0])
    pair = np.empty_like(out)
    for distance in range(1, reach + 1):
        np.add(shifted(distance), shifted(-distance), out=pair)
        pair *= np.float32(kernel[distance])
        out += pair
    return out


def blur_kernel(radius: float) -> list[float]:
    """Half of the kernel of Pillow's GaussianBlur, its middle first: a box with soft edges, three times.

    Source: P. Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", 2011.
    """
    variance = radius**2 / BLUR_PASSES
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    soft = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    weight = 1 / (2 * (whole + soft) + 1)
    edge = (1 - (2 * whole + 1) * weight) / 2
    box = np.array([edge] + [weight] * (2 * whole + 1) + [edge])
    kernel = np.convolve(np.convolve(box, box), box)
    half: list[float] = kernel[len(kernel) // 2 :].tolist()
    return half
