"""Every loss that is compared with computes the published one, in fp32 as in bf16, for both pairings."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from tests.bench_tool.toy import CPU, DTYPES, SHAPES
from vmf_bench.agreement import Outcome, outcome_of, relative_errors
from vmf_bench.attempts import attempt
from vmf_bench.check import expected_outcome, refuse_disagreement
from vmf_bench.errors import DisagreementError, UnavailableError
from vmf_bench.inputs import HeadInputs, HeadShape
from vmf_bench.peers.peer import eager
from vmf_bench.peers.stored import one_log_softmax
from vmf_bench.peers.table import PEERS

NOT_ON_A_CPU = "flex-attention"
OF_SOME_TORCHES = "linear-cross-entropy", "linear-cross-entropy-chunked"
REFUSAL = rf"torch {re.escape(torch.__version__)} (has no (chunked )?linear_cross_entropy|does not chunk)"
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
@pytest.mark.parametrize("name", [name for name in PEERS if name not in (NOT_ON_A_CPU, *OF_SOME_TORCHES)])
def test_peer_computes_the_published_loss(name: str, shape: HeadShape, dtype: torch.dtype) -> None:
    if name in INSTALLED and importlib.util.find_spec(INSTALLED[name]) is None:
        pytest.skip(f"{INSTALLED[name]} is not installed")
    refuse_disagreement(errors_of(name, HeadInputs.of(shape, device=CPU, dtype=dtype)), dtype)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", OF_SOME_TORCHES)
def test_peer_that_only_some_torches_have_agrees_or_names_the_torch(
    name: str, shape: HeadShape, dtype: torch.dtype
) -> None:
    if name == OF_SOME_TORCHES[0] and not hasattr(functional, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    errors, outcome = attempt(lambda: errors_of(name, HeadInputs.of(shape, device=CPU, dtype=dtype)))
    if errors is not None:
        refuse_disagreement(errors, dtype)
    else:
        assert name == OF_SOME_TORCHES[1], f"torch has the other: {outcome}"
        assert re.search(REFUSAL, outcome["reason"]), f"{outcome}"


@pytest.mark.quick
@pytest.mark.parametrize("name", OF_SOME_TORCHES)
def test_a_torch_without_a_loss_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(functional, "linear_cross_entropy", raising=False)
    with pytest.raises(UnavailableError, match=REFUSAL):
        PEERS[name].prepare(HeadInputs.of(SHAPES[0], device=CPU, dtype=torch.float32), eager)


@pytest.mark.quick
def test_peer_that_cannot_run_says_why() -> None:
    with pytest.raises(UnavailableError, match="no backward pass on the CPU"):
        PEERS[NOT_ON_A_CPU].prepare(HeadInputs.of(SHAPES[0], device=CPU, dtype=torch.float32), eager)


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
