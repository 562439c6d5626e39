"""Everything a run depends on: frozen dataclasses, each field with its unit, checked when made."""

from dataclasses import dataclass, field
from typing import Any

from vmf_pretrain.config.backbone import BackboneConfig
from vmf_pretrain.config.blocks import BlocksConfig
from vmf_pretrain.config.checks import require
from vmf_pretrain.config.clips import ClipsConfig
from vmf_pretrain.config.data import BUNDLED, DataConfig
from vmf_pretrain.config.decoder import DecoderConfig
from vmf_pretrain.config.evaluate import EvaluateConfig
from vmf_pretrain.config.head import HeadConfig
from vmf_pretrain.config.log import LogConfig
from vmf_pretrain.config.loss import LossConfig
from vmf_pretrain.config.masks import MasksConfig
from vmf_pretrain.config.method import PATCH_METHODS, VMF, is_import_path, require_method
from vmf_pretrain.config.optim import OptimConfig
from vmf_pretrain.config.predictor import PredictorConfig
from vmf_pretrain.config.start_from import StartFromConfig
from vmf_pretrain.config.train import TrainConfig
from vmf_pretrain.config.views import CANVASES, GLOBAL_VIEWS, ViewsConfig


def require_seed(seed: int) -> None:
    """A seed is one that every generator takes.

    Raises:
        PretrainError: it is negative or too large.
    """
    require(0 <= seed < 2**31, f"seed is {seed} but must lie between 0 and 2147483647.")


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        method: "dino", "ibot" or "dinov2"; "-vmf" after it gives the prototypes a concentration each. "mae", "ijepa" or
            "vjepa" have none. Or "module:Class" for a method of your own, which --allow-code has to permit.
        seed: seed of the initialisation, the data order and every augmentation.
        data: which images.
        views: multi-crop and augmentation.
        masks: which patches the student does not see.
        backbone: the vision transformer.
        start_from: published or earlier weights to start from.
        head: the projection head.
        loss: temperatures, centring, KoLeo.
        decoder: MAE's mask and decoder.
        predictor: the predictor of I-JEPA and V-JEPA.
        blocks: their block masks.
        clips: how a clip is cut out of a video.
        optim: optimizer and schedules.
        train: length and device.
        evaluate: k-NN and the other checks.
        log: what is written beside metrics.jsonl.
        options: settings of a method of your own, whatever it reads.
    """

    method: str = "dino-vmf"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    start_from: StartFromConfig = field(default_factory=StartFromConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._check_method()
        sizes = {"views.global_size": self.views.global_size}
        if self.views.local_count:
            sizes["views.local_size"] = self.views.local_size
        for name, size in sizes.items():
            patch = self.backbone.patch_size
            require(size % patch == 0, f"{name} is {size} but must be a multiple of backbone.patch_size, {patch}.")
        missing = self.data.kind in ("folder", "shards", "videos") and self.data.folder is None
        require(
            not missing,
            "data.folder is missing; expected the path of a folder of images, for example with --data FOLDER.",
        )
        batch, parts = self.data.batch_size, self.train.accumulate
        require(batch % parts == 0, f"train.accumulate is {parts} but must divide data.batch_size, {batch}.")
        alone = self.data.batch_size == 1 and self.loss.koleo_weight > 0
        require(not alone, "data.batch_size is 1 but KoLeo (loss.koleo_weight) compares images; expected at least 2.")
        self._check_bundled()
        rising = self.optim.warmup_epochs
        require(
            rising <= self.train.epochs,
            f"optim.warmup_epochs is {rising} but the run has {self.train.epochs} epochs (train.epochs).",
        )
        self._check_patches()
        epochs, warm_up = self.train.epochs, self.loss.warmup_teacher_temp_epochs
        require(
            warm_up <= epochs,
            f"loss.warmup_teacher_temp_epochs is {warm_up} but the run has {epochs} epochs (train.epochs).",
        )
        require_seed(self.seed)

    def _check_method(self) -> None:
        require_method(self.method)
        stray = self.options and not is_import_path(self.method)
        require(not stray, f"options are given but {self.method} reads none; expected a method module:Class.")
        videos, predicts = self.data.kind == "videos", self.method == "vjepa"
        fits = videos == predicts or (videos and is_import_path(self.method))
        require(fits, f'method is {self.method} and data.kind "{self.data.kind}"; vjepa and "videos" go together.')
        frozen = self.method.endswith(VMF) and self.head.norm_prototypes is True
        plain = self.method.removesuffix(VMF)
        require(
            not frozen,
            f"head.norm_prototypes is true but {self.method} learns the norms; leave it out or use method {plain}.",
        )

    def _check_patches(self) -> None:
        patches, masks, head = self.method in PATCH_METHODS, self.masks, self.head
        balanced, stored = self.loss.centering == "sinkhorn_knopp", self.loss.implementation == "published"
        others = " or ".join(PATCH_METHODS)
        require(
            patches or is_import_path(self.method) or not balanced,
            f"loss.centering is sinkhorn_knopp but {self.method} keeps a centre; expected method {others}.",
        )
        require(
            not (patches and stored), f"loss.implementation is published but {self.method} has only ours; leave it out."
        )
        linear = head.last_layer == "linear"
        require(
            patches or is_import_path(self.method) or not linear,
            f"head.last_layer is linear but {self.method} has weight norm; expected method {others}.",
        )
        if not patches:
            return
        begun, epochs = masks.start_epoch + self.loss.warmup_teacher_temp_epochs, self.train.epochs
        require(
            begun <= epochs,
            f"masks.start_epoch and loss.warmup_teacher_temp_epochs come to {begun} but the run has {epochs} epochs.",
        )
        scattered = masks.shape == "random" and self.method.startswith("dinov2")
        require(
            not scattered, f"masks.shape is random but {self.method} hides blocks; leave it out or use method ibot."
        )
        unseen = head.patches == "own_head" and head.batch_norm and masks.start_epoch > 0
        require(
            not unseen,
            f"masks.start_epoch is {masks.start_epoch} but the patches' own head normalises over masked patches "
            "(head.batch_norm); expected 0.",
        )

    def _check_bundled(self) -> None:
        kind, folder = self.data.kind, self.data.folder
        if kind not in BUNDLED:
            return
        require(folder is None, f'data.folder is {folder} but data.kind "{kind}" reads none; expected kind "folder".')
        canvas, sizes = CANVASES[kind], (self.views.global_size, self.views.local_size)
        require(
            sizes[0] == canvas and (sizes[1] < canvas or self.views.local_count == 0),
            f"views.global_size {sizes[0]} and views.local_size {sizes[1]} do not fit {kind}; expected {canvas} and less.",
        )

    @property
    def norm_prototypes(self) -> bool:
        """Whether the prototypes stay at norm 1."""
        chosen = self.head.norm_prototypes
        return self.method in ("dino", "ibot") and self.head.last_layer != "linear" if chosen is None else chosen

    @property
    def patch_prototypes(self) -> int:
        """Number of prototypes of the patches."""
        chosen = self.head.patch_prototypes
        return self.head.prototypes if chosen is None else chosen

    @property
    def token_grid(self) -> tuple[int, ...]:
        """Tokens of a global view: (height, width), for clips (time, height, width)."""
        side = self.views.global_size // self.backbone.patch_size
        time = (self.clips.frames // self.clips.tubelet,) if self.data.kind == "videos" else ()
        return (*time, side, side)

    @property
    def view_count(self) -> int:
        """Views per image that the student sees."""
        return GLOBAL_VIEWS + self.views.local_count
