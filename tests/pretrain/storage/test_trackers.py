"""Weights & Biases and MLflow, as stand-ins: what they get, that nothing leaves the machine unasked, and that they may fail."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.pretrain.tiny import changed, digits_config
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.log import LogConfig
from vmf_pretrain.config.run import Config
from vmf_pretrain.storage.metrics import MetricsLog, read_metrics
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.tolerant import TolerantWrites
from vmf_pretrain.storage.trackers import Tracked

pytestmark = pytest.mark.quick

RECORD = {"step": 1, "steps": 10, "loss": 2.5, "kl": None, "words": "not a number"}


class Calls(list[tuple[str, Any]]):
    """What a stand-in was called with; ``broken`` names the calls that raise."""

    broken: tuple[str, ...] = ()

    def note(self, name: str, value: Any) -> None:
        self.append((name, value))
        if name in self.broken:
            raise RuntimeError("the server\n is away")


def wandb_stand_in(calls: Calls) -> ModuleType:
    module = ModuleType("wandb")

    def init(**options: Any) -> Any:
        calls.note("init", options)
        return SimpleNamespace(
            log=lambda scalars, step: calls.note("log", (step, scalars)), finish=lambda: calls.note("finish", None)
        )

    vars(module)["init"] = init
    return module


def mlflow_stand_in(calls: Calls) -> ModuleType:
    class Client:
        runs: dict[str, str] = {}  # noqa: RUF012 -- shared, as a server's are

        def __init__(self, tracking_uri: str) -> None:
            calls.note("at", tracking_uri)

        def get_experiment_by_name(self, name: str) -> Any:
            return None

        def create_experiment(self, name: str) -> str:
            calls.note("experiment", name)
            return "1"

        def search_runs(self, experiments: list[str], filter_string: str) -> list[Any]:
            found = [run for tag, run in self.runs.items() if tag in filter_string]
            return [SimpleNamespace(info=SimpleNamespace(run_id=run)) for run in found]

        def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
            self.runs[tags["vmf_pretrain"]] = "a"
            calls.note("run", run_name)
            return SimpleNamespace(info=SimpleNamespace(run_id="a"))

        def update_run(self, run: str, status: str) -> None:
            calls.note("again", run)

        def log_param(self, run: str, name: str, value: str) -> None:
            calls.note("param", (name, value))

        def log_metric(self, run: str, name: str, value: float, step: int) -> None:
            calls.note("log", (step, {name: value}))

        def set_terminated(self, run: str) -> None:
            calls.note("finish", None)

    module = ModuleType("mlflow.tracking")
    vars(module)["MlflowClient"] = Client
    return module


STAND_INS = {"wandb": ("wandb", wandb_stand_in), "mlflow": ("mlflow.tracking", mlflow_stand_in)}
ASKED = {"wandb": {"wandb": "offline"}, "mlflow": {"mlflow": "local"}}


def logged(config: Config, folder: Path) -> list[str]:
    """Write a record of a run; what was said."""
    said: list[str] = []
    run = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    log = MetricsLog(run, 0, TolerantWrites(said.append), tensorboard=False, tracked=Tracked(config, run, said.append))
    log.write(RECORD)
    log.close()
    assert read_metrics(run) == [RECORD]
    return said


def installed(name: str, monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    module, stand_in = STAND_INS[name]
    monkeypatch.setitem(sys.modules, module.partition(".")[0], ModuleType(module.partition(".")[0]))
    monkeypatch.setitem(sys.modules, module, stand_in(calls))
    return calls


@pytest.mark.parametrize("name", STAND_INS)
def test_tracker_gets_the_numbers_and_the_settings_and_stays_on_the_machine(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = installed(name, monkeypatch)
    config = changed(digits_config(), log=ASKED[name])
    assert logged(config, tmp_path / "run") == []
    assert [call for call in calls if call[0] in ("log", "finish")] == [("log", (1, {"loss": 2.5})), ("finish", None)]
    if name == "wandb":
        options = calls[0][1]
        assert (options["mode"], options["dir"], options["name"]) == ("offline", str(tmp_path / "run"), "run")
        assert options["config"]["train"]["epochs"] == 2
    else:
        assert calls[0] == ("at", f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
        assert ("param", ("train.epochs", "2")) in calls
    first, again = list(calls), logged(config, tmp_path / "run")
    assert again == []
    known = calls[len(first) :]
    assert (known[0][1]["id"] == first[0][1]["id"]) if name == "wandb" else (("again", "a") in known)


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_tracker_that_fails_is_given_up_with_a_sentence(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = installed("wandb", monkeypatch)
    calls.broken = (broken,)
    said = logged(changed(digits_config(), log={"wandb": "online"}), tmp_path / "run")
    assert said == ["wandb gets no more numbers: the server is away; training goes on, and metrics.jsonl has them all."]
    assert calls[-1][0] == broken, "it was called again"


@pytest.mark.parametrize("name", STAND_INS)
def test_package_that_is_missing_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, STAND_INS[name][0], None)
    (said,) = logged(changed(digits_config(), log=ASKED[name]), tmp_path / "run")
    assert f'pip install "vmf_kernels[{name}]"' in said
    assert "training goes on" in said


def test_nothing_is_tracked_unless_a_person_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [installed(name, monkeypatch) for name in STAND_INS]
    assert logged(digits_config(), tmp_path / "run") == []
    assert calls == [[], []]


@pytest.mark.parametrize(
    ("given", "said"), [({"mlflow": "here"}, "log.mlflow is here"), ({"project": ""}, "log.project")]
)
def test_setting_that_says_nothing_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PretrainError, match=said):
        LogConfig(**given)
