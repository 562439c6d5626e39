"""Every loss that is compared with computes the published one, in fp32 as in bf16, for both pairings."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from tests.bench_tool.toy import CPU, DTYPES, SHAPES
from vmf_bench.agreement import Outcome, outcome_of, relative_errors
from vmf_bench.check import expected_outcome, refuse_disagreement
from vmf_bench.errors import DisagreementError, UnavailableError
from vmf_bench.inputs import HeadInputs, HeadShape
from vmf_bench.peers.peer import eager
from vmf_bench.peers.stored import one_log_softmax
from vmf_bench.peers.table import PEERS

NOT_ON_A_CPU = {"flex-attention": "no backward pass on the CPU", "linear-cross-entropy-chunked": "chunk"}
INSTALLED = {"liger": "liger_kernel", "lightly": "lightly"}


def errors_of(name: str, inputs: HeadInputs) -> dict[str, float]:
    """Relative errors of a peer, its value with the targets' entropy."""
    expected, entropy = expected_outcome(inputs)
    outcome: Outcome = outcome_of(PEERS[name].prepare(inputs, eager), inputs)
    if PEERS[name].omits_teacher_entropy:
        outcome["loss"] = outcome["loss"] + entropy
    return relative_errors(outcome, expected)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", [name for name in PEERS if name not in NOT_ON_A_CPU])
def test_peer_computes_the_published_loss(name: str, shape: HeadShape, dtype: torch.dtype) -> None:
    if name in INSTALLED and importlib.util.find_spec(INSTALLED[name]) is None:
        pytest.skip(f"{INSTALLED[name]} is not installed")
    refuse_disagreement(errors_of(name, HeadInputs.of(shape, device=CPU, dtype=dtype)), dtype)


@pytest.mark.quick
@pytest.mark.parametrize("name", NOT_ON_A_CPU)
def test_peer_that_cannot_run_says_why(name: str) -> None:
    with pytest.raises(UnavailableError, match=NOT_ON_A_CPU[name]):
        PEERS[name].prepare(HeadInputs.of(SHAPES[0], device=CPU, dtype=torch.float32), eager)


@pytest.mark.quick
@pytest.mark.parametrize("name", INSTALLED)
def test_peer_that_is_not_installed_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"vmf_bench.peers.{name}.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="is not installed"):
        PEERS[name].prepare(HeadInputs.of(SHAPES[0], device=CPU, dtype=torch.float32), eager)


def test_losses_that_are_means_refuse_unequal_weights() -> None:
    inputs = HeadInputs.of(SHAPES[1], device=CPU, dtype=torch.float32)
    unequal = replace(inputs, image_weights=torch.arange(1.0, 8.0))
    with pytest.raises(UnavailableError, match=r"weights all rows alike|is not installed"):
        PEERS["lightly"].prepare(unequal, eager)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_temperature_is_refused(dtype: torch.dtype) -> None:
    """Negative control."""
    inputs = HeadInputs.of(SHAPES[0], device=CPU, dtype=dtype)
    expected, _ = expected_outcome(inputs)
    outcome = outcome_of(lambda inputs: one_log_softmax(replace(inputs, teacher_temperature=0.05)), inputs)
    with pytest.raises(DisagreementError, match="is off by"):
        refuse_disagreement(relative_errors(outcome, expected), dtype)
