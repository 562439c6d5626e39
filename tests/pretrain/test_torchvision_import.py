"""torchvision's import is mended once, before anything else imports it, and only where it is broken."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.on_ranks import imported_after
from vmf_pretrain import torchvision_import

LACKING_OPERATORS = RuntimeError("operator torchvision::nms does not exist")


class RecordedLibrary:
    """Stands in for torch.library.Library, whose declarations would stay for the rest of the process."""

    def __init__(self, namespace: str, kind: str) -> None:
        self.namespace, self.kind = namespace, kind
        self.schemas: list[str] = []

    def define(self, schema: str) -> None:
        self.schemas.append(schema)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType | None]:
    """What the mended import sees as loaded modules."""
    loaded: dict[str, ModuleType | None] = {"torchvision": None, "torchvision.ops": None, "torchvisionary": None}
    monkeypatch.setattr(torchvision_import, "sys", SimpleNamespace(modules=loaded))
    monkeypatch.setattr(torch.library, "Library", RecordedLibrary)
    return loaded


def answer_imports(monkeypatch: pytest.MonkeyPatch, *answers: Exception | None) -> None:
    """Let one import after the other succeed (None) or fail."""
    remaining = iter(answers)

    def import_module(name: str) -> None:
        answer = next(remaining)
        if answer is not None:
            raise answer

    monkeypatch.setattr(torchvision_import, "importlib", SimpleNamespace(import_module=import_module))


def test_after_the_package_torchvision_timm_and_lightning_can_be_imported() -> None:
    wanted = {"torchvision.transforms.v2", "timm", "lightning.fabric"}
    assert wanted < set(imported_after(*sorted(wanted)))


@pytest.mark.quick
def test_second_import_declares_nothing() -> None:
    assert torchvision_import.import_torchvision() is None, (
        "torchvision was importable, yet schemas were declared again"
    )


@pytest.mark.quick
def test_missing_operators_are_declared_and_half_imported_modules_dropped(
    monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType | None]
) -> None:
    answer_imports(monkeypatch, LACKING_OPERATORS, None)
    declared: Any = torchvision_import.import_torchvision()
    assert (declared.namespace, declared.kind) == ("torchvision", "FRAGMENT")
    assert declared.schemas == list(torchvision_import.MISSING_OPERATORS)
    assert list(modules) == ["torchvisionary"], f"left over or lost: {list(modules)}"


@pytest.mark.quick
def test_working_torchvision_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType | None]
) -> None:
    answer_imports(monkeypatch, None)
    assert torchvision_import.import_torchvision() is None
    assert "torchvision.ops" in modules, "a working import was undone"


@pytest.mark.quick
def test_another_failure_is_passed_on(monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType | None]) -> None:
    answer_imports(monkeypatch, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        torchvision_import.import_torchvision()
    assert "torchvision.ops" in modules, "modules were dropped for a failure that is not ours to mend"
