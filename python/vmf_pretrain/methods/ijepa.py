"""I-JEPA and V-JEPA: the features of hidden blocks are predicted from those of a context; the targets' network is an average.

Source: Assran et al., "Self-supervised learning from images with a joint-embedding predictive architecture", CVPR 2023;
Bardes et al., "Revisiting feature prediction for learning visual representations from video", TMLR 2024; and their published
trainers.

Legend: B images, N tokens, F features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.plan import MaskSampler, Plan
from vmf_pretrain.data.token_masks import MultiBlockMasks, TubeMasks
from vmf_pretrain.methods.method import MINIMISED, Method, Place
from vmf_pretrain.methods.spread import feature_numbers
from vmf_pretrain.networks import ranks
from vmf_pretrain.networks.average import follow
from vmf_pretrain.networks.backbone import build_backbone, heads_of, xavier
from vmf_pretrain.networks.parts import in_parts
from vmf_pretrain.networks.positions import COLUMN_FIRST, fix_positions
from vmf_pretrain.networks.predictor import ContextPredictor, Predictor
from vmf_pretrain.networks.tubelets import tubelets
from vmf_pretrain.networks.visible import chosen, patch_tokens, see_some
from vmf_pretrain.schedules import LinearSchedule

SPREAD = 0.02  # of every linear layer at the start: the published scaling by depth is drawn over again


class IJEPA(Method):
    """A context encoder with its predictor, and the target encoder, which is evaluated."""

    evaluated_name = "the target encoder"
    contexts = 1  # of an image; each has targets and a mask token of its own
    axes: tuple[int, ...] = COLUMN_FIRST

    def __init__(self, config: Config, start: Place) -> None:
        super().__init__(config, start)
        backbone, self.teacher = self._backbone(config.backbone.drop_path), self._backbone(0.0)
        predictor = Predictor(
            int(backbone.num_features),
            config.token_grid,
            config.predictor,
            heads=heads_of(backbone),
            axes=self.axes,
            masks=self.contexts,
        )
        self.student = ContextPredictor(backbone, predictor)
        self._initialise()
        self.begin()
        self.teacher.requires_grad_(False)
        optim = config.optim
        self.momentum = LinearSchedule(
            optim.teacher_momentum, optim.final_teacher_momentum, start.steps * optim.stretch
        )
        self._last: tuple[list[Tensor], list[Tensor], Tensor] | None = None

    @classmethod
    def plan(cls, config: Config) -> Plan:
        """One view, and the blocks of its tokens."""
        return Plan(1, 0, cls.sampler(config))

    @classmethod
    def sampler(cls, config: Config) -> MaskSampler:
        """Draws contexts and targets."""
        return MultiBlockMasks(config.token_grid, config.blocks)

    @property
    def evaluated(self) -> nn.Module:
        """The target encoder: the mean of its tokens."""
        backbone: nn.Module = self.teacher
        return backbone

    @property
    def exported(self) -> nn.Module:
        """The target encoder, and the predictor."""
        return nn.ModuleDict({"backbone": self.teacher, "predictor": self.student.predictor})

    @property
    def trained(self) -> nn.Module:
        """Context encoder and predictor."""
        return self.student

    def begin(self) -> None:
        """The target encoder becomes the context encoder."""
        self.teacher.load_state_dict(self.student.backbone.state_dict())

    def forward(self, batch: Batch, place: Place) -> dict[str, Tensor]:
        """The distance of predicted features from those of the target encoder, a mean over contexts, tokens and features."""
        (inputs,), masks = batch.views, self._ordered(batch.masks)
        targets = self._targets(inputs, masks[1::2])
        predicted = in_parts(
            self.student,
            inputs,
            images=len(inputs),
            parts=self.config.train.accumulate,
            call=lambda some, place: self.student(some, *(mask[place] for mask in masks)),
        )
        pieces = torch.split(predicted, [target.shape[1] for target in targets], dim=1)
        losses = [self.distance(piece.to(target.dtype), target) for piece, target in zip(pieces, targets, strict=True)]
        loss = torch.stack(losses).mean()
        self._last = (targets, [piece.detach() for piece in pieces], loss.detach())
        return {MINIMISED: loss, "loss": loss}

    @staticmethod
    def distance(predicted: Tensor, targets: Tensor) -> Tensor:
        """[] smooth L1 distance with a threshold of 1, the mean over all numbers."""
        return functional.smooth_l1_loss(predicted, targets)

    def numbers(self) -> dict[str, Tensor]:
        """The loss of predicting the mean target everywhere, the loss as a share of it, and what shows a collapse.

        ``target_variance`` is that of all target tokens, at most 1 because each is normalised; near 0, all tokens are alike.
        ``image_variance`` is that of the images' means; near 0, tokens may tell where they are, but not in which image.
        ``predicted_variance`` is that of all predicted tokens; near 0, the predictor says the same of everything.
        """
        assert self._last is not None
        targets, predicted, loss = self._last
        constants = [_centred(target.flatten(0, 1)) for target in targets]
        guesses = [_centred(piece.float().flatten(0, 1)).square().mean() for piece in predicted]
        constant = torch.stack([self.distance(c, torch.zeros_like(c)) for c in constants]).mean()
        tokens = torch.stack([c.square().mean() for c in constants]).mean()
        images = torch.stack([_centred(target.mean(dim=1)).square().mean() for target in targets]).mean()
        constant, tokens, images = (ranks.averaged(value) for value in (constant, tokens, images))
        return {
            "constant_loss": constant,
            "relative_loss": ranks.averaged(loss) / constant,
            "target_variance": tokens,
            "image_variance": images,
            "predicted_variance": ranks.averaged(torch.stack(guesses).mean()),
            **feature_numbers(targets[0].mean(dim=1)),
        }

    def after_step(self, place: Place, share: Tensor | float) -> None:
        """Move the target encoder."""
        follow(self.teacher, self.student.backbone, (1.0 - self.momentum.at(place.step)) * share)

    def rates(self, place: Place) -> dict[str, float]:
        """Momentum of the target encoder."""
        return {"teacher_momentum": self.momentum.at(place.step)}

    @torch.no_grad()
    def _targets(self, inputs: Tensor, blocks: list[Tensor]) -> list[Tensor]:
        """[B, M * m, F] for each mask: the target encoder's tokens, each normalised over its features."""
        parts = torch.tensor_split(inputs, self.config.train.accumulate)
        tokens = torch.cat([patch_tokens(self.teacher, part) for part in parts if len(part)])
        tokens = functional.layer_norm(tokens.to(inputs.dtype), tokens.shape[-1:])
        return [chosen(tokens, places.flatten(1)) for places in blocks]

    def _ordered(self, masks: dict[str, Tensor]) -> list[Tensor]:
        """Context and target of each mask in turn."""
        return [masks[f"{name}.{place}"] for place in range(self.contexts) for name in ("context", "target")]

    def _backbone(self, drop_path: float) -> Any:
        backbone = build_backbone(
            self.config,
            drop_path=drop_path,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            **self._embedding(),
        )
        see_some(backbone)
        fix_positions(backbone, self.config.token_grid, self.axes)
        return backbone

    def _embedding(self) -> dict[str, Any]:
        """What a vision transformer is told about its patches besides their size."""
        return {}

    def _initialise(self) -> None:
        for module in self.student.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                nn.init.trunc_normal_(module.weight, 0.0, SPREAD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.backbone.initialisation == "xavier":
            xavier(self.student)
        self._initialise_mask_tokens()

    def _initialise_mask_tokens(self) -> None:
        for token in self.student.predictor.mask_tokens:
            nn.init.trunc_normal_(token, 0.0, SPREAD)


class VJEPA(IJEPA):
    """I-JEPA on clips: tokens are tubelets, short and long blocks through all frames are two masks, the distance is L1."""

    contexts = 2
    axes = (0, 1, 2)

    @classmethod
    def sampler(cls, config: Config) -> MaskSampler:
        """Draws the short blocks and the long ones."""
        return TubeMasks(config.token_grid, config.blocks)

    @staticmethod
    def distance(predicted: Tensor, targets: Tensor) -> Tensor:
        """[] mean absolute difference."""
        return (predicted - targets).abs().mean()

    def _embedding(self) -> dict[str, Any]:
        clips = self.config.clips
        return {"embed_layer": tubelets(clips.frames, clips.tubelet), "dynamic_img_size": False}

    def _initialise_mask_tokens(self) -> None:
        """They start at 0, as published."""


def _centred(rows: Tensor) -> Tensor:
    """Rows less their mean over the rows of all ranks."""
    return rows - ranks.averaged(rows.mean(dim=0))
