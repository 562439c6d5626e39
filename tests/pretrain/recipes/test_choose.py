"""The choice of a recipe: a table of machines and images, and that what is chosen can run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmf_pretrain.config.file import config_of, python_layer
from vmf_pretrain.config.method import METHODS
from vmf_pretrain.config.run import Config
from vmf_pretrain.recipes.choose import GIB, Asked, Choice, choose
from vmf_pretrain.recipes.machine import Machine, Photos
from vmf_pretrain.recipes.table import recipe_layer, recipe_of

pytestmark = pytest.mark.quick

LAPTOP = Machine("cpu", 8 * GIB, cores=4)
GPU = Machine("cuda", 24 * GIB, cores=16)
# machine, images, recipe, global batch, parts, epochs, global view
CHOICES = [
    (LAPTOP, Photos(500, 480), "small_photos", 64, 1, 108, 64),
    (LAPTOP, Photos(5_000, 480), "small_photos", 64, 1, 11, 64),
    (LAPTOP, Photos(5_000, 32), "small_photos", 64, 1, 11, 32),
    (LAPTOP, Photos(10, 480), "small_photos", 8, 1, 200, 64),
    (LAPTOP, Photos(2, None), "small_photos", 2, 1, 200, 64),
    (LAPTOP, Photos(10_000_000, 480), "small_photos", 64, 1, 2, 64),
    (replace(LAPTOP, cores=64), Photos(5_000, 480), "small_photos", 64, 1, 173, 64),
    (GPU, Photos(1_281_167, 375), "imagefolder_vits16", 64, 1, 100, 224),
    (GPU, Photos(60_000, 375), "imagefolder_vits16", 64, 1, 200, 224),
    (GPU, Photos(50_000, 32), "imagefolder_vits16", 64, 1, 200, 32),
    (GPU, Photos(5_000, 96), "imagefolder_vits16", 64, 1, 800, 64),
    (GPU, Photos(5_000, 128), "imagefolder_vits16", 64, 1, 800, 96),
    (GPU, Photos(40, 375), "imagefolder_vits16", 32, 1, 800, 224),
    (replace(GPU, memory=8 * GIB), Photos(1_281_167, 375), "imagefolder_vits16", 64, 2, 100, 224),
    (replace(GPU, memory=1 * GIB), Photos(1_281_167, 375), "imagefolder_vits16", 64, 64, 100, 224),
    (replace(GPU, memory=139 * GIB), Photos(1_281_167, 375), "imagefolder_vits16", 256, 1, 100, 224),
    (replace(GPU, ranks=8), Photos(1_281_167, 375), "imagefolder_vits16", 256, 1, 100, 224),
]


def settings_of(choice: Choice) -> Config:
    return config_of(recipe_layer(choice.recipe), python_layer({**choice.fields, "data.folder": "/photos"}))


@pytest.mark.parametrize(("machine", "photos", "recipe", "batch", "parts", "epochs", "side"), CHOICES)
def test_recipe_fits_the_machine_and_its_images(
    machine: Machine, photos: Photos, recipe: str, batch: int, parts: int, epochs: int, side: int
) -> None:
    choice = choose(machine, photos)
    config = settings_of(choice)
    found = (
        choice.recipe,
        config.data.batch_size,
        config.train.accumulate,
        config.train.epochs,
        config.views.global_size,
    )
    assert found == (recipe, batch, parts, epochs, side)
    assert config.views.global_size % config.backbone.patch_size == 0
    assert f"{photos.count:,} images" in choice.reason[0]
    assert f"{epochs} epochs" in choice.reason[1]
    assert not any("\n" in line for line in choice.reason)


# machine, shorter side, method, recipe
OWN = [
    (LAPTOP, 480, "mae", "small_mae"),
    (LAPTOP, 32, "ijepa", "small_ijepa"),
    (LAPTOP, 480, "ibot-vmf", "small_ibot"),
    (LAPTOP, 480, "dino", "small_photos"),
    (LAPTOP, 480, "own.module:Own", "small_photos"),
    (GPU, 375, "mae", "imagenette_mae"),
    (GPU, 96, "ijepa", "imagenette_ijepa"),
    (GPU, 32, "dinov2", "cifar_dinov2"),
    (GPU, 375, "dino-vmf", "imagefolder_vits16"),
]


@pytest.mark.parametrize(("machine", "side", "method", "recipe"), OWN)
def test_a_method_gets_its_own_recipe(machine: Machine, side: int, method: str, recipe: str) -> None:
    assert choose(machine, Photos(5_000, side), Asked(method=method)).recipe == recipe


@pytest.mark.parametrize("machine", [LAPTOP, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "vjepa"])
def test_what_is_chosen_for_a_method_are_settings_of_it(machine: Machine, method: str) -> None:
    for count, side in [(10, 32), (500, 96), (5_000, 480), (10**6, 375)]:
        choice = choose(machine, Photos(count, side), Asked(method=method))
        fields = python_layer({**choice.fields, "data.folder": "/photos", "method": method})
        config = config_of(recipe_layer(choice.recipe), fields)
        assert recipe_of(choice.recipe).config.method.split("-")[0] == method.split("-")[0]
        if method == "ijepa":  # blocks need every row and column of a small grid, and patches that stay
            assert config.blocks.edges == "fixed" or config.token_grid >= (14, 14)


def test_fast_methods_get_more_epochs_of_the_same_minutes() -> None:
    ours, mae = (settings_of(choose(LAPTOP, Photos(5_000, 480), Asked(method=name))) for name in ("dino-vmf", "mae"))
    assert mae.train.epochs > 5 * ours.train.epochs


@pytest.mark.parametrize("machine", [LAPTOP, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("epochs", [1, 2, 7, 1000])
def test_what_a_person_has_fixed_is_kept_and_the_rest_goes_with_it(machine: Machine, epochs: int) -> None:
    choice = choose(machine, Photos(5_000, 480), Asked(batch_size=48, epochs=epochs, view_size=80))
    config = settings_of(choice)
    assert (config.data.batch_size, config.train.epochs, config.views.global_size) == (48, epochs, 80)
    assert choice.reason[1].startswith(f"{epochs} epochs (")
    assert "batch 48, views of 80 pixels; " in choice.reason[1]
    assert config.optim.freeze_last_layer_epochs < epochs


def test_learning_rate_follows_the_batch() -> None:
    small, large = (settings_of(choose(GPU, Photos(10**6, 375), Asked(batch_size=size))) for size in (64, 256))
    assert small.optim.peak(64) == pytest.approx(0.0005 * 64 / 256)
    assert large.optim.peak(256) == pytest.approx(0.0005)


@pytest.mark.parametrize(("count", "momentum"), [(1_281_167, 0.9995), (5_000, 0.9995), (500, 0.996)])
def test_teacher_is_as_slow_as_the_run_has_steps_for(count: int, momentum: float) -> None:
    assert settings_of(choose(GPU, Photos(count, 375))).optim.teacher_momentum == momentum
