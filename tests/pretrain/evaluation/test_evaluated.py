"""The network that is evaluated, what is kept of its outputs, and what a person reads who names none."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vmf_pretrain
from tests.pretrain.evaluation.tasks_at_work import CPU, digits_run
from tests.pretrain.tiny import one_sentence, save_photos
from vmf_pretrain.cli import main
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.evaluated import load_evaluated
from vmf_pretrain.evaluation.outputs import Kinds, outputs
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.tensor_file import read_tensors

pytestmark = pytest.mark.quick

TINY: dict[str, Any] = {"embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
Named = dict[str, Tensor]
ALL = Kinds(3, frozenset({"mean_patch", "patches", "unnormed"}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory.mktemp("runs") / "run")


def test_run_and_its_file_are_the_same_network(run: Path) -> None:
    found = load_evaluated(str(run), device=CPU)
    alone = load_evaluated(str(run / "weights" / "best.safetensors"), device=CPU)
    assert found.fingerprint == alone.fingerprint
    tensors, _ = read_tensors(run / "weights" / "last.safetensors")
    for name, value in found.network.state_dict().items():
        assert torch.equal(value, tensors[f"backbone.{name}"]), name
    assert not found.network.training
    assert found.run == RunFolder(run)
    assert (found.fed.size, found.facts["step"], found.facts["method"]) == (16, 3, "dino-vmf")


def test_other_weights_or_another_scale_have_another_fingerprint(run: Path, tmp_path: Path) -> None:
    before = load_evaluated(str(run), device=CPU).fingerprint
    assert load_evaluated(str(run), device=CPU, size=32).fingerprint == before, "features say their size themselves"
    found = load_evaluated(str(run), device=CPU)
    with torch.no_grad():
        next(found.network.parameters()).view(-1)[0] += 1
    from vmf_pretrain.evaluation.evaluated import fingerprint_of

    assert fingerprint_of(found.network, found.fed) != before


def test_timm_s_network_takes_its_weights_from_a_file(tmp_path: Path) -> None:
    name, file = "vit_tiny_patch16_224", tmp_path / "weights.safetensors"
    published = timm.create_model(name, num_classes=10)
    assert isinstance(published, VisionTransformer)
    save_file(published.state_dict(), file)
    found = load_evaluated(f"timm:{name}={file}", device=CPU)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = published.eval().forward_head(published.forward_features(images), pre_logits=True)
        assert torch.equal(found.network(images), expected)
    assert found.fed.size == 224
    elsewhere = tmp_path / "checkpoint.pth"  # of a trainer, with what reading would run
    teacher = {f"module.backbone.{key}": value for key, value in published.state_dict().items()}
    torch.save({"teacher": teacher, "args": argparse.Namespace(lr=1.0)}, elsewhere)
    assert load_evaluated(f"timm:{name}={elsewhere}", device=CPU).fingerprint == found.fingerprint
    save_file({"cls_token": torch.zeros(1, 1, 192)}, file)
    with pytest.raises(PretrainError, match="not those of its network"):
        load_evaluated(f"timm:{name}={file}", device=CPU)


def _dino(w: Named) -> Any:
    return {name: {f"backbone.{key}": value for key, value in w.items()} for name in ("student", "teacher")}


def _dinov2(w: Named) -> Any:
    """Registers, chunks of blocks, and a position of the class token beside it."""
    w = {key.replace("reg_token", "register_tokens").replace("blocks.0.", "blocks.0.0."): w[key] for key in w}
    place = torch.randn_like(w["cls_token"])
    return {**w, "cls_token": w["cls_token"] - place, "pos_embed": torch.cat([place, w["pos_embed"]], dim=1)}


def _ijepa(w: Named) -> Any:
    return {name: {f"module.{key}": value for key, value in w.items()} for name in ("encoder", "target_encoder")}


PUBLISHED: dict[str, tuple[dict[str, Any], Callable[[Named], Any], str | None]] = {
    "dino": ({}, _dino, "teacher"),
    "dinov2": ({"reg_tokens": 2, "no_embed_class": True, "init_values": 1.0}, _dinov2, None),
    "ijepa": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, _ijepa, "target_encoder"),
}


@pytest.mark.parametrize("source", list(PUBLISHED))
def test_published_file_is_a_network_without_being_told_which(source: str, tmp_path: Path) -> None:
    options, written, name = PUBLISHED[source]
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0, **options).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # far from its initialisation, so that each matters
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(written(network.state_dict()), tmp_path / "published.pth")
    found = load_evaluated(str(tmp_path / "published.pth"), device=CPU)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.network(images), network(images), atol=1e-4, rtol=1e-4)
    assert (found.fed.size, found.fed.deviation, found.facts["network"]) == (32, (0.229, 0.224, 0.225), name)


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}], ids=str
)
def test_outputs_are_those_of_the_blocks(options: dict[str, Any]) -> None:
    network = timm.create_model("vit_tiny_patch16_224", **TINY, **options).eval()
    assert isinstance(network, VisionTransformer)
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    prefix = network.num_prefix_tokens
    kinds = ALL if prefix else Kinds(3, ALL.parts - {"unnormed"})
    blocks: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, given, out: blocks.append(out))
    with torch.no_grad():
        last = network(images)
        expected = torch.stack([network.forward_head(network.norm(block)) for block in blocks], dim=1)
        raw = blocks[-1]
        found = outputs(network, images, kinds)
    assert torch.equal(found["class"][:, -1], last)
    assert torch.equal(found["class"], expected)
    patches = network.norm(raw)[:, prefix:]
    assert torch.equal(found["patches"], patches.reshape(2, 2, 3, 12))
    assert torch.allclose(found["mean_patch"], patches.mean(dim=1))
    assert not prefix or torch.equal(found["unnormed"], raw[:, 0])


UNFIT: list[tuple[dict[str, Any], tuple[int, int], Kinds, str]] = [
    ({}, (33, 48), Kinds(), "patches of 16 do not divide"),
    ({"dynamic_img_size": False}, (32, 48), Kinds(), "224 x 224 pixels alone; it is shown 32 x 48"),
    ({"class_token": False, "global_pool": "avg", "reg_tokens": 2}, (32, 48), ALL, "of a network without one"),
    ({}, (32, 48), Kinds(4), "the last 4 blocks are asked for, of a network of 3"),
]


@pytest.mark.parametrize(("options", "sides", "kinds", "message"), UNFIT, ids=[row[-1] for row in UNFIT])
def test_what_a_network_has_not_or_takes_not_is_said(
    options: dict[str, Any], sides: tuple[int, int], kinds: Kinds, message: str
) -> None:
    network = timm.create_model("vit_tiny_patch16_224", **{**TINY, **options}).eval()
    with pytest.raises(PretrainError, match=message):
        outputs(network, torch.zeros(1, 3, *sides), kinds)


def test_network_without_tokens_has_its_feature_alone() -> None:
    network = timm.create_model("resnet10t", num_classes=0).eval()
    with torch.no_grad():
        assert outputs(network, torch.randn(2, 3, 32, 32), Kinds())["class"].shape == (2, 1, 512)
        with pytest.raises(PretrainError, match="need a vision transformer of images, which this ResNet is not"):
            outputs(network, torch.randn(2, 3, 32, 32), Kinds(1, frozenset({"patches"})))


MISTAKES = [
    (["eval", "RUN", "--task", "knm"], "there is no task knm; expected some of knn"),
    (["eval", "RUN", "--task", ","], "no task is given"),
    (["eval", "RUN", "--task", "knn", "--knn.neighbors", "3"], "did you mean knn.neighbours?"),
    (["eval", "RUN", "--task", "knn", "--data.held_out", "0.2"], "data.held_out is 0.2, but without --data the images"),
    (["eval", "RUN", "--task", "knn", "--knn.neighbours", "[3, 3]"], "expected different numbers"),
    (["eval", "RUN", "--task", "knn", "--weights", "newest"], 'weights is "newest"; expected last or best'),
    (["eval", "RUN", "--task", "knn", "--data.folder", "x", "--data", "y"], "data.folder is given twice"),
    (["eval", "NOTHING", "--task", "knn"], "NOTHING is nothing to evaluate"),
    (["eval", "timm:vit_nano", "--task", "knn"], "timm knows no network vit_nano"),
    (
        ["eval", "PICKLE", "--task", "knn"],
        "no patch_embed.proj.weight, but weight; say which it is with timm:NAME=FILE",
    ),
    (
        ["eval", "RUN", "--task", "neighbours", "--data", "FLAT"],
        "images have 3 channels but the network was trained on 1",
    ),
    (["eval", "RUN", "--task", "knn", "--data", "FLAT"], "has no classes"),
    (["eval", "RUN", "--task", "knn", "--data", "FLAT", "--out", "FLAT/photo_00.png"], "cannot be locked"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[row[1] for row in MISTAKES])
def test_mistake_is_answered_in_one_sentence(
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_photos(tmp_path / "FLAT", 3)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "PICKLE")
    code = main([str(run) if word == "RUN" else word for word in arguments])
    printed = capsys.readouterr()
    said = printed.err or printed.out.splitlines()[-1]  # a task that cannot be done is said among the results
    assert code == 2, said
    assert message in said
    assert one_sentence(said), said


def test_settings_are_checked_before_torch_is_imported() -> None:
    program = (
        "import sys; from vmf_pretrain.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(3 if 'torch' in sys.modules else code)"
    )
    arguments = ["eval", "run", "--task", "knn", "--knn.temperature", "0"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, "knn.temperature is 0" in done.stderr) == (2, True), done.stderr


def test_call_and_command_find_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--task", "knn", "--out", str(tmp_path / "out"), "--knn.neighbours", "[5]"]) == 0
    printed = capsys.readouterr().out
    assert "top-1, k 5" in printed
    answer = vmf_pretrain.evaluate(run, tasks="knn", out=tmp_path / "out", quiet=True, knn={"neighbours": [5]})
    assert f"{answer.results['knn'].figures[0].value:.2f} %" in printed
    assert capsys.readouterr().out == ""
    with pytest.raises(PretrainError, match="no images are given"):
        vmf_pretrain.evaluate(_timm_file(tmp_path), tasks=["knn"], out=tmp_path / "other", quiet=True)


def _timm_file(folder: Path) -> str:
    name, file = "vit_tiny_patch16_224", folder / "weights.safetensors"
    save_file(timm.create_model(name, num_classes=0).state_dict(), file)
    return f"timm:{name}={file}"
