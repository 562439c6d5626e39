"""A Dataset of the user's own: only if it is allowed, and whatever it raises has a name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.pretrain.data.photo_files import colours, encoded
from tests.pretrain.tiny import batches_over, changed, one_sentence, photos_config
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.load import load_images
from vmf_pretrain.data.photos import Photos

pytestmark = pytest.mark.quick

HERE = __name__
ITEMS: dict[str, Any] = {
    "image": colours,
    "pair": lambda: (colours(), 3),
    "bytes": lambda: encoded(colours(), "PNG"),
    "array": lambda: np.asarray(colours()),
    "tensor": lambda: torch.from_numpy(np.asarray(colours()).copy()).permute(2, 0, 1),
}


class Few:
    """Items of one kind; number 1 cannot be read if ``broken``."""

    def __init__(self, kind: str = "image", count: int = 12, broken: bool = False, labelled: bool = False) -> None:
        self.kind, self.count, self.broken = kind, count, broken
        if labelled:
            self.targets = [number % 3 for number in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if self.broken and index == 1:
            raise ZeroDivisionError("of all things")
        return ITEMS[self.kind]() if self.kind in ITEMS else {"image": 1}

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a map-style Dataset is read by number")


def config_of(path: str = f"{HERE}:Few", **arguments: Any) -> Config:
    return changed(
        photos_config(Path("unused")), data={"kind": "dataset", "dataset": path, "dataset_arguments": arguments}
    )


def test_without_permission_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "marking.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PretrainError, match="--allow-code") as caught:
        load_images(config_of("marking:Few"))
    assert one_sentence(str(caught.value))
    assert not (tmp_path / "marker").exists(), "the module was imported"


@pytest.mark.parametrize("kind", ITEMS)
def test_items_of_every_kind_are_its_images(kind: str) -> None:
    train, held_out, _ = load_images(config_of(kind=kind), allow_code=True)
    expected = torch.from_numpy(np.asarray(colours()).copy()).permute(2, 0, 1)
    assert torch.equal(train.decode(3), expected)
    assert (len(train), held_out, train.name(3)) == (12, None, f"{HERE}:Few[3]")
    assert batches_over(train, config_of()).batch(0).views[0].shape == (8, 3, 32, 32)


def test_targets_are_classes() -> None:
    train, held_out, found = load_images(config_of(labelled=True), allow_code=True)
    assert held_out is not None
    assert held_out.labels is not None
    assert (len(train), len(held_out), list(found.classes)) == (9, 3, ["0", "1", "2"])
    assert isinstance(held_out, Photos)
    assert held_out.labels.tolist() == [number % 3 for number in held_out.indices.tolist()]


@pytest.mark.parametrize(
    ("arguments", "index", "said"),
    [({"broken": True}, 1, "ZeroDivisionError: of all things"), ({"kind": "dict"}, 0, "is dict; expected an image")],
)
def test_an_item_that_cannot_be_read_is_a_bad_image(arguments: dict[str, Any], index: int, said: str) -> None:
    train, _, _ = load_images(config_of(**arguments), allow_code=True)
    with pytest.raises(UnreadableImageError, match=said):
        train.decode(index)


@pytest.mark.parametrize(
    ("path", "arguments", "said"),
    [
        ("no_colon", {}, 'expected "module:attribute"'),
        ("no.such.module:Few", {}, "ModuleNotFoundError"),
        (f"{HERE}:Fewer", {}, "AttributeError"),
        (f"{HERE}:Few", {"colour": 1}, "unexpected keyword argument 'colour'"),
        (f"{HERE}:Few", {"count": 0}, "holds no image"),
    ],
)
def test_a_dataset_that_cannot_be_built_is_named(path: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PretrainError) as caught:
        load_images(config_of(path, **arguments), allow_code=True)
    assert said in str(caught.value)
    assert path in str(caught.value)
