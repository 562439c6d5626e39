"""Exported networks give the features of the run in each library, or are refused by name."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLU
from torch import Tensor

from tests.pretrain.export.kept import KNN, STEP, kept_run
from tests.pretrain.tiny import changed, digits_config, one_sentence, photos_config
from vmf_pretrain.cli import BAD_INPUT, DONE, main
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.evaluation.evaluated import Evaluated, load_evaluated
from vmf_pretrain.export.form import WEIGHTS, Exportable, Form
from vmf_pretrain.export.table import FORMS
from vmf_pretrain.export.timm_form import TimmForm
from vmf_pretrain.export.write import write_form
from vmf_pretrain.export_command import FORM_NAMES, exportable_of

pytestmark = pytest.mark.quick

BUDGET = 1e-5
ALL = ("safetensors", "timm", "torchvision", "transformers")
PLAIN = {"width": 16, "depth": 2, "heads": 2}
PHOTOS = photos_config(Path("photos"), backbone=PLAIN)
SMALL_DECODER = {"width": 16, "depth": 1, "heads": 2}
NETWORKS: dict[str, tuple[Config, tuple[str, ...]]] = {  # and forms that it has
    "dino": (PHOTOS, ALL),
    "layer scale": (changed(PHOTOS, backbone={"layer_scale": 0.1}), ALL),
    "ibot, registers": (
        changed(PHOTOS, method="ibot", backbone={"registers": 3, "layer_scale": 0.1}),
        ("timm", "transformers", "safetensors"),
    ),
    "registers": (changed(PHOTOS, backbone={"registers": 2}), ("transformers",)),
    "mae, mean": (
        changed(PHOTOS, method="mae", decoder={**SMALL_DECODER, "features": "mean"}),
        ("timm", "transformers"),
    ),
    "ijepa": (changed(PHOTOS, method="ijepa", predictor={"depth": 1}), ("timm", "transformers")),
    "digits": (digits_config(), ("timm", "transformers")),
}
CASES = [(network, form) for network, (_, forms) in NETWORKS.items() for form in forms]
NOT_OF_TORCHVISION = [network for network, (_, forms) in NETWORKS.items() if "torchvision" not in forms]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: kept_run(config, root / re.sub(r"\W+", "_", name)) for name, (config, _) in NETWORKS.items()}


def loaded(run: Path) -> Evaluated:
    return load_evaluated(str(run), device=torch.device("cpu"))


def as_the_card_says(folder: Path, exported: Evaluated, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The features that the code in the model card computes."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"inputs": inputs, "torch": torch}
    if folder.name == "safetensors":  # whose network is for the reader to build
        fresh = loaded(folder.parents[1]).network
        for parameter in fresh.parameters():
            parameter.data.zero_()
        names["model"] = fresh
    monkeypatch.chdir(folder.parent)
    with torch.no_grad():
        exec(code[1], names)
        found: Tensor = names["features"] if "features" in names else names["model"](inputs)
        return found


@pytest.mark.parametrize(("network", "form"), CASES)
def test_the_library_gives_the_features_of_the_runs_network(
    network: str, form: str, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "transformers":
        pytest.importorskip("transformers")
    run = runs[network]
    assert main(["export", str(run), "--to", form]) == DONE
    exported = loaded(run)
    inputs = torch.randn(4, *exportable_of(exported).input_shape)
    found = as_the_card_says(run / "export" / form, exported, inputs, monkeypatch)
    with torch.no_grad():
        difference = float((found - exported.network(inputs)).abs().max())
    assert difference < BUDGET, f"{difference:.1e} of {BUDGET:.0e}"


@pytest.mark.parametrize("network", NOT_OF_TORCHVISION)
def test_what_a_library_cannot_express_is_refused(
    network: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(runs[network]), "--to", "torchvision", "--out", str(out)]) == BAD_INPUT
    said = capsys.readouterr().err
    assert one_sentence(said), said
    assert "--to safetensors" in said
    assert not list(tmp_path.iterdir()), "something is left behind"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": True}, "attn.q_norm"),
        ({"mlp_layer": SwiGLU}, "SwiGLU"),
        ({"pre_norm": True}, "norm_pre"),
        ({"act_layer": "gelu_tanh"}, "mlp.act"),
        ({"global_pool": "map"}, "mean of the patches"),
    ],
)
@pytest.mark.parametrize("form", ["torchvision", "transformers"])
def test_parts_whose_tensors_might_fit_but_whose_arithmetic_differs_are_refused(
    options: dict[str, Any], reason: str, form: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    vit = timm.create_model(
        "vit_small_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=0, **options
    )
    exported = Exportable(vit.eval(), loaded(runs["dino"]).fed, (3, 32, 32), {})
    with pytest.raises(PretrainError, match=re.escape(reason)) as told:
        write_form(exported, FORMS[form], tmp_path / "out", lambda _: "")
    assert one_sentence(str(told.value))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_small_patch16_18x2_224", {}, "blocks of the kind ParallelThingsBlock"),
        ("vit_small_patch16_224", {"global_pool": "avg", "fc_norm": True}, "a Identity as norm"),
    ],
)
def test_network_of_other_parts_has_no_timm_form(
    name: str, options: dict[str, Any], reason: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    vit = timm.create_model(name, img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=0, **options)
    exported = Exportable(vit.eval(), loaded(runs["dino"]).fed, (3, 32, 32), {})
    with pytest.raises(PretrainError, match=reason):
        write_form(exported, FORMS["timm"], tmp_path / "out", lambda _: "")


class Tampered(TimmForm):
    """timm's form, whose file is changed before it is read."""

    def __init__(self, change: str) -> None:
        self.change = change

    def read(self, exported: Exportable, folder: Path) -> Any:
        tensors = load_file(folder / WEIGHTS)
        if self.change == "missing":
            del tensors["norm.weight"]
        elif self.change == "left over":
            tensors["blocks.9.norm1.weight"] = torch.ones(16)
        else:
            tensors["norm.bias"][0] += float(self.change)
        save_file(tensors, folder / WEIGHTS)
        return super().read(exported, folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [("missing", "norm.weight"), ("left over", "blocks.9.norm1.weight"), ("1e-3", "differs"), ("nan", "differs")],
)
def test_file_that_is_not_the_network_is_refused_and_leaves_nothing(
    change: str, said: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    form: Form = Tampered(change)
    with pytest.raises(PretrainError, match=re.escape(said)):
        write_form(exportable_of(loaded(runs["dino"])), form, tmp_path / "out", lambda _: "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["timm", "torchvision", "transformers"])
def test_tensor_without_a_place_is_an_error_that_names_it(form: str, runs: dict[str, Path], tmp_path: Path) -> None:
    exported = exportable_of(loaded(runs["dino"]))
    exported.network.register_buffer("scale_of_mine", torch.ones(3))
    with pytest.raises(PretrainError, match="scale_of_mine"):
        write_form(exported, FORMS[form], tmp_path / "out", lambda _: "")


def test_the_timm_folder_is_also_a_model_of_timm(runs: dict[str, Path], tmp_path: Path) -> None:
    assert main(["export", str(runs["dino"]), "--to", "timm", "--out", str(tmp_path / "mine")]) == DONE
    model = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    prepared = timm.data.resolve_model_data_config(model)
    exported = loaded(runs["dino"])
    assert (tuple(prepared["mean"]), tuple(prepared["std"])) == (exported.fed.mean, exported.fed.deviation)
    assert tuple(prepared["input_size"]) == (3, exported.fed.size, exported.fed.size)
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(inputs), exported.network(inputs))


def test_the_card_says_which_network_and_what_is_known_of_it(runs: dict[str, Path], tmp_path: Path) -> None:
    paths = {"data": {"folder": "/home/someone/photos of mine"}, "evaluate": {"sets": ("/home/someone/flowers",)}}
    config = changed(PHOTOS, **paths)
    run = kept_run(config, tmp_path / "run")
    assert main(["export", str(run), "--to", "torchvision", "--out", str(tmp_path / "mine")]) == DONE
    card = (tmp_path / "mine" / "README.md").read_text()
    said = (
        "the teacher's backbone",
        f"{STEP} steps",
        f"| {KNN} |",
        "photos of mine",
        "flowers",
        "0.485",
        "To be filled in",
    )
    missing = [text for text in said if text not in card]
    assert not missing, missing
    assert "/home/someone" not in card, "a path of the machine is nobody's business"


def test_nothing_is_replaced_pickled_or_written_through_a_link(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def poisoned(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, poisoned)
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(tmp_path / "outside")
    orders = [str(tmp_path / "new"), str(tmp_path / "new"), str(tmp_path / "run" / "export" / "timm")]
    codes = [main(["export", str(runs["dino"]), "--to", "timm", "--out", out]) for out in orders]
    assert codes == [DONE, BAD_INPUT, BAD_INPUT]
    said = capsys.readouterr().err
    assert "already exists" in said
    assert "symbolic link" in said
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}", "--to", "keras"], "expected one of timm"),
        (["{run}", "--to", "timm", "--weights", "best"], "best.safetensors"),
        (["nowhere", "--to", "timm"], "nowhere"),
        (["timm:vit_tiny_patch16_224=x", "--to", "timm"], "x"),
        (["{run}", "--to", "timm", "--optim.learning_rate", "1"], "does not go with export"),
    ],
)
def test_unfit_orders_are_one_sentence(
    arguments: list[str], said: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(run=runs["dino"]) for argument in arguments]
    assert main(["export", *given]) == BAD_INPUT
    error = capsys.readouterr().err
    assert one_sentence(error), error
    assert said in error


def test_every_form_is_offered() -> None:
    assert tuple(FORMS) == FORM_NAMES


def test_transformers_files_have_the_names_of_published_checkpoints(runs: dict[str, Path], tmp_path: Path) -> None:
    """Releases 4 and 5 read these; ``dinov2-with-registers`` as published."""
    assert main(["export", str(runs["registers"]), "--to", "transformers", "--out", str(tmp_path / "out")]) == DONE
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items()}
    expected = {
        "embeddings.register_tokens": (1, 2, 16),
        "embeddings.mask_token": (1, 16),
        "embeddings.position_embeddings": (1, 17, 16),
        "encoder.layer.1.attention.attention.query.weight": (16, 16),
        "encoder.layer.1.attention.output.dense.bias": (16,),
        "encoder.layer.0.layer_scale2.lambda1": (16,),
        "encoder.layer.0.mlp.fc1.weight": (64, 16),
        "layernorm.weight": (16,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["model_type"], settings["num_register_tokens"]) == ("dinov2_with_registers", 2)
