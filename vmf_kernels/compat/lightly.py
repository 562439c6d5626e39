"""Drop-in for lightly-ai/lightly: its DINO, iBOT and KoLeo losses and DINO heads, with its signatures, defaults and keys.

Import these instead of ``lightly.loss`` and ``lightly.models.modules`` (README, which also lists what differs). lightly itself
is not needed.

Legend: G / V teacher / student views, B images, M masked patches, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from vmf_kernels import koleo
from vmf_kernels.centering import LogitCenter
from vmf_kernels.compat._shared import unit_rows
from vmf_kernels.compat.checkpoints import load_modules as load_checkpoint
from vmf_kernels.heads import PrototypeLayer, init_linears, outlive
from vmf_kernels.logits import PrototypeLogits, project
from vmf_kernels.losses import publish_center
from vmf_kernels.pairing import multi_crop_weights
from vmf_kernels.prototypes import accumulation_dtype
from vmf_kernels.statistics import AssignmentStatistics
from vmf_kernels.streams import Stream, StreamOptions

__all__ = ["DINOLoss", "DINOProjectionHead", "DINOv2ProjectionHead", "IBOTPatchLoss", "KoLeoLoss", "RankMeanCenter"]
__all__ += ["load_checkpoint"]

CENTER_MODES = ("mean",)


class RankMeanCenter(LogitCenter):
    """The running mean of the ranks' means, each rank counting once however many rows it has; one without rows does not.

    Arguments as ``LogitCenter``, which weighs by rows: the two agree where all ranks have equally many.

    Source: lightly-ai/lightly lightly/models/modules/center.py.
    """

    @property
    def value(self) -> Tensor:
        """[1, K] the centre, under the name it has there."""
        return self.center

    @torch.no_grad()
    def _statistic(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        flat = teacher.detach().flatten(0, -2)
        rows = flat if isinstance(flat, Tensor) else flat.features
        total = rows.sum(dim=0, dtype=accumulation_dtype(rows.dtype))
        count = rows.shape[0]
        mine = torch.cat([total / max(count, 1), total.new_full((1,), float(count > 0))])
        summed = self._row_ranks.sum(mine)
        means = summed[:-1] if isinstance(teacher, Tensor) else project(teacher.prototypes, summed[:-1])
        return means, summed[-1]


class DINOLoss(nn.Module):
    """lightly's ``DINOLoss``: mean cross-entropy over pairs of different views, lists of views, the teacher's first.

    Args:
        output_dim: K.
        warmup_teacher_temp: teacher temperature at epoch 0, for calls with an epoch.
        teacher_temp: teacher temperature after the warm-up, and of calls without an epoch.
        warmup_teacher_temp_epochs: epochs of linear warm-up; the last of them already has the final value.
        student_temp: student temperature.
        center_momentum: of the running mean, in [0, 1).
        center_mode: "mean", the one there is.
        options: keywords of ``Stream``: the centring rule and how its centre moves, backend, ranks.

    Attributes:
        center: [1, 1, K], the state dict's only entry; absent under Sinkhorn-Knopp, which keeps none.
        statistics: ``AssignmentStatistics`` of the last call, None before.

    Raises:
        ValueError: a temperature is not positive, or an option unknown.
    Source: lightly-ai/lightly lightly/loss/dino_loss.py; Caron et al., ICCV 2021.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        **options: Unpack[StreamOptions],
    ) -> None:
        super().__init__()
        first = _checked_temperature(warmup_teacher_temp, "warmup_teacher_temp")
        self.teacher_temp = _checked_temperature(teacher_temp, "teacher_temp")
        self.teacher_temp_schedule: list[float] = torch.linspace(
            first, self.teacher_temp, warmup_teacher_temp_epochs, dtype=torch.float32, device="cpu"
        ).tolist()
        self.stream = _stream(output_dim, student_temp, center_momentum, center_mode, options)
        self.statistics: AssignmentStatistics | None = None
        publish_center(self, "center", "stream.centering.center", dims=3)

    @property
    def center(self) -> Tensor:
        """[1, 1, K] the running centre."""
        center: Tensor = self.stream.centering.center  # type: ignore[assignment]
        return center[None]

    def forward(
        self,
        teacher_out: Sequence[PrototypeLogits | Tensor],
        student_out: Sequence[PrototypeLogits | Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """Mean over the pairs of different views and the images; moves the centre.

        Args:
            teacher_out: G views, each [B, K] raw logits; no gradient reaches them.
            student_out: V views, each [B, K] raw logits; the first ones are those the teacher sees, in its order.
            teacher_temp: teacher temperature; None for that of the epoch or, without one, of the constructor.
            epoch: from 0.

        Returns:
            [] nats.

        Raises:
            ValueError: views have different shapes, no pair of different views is left, K is not ``output_dim``, or the
                temperature or epoch is out of range.
            TypeError: one side is stored and the other is not.
        """
        tau = self._temperature(teacher_temp, epoch)
        images = _images(teacher_out, student_out)
        device = teacher_out[0].device
        weights = multi_crop_weights(len(teacher_out), len(student_out), device=device) / max(images, 1)
        student: PrototypeLogits | Tensor = torch.cat(list(student_out))  # type: ignore[arg-type]
        teacher: PrototypeLogits | Tensor = torch.cat(list(teacher_out))  # type: ignore[arg-type]
        outputs = self.stream.prepare(student, teacher, tau)
        result = self.stream(outputs, weights, tau)
        self.statistics = result.statistics
        self.stream.observe(outputs.teacher, tau)
        loss: Tensor = result.loss
        return loss

    def update_center(
        self,
        teacher_out: PrototypeLogits | Tensor | None = None,
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> None:
        """Move the centre by [G, B, K] logits, if given, at the temperature as in ``forward``, and by the batches that wait."""
        if teacher_out is not None:
            self.stream.centering.accumulate(teacher_out, self._temperature(teacher_temp, epoch))
        self.stream.centering.apply_pending()

    def _temperature(self, given: float | None, epoch: int | None) -> float:
        if given is not None:
            return _checked_temperature(given, "teacher_temp")
        if epoch is None:
            return self.teacher_temp
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; expected an int >= 0, or None")
        return self.teacher_temp_schedule[epoch] if epoch < len(self.teacher_temp_schedule) else self.teacher_temp


class IBOTPatchLoss(nn.Module):
    """lightly's ``IBOTPatchLoss``: masked patches one to one; mean over those of an image, then over all images.

    Args:
        output_dim: K.
        teacher_temp: teacher temperature of calls without one.
        student_temp: student temperature.
        center_mode: "mean", the one there is.
        center_momentum: of the running mean, in [0, 1).
        options: keywords of ``Stream``: the centring rule and how its centre moves, backend, ranks.

    Attributes:
        center: the centring rule, whose own ``center`` [1, K] is the state dict's only entry, ``center.center``: the mean over
            ranks of each one's mean over its masked patches.
        statistics: ``AssignmentStatistics`` of the last call, None before.

    Raises:
        ValueError: a temperature is not positive, or an option unknown.
    Source: lightly-ai/lightly lightly/loss/ibot_loss.py; Zhou et al., "iBOT", ICLR 2022.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        **options: Unpack[StreamOptions],
    ) -> None:
        super().__init__()
        self.teacher_temp = _checked_temperature(teacher_temp, "teacher_temp")
        self.stream = _stream(output_dim, student_temp, center_momentum, center_mode, options)
        self.statistics: AssignmentStatistics | None = None
        publish_center(self, "center.center", "stream.centering.center")

    @property
    def center(self) -> nn.Module:
        """The centring rule; ``center.value`` is the [1, K] centre."""
        return self.stream.centering

    def forward(
        self,
        teacher_out: PrototypeLogits | Tensor,
        student_out: PrototypeLogits | Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the masked patches; moves the centre. Every rank calls it equally often, also with M = 0.

        Args:
            teacher_out: [M, K] raw logits of the masked patches; no gradient reaches them.
            student_out: [M, K] raw logits of the same patches.
            mask: [B, H, W] bool with M entries that are True, in the order of the rows.
            teacher_temp: teacher temperature; None for that of the constructor.

        Returns:
            [] nats; 0 with zero gradients for M = 0.

        Raises:
            ValueError: the mask is not bool or does not fit the rows, K is not ``output_dim``, or the temperature not positive.
            TypeError: one side is stored and the other is not.
        """
        tau = self.teacher_temp if teacher_temp is None else _checked_temperature(teacher_temp, "teacher_temp")
        weights = _patch_weights(mask, teacher_out, student_out)
        outputs = self.stream.prepare(student_out, teacher_out, tau)
        # the mean over images apart from the weights, which are fp32 there too: fp64 logits then lose nothing
        pair = torch.full((1, 1), 1 / max(len(mask), 1), dtype=torch.float64, device=weights.device)
        result = self.stream(outputs, pair, tau, weights)
        self.statistics = result.statistics
        self.stream.observe(outputs.teacher, tau)
        loss: Tensor = result.loss
        return loss

    def update_center(self) -> None:
        """Move the centre by the batches since the last call; only for ``center_update="manual"``."""
        self.stream.centering.apply_pending()


class KoLeoLoss(koleo.KoLeoLoss):
    """lightly's ``KoLeoLoss``: neighbours by cosine, their distance in any p-norm; in fp32 whatever autocast says.

    Args:
        p: degree of the norm of the distance, > 0.
        eps: added to the distance and to its components, > 0.

    Raises:
        ValueError: ``p`` or ``eps`` is not positive; when called, fewer than two rows, which have no neighbour.
    Source: lightly-ai/lightly lightly/loss/koleo_loss.py.
    """

    def __init__(self, p: float = 2, eps: float = 1e-8) -> None:
        super().__init__(eps)
        if not p > 0:
            raise ValueError(f"p is {p}; expected a number > 0")
        self.p = p

    def _of_crop(self, rows_BD: Tensor, among_ND: Tensor, start: int) -> Tensor:
        if self.p == 2:
            return super()._of_crop(rows_BD, among_ND, start)
        with torch.no_grad():
            nearest_B = (rows_BD @ among_ND.T).fill_diagonal_(-torch.inf).argmax(dim=1)
        distance_B = functional.pairwise_distance(rows_BD, among_ND[nearest_B], p=self.p, eps=self.eps)
        return -(distance_B + self.eps).log().mean()


class DINOv2ProjectionHead(nn.Module):
    """lightly's ``DINOv2ProjectionHead``, with logits that are never stored; unlike it, it can be deep-copied.

    Args:
        input_dim: dim of the backbone's features.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: D.
        output_dim: K.
        batch_norm: BatchNorm after each hidden layer, which then has no bias.

    Raises:
        ValueError: a dim is below 1, or ``bottleneck_dim`` below 2.
    Source: lightly-ai/lightly lightly/models/modules/heads.py.
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 65536,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if min(input_dim, hidden_dim, output_dim) < 1 or bottleneck_dim < 2:
            raise ValueError(
                f"input_dim, hidden_dim, bottleneck_dim, output_dim are {input_dim}, {hidden_dim}, {bottleneck_dim}, "
                f"{output_dim}; expected at least 1, 1, 2 and 1"
            )
        layers: list[nn.Module] = []
        for width in (input_dim, hidden_dim):
            layers.append(nn.Linear(width, hidden_dim, bias=not batch_norm))
            layers += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if batch_norm else [nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        init_linears(self.layers)
        self.last_layer = PrototypeLayer(bottleneck_dim, output_dim)

    def forward(self, x: Tensor) -> PrototypeLogits:
        """[R, input_dim] features to [R, K] logits, in the dtype autocast gives the MLP."""
        return outlive(self, self.last_layer(unit_rows(self.layers(x))))


class DINOProjectionHead(DINOv2ProjectionHead):
    """lightly's ``DINOProjectionHead``: the same, with norms that may be frozen and a last layer that may rest at first.

    Args:
        input_dim, hidden_dim, bottleneck_dim, output_dim, batch_norm: as ``DINOv2ProjectionHead``, which lists the errors.
        freeze_last_layer: epochs during which ``cancel_last_layer_gradients`` acts.
        norm_last_layer: freeze the prototypes' norms at 1.

    Source: lightly-ai/lightly lightly/models/modules/heads.py.
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 65536,
        batch_norm: bool = False,
        freeze_last_layer: int = -1,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__(input_dim, hidden_dim, bottleneck_dim, output_dim, batch_norm)
        self.freeze_last_layer = freeze_last_layer
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def cancel_last_layer_gradients(self, current_epoch: int) -> None:
        """Drop the prototypes' gradients before epoch ``freeze_last_layer``; call between backward and optimiser step."""
        if current_epoch < self.freeze_last_layer:
            for parameter in self.last_layer.parameters():
                parameter.grad = None  # not 0: a step with zeros would still decay weights and moments


def _stream(output_dim: int, student_temp: float, momentum: float, center_mode: str, options: StreamOptions) -> Stream:
    """A stream whose logit centre averages over ranks as lightly's does."""
    if center_mode not in CENTER_MODES:
        raise ValueError(f"center_mode is {center_mode!r}; expected one of {', '.join(CENTER_MODES)}")
    stream = Stream(output_dim, student_temp, momentum, **options)
    if isinstance(stream.centering, LogitCenter):
        stream.centering = RankMeanCenter(
            output_dim,
            momentum,
            start=options.get("center_start", "zero"),
            prototype_group=options.get("prototype_group"),
            row_group=options.get("row_group"),
        )
    return stream


def _checked_temperature(value: float, name: str) -> float:
    """The value in fp32, in which lightly keeps teacher temperatures; only fp64 logits tell the difference."""
    if not value > 0:
        raise ValueError(f"{name} is {value}; expected a number > 0")
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


def _images(teacher_out: Sequence[PrototypeLogits | Tensor], student_out: Sequence[PrototypeLogits | Tensor]) -> int:
    """B of views [B, K]."""
    shapes = [tuple(view.shape) for view in (*teacher_out, *student_out)]
    if not teacher_out or not student_out:
        raise ValueError(
            f"got {len(teacher_out)} teacher views and {len(student_out)} student views; expected some of each"
        )
    if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"views have shapes {', '.join(map(str, shapes))}; expected [B, K] with one B")
    return shapes[0][0]


def _patch_weights(mask: Tensor, teacher: PrototypeLogits | Tensor, student: PrototypeLogits | Tensor) -> Tensor:
    """[M] fp32 one over the number of masked patches of the row's image."""
    if mask.dtype != torch.bool or mask.ndim < 2:
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; expected bool [images, height, width]")
    mask = mask.flatten(1)
    share_B = mask.sum(dim=1).clamp(min=1).float().reciprocal()
    weights = share_B[:, None].expand_as(mask)[mask].to(student.device)
    for rows, side in ((teacher, "teacher_out"), (student, "student_out")):
        if rows.ndim != 2 or rows.shape[0] != weights.shape[0]:
            raise ValueError(
                f"{side} has shape {tuple(rows.shape)} but the mask {weights.shape[0]} masked patches; expected "
                f"[{weights.shape[0]}, K]"
            )
    return weights
