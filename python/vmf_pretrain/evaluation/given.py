"""The images that an evaluation is given: two splits, or all of a folder."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.tasks.data import DataTask
from vmf_pretrain.data.folder import FolderSource, labels_of
from vmf_pretrain.data.images import Found, Images, SomeImages, split
from vmf_pretrain.data.load import load_images
from vmf_pretrain.data.photos import Photos, everything

TRAIN = "train"
TESTS = ("val", "validation", "test")  # the first of these folders that there is


@dataclass(frozen=True, eq=False)
class Splits:
    """Images of a training and of a test split.

    Attributes:
        train: with labels, unless ``classes`` is empty.
        test: the same.
        classes: names by label; empty without labels.
        where: for people.
    """

    train: Images
    test: Images
    classes: Sequence[str]
    where: str


class Given:
    """What an evaluation is given to look at.

    Args:
        settings: which images.
        config: of the run that is evaluated, if it is one; its images are taken where ``settings`` name none.
        size: side of the square that the network sees, pixels.
        allow_code: whether the configuration may name a module to import.
    """

    def __init__(self, settings: DataTask, config: Config | None, size: int, *, allow_code: bool = False) -> None:
        self.settings, self.config, self.size, self.allow_code = settings, config, size, allow_code

    @property
    def folder(self) -> Path:
        """The folder of ``--data``, for tasks whose files lie in it in their own order.

        Raises:
            PretrainError: none was given.
        """
        if self.settings.folder is None:
            raise PretrainError("no images are given; expected --data FOLDER.")
        return Path(self.settings.folder)

    @functools.cached_property
    def splits(self) -> Splits:
        """Both splits, at most ``max_images`` of each.

        Raises:
            PretrainError: there are no images, or nothing can be held out.
        """
        if self.settings.folder is None:
            found = self._of_run()
        elif (self.folder / TRAIN).is_dir() and (test := self._test_folder()) is not None:
            found = self._of_folders(test)
        else:
            found = self._held_out()
        return Splits(self._some(found.train), self._some(found.test), found.classes, found.where)

    @property
    def labelled(self) -> Splits:
        """The same, with labels.

        Raises:
            PretrainError: there are none.
        """
        if not self.splits.classes:
            raise PretrainError(
                f"{self.splits.where} has no classes; expected a sub-folder for each class, at least two of them."
            )
        return self.splits

    @functools.cached_property
    def all(self) -> Images:
        """All images of the folder, without splits, at most ``max_images``; without a folder, a run's training images."""
        if self.settings.folder is None:
            return self._some(self._loaded[0])
        return self._some(self.below(self.folder))

    def below(self, folder: Path, setting: str = "data.folder") -> Photos:
        """All images below any folder, which a setting names, sorted by path, with the first sub-folder as class."""
        source = FolderSource(folder, setting=setting)
        return everything(source, source.labels()[0], self.size, None)

    def folders(self, names: Sequence[str]) -> tuple[list[Photos], Sequence[str]]:
        """The images of sub-folders of ``--data``, at most ``max_images`` of each, and the classes of all of them together.

        A class that is missing in one of them keeps its number. There are no classes if an image of any of them lies in no
        sub-folder, or all images in those of one name.
        """
        sources = [FolderSource(self.folder / name) for name in names]
        numbers, classes = labels_of([name for source in sources for name in source.classes])
        if numbers is None:
            return [self._some(everything(source, None, self.size, None)) for source in sources], ()
        labels = torch.split(numbers, [len(source.classes) for source in sources])
        photos = [everything(source, own, self.size, None) for source, own in zip(sources, labels, strict=True)]
        return [self._some(one) for one in photos], classes

    def _test_folder(self) -> Path | None:
        return next((self.folder / name for name in TESTS if (self.folder / name).is_dir()), None)

    @functools.cached_property
    def _loaded(self) -> tuple[Images, Images | None, Found]:
        """Training and held-out images of the run, and what was found."""
        if self.config is None:
            raise PretrainError("no images are given; expected --data FOLDER.")
        return load_images(self.config, allow_code=self.allow_code)

    def _of_run(self) -> Splits:
        train, test, found = self._loaded
        if test is None:
            raise PretrainError(
                f"the images of the run ({found.where}) have no classes; give others with --data FOLDER."
            )
        return Splits(train, test, found.classes, found.where)

    def _of_folders(self, test: Path) -> Splits:
        (train, kept), classes = self.folders([TRAIN, test.name])
        return Splits(train, kept, classes, str(self.folder))

    def _held_out(self) -> Splits:
        source = FolderSource(self.folder)
        labels, classes = source.labels()
        photos = everything(source, labels, self.size, None)
        if len(photos) < 2:
            raise PretrainError(f"{self.folder} holds 1 image; expected at least 2, to hold one out.")
        train, test = split(photos, min(len(photos) - 1, max(1, round(self.settings.held_out * len(photos)))))
        return Splits(train, test, classes, str(self.folder))

    def _some(self, images: SomeImages) -> SomeImages:
        """Evenly spread over all, because files are sorted by class."""
        most = self.settings.max_images
        if most is None or len(images) <= most:
            return images
        return images.subset(torch.arange(most) * len(images) // most)
