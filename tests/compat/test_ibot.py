"""The drop-in for bytedance/ibot: signatures, heads, training steps, and checkpoints of its shape loaded its way and ours."""

from __future__ import annotations

import argparse
import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fuzz.statements.ibot import PublishedIBOTHead, PublishedIBOTLoss
from tests.losses.ibot_steps import (
    GLOBAL,
    PROTOTYPES,
    Batch,
    batches,
    heads,
    make_batch,
    our_step,
    published_step,
    schedule,
    train,
    twin_of,
)
from tests.measure import allocations_of, worst_error
from vmf_kernels import PrototypeLogits
from vmf_kernels.compat import ibot

pytestmark = pytest.mark.quick

IN_DIM, TOKENS = 6, 5
SIZES: dict[str, Any] = {"patch_out_dim": 23, "hidden_dim": 16, "bottleneck_dim": 8}
SHAPES = [{"nlayers": 1}, {"nlayers": 2}, {"norm": "ln"}, {"norm": "bn"}, {"act": "relu"}, {"shared_head": True}]
REQUIRED = inspect.Parameter.empty


def pair(**options: Any) -> tuple[ibot.iBOTHead, PublishedIBOTHead]:
    """Ours and the published head with its parameters, norms of either sign."""
    given = {"norm_last_layer": False, **SIZES, **options}
    published = PublishedIBOTHead(IN_DIM, 31, **given)
    with torch.no_grad():
        for layer in (published.last_layer, published.last_layer2):
            layer.weight_g.copy_((0.5 + torch.rand_like(layer.weight_g)) * torch.randn_like(layer.weight_g).sign())
    ours = ibot.iBOTHead(IN_DIM, 31, **given)
    ours.load_state_dict(published.state_dict())
    return ours, published


def parts(output: Any) -> list[Tensor]:
    """Stored logits of either head, for class tokens alone or for all."""
    several = output if isinstance(output, tuple) else (output,)
    return [part.materialize() if isinstance(part, PrototypeLogits) else part for part in several]


@pytest.mark.parametrize("shape", [(4, 1 + TOKENS, IN_DIM), (4, IN_DIM)], ids=["all-tokens", "class-tokens"])
@pytest.mark.parametrize("options", SHAPES, ids=lambda options: "-".join(map(str, *options.items())))
def test_head_gives_the_published_logits_and_gradients(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    x, records = torch.randn(shape), []
    for head in pair(**options):
        given = x.clone().requires_grad_()
        logits = parts(head(given))
        sum((part * part.detach().sin()).sum() for part in logits).backward()  # type: ignore[union-attr]
        gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
        if options == {"norm": "bn"}:  # 0 but for rounding: the mean takes the biases before it out again
            gradients = {k: v for k, v in gradients.items() if k not in ("mlp.0.bias", "mlp.3.bias")}
        assert given.grad is not None
        records.append({f"logits {i}": part.detach() for i, part in enumerate(logits)} | {"x": given.grad} | gradients)
    error, name = worst_error(*records)
    assert len([key for key in records[0] if key.startswith("logits")]) == len(shape) - 1
    assert error <= 1e-5, f"{name}: relative error {error:.2e}, budget 1e-05"


@pytest.mark.parametrize("options", SHAPES, ids=lambda options: "-".join(map(str, *options.items())))
def test_head_has_the_published_keys_and_order_of_parameters(options: dict[str, Any]) -> None:
    """The order is how a checkpoint of the optimizer finds its tensors."""
    ours, published = pair(**options)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in published.state_dict().items()
    ]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in published.named_parameters()]


def test_keys_are_the_documented_ones() -> None:
    """The published side of the comparison, spelt out: a shared slip would pass above."""
    layers = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    prototypes = [f"{layer}.weight_{part}" for layer in ("last_layer", "last_layer2") for part in "gv"]
    assert list(ibot.iBOTHead(IN_DIM, 31, **SIZES).state_dict()) == layers + prototypes
    assert list(ibot.iBOTHead(IN_DIM, 31, shared_head=True, **SIZES).state_dict()) == layers + prototypes


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_state_of_torchs_weight_norm_loads() -> None:
    layer = nn.utils.weight_norm(nn.Linear(8, 31, bias=False))
    head = ibot.iBOTHead(IN_DIM, 31, **SIZES)
    head.last_layer.load_state_dict(layer.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(head.last_layer(x).materialize(), layer(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_norm_last_layer_freezes_both_layers_norms_at_one(frozen: bool) -> None:
    head = ibot.iBOTHead(IN_DIM, 31, norm_last_layer=frozen, **SIZES)
    for layer in (head.last_layer, head.last_layer2):
        assert layer.weight_g.eq(1).all()
        assert (layer.weight_g.requires_grad, layer.weight_v.requires_grad) == (not frozen, True)


def test_a_copied_shared_head_still_shares() -> None:
    head = copy.deepcopy(ibot.iBOTHead(IN_DIM, 31, shared_head=True, **SIZES))
    assert head.last_layer2 is head.last_layer
    separate = copy.deepcopy(ibot.iBOTHead(IN_DIM, 31, **SIZES))
    assert separate.last_layer2 is not separate.last_layer


@pytest.mark.parametrize("local_call", ["all-tokens", "class-tokens"])
@pytest.mark.parametrize("shared", [False, True])
def test_head_and_loss_train_as_the_published_ones(shared: bool, local_call: str) -> None:
    """Five steps; local crops go through the head as the published trainer sends them, or as class tokens alone."""
    student, teacher = heads(torch.float64, prototypes=(90, 90), shared=shared)
    twins = twin_of(student), twin_of(teacher).requires_grad_(False)
    published, ours = PublishedIBOTLoss(*schedule((90, 90))).double(), ibot.iBOTLoss(*schedule((90, 90))).double()
    expected = train(*twins, published, published_step(published), batches(torch.float64))

    def step(student: Any, teacher: Any, batch: Batch, epoch: int) -> dict[str, Tensor]:
        assert batch.local is not None
        local = student(batch.local)[0] if local_call == "all-tokens" else student(batch.local[:, 0])
        return ours(student(batch.crops), teacher(batch.views), local, batch.masks, epoch)  # type: ignore[no-any-return]

    error, name = worst_error(train(student, teacher, ours, step, batches(torch.float64)), expected)
    assert error <= 1e-10, f"{name}: relative error {error:.2e}, budget 1e-10"


def test_the_published_head_works_with_our_loss() -> None:
    """Stored logits: one change less, and the memory of the logits."""
    student, teacher = (twin_of(head).float() for head in heads())
    losses = ibot.iBOTLoss(*schedule()), PublishedIBOTLoss(*schedule())
    values = [published_step(loss)(student, teacher, make_batch(0), 0)["loss"] for loss in losses]
    torch.testing.assert_close(*values)


MANY = 200_003


def test_patch_logits_of_local_crops_are_never_computed() -> None:
    """Sent as the published trainer sends them: all tokens in, class tokens kept; nor do patches' prototypes get a gradient."""
    head = ibot.iBOTHead(IN_DIM, 31, **SIZES | {"patch_out_dim": MANY})
    local = torch.randn(8, 1 + TOKENS, IN_DIM, requires_grad=True)
    kept: list[PrototypeLogits] = []

    def step() -> None:
        kept[:] = [head(local)[0]]
        torch.autograd.backward(kept[0].features.sum())

    largest = allocations_of(step).largest
    assert largest < 8 * TOKENS * MANY, f"{largest} bytes at once"
    assert kept[0].shape == (8, 31)
    assert head.last_layer2.weight_v.grad is None
    assert local.grad is not None
    stored = allocations_of(lambda: head(local)[1].materialize()).largest
    assert stored >= 8 * TOKENS * MANY * 4, "negative control: stored patch logits are not seen"


@pytest.mark.parametrize(("call", "rows"), [("all-tokens", 8 * (1 + TOKENS)), ("class-tokens", 8)])
def test_the_mlp_runs_over_what_it_is_given(call: str, rows: int) -> None:
    """What the README's change of the trainer saves: every token of a local crop but one."""
    head = ibot.iBOTHead(IN_DIM, 31, **SIZES)
    seen: list[int] = []
    head.mlp.register_forward_hook(lambda module, given, out: seen.append(out.shape[0]))
    local = torch.randn(8, 1 + TOKENS, IN_DIM)
    head(local if call == "all-tokens" else local[:, 0])
    assert seen == [rows]


def test_class_tokens_alone_give_the_same_logits() -> None:
    head = ibot.iBOTHead(IN_DIM, 31, **SIZES)
    local = torch.randn(8, 1 + TOKENS, IN_DIM)
    torch.testing.assert_close(head(local)[0].features, head(local[:, 0]).features)


def test_autocast_sets_the_dtype_of_the_logits() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        cls, patches = ibot.iBOTHead(IN_DIM, 31, **SIZES)(torch.randn(4, 1 + TOKENS, IN_DIM))
    assert (cls.dtype, patches.dtype) == (torch.bfloat16, torch.bfloat16)


def parameters(function: Any) -> list[tuple[str, Any]]:
    given = list(inspect.signature(function).parameters.values())[1:]
    return [(p.name, p.default) for p in given if p.kind != p.VAR_KEYWORD]


def test_signature_of_the_head_is_the_published_one() -> None:
    expected = [
        *(("in_dim", REQUIRED), ("out_dim", REQUIRED), ("patch_out_dim", 8192), ("norm", None), ("act", "gelu")),
        *(("last_norm", None), ("nlayers", 3), ("hidden_dim", 2048), ("bottleneck_dim", 256)),
        *(("norm_last_layer", True), ("shared_head", False)),
    ]
    assert parameters(ibot.iBOTHead.__init__) == expected
    kinds = [p.kind for p in inspect.signature(ibot.iBOTHead).parameters.values()]
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2 + [inspect.Parameter.KEYWORD_ONLY] * 9
    assert parameters(PublishedIBOTHead.__init__) == expected


@pytest.mark.parametrize("loss", [ibot.iBOTLoss, ibot.IBOTvMFLoss])
def test_signature_of_the_loss_starts_with_the_published_one(loss: Any) -> None:
    expected = [
        *((name, REQUIRED) for name in ("out_dim", "patch_out_dim", "ngcrops", "nlcrops", "warmup_teacher_temp")),
        *((name, REQUIRED) for name in ("teacher_temp", "warmup_teacher_temp2", "teacher_temp2")),
        *((name, REQUIRED) for name in ("warmup_teacher_temp_epochs", "nepochs")),
        *(("student_temp", 0.1), ("center_momentum", 0.9), ("center_momentum2", 0.9)),
        *(("lambda1", 1.0), ("lambda2", 1.0), ("mim_start_epoch", 0)),
    ]
    assert parameters(loss.__init__)[: len(expected)] == expected == parameters(PublishedIBOTLoss.__init__)
    added = list(inspect.signature(loss).parameters.values())[len(expected) :]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in added), f"{added} could be given by position"
    names = ["student_output", "teacher_output", "student_local_cls", "student_mask", "epoch"]
    assert [name for name, _ in parameters(loss.forward)] == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_norm": "bn"}, "last_norm is 'bn', a normalisation over logits, which are never stored here"),
        ({"norm": "csyncbn"}, "norm is 'csyncbn'; expected None or one of bn, syncbn, ln"),
        ({"act": "silu"}, "act is 'silu'; expected one of gelu, relu"),
        ({"bottleneck_dim": 0}, "bottleneck_dim are .*, 0; expected at least 1, 1, 1, 1 and 2"),
        ({"patch_out_dim": 0}, "expected at least 1, 1, 1, 1 and 2"),
    ],
    ids=["last_norm", "norm", "act", "bottleneck_dim", "patch_out_dim"],
)
def test_options_that_the_head_lacks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ibot.iBOTHead(IN_DIM, 31, **SIZES | options)


class MultiCrop(nn.Module):
    """Backbone and head under the published names."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(5, IN_DIM), head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.backbone(x))


def ours_and_published(**options: Any) -> tuple[MultiCrop, MultiCrop]:
    ours, published = (MultiCrop(head) for head in pair(**options))
    return ours, published


@pytest.fixture
def published() -> dict[str, Any]:
    """Student, teacher and loss of a run under way, the loss with centres that have moved."""
    student, teacher = (ours_and_published(shared_head=shared)[1] for shared in (False, True))
    loss = PublishedIBOTLoss(31, 31, GLOBAL, 0, *schedule()[4:])
    output = teacher(torch.randn(4, 1 + TOKENS, 5))
    loss(output, output, None, [torch.ones(2, TOKENS, 1)] * GLOBAL, 0)
    return {"student": student, "teacher": teacher, "ibot_loss": loss}


@pytest.fixture
def checkpoint(published: dict[str, Any]) -> dict[str, Any]:
    """What the published trainer saves: the student under DDP, the teacher not, and its command line."""
    student = published["student"]
    return {
        "student": {f"module.{key}": value for key, value in student.state_dict().items()},
        "teacher": published["teacher"].state_dict(),
        "optimizer": torch.optim.AdamW(student.parameters()).state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", out_dim=31, lr=0.0005, shared_head=False),
        "ibot_loss": published["ibot_loss"].state_dict(),
    }


def assert_same_network(ours: MultiCrop, published: MultiCrop) -> None:
    x = torch.randn(4, 1 + TOKENS, 5)
    for got, expected in zip(parts(ours(x)), published(x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("network", ["teacher", "student"])
@pytest.mark.parametrize("source", ["file", "mapping"])
def test_load_checkpoint_restores_networks_and_centers(
    source: str, network: str, checkpoint: dict[str, Any], published: dict[str, Any], tmp_path: Path
) -> None:
    model, loss = ours_and_published(shared_head=network == "teacher")[0], ibot.iBOTLoss(31, 31, *schedule()[2:])
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    given: Any = tmp_path / "checkpoint.pth" if source == "file" else checkpoint
    ibot.load_checkpoint(given, network=network, backbone=model.backbone, head=model.head, loss=loss)
    assert_same_network(model, published[network])
    for name in ("center", "center2"):
        assert torch.equal(getattr(loss, name), getattr(published["ibot_loss"], name))
        assert getattr(loss, name).ne(0).any()


def test_the_codebases_own_restart_loads_it(checkpoint: dict[str, Any], published: dict[str, Any]) -> None:
    """Its ``restart_from_checkpoint``: every entry by ``load_state_dict(strict=False)``, the loss by ``load_state_dict``."""
    student, teacher, loss = (
        nn.Module(),
        ours_and_published(shared_head=True)[0],
        ibot.iBOTLoss(31, 31, *schedule()[2:]),
    )
    student.module = ours_and_published()[0]  # as DDP wraps it
    reports = [
        student.load_state_dict(checkpoint["student"], strict=False),
        teacher.load_state_dict(checkpoint["teacher"], strict=False),
        loss.load_state_dict(checkpoint["ibot_loss"], strict=False),
    ]
    assert [(r.missing_keys, r.unexpected_keys) for r in reports] == [([], [])] * 3
    assert_same_network(student.module, published["student"])
    assert_same_network(teacher, published["teacher"])
    assert torch.equal(loss.center2, published["ibot_loss"].center2)


def test_the_optimizers_state_finds_its_tensors() -> None:
    """A published optimizer's state under our parameters: each has the momentum of its own tensor."""
    ours, published = ours_and_published()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (ours, published)]
    logits = parts(published(torch.randn(4, 1 + TOKENS, 5)))
    (logits[0].sin().sum() + logits[1].sin().sum()).backward()
    optimizers[1].step()
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    momenta = [
        {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
        for model, optimizer in zip((ours, published), optimizers, strict=True)
    ]
    assert worst_error(*momenta)[0] == 0
    assert all(momentum.ne(0).any() for momentum in momenta[1].values())


def test_a_checkpoint_of_ours_loads_into_the_published_code() -> None:
    model, other = ours_and_published()[0], ours_and_published()[1]
    loss, other_loss = ibot.iBOTLoss(*schedule()), PublishedIBOTLoss(*schedule())
    our_step(loss)(*heads(), make_batch(0), 0)
    other.load_state_dict(model.state_dict())
    other_loss.load_state_dict(loss.state_dict())
    assert_same_network(model, other)
    assert torch.equal(other_loss.center2, loss.center2)
    assert loss.center2.shape == (1, 1, PROTOTYPES[1])


def test_a_separate_students_state_in_a_shared_teacher_is_what_it_is_there() -> None:
    """The published default: the teacher's one layer ends up with the student's prototypes of patches."""
    (student, of_student), (teacher, of_teacher) = (
        pair(patch_out_dim=31, shared_head=shared) for shared in (False, True)
    )
    teacher.load_state_dict(student.state_dict(), strict=False)
    of_teacher.load_state_dict(of_student.state_dict(), strict=False)
    assert torch.equal(teacher.last_layer.weight_v, of_teacher.last_layer.weight_v)
    assert torch.equal(teacher.last_layer.weight_v, student.last_layer2.weight_v)


def test_a_missing_entry_is_named(checkpoint: dict[str, Any]) -> None:
    del checkpoint["ibot_loss"]
    with pytest.raises(ValueError, match=r"has the entries student, teacher, .* expected 'ibot_loss' among them"):
        ibot.load_checkpoint(checkpoint, loss=ibot.iBOTLoss(31, 31, *schedule()[2:]))
    with pytest.raises(ValueError, match="network is 'both'; expected one of teacher, student"):
        ibot.load_checkpoint(checkpoint, network="both")
