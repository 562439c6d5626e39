"""A network's input has one scale in training, evaluation and plots, for every kind of data, set in one place."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import vmf_pretrain
from tests.pretrain.tiny import (
    a_run,
    animals_config,
    batch_of,
    batches_over,
    digits_config,
    few_digits,
    photos_config,
    save_ramps,
)
from vmf_pretrain.config.data import DataConfig
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.views import GLOBAL_VIEWS
from vmf_pretrain.data.load import load_images
from vmf_pretrain.data.network_input import SCALES, NetworkInput, network_input
from vmf_pretrain.evaluation.judge import Judge

KINDS = ("digits", "animals", "folder")  # shards and a Dataset of the user's own are fed as a folder is
PHOTOS = NetworkInput(32, *SCALES["folder"])
PACKAGE = Path(str(vmf_pretrain.__file__)).parent
EXCEPT = {
    "data/network_input.py",
    "config/data.py",  # the settings that replace a scale
    *("engine/beginning.py", "networks/hub.py"),  # compare it with that of published weights
    *("export/card.py", "export/timm_form.py", "export/transformers_form.py"),  # say it in the words of other libraries
    *("networks/batch_norm.py", "evaluation/whitening.py"),  # the mean of features
}
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() not in EXCEPT)
SCALE_NAMES = ("mean", "deviation", "std")
OF_FIGURES = ("deviation", "std")  # in evaluations, where a mean is one of figures or features
MOVED = 1000.0  # further than any scale moves a pixel
# Views that show all of an image: what is left of the augmentation changes neither mean nor deviation by much.
MILD: dict[str, dict[str, Any]] = {
    "animals": {},  # what is evaluated is in the sizes of the views
    "digits": {"digits": replace(digits_config().views.digits, global_zoom=(1.0, 1.0))},
    "folder": {
        "photos": replace(digits_config().views.photos, global_area=(0.9, 1.0), jitter=0.0, solarize=0.0, grayscale=0.0)
    },
}


def config_of(kind: str, folder: Path, **sections: Any) -> Config:
    """Runs of one kind of data, on images with something to see."""
    if kind != "folder":
        return (digits_config if kind == "digits" else animals_config)(**sections)
    for name in ("cats", "dogs"):
        save_ramps(folder / name, 12)
    return photos_config(folder, **sections)


@pytest.mark.quick
def test_every_kind_of_data_has_a_scale_of_its_own_channels() -> None:
    assert {kind: len(mean) for kind, (mean, _) in SCALES.items()} == {
        "digits": 1,
        "animals": 1,
        "folder": 3,
        "shards": 3,
        "videos": 3,
        "dataset": 3,
    }
    assert set(SCALES) == set(get_args(get_type_hints(DataConfig)["kind"]))


# The scale


@pytest.mark.quick
def test_pixels_come_back_from_what_was_made_of_them() -> None:
    pixels = torch.rand(2, 3, 5, 4)
    error = (PHOTOS.pixels(PHOTOS.of(pixels)) - pixels).abs().max().item()
    assert error < 1e-6, f"off by {error:.1e}"


@pytest.mark.quick
def test_each_channel_has_its_own_mean_and_deviation() -> None:
    pixels = torch.rand(2, 3, 5, 4)
    for channel, (mean, deviation) in enumerate(zip(PHOTOS.mean, PHOTOS.deviation, strict=True)):
        expected = (pixels[:, channel] - mean) / deviation
        assert torch.equal(PHOTOS.of(pixels)[:, channel], expected), f"channel {channel}"


@pytest.mark.quick
def test_bytes_are_read_as_shares_of_255_and_left_alone() -> None:
    decoded = torch.randint(256, (3, 5, 4), dtype=torch.uint8)
    before = decoded.clone()
    assert torch.equal(PHOTOS.of(decoded), PHOTOS.of(decoded / 255))
    assert torch.equal(decoded, before)


@pytest.mark.quick
def test_ink_is_fed_as_it_is_to_the_bit() -> None:
    ink = torch.randn(3, 1, 16, 16)
    assert torch.equal(network_input(digits_config()).of(ink), ink)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(1, 8, 8), (8, 8), (3, 8)])
def test_images_of_other_channels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, PretrainError), match=r"expected \[\.\.\., 3, H, W\]|trained on 3"):
        PHOTOS.of(torch.zeros(shape))


@pytest.mark.quick
def test_facts_come_back_from_json_as_they_were() -> None:
    assert NetworkInput.from_facts(json.loads(json.dumps(PHOTOS.facts()))) == PHOTOS


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean": None}, "input lacks mean"),
        ({"channels": 1}, "input.channels is 1 but input.mean has 3"),
        ({"deviation": [1.0]}, "3 channels and input.deviation 1"),
        ({"deviation": [0.2, 0.0, 0.2]}, "input.deviation is 0.0"),
        ({"size": 0}, "input.size is 0"),
    ],
)
def test_facts_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    facts = {name: value for name, value in {**PHOTOS.facts(), **changes}.items() if value is not None}
    with pytest.raises(PretrainError) as caught:
        NetworkInput.from_facts(facts)
    assert said in str(caught.value)


# The same in training and judging


def moments(images: Tensor) -> Tensor:
    """[2, C] mean and deviation of each channel."""
    return torch.stack([images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3))])


def training_and_judged(kind: str, folder: Path) -> tuple[Tensor, Tensor, NetworkInput]:
    """What the network is fed in global views of every training image, and when it is judged."""
    config = config_of(kind, folder, views=MILD[kind], evaluate={"max_images": 10_000})
    train, held_out, _ = load_images(config)
    train = train.subset(torch.arange(0, len(train), 1 + len(train) // 2000))  # every fourth animal is enough
    views = batches_over(train, config).views(0, list(range(len(train))))[:GLOBAL_VIEWS]
    return torch.cat(views), Judge(train, held_out, config).inputs(train, range(len(train))), network_input(config)


def apart(trained: Tensor, judged: Tensor) -> float:
    """Largest difference of a channel's mean or deviation, in deviations of the training views."""
    return ((moments(trained) - moments(judged)).abs() / moments(trained)[1]).max().item()


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_judged_inputs_have_the_statistics_of_training_views(kind: str, tmp_path: Path) -> None:
    trained, judged, fed = training_and_judged(kind, tmp_path)
    found = apart(trained, judged)
    assert found < 0.2, f"{kind}: mean or deviation is {found:.2f} deviations off"
    assert judged.shape[1:] == (fed.channels, fed.size, fed.size)
    # the controls: the fault that this is about, where it makes a difference, and its reverse where it does not
    unlike = fed.pixels(judged) if fed.deviation != (1.0,) else (judged - 0.2) / 0.4
    assert apart(trained, unlike) > 0.4, (
        f"{kind}: another scale is {apart(trained, unlike):.2f} off: this shows nothing"
    )


class SeenInputs:
    """The least value of each tensor that reaches a vision transformer, wherever it is called from."""

    def __init__(self) -> None:
        self.least: list[float] = []

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, VisionTransformer):
            self.least.append(arguments[0].min().item())


@pytest.mark.parametrize("kind", ["digits", "folder"])  # animals take the way of digits
def test_nothing_reaches_a_network_in_a_whole_run_but_through_the_one_way(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = NetworkInput.of
    monkeypatch.setattr(NetworkInput, "of", lambda self, pixels: original(self, pixels) + MOVED)
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)  # of what networks gave
    few_digits(monkeypatch)
    seen = SeenInputs()
    hook = register_module_forward_pre_hook(seen)
    try:
        a_run(config_of(kind, tmp_path / "photos", data={"batch_size": 16}, train={"epochs": 1}), tmp_path / "run")[
            0
        ].train()
    finally:
        hook.remove()
    assert len(seen.least) > 5, f"{len(seen.least)} calls"
    assert min(seen.least) > MOVED / 2, f"an input as low as {min(seen.least):.2f} came another way"


@pytest.mark.quick
def test_views_are_the_same_pixels_on_the_networks_scale(tmp_path: Path) -> None:
    config = config_of("folder", tmp_path)
    batches = batches_over(load_images(config)[0], config)
    shown = [network_input(config).pixels(view) for view in batch_of(batches, 0).views]
    assert all(view.min() > -1e-5 and view.max() < 1 + 1e-5 for view in shown), [view.aminmax() for view in shown]
    assert max(view.max().item() for view in shown) > 0.7


# Made in one place


def scalings(source: str, scale: tuple[str, ...] = SCALE_NAMES) -> list[str]:
    """What in a module's source scales images or knows a scale, calls of ``mean`` and ``std`` on a tensor left out."""
    tree = ast.parse(source)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    numbers = {value for scale in SCALES["folder"] for value in scale}
    of_images = "torchvision" in source
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in numbers:
            found.append(str(node.value))
        if isinstance(node, ast.Attribute):
            known = node.attr.lower() in scale and id(node) not in called
            found += [node.attr] if known or (of_images and node.attr.lower() == "normalize") else []
        names = (getattr(node, name, None) for name in ("id", "arg"))
        found += [name for name in names if isinstance(name, str) and name.lower() in scale]
        if isinstance(node, ast.alias) and node.name.split(".")[-1] in ("Normalize", "SCALES"):
            found.append(node.name)
    return found


@pytest.mark.quick
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_scales_images(path: Path) -> None:
    scale = OF_FIGURES if path.is_relative_to(PACKAGE / "evaluation") else SCALE_NAMES
    assert scalings(path.read_text(), scale) == [], f"{path.name}; only network_input.py may"


@pytest.mark.quick
@pytest.mark.parametrize(
    "source",
    [
        "from torchvision.transforms.v2 import functional\nfunctional.normalize(image, a, b)",
        "from torchvision.transforms.v2 import Normalize",
        "scaled = (image - fed.mean) / other",
        "DEVIATION = 1",
        "inputs = (pixels - 0.485) / a",
        "scale(image, mean=a)",
        "from vmf_pretrain.network_input import SCALES",
    ],
)
def test_every_way_of_scaling_is_found(source: str) -> None:
    assert scalings(source), "not found"


@pytest.mark.quick
def test_means_of_tensors_are_not_mistaken_for_scales() -> None:
    assert scalings("from torch.nn import functional\nfunctional.normalize(rows.mean(dim=0) / rows.std())") == []


@pytest.mark.quick
def test_settings_give_a_scale_of_their_own(tmp_path: Path) -> None:
    given = digits_config(data={"mean": (0.25,), "deviation": (0.5,)})
    pixels = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(network_input(given).of(pixels), (pixels - 0.25) / 0.5)
    assert network_input(digits_config(data={"mean": (0.25,)})).deviation == SCALES["digits"][1]
    for name, wrong, words in [
        ("mean", (0.1, 0.2, 0.3), "data.mean is .* expected 1 numbers"),
        ("deviation", (), "data.deviation is .* expected 1 numbers"),
        ("deviation", (0.0,), "data.deviation"),
    ]:
        with pytest.raises(PretrainError, match=words):
            digits_config(data={name: wrong})
