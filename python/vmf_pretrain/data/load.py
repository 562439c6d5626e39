"""The images of a configuration, and what was found where they were looked for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vmf_pretrain.config.data import DataConfig
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.animals import ANIMAL_CLASSES, animals
from vmf_pretrain.data.bundled import DIGIT_CLASSES, digits
from vmf_pretrain.data.cache import ImageCache
from vmf_pretrain.data.clips import SUFFIXES, everything_in_clips
from vmf_pretrain.data.folder import FolderSource
from vmf_pretrain.data.images import Found, Images, split
from vmf_pretrain.data.photos import everything
from vmf_pretrain.data.shards import ShardSource
from vmf_pretrain.data.source import Source
from vmf_pretrain.data.user_dataset import UserSource

BUNDLED: dict[str, tuple[Callable[[], tuple[Images, Images]], Sequence[str]]] = {
    "digits": (digits, DIGIT_CLASSES),
    "animals": (animals, ANIMAL_CLASSES),
}


def load_images(config: Config, *, allow_code: bool = False) -> tuple[Images, Images | None, Found]:
    """Training and held-out images, and what was found; images are held out only if they have classes.

    Args:
        config: the run.
        allow_code: whether data.dataset may be imported and called.

    Raises:
        PretrainError: there are no images, or not where the configuration says.
    """
    train, held_out, found = _found(config, allow_code)
    facts = {**train.facts(), "held_out": None if held_out is None else held_out.facts()}
    return train, held_out, replace(found, facts=facts)


def _found(config: Config, allow_code: bool) -> tuple[Images, Images | None, Found]:
    if config.data.kind in BUNDLED:
        return _bundled(config.data.kind)
    return _videos(config) if config.data.kind == "videos" else _photos(config, allow_code)


def _bundled(kind: str) -> tuple[Images, Images | None, Found]:
    load, classes = BUNDLED[kind]
    train, held_out = load()
    count = len(train) + len(held_out)
    return train, held_out, Found(f"the bundled {kind}", count, classes, len(held_out))


def _photos(config: Config, allow_code: bool) -> tuple[Images, Images | None, Found]:
    source, where = source_of(config.data, allow_code)
    cache = None if config.data.cache is None else ImageCache(Path(config.data.cache), config.data.cache_side)
    labels, classes = source.labels()
    photos = everything(source, labels, config.views.global_size, cache)
    train: Images = photos
    held_out: Images | None = None
    if labels is not None:
        train, held_out = split(photos, _held_out(config, len(photos)))
    kept = 0 if held_out is None else len(held_out)
    return train, held_out, Found(where, len(photos), classes, kept, source.skipped, source.notes)


def _videos(config: Config) -> tuple[Images, Images | None, Found]:
    source = FolderSource(Path(str(config.data.folder)), SUFFIXES)
    labels, classes = source.labels()
    clips = everything_in_clips(source, labels, config.views.global_size, config.clips)
    train: Images = clips
    held_out: Images | None = None
    if labels is not None:
        train, held_out = split(clips, _held_out(config, len(clips)))
    kept = 0 if held_out is None else len(held_out)
    return train, held_out, Found(str(source.root), len(clips), classes, kept, source.skipped)


def _held_out(config: Config, count: int) -> int:
    return max(1, round(config.data.held_out * count))


def source_of(data: DataConfig, allow_code: bool) -> tuple[Source, str]:
    """The source of photographs, and its name for people.

    Raises:
        PretrainError: there are none, or not where the settings say.
    """
    if data.kind == "dataset":
        path = str(data.dataset)
        return UserSource(path, data.dataset_arguments, allow_code=allow_code), path
    folder = Path(str(data.folder))
    source = FolderSource(folder) if data.kind == "folder" else ShardSource(folder)
    return source, str(folder)
