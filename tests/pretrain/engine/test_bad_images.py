"""Unreadable images are counted and listed once, and too many of them end a run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pretrain.tiny import one_sentence
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.batch import BadImage
from vmf_pretrain.engine.bad_images import SUPPOSED, BadImages
from vmf_pretrain.engine.votes import Counts, Taken

pytestmark = pytest.mark.quick


def taken(bad: int, step: int = 0) -> Taken:
    images = [BadImage(f"image {number}", "cut") for number in range(bad)]
    return Taken(step, Counts(bad_images=bad), [], images, {})


def test_list_has_a_line_for_each_image_and_the_count_goes_on() -> None:
    lines: list[dict[str, Any]] = []
    images = BadImages(lines.append, 0.5, 3)
    for step, bad in enumerate((1, 0, 2)):
        images.learn(taken(bad, step), 64 * (step + 1))
    assert images.count == 6
    assert [(line["name"], line["reason"], line["step"]) for line in lines] == [
        ("image 0", "cut", 0),
        ("image 0", "cut", 2),
        ("image 1", "cut", 2),
    ]


@pytest.mark.parametrize(
    ("share", "read", "allowed"), [(0.01, 100, 10), (0.01, 5 * SUPPOSED, 50), (0.0, 10**6, 0), (1.0, 64, 64)]
)
def test_limit_is_a_share_of_what_was_read(share: float, read: int, allowed: int) -> None:
    images = BadImages(lambda line: None, share, allowed)
    images.learn(taken(0), read)
    if share == 1.0:  # every image may be bad
        return
    with pytest.raises(PretrainError, match=r"data\.max_bad_share") as caught:
        images.learn(taken(12), read)
    message = str(caught.value)
    assert one_sentence(message), message
    assert "image 9 and 2 more" in message, message
