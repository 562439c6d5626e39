"""iBOT and iBOT-vMF: DINO, and a student that learns the teacher's assignments of patches that it does not see.

Legend: G global views, B images of this rank, C = G B, N = H W patches of a global view, M masked ones, K prototypes.

Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022, section 3 and algorithm 1, and its
published trainer; Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm

from vmf_kernels import DINOHead, DINOvMFHead, IBOTLoss, IBOTvMFLoss, PrototypeLogits
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.masks import MASK, RatioMasks
from vmf_pretrain.data.plan import MaskSampler, Plan
from vmf_pretrain.methods.dino import DINO, GLOBAL_VIEWS, teach
from vmf_pretrain.methods.masked_patches import MaskedPatches
from vmf_pretrain.methods.method import MINIMISED, Place
from vmf_pretrain.methods.sinkhorn import RememberedSinkhorn
from vmf_pretrain.networks.average import update_average
from vmf_pretrain.networks.backbone import build_backbone, xavier
from vmf_pretrain.networks.tokens import TokenTransformer
from vmf_pretrain.networks.two_streams import StreamHead, TwoStreams, placed

PROTOTYPE_STD = 0.02  # deviation of a linear last layer's start (DINOv3)


class IBOT(DINO):
    """Student and teacher with prototypes for class tokens and for patches; the student's global views lack patches."""

    student: TwoStreams
    teacher: TwoStreams
    center_tokens = "all"  # which patches of the teacher enter their centre

    def __init__(self, config: Config, start: Place) -> None:
        super().__init__(config, start)
        self.patches: MaskedPatches | None = None  # of the last batch
        loss = self.loss
        self._temperatures = loss.teacher_temp_schedule, loss.teacher_temp2_schedule

    @classmethod
    def plan(cls, config: Config) -> Plan:
        """Two masked global views, and local ones that only the student sees."""
        side = config.views.global_size // config.backbone.patch_size
        return Plan(GLOBAL_VIEWS, config.views.local_count, cls.sampler(config, (side, side)))

    @classmethod
    def sampler(cls, config: Config, grid: tuple[int, int]) -> MaskSampler:
        """What draws the masks of views of H x W patches."""
        masks = config.masks
        return RatioMasks(grid, GLOBAL_VIEWS, masks.ratios, masks.spreads, blocks=masks.shape == "blocks")

    def forward(self, batch: Batch, place: Place) -> dict[str, Tensor]:
        """The cross-entropy between views' class tokens, that of masked patches, and KoLeo."""
        # what is masked is read on the host, which so waits for no device
        mask, on_host = (self._mask(masks, place) for masks in (batch.masks[MASK], batch.host_mask(MASK)))
        images, patches = len(mask), mask[0].numel()
        chosen = on_host.flatten().nonzero().flatten().to(mask.device, non_blocking=True)
        whole, local = batch.views[:GLOBAL_VIEWS], batch.views[GLOBAL_VIEWS:]
        every = self.center_tokens == "all"
        with torch.no_grad():
            taught = self.teacher.streams(whole, [], mask=None, chosen=None if every else chosen)
            self._norms, self._features = taught.of_class.prototypes.norms(), taught.features
        learnt = self.student.streams(whole, local, mask=mask, chosen=chosen)
        targets = (
            taught.patches.unflatten(0, (images, patches)) if every else placed(taught.patches, chosen, images, patches)
        )
        losses = self.loss(
            (learnt.of_class[:images], placed(learnt.patches, chosen, images, patches)),
            (taught.of_class, targets),
            learnt.of_class[images:] if local else None,
            on_host.chunk(GLOBAL_VIEWS),
            self._moment(place),
        )
        self._remember(taught.patches[chosen] if every else taught.patches, learnt.patches, mask, place)
        koleo = self._koleo(learnt.features)
        total = losses["loss"] + self.config.loss.koleo_weight * koleo
        named = {"loss": losses["loss"], "class_loss": losses["cls"], "patch_loss": losses["patch"]}
        return {MINIMISED: total, **named, "koleo": koleo}

    def numbers(self) -> dict[str, Tensor]:
        """Those of the class tokens as in DINO; the same of masked patches, and how often teacher and student agree."""
        assert self.patches is not None
        return {**super().numbers(), **self.patches.numbers()}

    def after_step(self, place: Place, share: Tensor | float) -> None:
        """Move the teacher, which has no mask token."""
        trained = dict(self.student.named_parameters())
        followers = dict(self.teacher.named_parameters())
        leaders = [trained[name] for name in followers]
        update_average(followers.values(), leaders, (1.0 - self.momentum.at(place.step)) * share)

    def rates(self, place: Place) -> dict[str, float]:
        """Momentum and temperatures of the teacher."""
        return {**super().rates(place), "patch_teacher_temperature": self._patch_temperature(place)}

    def _mask(self, masks: Tensor, place: Place) -> Tensor:
        """[C, H, W] of the global views, view-major; nothing is masked before the first epoch of masks."""
        mask = masks.transpose(0, 1).flatten(0, 1)
        return mask if place.epoch >= self.config.masks.start_epoch else torch.zeros_like(mask)

    def _moment(self, place: Place) -> int:
        """The entry of the temperatures' schedules: one for each epoch, as published."""
        return place.epoch

    def _teacher_temperature(self, place: Place) -> float:
        return float(self._temperatures[0][self._moment(place)])

    def _patch_temperature(self, place: Place) -> float:
        return float(self._temperatures[1][self._moment(place)])

    def _remember(self, taught: PrototypeLogits, learnt: PrototypeLogits, mask: Tensor, place: Place) -> None:
        loss: Any = self.loss.patch_loss
        share = mask.flatten(1).any(dim=1).double().mean()
        temperatures = self._patch_temperature(place), loss.student_temp
        centering = loss.stream.centering
        self.patches = MaskedPatches(loss.statistics, share, taught, learnt.detach(), centering, *temperatures)

    @property
    def _centering(self) -> Any:
        return self.loss.stream.centering

    def _networks(self) -> tuple[TwoStreams, TwoStreams]:
        config, parts = self.config, self.config.train.accumulate
        backbone = build_backbone(config, drop_path=config.backbone.drop_path)
        if not isinstance(backbone, TokenTransformer):
            raise PretrainError(
                f"backbone.name {config.backbone.name} is a {type(backbone).__name__}, whose patches cannot be hidden; "
                "expected a plain vision transformer."
            )
        head, patch_head = self._head(int(backbone.num_features)), self._patch_head(int(backbone.num_features))
        backbone.learn_to_hide()
        student = TwoStreams(backbone, head, patch_head, parts=parts)
        if config.backbone.initialisation == "xavier":
            xavier(student)
        teacher = TwoStreams(build_backbone(config), copy.deepcopy(head), copy.deepcopy(patch_head), parts=parts)
        teach(teacher, student)
        return student, teacher.requires_grad_(False)

    def _head(self, features: int) -> StreamHead:
        size = self.config.head
        own = self.config.patch_prototypes if size.patches == "own_prototypes" else None
        frozen = self.config.norm_prototypes
        head = StreamHead(
            features,
            size.prototypes,
            own,
            vmf=self.vmf,
            norm_last_layer=frozen,
            use_bn=size.batch_norm,
            nlayers=size.layers,
            hidden_dim=size.hidden_dim,
            bottleneck_dim=size.bottleneck_dim,
        )
        self._last_layers(head.last_layer, head.last_layer2)
        return head

    def _patch_head(self, features: int) -> DINOHead | None:
        size = self.config.head
        if size.patches != "own_head":
            return None
        options: dict[str, Any] = {
            "use_bn": size.batch_norm,
            "nlayers": size.layers,
            "hidden_dim": size.patch_hidden_dim or size.hidden_dim,
            "bottleneck_dim": size.patch_bottleneck_dim or size.bottleneck_dim,
        }
        if not self.vmf:
            options["norm_last_layer"] = self.config.norm_prototypes
        head = (DINOvMFHead if self.vmf else DINOHead)(features, self.config.patch_prototypes, **options)
        self._last_layers(head.last_layer)
        return head

    def _last_layers(self, *layers: nn.Module | None) -> None:
        """Make last layers linear, if the configuration says so, with DINOv3's start."""
        if self.config.head.last_layer == "linear":
            for layer in filter(None, layers):
                remove_weight_norm(layer)
                nn.init.trunc_normal_(layer.get_parameter("weight"), 0.0, PROTOTYPE_STD)

    def _loss(self) -> IBOTLoss:
        loss, sizes = self.config.loss, (self.config.head.prototypes, self.config.patch_prototypes)
        warm_up, first, entries = self._schedule()
        published: tuple[Any, ...] = (
            *sizes,
            GLOBAL_VIEWS,
            self.config.views.local_count,
            *self._teacher_temps(),
            warm_up,
            entries,
            loss.student_temp,
            loss.center_momentum,
            loss.patch_center_momentum,
            self._class_weight(),
            loss.patch_weight,
            first,
        )
        options: dict[str, Any] = {"center_start": loss.center_start, "center_tokens": self.center_tokens}
        if loss.centering == "sinkhorn_knopp":
            options["centering"], options["patch_centering"] = map(RememberedSinkhorn, sizes)
        elif self.vmf:
            options["centering"] = loss.centering
        return (IBOTvMFLoss if self.vmf else IBOTLoss)(*published, **options)

    def _schedule(self) -> tuple[int, int, int]:
        """Entries of the temperatures' warm-up, of the patches' wait before it, and of the run."""
        return self.config.loss.warmup_teacher_temp_epochs, self.config.masks.start_epoch, self.start.epochs

    def _teacher_temps(self) -> tuple[float, float, float, float]:
        """Teacher temperatures of class tokens before and after the warm-up, and of patches."""
        loss = self.config.loss
        of_patches = loss.warmup_patch_teacher_temp, loss.patch_teacher_temp
        return loss.warmup_teacher_temp, loss.teacher_temp, *of_patches

    def _class_weight(self) -> float:
        return self.config.loss.class_weight


class IBOTvMF(IBOT):
    """iBOT whose prototypes are von Mises-Fisher components of free precision."""

    vmf = True
