"""MAE: a quarter of the patches is encoded, and the pixels of the others are reconstructed. Nothing follows.

Source: He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, and its published trainer.
"""

import torch
from torch import Tensor, nn

from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.data.plan import Plan
from vmf_pretrain.data.token_masks import RandomMasks
from vmf_pretrain.methods.method import MINIMISED, Method, Place
from vmf_pretrain.networks import ranks
from vmf_pretrain.networks.backbone import build_backbone
from vmf_pretrain.networks.decoder import Decoder, MaskedAutoencoder, hidden_from, images_of, initialise, patches_of
from vmf_pretrain.networks.parts import in_parts
from vmf_pretrain.networks.positions import COLUMN_FIRST, fix_positions
from vmf_pretrain.networks.visible import see_some

VARIANCE_FLOOR = 1e-6  # added to a patch's variance, as published; patches of one colour have none
DRAWN_SEED = 0  # of the masks in pictures, so that those of all runs show the same patches


class MAE(Method):
    """A masked autoencoder; its encoder is what is evaluated, without a mask."""

    evaluated_name = "the encoder"

    def __init__(self, config: Config, start: Place) -> None:
        super().__init__(config, start)
        self.grid, self.side = config.token_grid, config.backbone.patch_size
        pool = "token" if config.decoder.features == "class" else "avg"
        backbone = build_backbone(config, drop_path=config.backbone.drop_path, global_pool=pool, fc_norm=False)
        see_some(backbone)
        fix_positions(backbone, self.grid, COLUMN_FIRST)
        outputs = self.side**2 * network_input(config).channels
        decoder = Decoder(int(backbone.num_features), self.grid, outputs, config.decoder)
        self.autoencoder = MaskedAutoencoder(backbone, decoder)
        initialise(self.autoencoder)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def plan(cls, config: Config) -> Plan:
        """One view, and the patches that the encoder sees."""
        return Plan(1, 0, RandomMasks(config.token_grid, config.decoder.masked))

    @property
    def evaluated(self) -> nn.Module:
        """The encoder, which sees all patches of an evaluated image."""
        return self.autoencoder.backbone

    @property
    def exported(self) -> nn.Module:
        """Encoder and decoder."""
        return self.autoencoder

    @property
    def trained(self) -> nn.Module:
        """Encoder and decoder."""
        return self.autoencoder

    def forward(self, batch: Batch, place: Place) -> dict[str, Tensor]:
        """The mean squared error of the hidden patches."""
        (inputs,), kept = batch.views, batch.masks["kept"]
        predicted = in_parts(
            self.autoencoder,
            inputs,
            images=len(inputs),
            parts=self.config.train.accumulate,
            call=lambda some, place: self.autoencoder(some, kept[place]),
        )
        targets = self._targets(inputs)
        hidden = hidden_from(kept, targets.shape[1])
        # every image has as many hidden patches, so that the mean over them is one over images
        shares = hidden.to(targets.dtype) / hidden.sum()
        loss = ((predicted.to(targets.dtype) - targets).square().mean(dim=-1) * shares).sum()
        self._last = (targets, shares, loss.detach())
        return {MINIMISED: loss, "loss": loss}

    def numbers(self) -> dict[str, Tensor]:
        """The error of predicting the mean hidden patch everywhere, and the loss as a share of it: 1 has learned nothing."""
        assert self._last is not None
        targets, shares, loss = self._last
        mean_patch = ranks.averaged((targets * shares.unsqueeze(-1)).sum(dim=(0, 1)))
        constant = ranks.averaged(((targets - mean_patch).square().mean(dim=-1) * shares).sum())
        return {"mean_patch_loss": constant, "relative_loss": ranks.averaged(loss) / constant}

    @torch.no_grad()
    def pictures(self, inputs: Tensor) -> dict[str, Tensor]:
        """What the encoder sees of each image, and that with the hidden patches as the decoder predicts them."""
        generators = [torch.Generator().manual_seed(DRAWN_SEED + place) for place in range(len(inputs))]
        masks = RandomMasks(self.grid, self.config.decoder.masked).draw(generators)
        kept = masks["kept"].to(inputs.device)
        predicted = self.autoencoder(inputs, kept).to(inputs.dtype)
        patches = patches_of(inputs, self.side)
        title = "reconstruction"
        if self.config.decoder.norm_pixels:  # such a prediction has no brightness and no contrast of its own
            title = "reconstruction, with each\npatch's true mean and contrast"
            center, spread = _moments(patches)
            predicted = predicted * spread + center
        hidden = hidden_from(kept, patches.shape[1]).unsqueeze(-1)
        gray = (patches.amin(dim=(1, 2), keepdim=True) + patches.amax(dim=(1, 2), keepdim=True)) / 2
        shown = {"masked": torch.where(hidden, gray, patches), title: torch.where(hidden, predicted, patches)}
        return {name: images_of(each, self.grid, self.side) for name, each in shown.items()}

    def _targets(self, inputs: Tensor) -> Tensor:
        """[B, N, p * p * C] what the decoder has to predict."""
        patches = patches_of(inputs, self.side)
        if not self.config.decoder.norm_pixels:
            return patches
        center, spread = _moments(patches)
        return (patches - center) / spread


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, 1] mean of each patch, and the root of its unbiased variance and the floor."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + VARIANCE_FLOOR).sqrt()
