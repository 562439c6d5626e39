"""The Python call: the run of the command, its summary as a value, its mistakes as exceptions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vmf_pretrain
from tests.pretrain.tiny import digits_config, two_classes, yaml_of
from vmf_pretrain import PretrainError, pretrain
from vmf_pretrain.start import Started

pytestmark = pytest.mark.quick


def test_call_returns_the_summary_and_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
    config = yaml_of(digits_config(), tmp_path / "config.yaml")
    fields: dict[str, Any] = {"optim": {"learning_rate": 2e-3}, "train.epochs": 1, "optim.warmup_epochs": 0}
    fields |= {"loss.warmup_teacher_temp_epochs": 0, "seed": 3}
    done = pretrain(method="dino", out=tmp_path / "run", config=config, quiet=True, **fields)
    assert done.folder == tmp_path / "run"
    assert (done.summary["method"], done.summary["seed"], done.summary["steps"]) == ("dino", 3, 5)
    assert "learning_rate: 0.002" in (done.folder / "config.yaml").read_text()
    assert capsys.readouterr() == ("", "")
    again = pretrain(out=tmp_path / "run", resume=True, quiet=True)
    assert again.summary["steps"] == 5
    with pytest.raises(PretrainError, match="already exists"):
        pretrain(out=tmp_path / "run", config=config)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, "fit got no images"),
    ({"optim": {"learning_rate": "fast"}}, 'optim.learning_rate is "fast"; expected a finite number'),
    ({"optim.learnin_rate": 1}, "did you mean optim.learning_rate"),
    ({"epochs": 3}, "epochs is not an option"),
    ({"data": 3}, "data.folder is 3; expected text or null"),
    ({"method": "simclr", "recipe": "digits"}, "method is simclr"),
    ({"recipe": "digit"}, "did you mean digits"),
    ({"resume": True}, "resume needs out"),
    ({"resume": True, "out": "/nowhere/run"}, "holds no run to resume"),
    ({"allow_changed": ["lr"]}, '"lr" is not known'),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[row[1] for row in MISTAKES])
def test_mistake_is_an_exception_of_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PretrainError) as caught:
        pretrain(**arguments)
    assert message in str(caught.value)


def test_folder_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def started(config: Any, out: Path | None, **options: Any) -> Started:
        chosen.append((config, out, options))
        return Started(130, tmp_path)

    monkeypatch.setattr("vmf_pretrain.call.start", started)
    two_classes(tmp_path / "photos")
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        pretrain(tmp_path / "photos", "dino", train={"device": "cpu"})
    config, out, options = chosen[0]
    assert (config.data.folder, config.method, out, options["name"]) == (str(tmp_path / "photos"), "dino", None, "fit")
    monkeypatch.setattr("vmf_pretrain.call.start", lambda *arguments, **options: Started(143, tmp_path))
    with pytest.raises(PretrainError, match="stopped by a signal"):
        pretrain(tmp_path / "photos", train={"device": "cpu"})


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, vmf_pretrain\nvmf_pretrain.pretrain, vmf_pretrain.Finished, vmf_pretrain.PretrainError\n"
        "assert not {'torch', 'numpy', 'rich', 'torchvision'} & set(sys.modules)\n"
        "assert {'pretrain', 'Finished'} <= set(dir(vmf_pretrain))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        _ = vmf_pretrain.pretrian
