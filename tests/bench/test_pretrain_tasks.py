"""bench.pretrain_tasks: a command for every task, the pictures that they need, and a row of what one printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import task_pictures
from bench.pretrain_tables import tasks_table
from bench.pretrain_tasks import PLAN, Planned, evaluated
from tests.pretrain.evaluation.tasks_at_work import digits_run
from vmf_pretrain.config.file import python_layer
from vmf_pretrain.data.label_image import read_label_file
from vmf_pretrain.evaluation.tasks.table import TASKS
from vmf_pretrain.evaluation.video.davis import read_videos
from vmf_pretrain.start import Wish, settings

pytestmark = pytest.mark.quick


def test_every_task_has_a_command() -> None:
    assert sorted(one.task for one in PLAN) == sorted(TASKS)


def test_pictures_are_laid_out_as_the_tasks_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TRAIN": 2, "TEST": 1, "SCENES": {"train": 3, "val": 2}, "VIDEOS": 1, "FRAMES": 3}.items():
        monkeypatch.setattr(task_pictures, name, value)
    task_pictures.make(tmp_path / "made")
    assert len(list((tmp_path / "made/classes/train").glob("*/*.png"))) == 20
    (video,) = read_videos(tmp_path / "made/video")
    assert len(video.frames) == 3
    assert set(video.first_mask().ravel().tolist()) == {0, 1}
    masks = [read_label_file(path) for path in sorted((tmp_path / "made/masks/train/masks").iterdir())]
    assert [int(mask.max()) for mask in masks] == [1, 2, 3]
    given = python_layer({"data.folder": str(tmp_path / "made/classes/train")})
    assert settings(Wish(config=tmp_path / "made/recipe.yaml", fields=given), print).views.global_size == 48


def test_a_row_has_the_first_figures_of_the_task(tmp_path: Path) -> None:
    planned = Planned("neighbours", str(digits_run(tmp_path / "run")), "--data.max_images 20 --neighbours.queries 2")
    row = evaluated(planned, tmp_path / "out")
    assert row["printed"][0].startswith("images with a near-duplicate, cosine 0.99: ")
    assert "cosine to the nearest image: " in row["printed"][1]
    assert f"| neighbours | `{planned.command}` | images" in tasks_table({"rows": [row]})
