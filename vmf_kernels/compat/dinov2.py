"""Drop-in for facebookresearch/dinov2: ``DINOHead``, ``DINOLoss``, ``iBOTPatchLoss`` and ``KoLeoLoss`` under its names.

With ``DINOvMFHead`` instead of ``DINOHead``, the method is DINO-vMF.

Signatures, defaults, reductions, buffers and state-dict keys are dinov2's; change the imports of its ``ssl_meta_arch.py``
(README). There are differences where the published code loses a batch or gives NaN: a state dict holds the pending update, a
batch with a non-finite value does not change the centre, and any rank may have no masked patches and then has no part in their
centre. Also, ``n_masked_patches_tensor`` is not overwritten, and no process group is needed.

Legend: R rows of an entry, G / V teacher / student entries, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from vmf_kernels.compat._dinov2_and_v3 import (
    ClassTokenLoss,
    Logits,
    PatchLoss,
    RankOptions,
    Targets,
    check_targets,
)
from vmf_kernels.compat.checkpoints import load_networks
from vmf_kernels.heads.mlp import check_head_dims, projection_mlp, reset_children, unit_rows
from vmf_kernels.heads.prototype_layer import PrototypeLayer, outlive
from vmf_kernels.losses import koleo
from vmf_kernels.prototypes import accumulation_dtype
from vmf_kernels.unstored.prototype_logits import PrototypeLogits
from vmf_kernels.unstored.teacher_targets import TeacherTargets

__all__ = ["DINOHead", "DINOLoss", "DINOvMFHead", "KoLeoLoss", "iBOTPatchLoss", "load_checkpoint"]


class DINOHead(nn.Module):
    """MLP, L2-normalised bottleneck, weight-normed prototypes of free norm; it returns unstored logits.

    Args:
        in_dim: dim of the backbone's features.
        out_dim: number of prototypes K.
        use_bn: BatchNorm after each hidden layer.
        nlayers: layers of the MLP, at least 1.
        hidden_dim: width of its hidden layers.
        bottleneck_dim: D.
        mlp_bias: biases in the MLP.

    Raises:
        ValueError: a dim is below 1, or ``bottleneck_dim`` below 2.
    Source: facebookresearch/dinov2 dinov2/layers/dino_head.py.

    Example:
        >>> head = DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4)
        >>> tuple(head(torch.randn(3, 8)).shape), head.last_layer.weight_g.requires_grad
        ((3, 512), True)
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        check_head_dims(in_dim, out_dim, hidden_dim, bottleneck_dim)
        self.mlp = projection_mlp(in_dim, hidden_dim, bottleneck_dim, nlayers, use_bn=use_bn, bias=mlp_bias)
        self.last_layer = self._make_layer(bottleneck_dim, out_dim)

    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer as the constructor does."""
        reset_children(self)

    def forward(self, x: Tensor) -> PrototypeLogits:
        """[..., in_dim] features to [..., K] logits, in the dtype autocast gives the MLP."""
        logits: PrototypeLogits = self.last_layer(unit_rows(self.mlp(x)))
        return outlive(self, logits)

    def _make_layer(self, dim: int, num_prototypes: int) -> nn.Module:
        return PrototypeLayer(dim, num_prototypes)


class DINOvMFHead(DINOHead):
    """``DINOHead`` with prototypes as von Mises-Fisher components of precision ``||w_k|| / tau``.

    The losses then add ``log C_D(||w_k|| / tau)`` to each network's logits, with its own prototypes and its own temperature,
    both with Sinkhorn-Knopp and with the centre, which is still a mean of raw logits. Arguments and keys as ``DINOHead``.

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).

    Example:
        >>> head = DINOvMFHead(8, 512, hidden_dim=16, bottleneck_dim=4)
        >>> head(torch.randn(3, 8)).prototypes.has_normalizer
        True
    """

    def forward(self, x: Tensor) -> PrototypeLogits:
        """[..., in_dim] features to [..., K] logits, in the dtype autocast gives the MLP."""
        return super().forward(x).with_vmf()


class DINOLoss(ClassTokenLoss):
    """Cross-entropy of class tokens, summed over all pairs of a student and a teacher entry, mean over rows.

    The caller chooses which entries form pairs and what the sum is divided by, as published.

    Args:
        out_dim: number of prototypes K.
        student_temp: student temperature.
        center_momentum: of the running mean, in [0, 1).
        options: keywords ``backend``, ``prototype_group``, ``row_group`` of ``Stream``.

    Attributes:
        center: [1, K] fp32, the state dict's only entry.

    Raises:
        ValueError: a temperature is not positive, or an option out of range.
    Source: facebookresearch/dinov2 dinov2/loss/dino_clstoken_loss.py.

    Example:
        >>> student, teacher = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4)(torch.randn(2 * 3, 8)) for _ in range(2))
        >>> criterion = DINOLoss(512)
        >>> targets = criterion.softmax_center_teacher(teacher, teacher_temp=0.04)
        >>> criterion.update_center(teacher)
        >>> loss = criterion(student.chunk(2), targets.chunk(2))  # 2 crops of 3 images, each against each
        >>> type(targets).__name__, tuple(targets.shape), loss.requires_grad
        ('TeacherTargets', (6, 512), True)
    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9, **options: Unpack[RankOptions]
    ) -> None:
        super().__init__(out_dim, student_temp, center_momentum, **options)

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output: Logits, teacher_temp: float | Tensor) -> Targets:
        """[..., K] targets of [..., K] raw logits by the centre, after its pending update."""
        self.apply_center_update()
        return self._centered_targets(teacher_output, teacher_temp)

    def sinkhorn_knopp_teacher(
        self, teacher_output: Logits, teacher_temp: float | Tensor, n_iterations: int = 3
    ) -> Targets:
        """[..., K] targets of [..., K] raw logits by Sinkhorn-Knopp over the rows of all ranks; no centre. Collective."""
        return self._sinkhorn_targets(teacher_output, teacher_temp, n_iterations)

    def forward(
        self,
        student_output_list: Iterable[Logits],
        teacher_out_softmaxed_centered_list: Iterable[Targets],
    ) -> Tensor:
        """Sum over the pairs of the mean over rows, in one pass over all entries.

        Args:
            student_output_list: V entries of [R, K] raw logits; a list, or one [V, R, K].
            teacher_out_softmaxed_centered_list: G entries of [R, K] targets, likewise; row r is paired with row r.

        Returns:
            [] nats.

        Raises:
            ValueError: the entries differ in their number of rows.
            TypeError: one side is stored and the other is not.
        """
        teacher_out_softmaxed_centered_list = list(teacher_out_softmaxed_centered_list)
        for entry in teacher_out_softmaxed_centered_list:
            check_targets(entry)
        students = [entry.reshape(-1, entry.shape[-1]) for entry in student_output_list]
        teachers = [entry.reshape(-1, entry.shape[-1]) for entry in teacher_out_softmaxed_centered_list]
        rows = {entry.shape[0] for entry in (*students, *teachers)}
        if len(rows) > 1:
            raise ValueError(f"entries have {sorted(rows)} rows; expected as many rows in each, paired in their order")
        if not students or not teachers:
            return self.center.new_zeros(())  # a sum without terms
        student = students[0] if len(students) == 1 else torch.cat(students)  # type: ignore[arg-type]
        terms = []
        for targets, count in _joined(teachers):
            weights = torch.ones(count, len(students), dtype=torch.float64, device=student.device) / max(*rows, 1)
            terms.append(self._cross_entropy(student, targets, weights))
        return torch.stack(terms).sum()


class iBOTPatchLoss(PatchLoss):  # noqa: N801 - the published name
    """Cross-entropy of masked patches: the mean over those of each image, then over all images.

    Args:
        patch_out_dim: number of prototypes K.
        student_temp, center_momentum, options: as ``DINOLoss``.

    Attributes:
        center: [1, 1, K] fp32, the state dict's only entry.

    Raises:
        ValueError: a temperature is not positive, or an option out of range.
    Source: facebookresearch/dinov2 dinov2/loss/ibot_patch_loss.py.

    Example:
        >>> masks = torch.eye(3).bool().expand(2, 3, 3).flatten(1)  # 3 of the 9 patches of each of 2 images
        >>> student, teacher = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4)(torch.randn(6, 8)) for _ in range(2))
        >>> criterion = iBOTPatchLoss(512)
        >>> targets = criterion.softmax_center_teacher(teacher.unsqueeze(0), teacher_temp=0.04).squeeze(0)
        >>> criterion.update_center(teacher.unsqueeze(0))
        >>> criterion.forward_masked(student, targets, masks).requires_grad
        True
    """

    def __init__(
        self,
        patch_out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        **options: Unpack[RankOptions],
    ) -> None:
        super().__init__(patch_out_dim, student_temp, center_momentum, **options)

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_patch_tokens: Logits, teacher_temp: float | Tensor) -> Targets:
        """[..., K] targets of [..., K] raw logits by the centre, after its pending update."""
        self.apply_center_update()
        return self._centered_targets(teacher_patch_tokens, teacher_temp)

    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Logits,
        teacher_temp: float | Tensor,
        n_masked_patches_tensor: Tensor,
        n_iterations: int = 3,
    ) -> Targets:
        """[M, K] targets of [M, K] raw logits by Sinkhorn-Knopp over the masked patches of all ranks. Collective.

        ``n_masked_patches_tensor`` is neither read nor written: the number of patches cancels in the algorithm.
        """
        return self._sinkhorn_targets(teacher_output, teacher_temp, n_iterations)


class KoLeoLoss(nn.Module):
    """``-mean_i log(min_{j != i} ||x_i - x_j||)`` over the L2-normalised rows of this rank.

    This is the library's ``KoLeoLoss`` with the published signature, computed in fp32, so that fp16 features do not give
    infinity. A single row raises an error; the published code returns the constant 17.08.

    Attributes:
        pdist: the distance, as published.

    Source: facebookresearch/dinov2 dinov2/loss/koleo_loss.py.

    Example:
        >>> round(KoLeoLoss()(torch.eye(4)).item(), 2)  # every nearest neighbour is sqrt(2) away: -log(2) / 2
        -0.35
    """

    def __init__(self) -> None:
        super().__init__()
        self.pdist = nn.PairwiseDistance(2, eps=1e-8)

    def pairwise_NNs_inner(self, x: Tensor) -> Tensor:  # noqa: N802 - the published name
        """[B] the nearest other row of each row of [B, D], by dot product."""
        return (x @ x.T).fill_diagonal_(-1).argmax(dim=1)

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """[B, D] features to a [] loss, nats.

        Raises:
            ValueError: ``student_output`` is not a matrix of at least two rows.
        """
        loss: Tensor = koleo.KoLeoLoss(eps)(student_output)
        return loss


def load_checkpoint(
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    *,
    network: str = "teacher",
    backbone: nn.Module | None = None,
    dino_head: nn.Module | None = None,
    ibot_head: nn.Module | None = None,
    dino_loss: nn.Module | None = None,
    ibot_patch_loss: nn.Module | None = None,
) -> None:
    """Load a checkpoint of a run into our modules, strictly.

    Args:
        checkpoint: its path or, already loaded, its mapping: ``teacher_checkpoint.pth`` of an evaluation, with the entry
            ``teacher``; a checkpointer's file, with the state of the whole run in the entry ``model``; or that state. A file
            is read without running pickled code. A file of one rank (``model_*.rank_0.pth``) holds whole tensors only where
            FSDP did not shard them; where it did, the error names what to save instead.
        network: "teacher" or "student": which one ``backbone`` and the heads take.
        backbone, dino_head, ibot_head: take the keys under their names, or None.
        dino_loss, ibot_patch_loss: take their centres, or None; they are in the whole run's state only.

    Raises:
        ValueError: ``network`` is unknown, the file is not one of ``torch.save``, a tensor is one rank's part, or the
            checkpoint lacks an entry or prefix; says which it has.
        OSError: the file cannot be opened; FileNotFoundError where there is none.
        RuntimeError: a tensor is missing, left over or of another shape (from ``load_state_dict``).

    Example:
        >>> saved, head = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4) for _ in range(2))
        >>> run = {"teacher": {f"dino_head.{key}": value for key, value in saved.state_dict().items()}}  # or the path of a file
        >>> load_checkpoint(run, network="teacher", dino_head=head)
        >>> torch.equal(head.last_layer.weight, saved.last_layer.weight)
        True
    """
    modules = {"backbone.": backbone, "dino_head.": dino_head, "ibot_head.": ibot_head}
    load_networks(checkpoint, network, modules, {"dino_loss": dino_loss, "ibot_patch_loss": ibot_patch_loss})


def _joined(entries: list[Targets]) -> list[tuple[Targets, int]]:
    """Concatenated targets with their number of entries, in as few parts as possible; stored targets as their sum."""
    joined: list[tuple[Targets, int]] = []
    stored = [entry for entry in entries if isinstance(entry, Tensor)]
    if stored:
        # the loss is linear in the targets, so one pass is enough
        total = stored[0] if len(stored) == 1 else sum(q.to(accumulation_dtype(q.dtype)) for q in stored)
        assert isinstance(total, Tensor)
        joined.append((total, 1))
    alike: dict[tuple[object, int], list[TeacherTargets]] = {}
    for entry in entries:
        if isinstance(entry, TeacherTargets):
            temperature = entry.temperature
            # compare by identity: parts of one batch share these tensors, and comparing values would wait for the device
            key = (id(temperature) if isinstance(temperature, Tensor) else temperature, id(entry.bias))
            alike.setdefault(key, []).append(entry)
    for group in alike.values():
        joined.append((group[0] if len(group) == 1 else torch.cat(group), len(group)))  # type: ignore[arg-type]
    return joined
