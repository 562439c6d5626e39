"""A teacher's assignments that are never stored.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmf_kernels.arguments import check_bias, temperature_tensor
from vmf_kernels.backends import reference
from vmf_kernels.prototypes import accumulation_dtype, prepare_keys
from vmf_kernels.tensors import is_readable, no_autocast, refuse_gradients
from vmf_kernels.unstored.einops_backend import offer_to_einops
from vmf_kernels.unstored.prototype_logits import PrototypeLogits
from vmf_kernels.unstored.row_index import advice
from vmf_kernels.unstored.rows import UnstoredRows
from vmf_kernels.unstored.same_layer import same_prototypes


@dataclass(eq=False, repr=False)
class TeacherTargets(UnstoredRows):
    """Stands for ``q = softmax(logits / temperature + bias)``, a teacher's [..., K] assignments, without storing them.

    It behaves like that tensor in operations on its rows (``UnstoredRows``). ``.float()`` does not change 16-bit logits,
    because their assignments are fp32 already. Prototypes with a vMF normaliser add it at this temperature. No gradient flows
    to any of the arguments.

    Args:
        logits: [..., K] raw teacher logits, stored or not; they are detached.
        temperature: positive; a float or a tensor of one element.
        bias: [K] nats, for example minus the centre, a Sinkhorn dual vector, or the vMF normaliser that stored logits lack; or
            None.

    Raises:
        ValueError: the logits are not [..., K] floating point, the bias does not have K elements, bias or temperature require
            a gradient, or the temperature is not positive (a tensor on a GPU is not checked: that would wait for the device).

    Example:
        >>> logits = DINOHead(in_dim=8, out_dim=512, hidden_dim=16, bottleneck_dim=4)(torch.randn(3, 8))
        >>> targets = TeacherTargets(logits, temperature=0.04, bias=torch.zeros(512))
        >>> torch.allclose(targets.materialize(), (logits.materialize() / 0.04).softmax(dim=1), atol=1e-5)
        True
    """

    logits: PrototypeLogits | Tensor
    temperature: float | Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        rows = self.logits.features if isinstance(self.logits, PrototypeLogits) else self.logits
        if not isinstance(rows, Tensor):
            return  # as in PrototypeLogits
        offer_to_einops(TeacherTargets)
        if self.logits.ndim < 1 or not self.logits.is_floating_point() or self.logits.shape[-1] < 1:
            raise ValueError(
                f"teacher logits are {self.logits.dtype} of shape {tuple(self.logits.shape)}; "
                "expected floating point [..., K] with K >= 1 prototypes"
            )
        # detach only if needed: cat recognises the parts of one batch by their having the same tensors
        if self.logits.requires_grad:
            self.logits = self.logits.detach()
        refuse_gradients(temperature=self.temperature, bias=self.bias)
        if isinstance(self.bias, Tensor):
            check_bias(self.bias, self.logits.shape[-1], "bias")
            self.bias = self.bias.detach() if self.bias.requires_grad else self.bias
        tau = self.temperature
        visible = not isinstance(tau, Tensor) or (is_readable(tau) and tau.numel() == 1)
        if visible and not float(tau) > 0:
            raise ValueError(f"temperature is {float(tau)}; expected a number > 0")

    @property
    def shape(self) -> torch.Size:
        """[..., K]."""
        return self.logits.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the probabilities: fp32, or fp64 for fp64 logits."""
        return accumulation_dtype(self.logits.dtype)

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @torch.no_grad()
    def materialize(self) -> Tensor:
        """[..., K] the probabilities as a tensor, fp32 (fp64 for fp64 logits). It takes the memory that this class saves."""
        with no_autocast(self.device):
            tau = temperature_tensor(self.temperature, "temperature", self.device)
            if isinstance(self.logits, PrototypeLogits):
                keys = prepare_keys(self.logits.prototypes, tau, self.bias, self.dtype)
                return reference.logits(self.logits.features, keys).softmax(dim=-1)
            scaled = self.logits.to(self.dtype) / tau.to(self.dtype)
            if self.bias is not None:
                scaled += self.bias.to(self.dtype).reshape(-1).clamp(min=torch.finfo(self.dtype).min)
            return scaled.softmax(dim=-1)

    def detach(self) -> TeacherTargets:
        """The targets themselves, which have no gradient."""
        return self

    @property
    def _rows(self) -> Tensor:
        return self.logits if isinstance(self.logits, Tensor) else self.logits.features

    def _with(self, rows: Tensor) -> TeacherTargets:
        logits = rows if isinstance(self.logits, Tensor) else PrototypeLogits(rows, self.logits.prototypes)
        return TeacherTargets(logits, self.temperature, self.bias)

    def _moved(self, device: torch.device, dtype: torch.dtype) -> TeacherTargets:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{dtype} values of TeacherTargets: {advice(str(dtype))}")
        temperature = self.temperature.to(device) if isinstance(self.temperature, Tensor) else self.temperature
        bias = None if self.bias is None else self.bias.to(device)
        logits = self.logits.to(device)
        return TeacherTargets(logits if dtype == self.dtype else logits.to(dtype), temperature, bias)

    def _check_joins(self, other: TeacherTargets, name: str) -> None:
        one, two = self.logits, other.logits
        if isinstance(one, PrototypeLogits) and isinstance(two, PrototypeLogits):
            if not same_prototypes(one.prototypes, two.prototypes):
                raise ValueError(f"torch.{name} of TeacherTargets with different prototypes; expected rows of one head")
        elif type(one) is not type(two):
            raise ValueError(
                f"torch.{name} of TeacherTargets over {type(one).__name__} and over {type(two).__name__}; "
                "expected one kind"
            )
        if not _same_value(self.temperature, other.temperature):
            raise ValueError(
                f"torch.{name} of TeacherTargets at temperatures {self.temperature} and {other.temperature}; expected one"
            )
        if not _same_value(self.bias, other.bias):
            raise ValueError(
                f"torch.{name} of TeacherTargets with different biases; expected one centre or dual vector"
            )


# as for PrototypeLogits: torch finds the tensors inside and can rebuild the object
torch.export.register_dataclass(TeacherTargets)


def _same_value(one: object, other: object) -> bool:
    """Whether two temperatures or biases are equal; different tensors are compared by value, which waits for a GPU."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.device == other.device and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
