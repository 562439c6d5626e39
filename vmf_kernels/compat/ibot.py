"""Drop-in for bytedance/ibot: ``iBOTHead`` and ``iBOTLoss`` with its signatures, defaults, buffers and keys.

Change a few lines of its ``main_ibot.py`` (README). Its checkpoints load: in its own code by ``load_state_dict``, elsewhere by
``load_checkpoint``.

Legend: R images, N patches, C width of the backbone, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from vmf_kernels.compat.checkpoints import load_networks
from vmf_kernels.heads.mlp import init_linears, reset_children, unit_rows
from vmf_kernels.heads.prototype_layer import PrototypeLayer, outlive
from vmf_kernels.losses.ibot import IBOTLoss, IBOTvMFLoss
from vmf_kernels.unstored.prototype_logits import PrototypeLogits

__all__ = ["IBOTvMFLoss", "iBOTHead", "iBOTLoss", "load_checkpoint"]

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm1d,
    "syncbn": nn.SyncBatchNorm,
    "ln": nn.LayerNorm,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}

iBOTLoss = IBOTLoss  # noqa: N816 (the published name)


class iBOTHead(nn.Module):  # noqa: N801 (the published name)
    """iBOT's head: one MLP, and separate or shared prototypes for class tokens and patches; it returns unstored logits.

    Keywords, parameter names, their order and initialisation are those of the published class, so its checkpoints load, and
    those of its optimizer. Unlike that class, the module can be deep-copied. As there, all hidden layers share one
    normalisation.

    Args:
        in_dim: dim C of the backbone's tokens.
        out_dim: prototypes of class tokens.
        patch_out_dim: prototypes of patches; ignored with a shared head.
        norm: of hidden layers: None, "bn", "syncbn" or "ln".
        act: "gelu" or "relu".
        last_norm: None; a normalisation over logits would need them stored.
        nlayers: layers of the MLP, at least 1.
        hidden_dim: width of its hidden layers.
        bottleneck_dim: D; without a bottleneck there are no prototypes.
        norm_last_layer: freeze the prototypes' norms at 1. iBOT-vMF needs False.
        shared_head: class tokens and patches share the prototypes.

    Raises:
        ValueError: a dim is below 1, ``bottleneck_dim`` below 2, or an option is not one of those above.
    Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022, section 3.2.

    Example:
        >>> head = iBOTHead(8, 512, patch_out_dim=256, hidden_dim=16, bottleneck_dim=4)
        >>> cls, patches = head(torch.randn(3, 1 + 4, 8))  # class token and 4 patches of 3 images
        >>> tuple(cls.shape), tuple(patches.shape), tuple(head(torch.randn(3, 8)).shape)
        ((3, 512), (3, 4, 256), (3, 512))
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        patch_out_dim: int = 8192,
        norm: str | None = None,
        act: str = "gelu",
        last_norm: str | None = None,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        shared_head: bool = False,
    ) -> None:
        super().__init__()
        if min(in_dim, out_dim, patch_out_dim, hidden_dim) < 1 or bottleneck_dim < 2:
            raise ValueError(
                "in_dim, out_dim, patch_out_dim, hidden_dim, bottleneck_dim are "
                f"{in_dim}, {out_dim}, {patch_out_dim}, {hidden_dim}, {bottleneck_dim}; expected at least 1, 1, 1, 1 and 2"
            )
        _check_options(norm, act, last_norm)
        widths = [in_dim] + [hidden_dim] * (max(nlayers, 1) - 1)
        self.mlp = _mlp(widths, bottleneck_dim, norm, act)
        init_linears(self.mlp)
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim, frozen_norm=norm_last_layer)
        self.last_layer2 = self.last_layer
        if not shared_head:
            self.last_layer2 = PrototypeLayer(bottleneck_dim, patch_out_dim, frozen_norm=norm_last_layer)
        self.register_module("last_norm", None)
        self.register_module("last_norm2", None)

    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer as the constructor does."""
        reset_children(self)

    def forward(self, x: Tensor) -> PrototypeLogits | tuple[PrototypeLogits, PrototypeLogits]:
        """Logits in the dtype autocast gives the MLP.

        Args:
            x: [R, 1 + N, C] class token and patches of each image, or [R, C] class tokens only. The MLP runs over all given
                tokens. No loss uses the patches of local crops, so these cost less as [R, C].

        Returns:
            [R, K] for class tokens and [R, N, K] for patches; or [R, K] for class tokens only.
        """
        if self.last_norm is not None or self.last_norm2 is not None:
            raise ValueError(
                "last_norm is set, a normalisation over logits, which are never stored here; expected None"
            )
        # for batch norm every token of every image is a row
        hidden = self.mlp(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        features = unit_rows(hidden)
        if x.ndim == 2:
            return outlive(self, self.last_layer(features))
        return outlive(self, self.last_layer(features[:, 0])), outlive(self, self.last_layer2(features[:, 1:]))


def load_checkpoint(
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    *,
    network: str = "teacher",
    backbone: nn.Module | None = None,
    head: nn.Module | None = None,
    loss: nn.Module | None = None,
) -> None:
    """Load a published training checkpoint into our modules, strictly.

    Args:
        checkpoint: its path, or its mapping, already loaded, with the entries ``teacher``, ``student`` and ``ibot_loss``.
            Keys may contain the names of wrappers, ``module.`` (DDP) or ``_orig_mod.`` (torch.compile). Reading a file runs no
            pickled code: values that are not tensors (command line, configuration, numpy scalars) are skipped.
        network: "teacher" or "student": the network from which ``backbone`` and ``head`` are loaded.
        backbone: loads the keys under ``backbone.``, or None.
        head: loads the keys under ``head.``, or None. Its last layer may be stored plain or in either form of weight norm.
        loss: loads the entry ``ibot_loss``, both centres, or None.

    Raises:
        ValueError: ``network`` is unknown, ``torch.save`` did not write the file, or the checkpoint lacks an entry or prefix;
            the text lists those that it has.
        OSError: the file cannot be opened; FileNotFoundError if it does not exist.
        RuntimeError: a tensor is missing, left over or of another shape (from ``load_state_dict``).

    Example:
        >>> saved, head = (iBOTHead(8, 512, hidden_dim=16, bottleneck_dim=4, shared_head=True) for _ in range(2))
        >>> run = {"teacher": {f"head.{key}": value for key, value in saved.state_dict().items()}}  # or the path of a file
        >>> load_checkpoint(run, network="teacher", head=head)
        >>> torch.equal(head.last_layer.weight, saved.last_layer.weight)
        True
    """
    load_networks(checkpoint, network, {"backbone.": backbone, "head.": head}, {"ibot_loss": loss})


def _check_options(norm: str | None, act: str, last_norm: str | None) -> None:
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected None or one of {', '.join(NORMS)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; expected one of {', '.join(ACTIVATIONS)}")
    if last_norm is not None:
        raise ValueError(
            f"last_norm is {last_norm!r}, a normalisation over logits, which are never stored here; expected None"
        )


def _mlp(widths: list[int], out_dim: int, norm: str | None, act: str) -> nn.Module:
    """[..., widths[0]] to [..., out_dim]; hidden layers are followed by one shared norm and an activation."""
    if len(widths) == 1:
        return nn.Linear(widths[0], out_dim)
    shared = [] if norm is None else [NORMS[norm](widths[1])]
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        modules += [nn.Linear(before, after), *shared, ACTIVATIONS[act]()]
    return nn.Sequential(*modules, nn.Linear(widths[-1], out_dim))
