"""Prototypes as a head's last layer stores them, and their preparation as keys of the operator.

Legend: K prototypes, D embedding dim. ``w_k`` is the effective prototype, ``tau`` a temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vmf_kernels.bessel import log_vmf_constant, vmf_mean_resultant_length
from vmf_kernels.tensors import has_memory

KINDS = ("linear", "normalized", "weight_norm", "linear_vmf", "weight_norm_vmf")
PULL_BACK_BLOCK = 4096  # prototypes per step of the in-place pull-back: 4 MiB of fp32 at D = 256, stays in L2/L3
FREED = (
    "the memory of prototypes of shape {shape} has been freed: FSDP, or a training loop that reshards, freed it after the "
    "head's forward pass, but the loss reads it later; expected a teacher that is resharded after the loss; or with "
    "fully_shard (FSDP2) fully_shard(head.last_layer) before fully_shard(head), or reshard_after_forward=False, or "
    "head.unshard() between the head and the loss; or with FullyShardedDataParallel (FSDP1) a head wrapped by itself, not "
    "inside another one, or ShardingStrategy.SHARD_GRAD_OP, or FSDP.summon_full_params(teacher_head) around the loss, where "
    "parameters are not cast"
)
SEVERED = (
    "the student's head ran inside the forward pass of an autograd.Function, such as torch.utils.checkpoint with "
    "use_reentrant=True, which gives a graph only to tensors: these logits are not stored, so their gradient would be lost; "
    "expected checkpoint(..., use_reentrant=False), a checkpoint around only the backbone or the head's MLP, or one around "
    "head and loss together with center_update='manual'"
)
LOWEST_BIAS = -1e30  # nats; stands for -inf, whose product with a zero probability would be NaN


@dataclass(eq=False)  # not frozen: Lightning rebuilds a module's outputs field by field
class Prototypes:
    """The stored prototypes of one network; construct them with the functions below.

    Attributes:
        weight: [K, D] floating point: ``w`` itself, or the direction ``v`` under weight norm.
        magnitude: [K, 1] or [K] signed norms ``g`` under weight norm, else None.
        kind: one of ``KINDS``; the suffix ``_vmf`` adds ``log C_D(||w_k|| / tau)`` to the logits.
        severed: whether the head ran where its outputs silently lose their gradient; see ``refuse_severed``.

    Example:
        >>> prototypes = linear_prototypes(torch.randn(512, 4)).with_vmf()
        >>> prototypes.count, prototypes.dim, prototypes.has_normalizer, tuple(prototypes.norms().shape)
        (512, 4, True, (512,))
    """

    weight: Tensor
    magnitude: Tensor | None
    kind: str
    severed: bool = False

    @property
    def count(self) -> int:
        """Number of prototypes K."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """Embedding dim D."""
        return self.weight.shape[1]

    @property
    def has_normalizer(self) -> bool:
        """Whether the von Mises-Fisher log-normaliser enters the logits."""
        return self.kind.endswith("_vmf")

    def with_vmf(self) -> Prototypes:
        """The same prototypes as von Mises-Fisher components of precision ``||w_k|| / tau``.

        Raises:
            ValueError: the prototypes are normalised, so every component would have the same precision.
        """
        if self.kind == "normalized":
            raise ValueError(
                "normalized prototypes all have norm 1, so the vMF normaliser cannot tell them apart; "
                "expected linear or weight-norm prototypes"
            )
        return self if self.has_normalizer else replace(self, kind=self.kind + "_vmf")

    def without_vmf(self) -> Prototypes:
        """The same prototypes without the log-normaliser."""
        return replace(self, kind=self.kind.removesuffix("_vmf"))

    def detach(self) -> Prototypes:
        """The same prototypes, detached from autograd."""
        magnitude = None if self.magnitude is None else self.magnitude.detach()
        # no longer severed: detaching is deliberate, so no gradient is lost silently
        return Prototypes(self.weight.detach(), magnitude, self.kind)

    @property
    def requires_grad(self) -> bool:
        """Whether a stored tensor requires a gradient."""
        return self.weight.requires_grad or (self.magnitude is not None and self.magnitude.requires_grad)

    def effective_weight(self) -> Tensor:
        """[K, D] effective prototypes ``w_k``, differentiable; a zero row stays zero."""
        refuse_freed(self.weight, self.magnitude)
        refuse_severed(self)
        gain = self.gain()
        return self.weight if gain is None else gain[:, None].to(self.weight.dtype) * self.weight

    def norms(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[K] norms ``||w_k||`` in ``dtype`` (fp64 for fp64 weights), differentiable, with zero gradient at zero rows."""
        refuse_freed(self.weight, self.magnitude)
        if self.magnitude is not None:
            return self.magnitude.reshape(-1).to(torch.promote_types(self.weight.dtype, dtype)).abs()
        norm = _safe_norm(self.weight, dtype)
        return torch.ones_like(norm) if self.kind == "normalized" else norm

    def gain(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """[K] factors with ``w_k = gain_k weight_k``, dtype as ``norms``, differentiable; None (all 1) for free norms."""
        if self.kind.startswith("linear"):
            return None
        refuse_freed(self.weight, self.magnitude)
        inverse = _safe_reciprocal(_safe_norm(self.weight, dtype))
        return inverse if self.magnitude is None else self.magnitude.reshape(-1).to(inverse.dtype) * inverse

    def log_normalizer(self, temperature: float | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[K] nats ``log C_D(||w_k|| / tau) - log C_D(0)``, added to the logits of von Mises-Fisher components.

        All torch code that needs the normaliser calls this; kernels implement ``bessel.py`` themselves.

        Args:
            temperature: positive; a float or a tensor of one element.
            dtype: float32 or float64, of the norms and the result (fp64 for fp64 weights).

        Returns:
            [K], differentiable in the stored tensors.

        Raises:
            ValueError: these prototypes are not von Mises-Fisher components.
        """
        if not self.has_normalizer:
            raise ValueError(f"{self.kind} prototypes have no vMF normaliser; expected prototypes.with_vmf()")
        norms = self.norms(dtype)
        tau = temperature.to(norms.dtype) if isinstance(temperature, Tensor) else temperature
        return log_vmf_constant(norms / tau, self.dim)


def linear_prototypes(weight: Tensor) -> Prototypes:
    """Prototypes of free norm: ``w_k = weight_k`` (DINOv3's plain last layer).

    Args:
        weight: [K, D] floating point.

    Raises:
        ValueError: ``weight`` is not a floating-point matrix with K >= 1 and D >= 2.

    Example:
        >>> weight = torch.nn.Linear(4, 512, bias=False).weight
        >>> linear_prototypes(weight).effective_weight() is weight
        True
    """
    return Prototypes(_checked_weight(weight, "weight"), None, "linear")


def normalized_prototypes(weight: Tensor) -> Prototypes:
    """Prototypes of norm 1: ``w_k = weight_k / ||weight_k||``; arguments and errors as ``linear_prototypes``.

    Squares of a row of norm below 1e-18 underflow in fp32: its direction loses digits, and from 1e-22 down it counts as zeros.

    Example:
        >>> normalized_prototypes(torch.tensor([[0.0, 5.0]])).effective_weight().tolist()
        [[0.0, 1.0]]
    """
    return Prototypes(_checked_weight(weight, "weight"), None, "normalized")


def weight_norm_prototypes(magnitude: Tensor, direction: Tensor) -> Prototypes:
    """Prototypes under weight norm: ``w_k = g_k v_k / ||v_k||`` (DINO, DINOv2); ``g`` may be negative.

    Args:
        magnitude: [K, 1] or [K] ``g``.
        direction: [K, D] ``v``.

    Raises:
        ValueError: ``direction`` is not a floating-point matrix, or ``magnitude`` does not have K elements.
    Source: Salimans & Kingma, "Weight Normalization", NeurIPS 2016, equation 2.

    Example:
        >>> prototypes = weight_norm_prototypes(magnitude=torch.tensor([2.0]), direction=torch.tensor([[0.0, 5.0]]))
        >>> prototypes.effective_weight().tolist(), prototypes.norms().tolist()
        ([[0.0, 2.0]], [2.0])
    """
    direction = _checked_weight(direction, "direction")
    if tuple(magnitude.shape) not in ((direction.shape[0], 1), (direction.shape[0],)):
        raise ValueError(
            f"magnitude has shape {tuple(magnitude.shape)}; expected [K, 1] or [K] with "
            f"K = {direction.shape[0]}, the rows of direction"
        )
    return Prototypes(direction, magnitude, "weight_norm")


def vmf_prototypes(weight: Tensor) -> Prototypes:
    """Free-norm prototypes as vMF components; arguments and errors as ``linear_prototypes``.

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).

    Example:
        >>> prototypes = vmf_prototypes(torch.randn(512, 4))
        >>> usage = prototype_usage(torch.randn(3, 4), prototypes, temperature=0.1)  # the normaliser enters here
        >>> prototypes.has_normalizer, tuple(usage.shape)
        (True, (512,))
    """
    return linear_prototypes(weight).with_vmf()


def weight_norm_vmf_prototypes(magnitude: Tensor, direction: Tensor) -> Prototypes:
    """Weight-norm prototypes as vMF components; arguments and errors as ``weight_norm_prototypes``.

    Example:
        >>> weight_norm_vmf_prototypes(torch.ones(512, 1), torch.randn(512, 4)).kind
        'weight_norm_vmf'
    """
    return weight_norm_prototypes(magnitude, direction).with_vmf()


class Keys(NamedTuple):
    """Prepared prototypes: ``logit_k(x) = scale gain_k <x, weight_k> + bias_k``; all except ``weight`` in fp32 or fp64."""

    weight: Tensor  # [K, D] as stored
    gain: Tensor | None  # [K]; None means 1
    scale: Tensor  # [] inverse temperature
    bias: Tensor | None  # [K] nats; None means 0


def prepare_keys(prototypes: Prototypes, temperature: Tensor, extra_bias: Tensor | None, dtype: torch.dtype) -> Keys:
    """Keys of the operator at one temperature: gains, and one bias, the vMF normaliser plus ``extra_bias``.

    Args:
        prototypes: K prototypes of dim D; no gradient is recorded.
        temperature: [] positive.
        extra_bias: [K] nats or None, e.g. a centre.
        dtype: accumulation dtype, float32 or float64.

    Raises:
        RuntimeError: the memory of the prototypes has been freed.
    """
    refuse_freed(prototypes.weight, prototypes.magnitude)
    with torch.no_grad():
        gain = prototypes.gain(dtype)
        return Keys(
            prototypes.weight.detach(),
            None if gain is None else _narrowed(gain, dtype),
            temperature.to(dtype).reciprocal(),
            prepare_bias(prototypes, temperature, extra_bias, dtype),
        )


def prepare_bias(
    prototypes: Prototypes, temperature: Tensor, extra_bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """[K] nats, the bias of ``prepare_keys``, whose arguments these are."""
    bias = None if extra_bias is None else extra_bias.detach().to(dtype).reshape(-1)
    if prototypes.has_normalizer:
        with torch.no_grad():
            # as ``log_normalizer``, but with the same inverse temperature as the products
            kappa = prototypes.norms(dtype).to(dtype) * temperature.to(dtype).reciprocal()
            normalizer = log_vmf_constant(kappa, prototypes.dim)
        bias = normalizer if bias is None else bias + normalizer
    # the lowest finite number, not -inf: its product with a zero probability would be NaN
    return None if bias is None else bias.clamp(min=torch.finfo(dtype).min)


def pull_back_to_stored(
    prototypes: Prototypes, temperature: Tensor, gradient_KD: Tensor, bias_gradient_K: Tensor | None
) -> Tensor | None:
    """Convert the gradient at the effective prototypes to that at the stored tensors, in place.

    Args:
        prototypes: K prototypes of dim D.
        temperature: [] positive, with which the bias was prepared.
        gradient_KD: [K, D] fp32 or fp64 loss gradient at ``w_k``; overwritten by the gradient at ``weight``.
        bias_gradient_K: [K] loss gradient at the bias, needed if the prototypes have a normaliser.

    Returns:
        [K] gradient at ``magnitude``, or None without weight norm. Rows of zeros get gradient 0.
    """
    magnitude_gradient = None if prototypes.magnitude is None else gradient_KD.new_empty(prototypes.count)
    with torch.no_grad():
        norm_gradient = _norm_gradient(prototypes, temperature, bias_gradient_K)
        for start in range(0, prototypes.count, PULL_BACK_BLOCK):
            rows = slice(start, start + PULL_BACK_BLOCK)
            radial = None if norm_gradient is None else norm_gradient[rows]
            weight = prototypes.weight[rows].to(gradient_KD.dtype)
            inverse_norm = _safe_reciprocal(torch.linalg.vector_norm(weight, dim=1))
            if prototypes.kind.startswith("linear"):
                if radial is not None:
                    gradient_KD[rows].addcmul_(weight, (radial * inverse_norm)[:, None])
                continue
            along = torch.linalg.vecdot(gradient_KD[rows], weight) * inverse_norm
            gain = inverse_norm
            if prototypes.magnitude is not None and magnitude_gradient is not None:
                g = prototypes.magnitude.reshape(-1)[rows].to(gain.dtype)
                gain = g * inverse_norm
                magnitude_gradient[rows] = along if radial is None else along + radial * torch.sign(g)
            gradient_KD[rows].addcmul_(weight, (along * inverse_norm)[:, None], value=-1).mul_(gain[:, None])
    return magnitude_gradient


def refuse_freed(*stored: Tensor | None) -> None:
    """Raise RuntimeError if the memory of a stored tensor has been freed: reading it would crash the process.

    FSDP2 frees a module's full parameters when its forward returns, and the loss runs after that.
    """
    for tensor in stored:
        # traced and wrapped tensors have no memory of their own; the ops, which run later, check again
        if tensor is None or tensor.numel() == 0 or not has_memory(tensor):
            continue
        if tensor.untyped_storage().size() == 0:
            raise RuntimeError(FREED.format(shape=list(tensor.shape)))


def refuse_severed(prototypes: Prototypes) -> None:
    """Raise RuntimeError if a gradient would be recorded for outputs that autograd has cut off from their head."""
    if prototypes.severed and torch.is_grad_enabled():
        raise RuntimeError(SEVERED)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _norm_gradient(prototypes: Prototypes, temperature: Tensor, bias_gradient_K: Tensor | None) -> Tensor | None:
    """[K] loss gradient at ``||w_k||`` through the vMF bias: ``-A_D(||w_k||/tau)/tau`` times the bias gradient."""
    if not prototypes.has_normalizer or bias_gradient_K is None:
        return None
    scale = temperature.to(bias_gradient_K.dtype).reciprocal()
    kappa = prototypes.norms(scale.dtype).detach().to(scale.dtype) * scale
    return -bias_gradient_K * vmf_mean_resultant_length(kappa, prototypes.dim) * scale


def _narrowed(gain: Tensor, dtype: torch.dtype) -> Tensor:
    # fp64 prototypes may be so short that the gain leaves fp32; cast to fp32 they are zeros, without a direction
    narrow = gain.to(dtype)
    return narrow if narrow is gain else narrow.masked_fill_(narrow.isinf() & gain.isfinite(), 0.0)


def _safe_norm(weight: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, dtype))
    return norm


def _safe_reciprocal(norm: Tensor) -> Tensor:
    # a row of zeros has no direction: it stays zero and gets no gradient; 1/0 would give NaN
    return torch.where(norm > 0, norm, torch.inf).reciprocal()


def _checked_weight(weight: Tensor, name: str) -> Tensor:
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] < 2 or not weight.is_floating_point():
        raise ValueError(
            f"{name} is {weight.dtype} of shape {tuple(weight.shape)}; expected a floating-point matrix "
            "[K, D] with K >= 1 prototypes of dim D >= 2"
        )
    return weight
