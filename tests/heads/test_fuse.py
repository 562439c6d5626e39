"""Heads of others made to return unstored logits: the same numbers, parameters, names and training, and what is refused.

Legend: B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
import functools
import importlib
import io
import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.nn.utils.weight_norm import WeightNorm

from tests.fuzz.statements.dino import follow
from tests.measure import relative_error, worst_error
from vmf_kernels import DINOHead, DINOLoss, DINOvMFLoss, PrototypeLogits
from vmf_kernels.heads.fuse import FusedLinear, fuse_head

pytestmark = pytest.mark.quick

IN_DIM, DIM, PROTOTYPES, CROPS, IMAGES = 12, 24, 301, 4, 3
BUDGET = 1e-10  # relative, in norm, of fp64: a few steps amplify the rounding of fp32 beyond what tells formulas apart
NORMS = torch.linspace(0.5, 1.5, PROTOTYPES)[:, None]


def hooked(layer: nn.Linear, dim: int | None = 0) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)  # type: ignore[arg-type]


class Head(nn.Module):
    """MLP, normalised bottleneck, last layer: of the three ways in which published heads store theirs."""

    def __init__(self, style: str, *, bias: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(IN_DIM, 16), nn.GELU(), nn.Linear(16, DIM))
        self.last_layer = nn.Linear(DIM, PROTOTYPES, bias=bias)
        if style == "hook":
            hooked(self.last_layer).weight_g.data.copy_(NORMS)
        elif style == "parametrization":
            parametrizations.weight_norm(self.last_layer)
            self.last_layer.get_parameter("parametrizations.weight.original0").data.copy_(NORMS)
        else:
            self.last_layer.weight.data.mul_(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(functional.normalize(self.mlp(x), dim=-1))  # type: ignore[no-any-return]


class TwoOutputs(Head):
    """As iBOT's: one last layer for the images and one for their patches, which may be the same."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__("hook")
        self.last_layer2 = self.last_layer if shared else hooked(nn.Linear(DIM, 57, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows = functional.normalize(self.mlp(x), dim=-1)
        return self.last_layer(rows[:, 0]), self.last_layer2(rows[:, 1:])


STYLES = ("plain", "hook", "parametrization")
MODULES: dict[str, Callable[[], nn.Module]] = {
    **{style: functools.partial(Head, style) for style in STYLES},
    "sequential": lambda: nn.Sequential(nn.Linear(IN_DIM, 16), nn.GELU(), nn.Linear(16, PROTOTYPES, bias=False)),
    "sequential-parametrized": lambda: nn.Sequential(
        nn.Linear(IN_DIM, 16), parametrizations.weight_norm(nn.Linear(16, PROTOTYPES, bias=False)), nn.Identity()
    ),
    "linear": lambda: nn.Linear(IN_DIM, PROTOTYPES, bias=False),
    "hooked-linear": lambda: hooked(nn.Linear(IN_DIM, PROTOTYPES, bias=False)),
}
KEYS = {
    "plain": ["last_layer.weight"],
    "hook": ["last_layer.weight_g", "last_layer.weight_v"],
    "parametrization": [
        "last_layer.parametrizations.weight.original0",
        "last_layer.parametrizations.weight.original1",
    ],
}


def rebuilt(module: nn.Module, style: str) -> nn.Module:
    """Another head with the same parameters; one with a weight-norm hook cannot be deep-copied."""
    twin = Head(style).double()
    twin.load_state_dict(module.state_dict())
    for theirs, ours in zip(twin.parameters(), module.parameters(), strict=True):
        theirs.requires_grad_(ours.requires_grad)
    return twin


@pytest.mark.parametrize("name", MODULES)
def test_fused_logits_are_those_of_the_head(name: str) -> None:
    module, x = MODULES[name](), torch.randn(5, IN_DIM)
    expected = module(x)
    fused = fuse_head(module)
    logits = fused(x)
    assert fused is module
    assert isinstance(logits, PrototypeLogits)
    assert logits.shape == expected.shape
    error = relative_error(logits.materialize(), expected)
    assert error <= 1e-6, f"relative error {error:.2e}"


@pytest.mark.parametrize("shared", [False, True])
def test_both_last_layers_of_a_two_output_head_are_fused(shared: bool) -> None:
    head, x = TwoOutputs(shared=shared), torch.randn(5, 3, IN_DIM)
    expected = head(x)
    fuse_head(head)
    for logits, wanted in zip(head(x), expected, strict=True):
        assert isinstance(logits, PrototypeLogits)
        torch.testing.assert_close(logits.materialize(), wanted)
    assert (head.last_layer is head.last_layer2) == shared


@pytest.mark.parametrize("style", STYLES)
def test_nothing_else_of_the_module_changes(style: str) -> None:
    head = Head(style).double().eval()
    heard: list[str] = []
    head.last_layer.register_forward_pre_hook(lambda *_: heard.append("layer"))
    head.register_forward_hook(lambda *_: heard.append("head"))
    next(iter(head.last_layer.parameters())).requires_grad_(False)
    modules, parameters = list(head.named_modules()), list(head.named_parameters())
    state, before = list(head.state_dict()), [(p.dtype, p.requires_grad) for p in head.parameters()]
    fuse_head(head)
    assert [name for name, _ in modules] == [name for name, _ in head.named_modules()]
    assert all(old is new for (_, old), (_, new) in zip(modules, head.named_modules(), strict=True))
    assert all(n == m and p is q for (n, p), (m, q) in zip(parameters, head.named_parameters(), strict=True))
    assert state == list(head.state_dict())
    assert state[-len(KEYS[style]) :] == KEYS[style]
    assert before == [(p.dtype, p.requires_grad) for p in head.parameters()]
    assert not any(m.training for m in head.modules())
    assert isinstance(head.last_layer, nn.Linear)
    head(torch.randn(2, IN_DIM).double())
    assert heard == ["layer", "head"]


@pytest.mark.parametrize("style", ["hook", "parametrization"])
def test_the_forward_pass_never_computes_the_effective_weight(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, x = [Head(style), fuse_head(Head(style))], torch.randn(2, IN_DIM)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("the effective weight was computed")

    monkeypatch.setattr(torch, "_weight_norm", refuse)
    monkeypatch.setattr(WeightNorm, "compute_weight", refuse)
    with pytest.raises(AssertionError, match="the effective weight was computed"):  # negative control
        heads[0](x)
    heads[1](x)


@pytest.mark.parametrize("style", STYLES)
def test_the_weight_can_still_be_read(style: str) -> None:
    head = Head(style)
    head(torch.randn(2, IN_DIM))  # the hook computes the weight with each call
    expected = head.last_layer.weight.detach().clone()
    fuse_head(head)
    torch.testing.assert_close(head.last_layer.weight, expected)


def train(student: nn.Module, teacher: nn.Module, loss: DINOLoss, steps: range, optimizer: Any) -> dict[str, Tensor]:
    """Losses, gradients and centres by step."""
    results: dict[str, Tensor] = {}
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        crops = torch.randn(CROPS, IMAGES, IN_DIM, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        value = loss(student(crops.flatten(0, 1)), teacher(crops[:2].flatten(0, 1) + 0.1), 0)
        value.backward()
        named = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        named |= {"loss": value.detach(), "center": loss.center.clone()}
        results |= {f"step {step} {name}": tensor for name, tensor in named.items()}
        optimizer.step()
        follow(teacher, student, 0.9)
    return results


def make_loss() -> DINOLoss:
    return DINOLoss(PROTOTYPES, CROPS, 0.04, 0.04, 0, 1).double()


def pairs_of_runs(style: str) -> list[tuple[nn.Module, nn.Module]]:
    """(student, teacher) twice, with the same numbers."""
    student, teacher = Head(style).double(), Head(style).double().requires_grad_(False)
    return [(student, teacher), (rebuilt(student, style), rebuilt(teacher, style))]


@pytest.mark.parametrize("style", STYLES)
def test_training_equals_that_of_the_head_on_stored_logits(style: str) -> None:
    runs = []
    for (student, teacher), fuse in zip(pairs_of_runs(style), (False, True), strict=True):
        if fuse:
            fuse_head(student), fuse_head(teacher)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        runs.append(train(student, teacher, make_loss(), range(4), optimizer))
    error, name = worst_error(runs[1], runs[0])
    assert error <= BUDGET, f"{name}: relative error {error:.2e}, budget {BUDGET:.0e}"
    moved = relative_error(runs[0]["step 3 loss"], runs[0]["step 0 loss"])
    assert moved > 1e-3, f"four steps changed the loss by {moved:.2e}: nothing was trained"
    assert any("last_layer" in name for name in runs[0])


@pytest.mark.parametrize("style", STYLES)
def test_an_optimizer_made_before_fusing_keeps_training(style: str) -> None:
    """Two steps of Adam stored, then two fused, against four stored: its moments and teacher stay in use."""
    runs = []
    for (student, teacher), fuse in zip(pairs_of_runs(style), (False, True), strict=True):
        optimizer, loss = torch.optim.Adam(student.parameters(), lr=1e-2), make_loss()
        first = train(student, teacher, loss, range(2), optimizer)
        if fuse:
            fuse_head(student), fuse_head(teacher)
        runs.append(first | train(student, teacher, loss, range(2, 4), optimizer))
    error, name = worst_error(runs[1], runs[0])
    assert error <= 100 * BUDGET, f"{name}: relative error {error:.2e}"  # Adam divides by the smallest gradients


def test_a_fused_plain_head_trains_under_dino_vmf() -> None:
    student, teacher = (fuse_head(Head("plain").double()) for _ in range(2))
    loss = DINOvMFLoss(PROTOTYPES, CROPS, 0.04, 0.04, 0, 1)
    results = train(student, teacher, loss, range(2), torch.optim.SGD(student.parameters(), lr=0.1))
    assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.parametrize("style", STYLES)
def test_state_dicts_go_both_ways(style: str) -> None:
    x, fused, plain = torch.randn(4, IN_DIM), fuse_head(Head(style)), Head(style)
    assert relative_error(fused(x).materialize(), plain(x)) > 1e-2, "two heads drawn anew agree"
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(x).materialize(), plain(x))
    other = fuse_head(Head(style))
    plain.load_state_dict(other.state_dict())
    torch.testing.assert_close(other(x).materialize(), plain(x))


def test_a_checkpoint_of_the_hook_loads_into_a_fused_parametrization() -> None:
    old, new, x = Head("hook"), fuse_head(Head("parametrization")), torch.randn(4, IN_DIM)
    new.load_state_dict(old.state_dict())
    torch.testing.assert_close(new(x).materialize(), old(x))


@pytest.mark.parametrize("name", MODULES)
def test_a_fused_head_is_deep_copied(name: str) -> None:
    module, x = fuse_head(MODULES[name]()), torch.randn(4, IN_DIM)
    module(x).materialize().sum().backward()  # a used head copies too
    twin = copy.deepcopy(module)
    before = twin(x).materialize()
    torch.testing.assert_close(before, module(x).materialize(), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(twin(x).materialize(), before, rtol=0, atol=0)
    assert list(twin.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("style", ["plain", "hook"])
def test_a_fused_head_is_pickled_whole(style: str) -> None:
    head, x, file = fuse_head(Head(style)), torch.randn(4, IN_DIM), io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(x).materialize(), head(x).materialize(), rtol=0, atol=0)


def test_a_parametrized_head_is_pickled_by_its_state_dict_only() -> None:
    """What torch says of every parametrized module."""
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        torch.save(fuse_head(Head("parametrization")), io.BytesIO())


def test_parametrization_can_be_removed_after_fusing() -> None:
    head, x = fuse_head(Head("parametrization")), torch.randn(4, IN_DIM)
    before = head(x).materialize()
    parametrize.remove_parametrizations(head.last_layer, "weight")  # type: ignore[arg-type]
    assert list(head.state_dict())[-1:] == KEYS["plain"]
    torch.testing.assert_close(head(x).materialize(), before)


@pytest.mark.parametrize("name", MODULES)
def test_fusing_twice_changes_nothing_more(name: str) -> None:
    module = fuse_head(MODULES[name]())
    before = [type(m) for m in module.modules()]
    assert fuse_head(module) is module
    assert [type(m) for m in module.modules()] == before


def test_the_head_of_the_library_stays_as_it_is() -> None:
    head = DINOHead(IN_DIM, PROTOTYPES, hidden_dim=16, bottleneck_dim=DIM)
    before = [type(m) for m in head.modules()]
    assert fuse_head(head) is head
    assert fuse_head(head.last_layer) is head.last_layer
    assert [type(m) for m in head.modules()] == before


def test_a_named_layer_is_fused_wherever_it_is() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(IN_DIM, IN_DIM), "head": Head("plain"), "other": nn.Softmax(dim=1)})
    fuse_head(model, "head.last_layer")
    assert isinstance(model["head"].last_layer, FusedLinear)
    assert type(model["backbone"]) is nn.Linear


def test_lightlys_head_is_fused() -> None:
    importlib.import_module("vmf_pretrain.with_torchvision")  # first, as it mends an import that lightly fails at
    heads = importlib.import_module("lightly.models.modules.heads")
    for frozen, batch_norm in itertools.product((True, False), repeat=2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            head = heads.DINOProjectionHead(IN_DIM, 16, DIM, PROTOTYPES, batch_norm=batch_norm, norm_last_layer=frozen)
        x = torch.randn(4, IN_DIM)
        expected = head(x)
        fuse_head(head)
        torch.testing.assert_close(head(x).materialize(), expected)
        head(x).materialize().sum().backward()
        head.cancel_last_layer_gradients(current_epoch=-2)
        assert all(p.grad is None for p in head.last_layer.parameters())


class Odd(nn.Linear):
    """A subclass that could compute anything."""


def doubled() -> nn.Module:
    return parametrize.register_parametrization(
        parametrizations.weight_norm(nn.Linear(4, 5, bias=False)), "weight", nn.Identity()
    )


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bias": (lambda: Head("plain", bias=True), "'last_layer' is a Linear with a bias"),
    "bias-hook": (lambda: Head("hook", bias=True), "'last_layer' is a Linear with a bias"),
    "bias-parametrized": (lambda: Head("parametrization", bias=True), "is a ParametrizedLinear with a bias"),
    "bare-bias": (lambda: nn.Linear(4, 5), "cannot fuse Linear: it is a Linear with a bias"),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Softmax(dim=1)), "'1' is a Softmax"),
    "batch-norm": (lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)), "'1' is a BatchNorm1d"),
    "conv": (lambda: nn.Sequential(nn.Conv1d(4, 5, 1)), "'0' is a Conv1d"),
    "dim-1": (lambda: hooked(nn.Linear(4, 5, bias=False), dim=1), "weight norm over dim 1"),
    "dim-none": (lambda: hooked(nn.Linear(4, 5, bias=False), dim=None), "weight norm over dim None"),
    "parametrized-dim-1": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 5, bias=False), dim=1),
        "weight norm over dim 1",
    ),
    "spectral": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 5, bias=False)),
        "the parametrization _SpectralNorm of weight",
    ),
    "two-parametrizations": (doubled, "the parametrization _WeightNorm of weight, Identity of weight"),
    "spectral-hook": (
        lambda: spectral_norm(nn.Linear(4, 5, bias=False)),
        "a Linear whose weight is computed from weight_orig",
    ),
    "subclass": (lambda: Odd(4, 5, bias=False), "an Odd, a subclass of nn.Linear"),
    "parametrized-subclass": (lambda: parametrizations.weight_norm(Odd(4, 5, bias=False)), "a subclass of nn.Linear"),
    "sequence": (
        lambda: nn.ModuleDict({"last_layer": nn.Sequential(nn.Linear(4, 5, bias=False))}),
        "'last_layer' is a Sequential",
    ),
    "empty": (nn.Sequential, "cannot fuse Sequential: it is a Sequential"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    make, said = REFUSED[name]
    module = make()
    before = [type(m) for m in module.modules()]
    with pytest.raises(ValueError, match=f"{re.escape(said)}.*; expected an nn.Linear without bias.*layer=..."):
        fuse_head(module)
    assert [type(m) for m in module.modules()] == before


def test_a_head_of_which_one_layer_does_not_fit_is_left_alone() -> None:
    head = TwoOutputs(shared=False)
    head.last_layer2 = nn.Linear(DIM, 57)
    with pytest.raises(ValueError, match=r"'last_layer2' is a Linear with a bias"):
        fuse_head(head)
    assert type(head.last_layer) is nn.Linear


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Head has no submodule 'prototypes'; expected .* children: mlp, last_layer"):
        fuse_head(Head("plain"), "prototypes")
