"""Runs start from published weights and from ours: every tensor arrives, and what does not fit is named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

from tests.pretrain.engine.starts import HEAD, config_of, dino, saved, started
from tests.pretrain.methods.plain import Weights, jepa_loss, mae_loss
from tests.pretrain.networks import published
from tests.pretrain.networks.published import HEADS, PATCH, PATCHES, WIDTH, backbone, drawn, head, layer, under
from tests.pretrain.tiny import a_run, changed, differing, digits_config
from vmf_pretrain.config.paths import with_absolute_paths
from vmf_pretrain.methods.method import Place
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks.tokens import Hidden
from vmf_pretrain.storage.checkpoint import load_checkpoint
from vmf_pretrain.storage.tensor_file import write_tensors

pytestmark = pytest.mark.quick

IMAGES = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
GIANT = {"name": "vit_giant_patch14_reg4_dinov2"}


def ibot(last: str = "last_layer2", *, twins: bool = False) -> dict[str, Any]:
    scaled = backbone(scale=("gamma_1", "gamma_2"), mask="masked_embed")
    of_head = drawn(head("last_layer", last), 7)
    if twins:
        of_head |= {name.replace("last_layer.", "last_layer2."): value for name, value in of_head.items()}
    whole = under("backbone.", drawn(scaled, 6)) | under("head.", of_head)
    evaluated = {name: value for name, value in whole.items() if "masked" not in name}
    return {"student": under("module._orig_mod.", whole), "teacher": evaluated}


def dinov2(gates: tuple[str, ...]) -> dict[str, Any]:
    scale = ("ls1.gamma", "ls2.gamma")
    shapes = backbone(registers=4, scale=scale, gates=gates, chunked=len(gates) == 1, mask="mask_token")
    networks: Weights = {}
    for seed, name in ((10, "student."), (20, "teacher.")):
        networks |= under(f"{name}backbone.", drawn(shapes, seed))
        networks |= under(f"{name}dino_head.", drawn(head(), seed + 1)) | under(
            f"{name}ibot_head.", drawn(head(), seed + 2)
        )
    return {"model": {**networks, "dino_loss.center": torch.ones(1, 12)}}


def of(entries: dict[str, Any], *path: str) -> Weights:
    """The tensors below an entry and a prefix."""
    *entry, prefix = path
    for name in entry:
        entries = entries[name]
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def check_tokens(network: Any, w: Weights) -> None:
    """Class token and patches of a backbone are those of the published network, whose masked patches have its mask token."""
    expected = torch.stack([published.tokens(image, w) for image in IMAGES])
    registers = w["register_tokens"].shape[1] if "register_tokens" in w else 0
    expected = torch.cat([expected[:, :1], expected[:, 1 + registers :]], dim=1)
    error = off(network(IMAGES, hidden=Hidden()), expected)
    assert error < 1e-12, f"tokens are off by {error:.1e}"


def check_head(part: Any, w: Weights, last: str = "last_layer") -> None:
    features = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits = part(features)
    error = off(logits.materialize(), published.logits(features, w, last))
    assert error < 1e-12, f"logits of {last} are off by {error:.1e}"


def test_dino_starts_from_its_teacher_or_its_student_with_its_head(tmp_path: Path) -> None:
    entries = dino()
    path = saved(tmp_path / "dino.pth", entries)
    for name, w in (("teacher", entries["teacher"]), ("student", of(entries, "student", "module."))):
        method, said = started(config_of("dino", path, start_from={"parts": "all", "network": name}))
        for network in (method.get_submodule("student"), method.get_submodule("teacher")):
            check_tokens(network.get_submodule("backbone"), of({"w": w}, "w", "backbone."))
            check_head(network.get_submodule("head"), of({"w": w}, "w", "head."))
        counted, left = said.split("; left over there: ")
        assert counted.endswith(f"network {name}: 30 tensors of the backbone, 8 tensors of the head"), said
        assert set(left.rstrip(".").split(", ")) == {"student", "teacher", "dino_loss", "optimizer"} - {name}, said


def test_backbone_alone_is_the_default_and_the_rest_is_said(tmp_path: Path) -> None:
    fresh = method_class(config := config_of("dino-vmf", saved(tmp_path / "dino.pth", dino())))
    torch.manual_seed(0)
    before = fresh(config, Place(0, 5, 2)).double().trained.get_submodule("head").state_dict()
    method, said = started(config)
    assert differing(method.trained.get_submodule("head").state_dict(), before) == []
    assert "network teacher: 30 tensors of the backbone; left over there: head, " in said, said
    assert "at its start here: head." in said, said


@pytest.mark.parametrize("shared", [True, False])
def test_ibot_starts_with_both_streams_and_its_mask_token(shared: bool, tmp_path: Path) -> None:
    entries = ibot("last_layer", twins=True) if shared else ibot()
    path = saved(tmp_path / "ibot.pth", entries)
    heads = {**HEAD, "patches": "shared" if shared else "own_prototypes"}
    config = config_of(
        "ibot", path, head=heads, backbone={"layer_scale": 1.0}, start_from={"parts": "all", "network": "student"}
    )
    method, said = started(config)
    w = of(entries, "student", "module._orig_mod.backbone.")
    check_tokens(method.evaluated, w)
    assert torch.equal(method.trained.get_parameter("backbone.mask_token"), w["masked_embed"])
    w_head = of(entries, "student", "module._orig_mod.head.")
    check_head(method.trained.get_submodule("head"), w_head)
    if not shared:
        _, of_patches = method.trained.get_submodule("head")(IMAGES.new_ones(1, WIDTH), IMAGES.new_ones(1, WIDTH))
        expected = published.logits(IMAGES.new_ones(1, WIDTH), w_head, "last_layer2")
        assert off(of_patches.materialize(), expected) < 1e-12
    assert "at its start here" not in said, said


@pytest.mark.parametrize("gates", [("w12",), ("w1", "w2")], ids=["chunked, one gate", "two gates"])
def test_dinov2_starts_with_registers_gates_and_two_heads(gates: tuple[str, ...], tmp_path: Path) -> None:
    entries = dinov2(gates)
    path = saved(tmp_path / "dinov2.pth", entries)
    heads = {**HEAD, "patches": "own_head"}
    method, said = started(config_of("dinov2", path, head=heads, backbone=GIANT, start_from={"parts": "all"}))
    w = of(entries, "model", "teacher.backbone.")
    check_tokens(method.evaluated, w)
    # with all patches masked the network computes what it does where the patch embedding is the mask token
    masked = method.trained.get_submodule("backbone")(IMAGES, hidden=Hidden(torch.ones(2, 4, 4, dtype=torch.bool)))
    blind = {**w, "patch_embed.proj.weight": torch.zeros_like(w["patch_embed.proj.weight"])}
    blind["patch_embed.proj.bias"] = w["mask_token"][0]
    assert off(masked[:, 0], torch.stack([published.tokens(image, blind)[0] for image in IMAGES])) < 1e-12
    check_head(method.trained.get_submodule("head"), of(entries, "model", "teacher.dino_head."))
    check_head(method.trained.get_submodule("patch_head"), of(entries, "model", "teacher.ibot_head."))
    assert "left over there: student, dino_loss, optimizer." in said, said


def mae() -> Weights:
    w = drawn(backbone(), 30)
    decoder = {"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 1 + PATCHES, 16), **layer("decoder_embed", 16, WIDTH)}
    decoder |= {
        **layer("decoder_norm", 16),
        **layer("decoder_pred", PATCH * PATCH, 16),
        **narrow("decoder_blocks.0.", 16),
    }
    return w | drawn(decoder, 31)


def narrow(name: str, width: int) -> published.Shapes:
    """A block of a decoder or predictor."""
    shapes = layer(f"{name}norm1", width) | layer(f"{name}norm2", width) | layer(f"{name}attn.qkv", 3 * width, width)
    shapes |= layer(f"{name}attn.proj", width, width)
    return shapes | layer(f"{name}mlp.fc1", 4 * width, width) | layer(f"{name}mlp.fc2", width, 4 * width)


def test_mae_starts_with_its_decoder_and_its_encoder_alone_starts_dino(tmp_path: Path) -> None:
    w = mae()
    path = saved(tmp_path / "mae.pth", {"model": w})
    method, said = started(config_of("mae", path, start_from={"parts": "all"}))
    ours = {("backbone." if not name.startswith(("decoder", "mask")) else "decoder.") + name.removeprefix("decoder_"): value
            for name, value in w.items()}  # fmt: skip
    kept = torch.tensor([[0, 5, 9, 14], [3, 4, 5, 6]])
    expected = mae_loss(ours, IMAGES, kept, patch=PATCH, heads=(HEADS, 4), norm_pixels=True)
    batch = argparse.Namespace(views=[IMAGES], masks={"kept": kept})
    found = method(batch, Place(0, 5, 2))["loss"]
    assert off(found, expected) < 1e-12
    assert said.endswith("30 tensors of the backbone, 20 tensors of the decoder; left over there: optimizer."), said
    method, _ = started(config_of("dino", path))
    check_tokens(
        method.evaluated, {name: value for name, value in w.items() if not name.startswith(("decoder", "mask"))}
    )


def jepa(wrapper: str, *, clips: bool) -> dict[str, Any]:
    """I-JEPA's file, or V-JEPA's: two mask tokens, tubelets of two frames, 2 x 4 x 4 tokens."""
    masks = ("mask_tokens.0", "mask_tokens.1") if clips else ("mask_token",)
    tokens = 2 * PATCHES if clips else PATCHES
    predictor = {**dict.fromkeys(masks, (1, 1, 8)), "predictor_pos_embed": (1, tokens, 8), **layer("predictor_norm", 8)}
    predictor |= {
        **layer("predictor_embed", 8, WIDTH),
        **layer("predictor_proj", WIDTH, 8),
        **narrow("predictor_blocks.0.", 8),
    }
    of_encoder = backbone(classes=0, patches=tokens, kernel=(3, 2, PATCH, PATCH) if clips else (1, PATCH, PATCH))
    encoders = {
        name: under(wrapper, drawn(of_encoder, seed)) for seed, name in ((40, "encoder"), (41, "target_encoder"))
    }
    return {**encoders, "predictor": under(wrapper, drawn(predictor, 42))}


@pytest.mark.parametrize(("name", "wrapper"), [("ijepa", "module."), ("vjepa", "module.backbone.")])
def test_jepa_starts_from_its_target_encoder_with_its_predictor(name: str, wrapper: str, tmp_path: Path) -> None:
    clips = name == "vjepa"
    entries = jepa(wrapper, clips=clips)
    config = config_of(name, saved(tmp_path / "latest.pth.tar", entries), start_from={"parts": "all"})
    method, said = started(config)
    target = of(entries, "target_encoder", wrapper)
    predictor = {name.removeprefix("predictor_"): value for name, value in of(entries, "predictor", wrapper).items()}
    if not clips:
        predictor["mask_tokens.0"] = predictor.pop("mask_token")
    masks = {}
    for number in range(1 + clips):
        masks[f"context.{number}"] = torch.tensor([[0, 1, 2, 7], [4, 5, 8, 9]]) + number
        masks[f"target.{number}"] = torch.tensor([[[10, 11], [3, 6]], [[0, 1], [13, 14]]]) + number
    inputs = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(6)).double() if clips else IMAGES
    w = under("backbone.", target) | under("predictor.", predictor)
    expected = jepa_loss(w, target, inputs, masks, patch=PATCH, heads=(HEADS, HEADS))
    found = method(argparse.Namespace(views=[inputs], masks=masks), Place(0, 5, 2))["loss"]
    assert off(found, expected) < 1e-12
    tensors = 21 if clips else 20
    assert f"network target_encoder: 29 tensors of the backbone, {tensors} tensors of the predictor" in said, said


def test_positions_are_resized_when_asked_as_the_sources_resize_theirs(tmp_path: Path) -> None:
    """Bicubic with a = -0.75 and no antialiasing, halfway between two of 8 places: weights -3/32, 19/32, 19/32, -3/32."""
    w = drawn(backbone(patches=64), 50)
    path = saved(tmp_path / "larger.pth", {"model": w})
    method, said = started(config_of("dino", path, start_from={"positions": "resized"}))
    pick = torch.zeros(4, 8, dtype=torch.float64)
    for place in range(4):
        for tap, weight in zip(range(2 * place - 1, 2 * place + 3), (-3, 19, 19, -3), strict=True):
            pick[place, min(max(tap, 0), 7)] += weight / 32
    square = w["pos_embed"][0, 1:].reshape(8, 8, WIDTH)
    expected = torch.einsum("ra,cb,abd->rcd", pick, pick, square).reshape(PATCHES, WIDTH)
    found = method.trained.get_parameter("backbone.pos_embed")
    assert off(found[0, 1:], expected) < 1e-6  # interpolated in fp32
    assert torch.equal(found[:, :1], w["pos_embed"][:, :1])
    assert "positions resized from 8 x 8 patches to 4 x 4" in said, said


def test_run_starts_from_a_run_its_checkpoint_or_its_weights_and_goes_on_without_them(tmp_path: Path) -> None:
    config = digits_config(data={"batch_size": 512}, evaluate={"max_images": 40}, seed=1)
    first, second = tmp_path / "first", tmp_path / "second"
    a_run(config, first)[0].close()  # leaves the checkpoint of step 0
    written = load_checkpoint(first / "checkpoints")
    weights = tmp_path / "weights.safetensors"
    write_tensors(weights, written.tensors["teacher"])
    for path in (written.path, weights):
        method, _ = started(changed(config, start_from={"weights": str(path), "parts": "all"}, seed=2))
        assert differing(method.float().get_submodule("student").state_dict(), written.tensors["student"]) == []
    after = changed(config, start_from={"weights": str(first), "parts": "all"}, seed=2)
    run, printed = a_run(after, second)
    run.close()
    before = load_checkpoint(second / "checkpoints").tensors
    for network in ("student", "teacher"):
        assert differing(before[network], written.tensors["teacher"]) == []
    assert "Starts from" in printed.getvalue()
    first.rename(tmp_path / "gone")
    run, printed = a_run(after, second, resume=True)
    run.close()
    assert "Starts from" not in printed.getvalue()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_timm_weights_come_from_the_cache_without_a_network(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published file of a classifier: its backbone is taken, its classifier said."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    folder = cache / "models--timm--vit_tiny_patch16_224.augreg_in21k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    w = drawn({**backbone(), **layer("head", 10, WIDTH)})
    path = folder / "snapshots" / ("0" * 40) / file
    if file.endswith(".bin"):
        torch.save(w, path)
    else:
        write_tensors(path, w)
    method, said = started(config_of("dino", "timm:vit_tiny_patch16_224.augreg_in21k"))
    check_tokens(method.evaluated, w)
    assert "30 tensors of the backbone; left over there: classifier; at its start here: head." in said, said
    assert "Its own input had the mean (0.5, 0.5, 0.5)" in said, said


def test_common_keys_take_what_fits_and_say_the_rest(tmp_path: Path) -> None:
    w = drawn(backbone())
    method, said = started(
        config_of("ijepa", saved(tmp_path / "dino.pth", {"model": w}), start_from={"keys": "common"})
    )
    taken = method.trained.get_submodule("backbone").state_dict()
    assert differing(taken, {name: w[name] for name in taken} | {"pos_embed": w["pos_embed"][:, 1:]}) == []
    assert "29 tensors of the backbone; left over there: cls_token" in said, said


def test_paths_mean_the_same_from_any_folder_and_names_stay() -> None:
    for given, expected in {"timm:a.b": "timm:a.b", "runs/one": str(Path("runs/one").absolute())}.items():
        assert with_absolute_paths(digits_config(start_from={"weights": given})).start_from.weights == expected
