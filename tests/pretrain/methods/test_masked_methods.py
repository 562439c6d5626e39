"""MAE, I-JEPA and V-JEPA compute what the published trainers do, train, and go on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretrain.engine.stopping import state_of, stopped_at, untimed
from tests.pretrain.methods.masked_runs import METHODS, masked_config, save_videos
from tests.pretrain.methods.plain import Weights, jepa_loss, mae_loss, positions_of
from tests.pretrain.tiny import FEW, a_run, batch_of, changed, config_in, copied, differing, few_digits
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.load import load_images
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.methods.method import Place
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks.positions import COLUMN_FIRST, grid_positions
from vmf_pretrain.networks.published_names import network_in
from vmf_pretrain.report.figures import draw_plots, sample_pictures
from vmf_pretrain.storage.metrics import read_metrics

IMAGES = 3
FP64 = {"precision": "fp64", "epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_videos(tmp_path_factory.mktemp("videos"))


def a_loop(config: Config) -> tuple[Loop, ViewBatches]:
    method = method_class(config)
    batches = ViewBatches(load_images(config)[0], config, method.plan(config))
    return Loop(config, method, batches.steps_per_epoch, torch.device("cpu")), batches


def fp64_loop(name: str, videos: Path, **sections: Any) -> tuple[Loop, list[Batch]]:
    """A run in fp64 before its first step, and its batches of a few images."""
    config = masked_config(name, videos, data={"batch_size": IMAGES}, train=FP64, optim={"clip": 0.0}, **sections)
    loop, batches = a_loop(config)
    return loop, [batch_of(batches, step) for step in range(min(3, len(batches)))]


def leaves(module: torch.nn.Module) -> Weights:
    return {name: value.detach().clone().requires_grad_() for name, value in module.state_dict().items()}


def plain_loss(loop: Loop, batch: Batch) -> tuple[Tensor, Weights]:
    """The published loss of a batch, and the trained parameters that it is a function of."""
    method, inputs = loop.method, batch.views[0].double()
    config, patch = loop.config, loop.config.backbone.patch_size
    if config.method == "mae":
        w = leaves(method.get_submodule("autoencoder"))
        heads, normed = (2, config.decoder.heads), config.decoder.norm_pixels
        return mae_loss(w, inputs, batch.masks["kept"], patch=patch, heads=heads, norm_pixels=normed), w
    w = leaves(method.get_submodule("student"))
    teacher = copied(method.get_submodule("teacher").state_dict())
    return jepa_loss(w, teacher, inputs, batch.masks, patch=patch, heads=(2, 2)), w


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("mae", {}),
    "mae, pixels as they are": ("mae", {"decoder": {"norm_pixels": False, "width": 16, "depth": 1, "heads": 4}}),
    "ijepa": ("ijepa", {}),
    "vjepa": ("vjepa", {}),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_three_steps_are_the_published_formula(name: str, videos: Path) -> None:
    """Losses to 1e-10 and gradients of every trained parameter to 1e-8, at weights that have moved too."""
    method, sections = SETTINGS[name]
    loop, batches = fp64_loop(method, videos, **sections)
    trained = loop.method.get_submodule("autoencoder" if method == "mae" else "student")
    for step, batch in enumerate(batches):
        loss, weights = plain_loss(loop, batch)
        before = None if method == "mae" else copied(loop.method.get_submodule("teacher").state_dict())
        loss.backward()
        with torch.no_grad():
            exact = loop.method(batch.to(torch.device("cpu"), torch.float64), loop.place(step))["loss"]
        off = (exact - loss).abs().item()
        assert off < 1e-10, f"step {step}: the loss {loss.item():.6f} is {off:.1e} off"
        loop.step(step, batch)
        for key, parameter in trained.named_parameters():
            if parameter.requires_grad:
                expected, found = weights[key].grad, parameter.grad
                assert expected is not None
                assert found is not None, f"{key} has no gradient"
                assert (found - expected).abs().max().item() < 1e-8, f"step {step}, {key}"
        if before is not None:
            share = 0.1 * (1 - step / loop.start.steps)  # momentum from 0.9 to 1 in a straight line
            leader = copied(trained.get_submodule("backbone").state_dict())
            for key, value in loop.method.get_submodule("teacher").state_dict().items():
                expected = (1 - share) * before[key] + share * leader[key]
                assert (value - expected).abs().max().item() < 1e-12, f"step {step}: average of {key}"


@pytest.mark.parametrize("method", METHODS)
def test_parts_change_nothing(method: str, videos: Path) -> None:
    """Also with stochastic depth, which is drawn for the whole batch."""
    depth = {"backbone": {"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "drop_path": 0.5}}
    gradients = []
    for parts in (1, 3):
        config = masked_config(
            method, videos, data={"batch_size": IMAGES}, train={**FP64, "accumulate": parts}, **depth
        )
        loop, batches = a_loop(config)
        loop.step(0, batch_of(batches, 0))
        gradients.append({name: p.grad for name, p in loop.method.named_parameters() if p.grad is not None})
    whole, parted = gradients
    assert whole.keys() == parted.keys()
    worst = max((whole[name] - parted[name]).abs().max().item() for name in whole)
    assert worst < 1e-12, f"a gradient is {worst:.1e} off"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("grid", "width", "order"),
    [((3, 4), 16, COLUMN_FIRST), ((14, 14), 768, COLUMN_FIRST), ((2, 3, 4), 16, (0, 1, 2)), ((5,), 8, (0,))],
)
def test_positions_are_the_published_ones(grid: tuple[int, ...], width: int, order: tuple[int, ...]) -> None:
    off = (grid_positions(grid, width, order) - positions_of(grid, width, order)).abs().max().item()
    assert off < 1e-7, f"off by {off:.1e}"  # the rounding of fp32
    if len(grid) == 2:  # the first half tells the column
        table = grid_positions(grid, width, order).view(*grid, width)
        assert torch.equal(table[0, :, : width // 2], table[-1, :, : width // 2])
        assert not torch.equal(table[0], table[-1])


def rate(step: int, *, steps: int, warm_up: int, numbers: tuple[float, float, float], ahead: int) -> float:
    """A learning rate as MAE (ahead 0) and the JEPAs (1) define it: from, to, and at the end."""
    first, peak, last = numbers
    place = step + ahead
    if place < warm_up:
        return first + (peak - first) * place / warm_up
    cosine = float(torch.cos(torch.tensor((place - warm_up) / (steps - warm_up) * torch.pi, dtype=torch.float64)))
    return last + (peak - last) * (1 + cosine) / 2


@pytest.mark.parametrize(("method", "ahead", "stretch"), [("mae", 0, 1.0), ("ijepa", 1, 1.0), ("ijepa", 1, 1.25)])
def test_schedules_count_as_published(method: str, ahead: int, stretch: float) -> None:
    numbers = {"start_learning_rate": 2e-4, "learning_rate": 1e-3, "final_learning_rate": 1e-6}
    config = masked_config(method, optim={**numbers, "warmup_epochs": 2, "stretch": stretch}, train={"epochs": 8})
    loop = Loop(config, method_class(config), 2, torch.device("cpu"))
    steps = 16 * stretch
    for step in range(16):
        rates = loop.rates(step)
        expected = rate(step, steps=int(steps), warm_up=4, numbers=(2e-4, 1e-3, 1e-6), ahead=ahead)
        assert rates["learning_rate"] == pytest.approx(expected, rel=1e-12), f"step {step}"
        if method == "ijepa":
            assert rates["teacher_momentum"] == pytest.approx(0.9 + 0.1 * step / steps, rel=1e-12)


def test_weight_decay_spares_biases_norms_and_what_is_fixed() -> None:
    loop, _ = a_loop(masked_config("mae", data={"batch_size": FEW}))
    names = {id(parameter): name for name, parameter in loop.method.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in loop.optimizer.param_groups)
    assert {"autoencoder.backbone.cls_token", "autoencoder.decoder.mask_token"} <= set(decayed)
    assert all(name.endswith("bias") or "norm" in name for name in plain), plain
    assert "autoencoder.backbone.pos_embed" not in decayed + plain


@pytest.mark.quick
@pytest.mark.parametrize("method", ["mae", "ijepa"])
def test_start_is_the_published_one(method: str) -> None:
    """MAE: Xavier, also of the patch embedding as a matrix; I-JEPA: a deviation of 0.02 in every block, whatever its depth."""
    torch.manual_seed(0)
    config = masked_config(method, backbone={"width": 96, "depth": 3, "heads": 4, "initialisation": "timm"})
    network: Any = method_class(config)(config, Place(0, 2, 2))
    backbone = network.evaluated
    layers = {name: value for name, value in backbone.named_parameters() if name.endswith(("qkv.weight", "fc2.weight"))}
    layers["patch_embed"] = backbone.patch_embed.proj.weight.flatten(1)
    for name, value in layers.items():
        expected = (2 / sum(value.shape)) ** 0.5 if method == "mae" else 0.02
        assert value.std().item() == pytest.approx(expected, rel=0.08), name
        assert method == "ijepa" or value.abs().max().item() <= 3**0.5 * expected, f"{name} is not uniform"
    assert not any(value.any() for name, value in backbone.named_parameters() if "blocks" in name and "bias" in name)


@pytest.fixture(scope="module", autouse=True)
def draw() -> Iterator[Callable[..., None]]:
    """Drawing, which takes longer than these runs: they go without it, and on few digits."""
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch)
        patch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
        yield draw_plots


OWN_NUMBERS = {
    "mae": {"mean_patch_loss", "relative_loss"},
    "ijepa": {"constant_loss", "relative_loss", "target_variance", "image_variance"},
}


@pytest.mark.parametrize("method", METHODS)
def test_run_trains_and_goes_on_bit_for_bit(method: str, videos: Path, tmp_path: Path) -> None:
    of_digits = {"data": {"batch_size": FEW // 2}}
    config = masked_config(method, videos, **({} if method == "vjepa" else of_digits))
    whole, _ = a_run(config, tmp_path / "whole")
    assert whole.train() == 0
    run, _ = a_run(config, tmp_path / "stopped")
    assert stopped_at(run, 1) == 130
    again, _ = a_run(config_in(tmp_path / "stopped"), tmp_path / "stopped", resume=True)
    assert again.train() == 0
    assert differing(state_of(again), state_of(whole)) == []
    assert untimed(again) == untimed(whole)
    logged = [record for record in read_metrics(whole.folder) if "loss" in record]
    assert len(logged) == 4
    assert OWN_NUMBERS.get(method, OWN_NUMBERS["ijepa"]) <= logged[-1].keys()
    assert json.loads(whole.folder.summary.read_text())["knn"] is not None


def test_reconstructions_are_drawn_and_show_what_is_seen(draw: Callable[..., None], tmp_path: Path) -> None:
    run, _ = a_run(masked_config("mae", data={"batch_size": FEW}), tmp_path / "run")
    run.folder.plots.mkdir(parents=True, exist_ok=True)
    method: Any = run.loop.method
    shown = sample_pictures(run.config, method.evaluated, run.judge.train, method.pictures)
    draw(run.folder, run.config, None, None, {}, shown)
    assert (run.folder.plots / "reconstructions.png").stat().st_size > 1000
    inputs = run.fed.of(run.judge.train.evaluation_pixels([0, 1]))
    masked, filled = method.eval().pictures(inputs).values()
    assert masked.shape == filled.shape == inputs.shape
    same = [
        (each == inputs).unfold(2, 4, 4).unfold(3, 4, 4).all(dim=(1, 4, 5)).sum().item() for each in (masked, filled)
    ]
    assert min(same) >= 2 * 4, (
        f"{same} patches of two images are shown as they are; expected the 4 of each that are seen"
    )
    run.close()


def test_numbers_compare_with_a_constant_and_show_a_collapse() -> None:
    loop, batches = fp64_loop("ijepa", Path())
    batch = batches[0]
    loop.step(0, batch)
    alive = loop.method.numbers()
    for value in loop.method.get_submodule("teacher").parameters():
        value.zero_()
    loop.method.get_parameter("teacher.norm.bias").data.copy_(torch.arange(16.0))
    loop.step(1, batch)
    dead = loop.method.numbers()
    assert alive["target_variance"] > 1e-4
    assert dead["target_variance"] < 1e-20
    assert dead["image_variance"] < 1e-20
    assert dead["constant_loss"] < 1e-20


# Names and shapes in published files


def block_shapes(name: str, depth: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for place in range(depth):
        inner = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        inner |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for part, shape in inner.items():
            shapes[f"{name}{place}.{part}.weight"] = shape
            shapes[f"{name}{place}.{part}.bias"] = shape[:1]
    return shapes


def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def encoder_shapes(depth: int, width: int, tokens: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    own = {"pos_embed": (1, tokens, width), **pair("patch_embed.proj", width, *kernel), **pair("norm", width)}
    return own | block_shapes("blocks.", depth, width)


MAE_B16 = {
    **encoder_shapes(12, 768, 197, (3, 16, 16)),
    "cls_token": (1, 1, 768),
    "mask_token": (1, 1, 512),
    "decoder_pos_embed": (1, 197, 512),
    **pair("decoder_embed", 512, 768),
    **block_shapes("decoder_blocks.", 8, 512),
    **pair("decoder_norm", 512),
    **pair("decoder_pred", 768, 512),
}


def predictor_shapes(wrapper: str, width: int, tokens: int, masks: list[str]) -> dict[str, tuple[int, ...]]:
    own = {
        "predictor_pos_embed": (1, tokens, 384),
        **dict.fromkeys(masks, (1, 1, 384)),
        **pair("predictor_embed", 384, width),
        **block_shapes("predictor_blocks.", 12, 384),
        **pair("predictor_norm", 384),
        **pair("predictor_proj", width, 384),
    }
    return {wrapper + name: shape for name, shape in own.items()}


def tensors(shapes: dict[str, tuple[int, ...]], wrapper: str = "") -> dict[str, Tensor]:
    return {wrapper + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_published_names_and_shapes_are_ours(tmp_path: Path) -> None:
    large = {"initialisation": "timm", "width": None, "depth": None, "heads": None}
    folder = {"data": {"kind": "folder", "folder": str(tmp_path)}, "views": {"global_size": 224, "local_size": 112}}
    vit_h = {"name": "vit_huge_patch14_224", "patch_size": 14, **large}
    vit_l = {"name": "vit_large_patch16_224", "patch_size": 16, **large}
    vit_b = {"name": "vit_base_patch16_224", "patch_size": 16, **large}
    published = {"decoder": {"width": 512, "depth": 8, "heads": 16}, "predictor": {"width": 384, "depth": 12}}
    clips = {"data": {"kind": "videos", "folder": str(tmp_path)}, "clips": {"frames": 16, "step": 4}}
    ijepa, vjepa = (
        predictor_shapes("predictor.", 1280, 256, ["mask_token"]),
        predictor_shapes("predictor.module.backbone.", 1024, 1568, ["mask_tokens.0", "mask_tokens.1"]),
    )
    vith14 = encoder_shapes(32, 1280, 256, (3, 14, 14))
    vitl16 = encoder_shapes(24, 1024, 1568, (3, 2, 16, 16))
    cases: list[tuple[str, dict[str, Any], str, dict[str, Tensor]]] = [
        ("mae", {**folder, "backbone": vit_b}, "autoencoder", tensors(MAE_B16, "model.")),
        (
            "ijepa",
            {**folder, "backbone": vit_h},
            "student",
            tensors(vith14, "encoder.module.") | tensors(vith14, "target_encoder.module.") | tensors(ijepa),
        ),
        (
            "vjepa",
            {**folder, **clips, "backbone": vit_l},
            "student",
            tensors(vitl16, "target_encoder.module.backbone.") | tensors(vjepa),
        ),
    ]
    for method, sections, part, given in cases:
        config = changed(masked_config("mae"), method=method, **sections, **published)
        with torch.device("meta"):
            network = method_class(config)(config, Place(0, 1, 2)).get_submodule(part)
        ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        found = network_in(given).parts.items()
        theirs = {f"{part}.{name}": tuple(value.shape) for part, named in found for name, value in named.items()}
        assert ours == theirs, f"{method}: {sorted(set(ours.items()) ^ set(theirs.items()))[:6]}"
