"""Every baseline computes the loss that it is compared with; one that computes another loss is refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.baselines import BASELINES
from bench.gpu.agreement import exact_outcome, refuse_disagreement
from bench.gpu.losses import variants
from bench.workloads import HEAD_SHAPES, TOY_HEAD_SHAPES
from vmf_bench.agreement import outcome_of, relative_errors
from vmf_bench.errors import DisagreementError, UnavailableError
from vmf_bench.inputs import HeadInputs, HeadShape, matched_shape
from vmf_bench.ours import ours, stored_logits
from vmf_bench.peers import chunks
from vmf_bench.peers.attention import attention
from vmf_bench.peers.chunks import chunks_of_images
from vmf_bench.peers.peer import eager

CPU = torch.device("cpu")
RUNNING = ("B1", "B2", "B3", "B3g")  # on the CPU, with any torch


@pytest.fixture(params=TOY_HEAD_SHAPES, ids=lambda shape: shape.name)
def inputs(request: pytest.FixtureRequest) -> HeadInputs:
    return HeadInputs.of(request.param, device=CPU)


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="eager")


def test_truth_is_the_dense_formula(inputs: HeadInputs) -> None:
    """The fp32 outcome everything is checked against, against autograd in fp64 written out here."""
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves.items()}
    weight = wide["magnitude"] * torch.nn.functional.normalize(wide["direction"], dim=1)
    teacher = inputs.teacher_magnitude * torch.nn.functional.normalize(inputs.teacher_direction, dim=1)
    log_p = (wide["features"] @ weight.T / 0.1).log_softmax(dim=1)
    q = ((inputs.teacher_features.double() @ teacher.double().T - inputs.center) / 0.04).softmax(dim=1)
    pairs_TS = torch.kron(inputs.pair_weights, torch.diag(inputs.image_weights)).double()
    loss = -(pairs_TS * (q @ log_p.T)).sum()
    loss.backward()
    truth = {"loss": loss.detach()} | {name: leaf.grad for name, leaf in wide.items() if leaf.grad is not None}
    exact, entropy = exact_outcome(inputs)
    errors = relative_errors(exact, truth)
    assert max(errors.values()) < 1e-5, f"relative errors {errors}"
    expected = -(pairs_TS.sum(dim=1) @ torch.xlogy(q, q).sum(dim=1)).item()
    assert entropy == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", RUNNING)
def test_baseline_agrees(inputs: HeadInputs, name: str) -> None:
    outcome = outcome_of(BASELINES[name].prepare(inputs, traced), inputs)
    refuse_disagreement(relative_errors(outcome, exact_outcome(inputs)[0]))


@pytest.mark.parametrize("name", ["B3", "B3g"])
def test_chunked_baseline_agrees_over_several_chunks(
    inputs: HeadInputs, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CPU_CACHE_BYTES", 10_000)
    assert len(list(chunks_of_images(inputs, chunks.cache_bytes_of(CPU)))) > 1, "one chunk proves nothing"
    outcome = outcome_of(BASELINES[name].prepare(inputs, eager), inputs)
    refuse_disagreement(relative_errors(outcome, exact_outcome(inputs)[0]))


def test_attention_baseline_has_the_value(inputs: HeadInputs) -> None:
    """Its gradients are autograd's and need a GPU."""
    detached: dict[str, Any] = {f"student_{name}": leaf.detach() for name, leaf in inputs.leaves.items()}
    frozen = replace(inputs, **detached)
    with torch.no_grad():
        value = attention(frozen, frozen.teacher_bias, None).item()
    assert value == pytest.approx(exact_outcome(inputs)[0]["loss"].item(), rel=5e-3)


def test_attention_baseline_says_why_it_does_not_run(inputs: HeadInputs) -> None:
    with pytest.raises(UnavailableError, match="no backward pass on the CPU"):
        BASELINES["B4"].prepare(inputs, eager)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no chunked loss")
def test_linear_cross_entropy_baseline_agrees(inputs: HeadInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its reference path, which takes probability targets in any version."""
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", lambda: None)
    outcome = outcome_of(BASELINES["B5"].prepare(inputs, eager), inputs)
    refuse_disagreement(relative_errors(outcome, exact_outcome(inputs)[0]))


def test_linear_cross_entropy_baseline_says_that_torch_lacks_it(
    inputs: HeadInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(UnavailableError, match="has no chunked linear_cross_entropy"):
        BASELINES["B5"].prepare(inputs, eager)


def test_liger_baseline_agrees(inputs: HeadInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with its signature and its formula, the mean over rows of KL(q, p)."""
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setattr("vmf_bench.peers.liger.importlib.util.find_spec", lambda name: name)
    chunked = types.ModuleType("liger_kernel.chunked_loss")
    chunked.LigerFusedLinearJSDLoss = _StandInForLiger  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", chunked)
    exact, entropy = exact_outcome(inputs)
    outcome = outcome_of(BASELINES["B6"].prepare(inputs, eager), inputs)
    assert relative_errors(outcome, exact)["loss"] > 0.1, "a KL without the entropy is not the cross-entropy"
    outcome["loss"] = outcome["loss"] + entropy
    refuse_disagreement(relative_errors(outcome, exact))


class _StandInForLiger:
    def __init__(self, **options: Any) -> None:
        assert options["weight_hard_loss"] == 0
        assert options["weight_soft_loss"] == 1
        assert options["beta"] == 0

    def __call__(self, x_S: Tensor, w_S: Tensor, x_T: Tensor, w_T: Tensor, labels: Tensor, *bias: Tensor) -> Tensor:
        assert bias[0] is None
        assert len(labels) == len(x_S)
        log_p, log_q = (x_S @ w_S.T).float().log_softmax(-1), (x_T @ w_T.T + bias[1]).float().log_softmax(-1)
        return torch.nn.functional.kl_div(log_p, log_q.detach(), reduction="batchmean", log_target=True)


def test_liger_baseline_says_that_it_is_not_installed(inputs: HeadInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_bench.peers.liger.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="not installed"):
        BASELINES["B6"].prepare(inputs, eager)


@pytest.mark.parametrize("loss", [ours("streaming"), ours("reference"), stored_logits])
def test_ours_agrees(inputs: HeadInputs, loss: Callable[[HeadInputs], Tensor]) -> None:
    refuse_disagreement(relative_errors(outcome_of(loss, inputs), exact_outcome(inputs)[0]))


WRONG: dict[str, Callable[[HeadInputs], HeadInputs]] = {
    "teacher temperature": lambda inputs: replace(inputs, teacher_temperature=0.05),
    "student temperature": lambda inputs: replace(inputs, student_temperature=0.12),
    "centre": lambda inputs: replace(inputs, center=3 * inputs.center),
    "weights of images": lambda inputs: replace(inputs, image_weights=1.1 * inputs.image_weights),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_a_baseline_with_something_wrong_is_refused(inputs: HeadInputs, what: str) -> None:
    """Negative control."""
    chunked = BASELINES["B3g"].prepare(inputs, eager)
    outcome = outcome_of(lambda inputs: chunked(WRONG[what](inputs)), inputs)
    with pytest.raises(DisagreementError, match="is off by"):
        refuse_disagreement(relative_errors(outcome, exact_outcome(inputs)[0]))


def test_nan_is_refused() -> None:
    """Negative control."""
    with pytest.raises(DisagreementError, match="features is off by nan"):
        refuse_disagreement({"loss": 0.0, "features": float("nan")})


def test_a_loss_without_a_gradient_is_refused(inputs: HeadInputs) -> None:
    """Negative control."""
    with pytest.raises(DisagreementError, match="no gradient reaches magnitude, direction"):
        outcome_of(lambda inputs: inputs.student_features.float().sum(), inputs)


@pytest.mark.parametrize("cache_bytes", [1, 10_000, 10**9])
def test_chunks_cover_every_image_once(inputs: HeadInputs, cache_bytes: int) -> None:
    images = torch.arange(inputs.shape.images)
    chunks = [images[chunk] for chunk in chunks_of_images(inputs, cache_bytes)]
    assert torch.cat(chunks).equal(images)
    assert all(len(chunk) for chunk in chunks), "an empty chunk costs two launches"


def test_a_chunk_fits_the_cache_it_is_sized_to() -> None:
    l2_bytes = 50 * 2**20
    for shape in HEAD_SHAPES:
        inputs = types.SimpleNamespace(shape=shape, dtype=torch.bfloat16)
        chunk = next(iter(chunks_of_images(inputs, l2_bytes)))  # type: ignore[arg-type]
        rows = (chunk.stop - chunk.start) * (shape.student_views + shape.teacher_views)
        assert 2 * rows * shape.prototypes <= l2_bytes, f"{shape.name}: {rows} rows do not fit"


def test_the_design_s_workloads_are_there() -> None:
    names = [shape.name for shape in HEAD_SHAPES]
    assert names[:4] == [f"{rows} K65536 D256" for rows in ("640/128", "3771/3771", "1280/256", "16384/16384")]
    for size in ("K131072 D256", "K65536 D384"):
        assert {f"640/128 {size}", f"3771/3771 {size}"} <= set(names)


def test_operations_are_counted_as_the_design_counts_them() -> None:
    assert HeadShape(64).flops == 8 * (640 + 128) * 65_536 * 256
    assert matched_shape(3771).flops == 8 * 2 * 3771 * 65_536 * 256


def test_every_variant_is_named_once_and_plain_torch_only_where_it_is_quick() -> None:
    small, large = variants("triton", HeadShape(64)), variants("triton", matched_shape(3771))
    assert set(BASELINES) < set(small), "a baseline is missing"
    assert "streaming" in small
    assert "streaming" not in large
    assert "DINOLoss" not in large
    assert next(iter(small)) == "B1", "what is prepared first cannot be lost to a later crash"
