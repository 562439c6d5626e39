"""The network that is evaluated, what is kept of its outputs, and what a person reads who names none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
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
    save_file(published.state_dict(), file)
    found = load_evaluated(f"timm:{name}={file}", device=CPU)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = published.eval().forward_head(published.forward_features(images), pre_logits=True)
        assert torch.equal(found.network(images), expected)
    assert found.fed.size == 224
    save_file({"cls_token": torch.zeros(1, 1, 192)}, file)
    with pytest.raises(PretrainError, match="not those of its network"):
        load_evaluated(f"timm:{name}={file}", device=CPU)


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}], ids=str
)
def test_outputs_are_those_of_the_blocks(options: dict[str, Any]) -> None:
    network = timm.create_model("vit_tiny_patch16_224", **TINY, **options).eval()
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
    (["eval", "RUN", "--task", "knn", "--knn.neighbours", "[3, 3]"], "expected different numbers"),
    (["eval", "RUN", "--task", "knn", "--weights", "newest"], 'weights is "newest"; expected last or best'),
    (["eval", "RUN", "--task", "knn", "--data.folder", "x", "--data", "y"], "data.folder is given twice"),
    (["eval", "NOTHING", "--task", "knn"], "NOTHING is nothing to evaluate"),
    (["eval", "timm:vit_nano", "--task", "knn"], "timm knows no network vit_nano"),
    (["eval", "PICKLE", "--task", "knn"], "is nothing to evaluate"),
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
