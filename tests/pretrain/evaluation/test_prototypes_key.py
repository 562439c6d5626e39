"""What the key of the prototypes' result is made of."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vmf_pretrain.data.network_input import PHOTOGRAPHS, NetworkInput
from vmf_pretrain.evaluation.tasks import prototypes


def test_a_checkpoint_and_another_head_each_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    method = nn.Module()
    method.exported = nn.Linear(3, 2)
    evaluated: Any = SimpleNamespace(method=method, fed=NetworkInput(8, *PHOTOGRAPHS))
    task, keys = prototypes.PrototypesOfRun(), []
    for centred, change in ((False, 0.0), (False, 1.0), (True, 0.0)):
        monkeypatch.setattr(prototypes, "_restored", lambda _, centred=centred: centred)
        with torch.no_grad():
            method.exported.weight += change
        keys.append(task.depends_on_run(evaluated))
    assert keys[0]["head"] != keys[1]["head"], "another head has the same key"
    assert keys[1] != keys[2], "a checkpoint with the centre has the key of none"
