"""References for the tests: problems, the loss as a dense formula, and the error budget.

The budget (CONTRIBUTING.md): the truth is fp64 on the already rounded inputs. A result may be off by twice the error of the
dense formula in plain torch in the same dtype, plus one rounding of every logit and of the result. Without these roundings,
chance would decide wherever the dense formula happens to round well. The dense formula is equations (1) and (2) under
autograd; no backend runs. A backend that multiplies 16-bit features in 16 bits is compared with the dense formula that does
so too (``products``). On a GPU set to tf32, the dense formula multiplies fp32 in tf32, as torch does.

Legend: S / T student / teacher rows, G / V their views, B images, R rows of either, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vmf_kernels.bessel import log_vmf_constant
from vmf_kernels.ops.prototype_cross_entropy import CrossEntropy, prototype_cross_entropy
from vmf_kernels.prototypes import Prototypes, accumulation_dtype

DENSE_ERRORS = 2.0  # by how many times the dense formula's error a result may be off
LOSS_SCALE = 2.0**16  # the initial scale of a GradScaler: without it the dense formula's gradient underflows in fp16
TF32_EPS = 2.0**-10  # relative spacing of fp32 numbers as tensor cores round them
FP64_BUDGET = 1e-12  # times the rounding sizes; the truth is not more exact
GRADIENTS = ("feature_gradient", "weight_gradient", "magnitude_gradient")

Outcome = dict[str, Tensor]  # loss, teacher_entropy, student_entropy, kl, usage, and the existing ones of GRADIENTS


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of one call of ``prototype_cross_entropy``, by name; rows are view-major."""

    student_features: Tensor
    student_prototypes: Prototypes
    teacher_features: Tensor
    teacher_prototypes: Prototypes
    pair_weights: Tensor
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    teacher_bias: Tensor | None = None
    image_weights: Tensor | None = None

    def student_leaves(self) -> tuple[Tensor, Prototypes]:
        """The student's features and prototypes in the same memory, as new leaves of autograd."""
        stored = self.student_prototypes.detach()
        for leaf in [t for t in (stored.weight, stored.magnitude) if t is not None]:
            leaf.requires_grad_()
        return self.student_features.detach().requires_grad_(), stored

    def cross_entropy(self, features: Tensor, prototypes: Prototypes, backend: str = "auto") -> CrossEntropy:
        """The problem's loss for the student's features and prototypes, which may be leaves of autograd."""
        return prototype_cross_entropy(
            features,
            prototypes,
            self.teacher_features,
            self.teacher_prototypes,
            self.pair_weights,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            teacher_bias=self.teacher_bias,
            image_weights=self.image_weights,
            backend=backend,
        )

    def to(self, dtype: torch.dtype) -> Problem:
        """Every tensor converted: up to fp64 for the truth, or down to round the inputs of a problem."""
        student, teacher = (
            replace(p, weight=p.weight.to(dtype), magnitude=None if p.magnitude is None else p.magnitude.to(dtype))
            for p in (self.student_prototypes, self.teacher_prototypes)
        )
        x_SD, x_TD = self.student_features.to(dtype), self.teacher_features.to(dtype)
        bias = None if self.teacher_bias is None else self.teacher_bias.to(dtype)
        moved = replace(self, student_features=x_SD, teacher_features=x_TD, teacher_bias=bias)
        return replace(moved, student_prototypes=student, teacher_prototypes=teacher)


def random_problem(
    *,
    images: int = 1,
    views: tuple[int, int] = (2, 3),
    prototypes: int = 127,
    dim: int = 24,
    kind: str = "weight_norm_vmf",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Problem:
    """A problem with unit features, signed magnitudes around 1, positive pair and image weights, and a teacher bias.

    Args:
        images: B; with B = 1 the views are single rows, and the pair weights are an arbitrary [T, S] matrix.
        views, prototypes, dim: (G, V), K and D.
        kind: one of ``vmf_kernels.prototypes.KINDS``, for both networks.
        dtype: of features, prototypes and bias; drawn in fp64 from torch's generator and then rounded.
        device: of every tensor and of the generator; another device draws other numbers.
    """

    normal, uniform = (partial(draw, dtype=torch.float64, device=device) for draw in (torch.randn, torch.rand))

    def features(rows: int) -> Tensor:
        return torch.nn.functional.normalize(normal(rows, dim), dim=1)

    def stored() -> Prototypes:
        magnitude = normal(prototypes, 1).sign() * (0.5 + uniform(prototypes, 1))
        weight = normal(prototypes, dim) / dim**0.5
        return Prototypes(weight, magnitude if kind.startswith("weight_norm") else None, kind)

    return Problem(
        features(images * views[1]),
        stored(),
        features(images * views[0]),
        stored(),
        pair_weights=uniform(views) / max(images * views[0] * views[1], 1),
        teacher_bias=normal(prototypes),
        image_weights=0.5 + uniform(images),
    ).to(dtype)


def library_outcome(problem: Problem, backend: str = "auto") -> Outcome:
    """The results of ``prototype_cross_entropy`` for the problem, with gradients."""
    features, prototypes = problem.student_leaves()
    loss, statistics = problem.cross_entropy(features, prototypes, backend)
    return {"loss": loss.detach()} | vars(statistics) | _gradients(loss, features, prototypes)


def dense_outcome(problem: Problem, products: torch.dtype | None = None) -> Outcome:
    """The same results by the dense formula and autograd, in the accumulation dtype of the problem; in fp64, the truth.

    Args:
        problem: what to compute.
        products: dtype of the products of rows and prototypes, in the logits and in their gradient, as under autocast; None
            means the accumulation dtype.
    """
    features, prototypes = problem.student_leaves()
    terms = _Terms.of(problem, features, prototypes, products)
    loss = -(terms.pairs_TS * (terms.q_TK @ terms.log_p_SK.T)).sum()
    n_S, n_T, total = terms.masses()
    p_SK, q_TK = terms.log_p_SK.detach().exp(), terms.q_TK
    teacher_entropy = -(n_T @ torch.xlogy(q_TK, q_TK)).sum() / total
    return {
        "loss": loss.detach(),
        "teacher_entropy": teacher_entropy,
        "student_entropy": -(n_S @ torch.xlogy(p_SK, p_SK)).sum() / total,
        "kl": loss.detach() / total - teacher_entropy,
        "usage": n_T @ q_TK / total,
    } | _gradients(loss, features, prototypes, 1.0 if products is None else LOSS_SCALE)


def rounding_sizes(problem: Problem) -> Outcome:
    """By how much each quantity changes, elementwise, per relative change of the logits' terms and of its own two parts.

    The two parts are the pull to the targets and the push from the normaliser. A relative change of a logit of size s changes
    its probability by s times as much.
    """
    features, prototypes = problem.student_leaves()
    terms = _Terms.of(problem, features, prototypes)
    (n_S, n_T, total), log_z_S, log_z_T = terms.masses(), terms.l_SK.logsumexp(dim=1), terms.l_TK.logsumexp(dim=1)
    push = _gradients((n_S * log_z_S).sum(), features, prototypes)
    pull = _gradients((terms.pairs_TS * (terms.q_TK @ terms.l_SK.T)).sum(), features, prototypes)
    student_S = (terms.log_p_SK.detach().exp() * terms.sizes_SK).sum(dim=1)
    teacher_TK = terms.q_TK * terms.sizes_TK
    student, teacher = 1 + n_S @ student_S / total, 1 + (n_T @ teacher_TK).sum() / total
    loss = n_S @ (student_S + log_z_S.detach().abs()) + (terms.pairs_TS * (terms.q_TK @ terms.sizes_SK.T)).sum()
    # a target that changes costs the difference of its student's logits from their mean
    drawn_TK = terms.pairs_TS @ terms.l_SK.detach()
    loss = loss + (teacher_TK * (drawn_TK - (terms.q_TK * drawn_TK).sum(dim=1, keepdim=True)).abs()).sum()
    teacher_entropy = teacher + n_T @ log_z_T.abs() / total
    return {
        "loss": loss,
        "teacher_entropy": teacher_entropy,
        "student_entropy": student + n_S @ log_z_S.detach().abs() / total,
        "kl": loss / total + teacher_entropy,
        "usage": n_T @ (terms.q_TK + teacher_TK) / total,
        **{name: student * push[name].abs() + teacher * pull[name].abs() for name in push},
    }


def assert_within_budget(
    actual: Outcome,
    problem: Problem,
    products: torch.dtype | None = None,
    *,
    logit_roundings: float = 1.0,
    dense: Outcome | None = None,
) -> dict[str, float]:
    """Assert that every error is within the budget; returns the used share of it by quantity, in [0, 1].

    Args:
        actual: the results to check.
        problem: what they are results of.
        products: as in ``dense_outcome``.
        logit_roundings: how many roundings of every logit to allow. 2 for kernels that compute logits in base 2: these are 1.44
            times as large, and their rounding is up to twice as large.
        dense: results of the dense formula whose errors are the measure; None means ``dense_outcome(problem, products)``.

    Raises:
        AssertionError: a quantity is missing, of a wrong shape or dtype, not finite, or off by more; the text has the numbers.
    """
    exact_problem = problem.to(torch.float64)
    truth, sizes = dense_outcome(exact_problem), rounding_sizes(exact_problem)
    dense = dense_outcome(problem, products) if dense is None else dense
    accumulated = accumulation_dtype(problem.student_features.dtype)
    in_fp64, smallest = accumulated == torch.float64, torch.finfo(accumulated).tiny
    assert actual.keys() == truth.keys(), f"got {sorted(actual)}, expected {sorted(truth)}"
    eps = _products_eps(problem, products)
    chance = {} if eps is None else _chance(exact_problem, eps)
    used: dict[str, float] = {}
    for name, exact in truth.items():
        got, plain = actual[name], dense[name]
        form, expected = (tuple(got.shape), got.dtype), (tuple(plain.shape), plain.dtype)
        assert form == expected, f"{name} is {form}, expected {expected}"
        for norm, measure in (("largest", _largest), ("root mean square", _root_mean_square)):
            error = measure(got.double() - exact)
            eps_of_sums = FP64_BUDGET if in_fp64 else logit_roundings * torch.finfo(torch.float32).eps
            # gradients have the dtype of what is stored, which may be narrower or wider than that of the sums
            kept = torch.finfo(got.dtype)
            # below the smallest normal number of the sums there are no digits to lose
            allowed = measure(eps_of_sums * sizes[name] + kept.eps / 2 * (exact.abs() + kept.tiny) + smallest)
            if not in_fp64:
                allowed += DENSE_ERRORS * measure(plain.double() - exact) + chance.get(name, 0.0)
            assert error <= allowed < float("inf"), f"{name}: {norm} error {error:.2e}, budget {allowed:.2e}"
            used[name] = max(used.get(name, 0.0), error / allowed if allowed else 0.0)
    return used


def _products_eps(problem: Problem, products: torch.dtype | None) -> float | None:
    """Relative spacing of the operands of the dense formula's products, if they are rounded more than their sums."""
    if products is not None:
        return torch.finfo(products).eps
    features = problem.student_features
    in_fp32 = features.device.type == "cuda" and accumulation_dtype(features.dtype) == torch.float32
    return TF32_EPS if in_fp32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else None


def _chance(problem: Problem, eps: float) -> dict[str, float]:
    """How far the sums over rows move if every logit is rounded independently: three standard deviations.

    The dense formula's own error in such a sum is one draw of this distribution, and may happen to be near 0.
    """
    terms = _Terms.of(problem, *problem.student_leaves())
    n_S, n_T, total = terms.masses()
    own = n_S[:, None] * terms.log_p_SK.detach().exp() * terms.sizes_SK
    drawn = terms.q_TK * (terms.pairs_TS @ terms.sizes_SK + n_T[:, None] * terms.sizes_TK)
    # roundings are uniform in +- eps/2 of the size: a standard deviation of eps/sqrt(12)
    deviation = float((own.square().sum() + drawn.square().sum()).sqrt()) * eps / 12**0.5
    return {"loss": 3 * deviation} | dict.fromkeys(
        ("teacher_entropy", "student_entropy", "kl"), 3 * deviation / float(total)
    )


@dataclass(frozen=True, eq=False)
class _Terms:
    """Dense logits and probabilities of both networks, and the weight of every pair of rows."""

    l_SK: Tensor
    l_TK: Tensor
    sizes_SK: Tensor  # of the terms of the logits: sums of absolute values
    sizes_TK: Tensor
    log_p_SK: Tensor
    q_TK: Tensor
    pairs_TS: Tensor

    @classmethod
    def of(
        cls, problem: Problem, features_SD: Tensor, prototypes: Prototypes, products: torch.dtype | None = None
    ) -> _Terms:
        dtype = accumulation_dtype(features_SD.dtype)
        dots_SK, bias_K = _logit_terms(features_SD.to(dtype), prototypes, problem.student_temperature, products)
        x_TD, bias_of_teacher = problem.teacher_features.to(dtype), problem.teacher_bias
        dots_TK, teacher_bias_K = _logit_terms(x_TD, problem.teacher_prototypes, problem.teacher_temperature, products)
        teacher_bias_K = teacher_bias_K if bias_of_teacher is None else teacher_bias_K + bias_of_teacher.to(dtype)
        images = features_SD.shape[0] // problem.pair_weights.shape[1]
        weights_B = features_SD.new_ones(images) if problem.image_weights is None else problem.image_weights
        return cls(
            l_SK=dots_SK + bias_K,
            l_TK=dots_TK + teacher_bias_K,
            sizes_SK=dots_SK.detach().abs() + bias_K.detach().abs(),
            sizes_TK=dots_TK.abs() + teacher_bias_K.abs().nan_to_num(posinf=0.0),  # -inf leaves a prototype out
            log_p_SK=(dots_SK + bias_K).log_softmax(dim=1),
            q_TK=(dots_TK + teacher_bias_K).softmax(dim=1),
            pairs_TS=torch.kron(problem.pair_weights.to(dtype), torch.diag(weights_B.to(dtype))),
        )

    def masses(self) -> tuple[Tensor, Tensor, Tensor]:
        """n_S, n_T, and the sum of the pair weights, or 1 if no pair has weight."""
        n_T = self.pairs_TS.sum(dim=1)
        return self.pairs_TS.sum(dim=0), n_T, n_T.sum() if n_T.any() else n_T.new_ones(())


def _logit_terms(
    rows_RD: Tensor, prototypes: Prototypes, temperature: float, products: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    weight_KD = prototypes.weight.to(rows_RD.dtype)
    norm_K1 = torch.linalg.vector_norm(weight_KD, dim=1, keepdim=True)
    magnitude_K1 = norm_K1
    if not prototypes.kind.startswith("linear"):
        weight_KD = weight_KD * norm_K1.masked_fill(norm_K1 == 0, torch.inf).reciprocal()
    if prototypes.magnitude is not None:
        magnitude_K1 = prototypes.magnitude.to(rows_RD.dtype).reshape(-1, 1)
        weight_KD = magnitude_K1 * weight_KD
    bias_K = log_vmf_constant(magnitude_K1[:, 0].abs() / temperature, prototypes.dim)
    rounded = rows_RD.dtype if products is None else products
    dots_RK = (rows_RD.to(rounded) @ weight_KD.to(rounded).T).to(rows_RD.dtype) / temperature
    return dots_RK, bias_K if prototypes.has_normalizer else torch.zeros_like(bias_K)


def _gradients(loss: Tensor, features: Tensor, prototypes: Prototypes, scale: float = 1.0) -> Outcome:
    leaves = dict(zip(GRADIENTS, (features, prototypes.weight, prototypes.magnitude), strict=True))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(scale * loss, list(wanted.values()), retain_graph=True)
    return {name: gradient / scale for name, gradient in zip(wanted, gradients, strict=True)}


def _largest(values: Tensor) -> float:
    """Largest absolute value; infinity if one is NaN, which compares false with everything."""
    return float(values.double().abs().nan_to_num(nan=torch.inf).max()) if values.numel() else 0.0


def _root_mean_square(values: Tensor) -> float:
    return float(values.double().nan_to_num(nan=torch.inf).square().mean().sqrt()) if values.numel() else 0.0
