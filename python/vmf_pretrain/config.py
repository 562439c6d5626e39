"""Everything a run depends on: frozen dataclasses, each field with its unit, checked when made."""

from dataclasses import dataclass, field
from typing import Literal

from vmf_pretrain.checks import require, require_not_negative, require_positive, require_range, require_share

GLOBAL_VIEWS = 2  # the ones the teacher sees
DIGIT_CANVAS = 16  # pixels: side of the canvas that a digit is put on


@dataclass(frozen=True)
class DataConfig:
    """Which images a run trains on, and in what batches.

    Attributes:
        kind: "digits" (scikit-learn's bundled handwritten digits on a 16 x 16 canvas) or "folder" (a folder of images).
        folder: the folder of images for kind "folder", searched recursively; its sub-folders are the classes of k-NN.
        batch_size: images per optimizer step.
        workers: processes that prepare batches; 0 prepares them in the training process. It never changes a result.
        held_out: share of the images held out for k-NN and linear accuracy; used only if the folder has class sub-folders.
    """

    kind: Literal["digits", "folder"] = "folder"
    folder: str | None = None
    batch_size: int = 64
    workers: int = 2
    held_out: float = 0.1

    def __post_init__(self) -> None:
        require_positive("data", batch_size=self.batch_size)
        require_not_negative("data", workers=self.workers)
        require(0 < self.held_out < 1, f"data.held_out is {self.held_out} but must lie strictly between 0 and 1.")


@dataclass(frozen=True)
class DigitViewConfig:
    """How a view of a digit is drawn.

    Attributes:
        global_zoom: range of the magnification of a global view.
        local_zoom: range of the magnification of a local view.
        local_shift: how far a local view's middle may lie from the digit's middle, in canvas pixels along each axis.
        rotation: largest rotation either way, degrees.
        gain: largest relative change of brightness either way.
        noise: standard deviation of the added normal noise, in units of full ink.
    """

    global_zoom: tuple[float, float] = (0.8, 1.25)
    local_zoom: tuple[float, float] = (1.0, 1.25)
    local_shift: float = 2.0
    rotation: float = 12.0
    gain: float = 0.1
    noise: float = 0.02

    def __post_init__(self) -> None:
        require_range("views.digits", global_zoom=self.global_zoom, local_zoom=self.local_zoom)
        amounts = {"local_shift": self.local_shift, "rotation": self.rotation, "gain": self.gain, "noise": self.noise}
        require_not_negative("views.digits", **amounts)


@dataclass(frozen=True)
class PhotoViewConfig:
    """How a view of a photograph is drawn: DINO's augmentation.

    Attributes:
        global_area: range of the share of the image's area that a global view shows.
        local_area: the same for a local view.
        flip: probability of a horizontal flip.
        jitter: probability of a colour jitter.
        brightness: largest relative change of brightness within a jitter.
        contrast: largest relative change of contrast within a jitter.
        saturation: largest relative change of saturation within a jitter.
        hue: largest shift of hue within a jitter, in turns of the colour circle (at most 0.5).
        grayscale: probability of losing colour.
        blur: probabilities of a Gaussian blur for the first global view, the second, and the local views.
        solarize: probability of inverting bright pixels, in the second global view only.
    """

    global_area: tuple[float, float] = (0.4, 1.0)
    local_area: tuple[float, float] = (0.05, 0.4)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    solarize: float = 0.2

    def __post_init__(self) -> None:
        require_range("views.photos", global_area=self.global_area, local_area=self.local_area)
        for name, (_, high) in {"global_area": self.global_area, "local_area": self.local_area}.items():
            require(high <= 1.0, f"views.photos.{name} reaches {high} but an area's share is at most 1.")
        require_share(
            "views.photos", flip=self.flip, jitter=self.jitter, grayscale=self.grayscale, solarize=self.solarize
        )
        require_share("views.photos", brightness=self.brightness, contrast=self.contrast, saturation=self.saturation)
        require(0 <= self.hue <= 0.5, f"views.photos.hue is {self.hue} but must lie between 0 and 0.5.")
        for value in self.blur:
            require_share("views.photos", blur=value)


@dataclass(frozen=True)
class ViewsConfig:
    """Multi-crop: two global views that teacher and student see, and local views that only the student sees.

    Attributes:
        global_size: side of a global view, pixels; a multiple of the patch size.
        local_size: side of a local view, pixels; a multiple of the patch size.
        local_count: local views per image; 0 trains on the two global views alone.
        digits: the augmentation for data.kind "digits".
        photos: the augmentation for data.kind "folder".
    """

    global_size: int = 224
    local_size: int = 96
    local_count: int = 8
    digits: DigitViewConfig = field(default_factory=DigitViewConfig)
    photos: PhotoViewConfig = field(default_factory=PhotoViewConfig)

    def __post_init__(self) -> None:
        require_positive("views", global_size=self.global_size, local_size=self.local_size)
        require_not_negative("views", local_count=self.local_count)


@dataclass(frozen=True)
class BackboneConfig:
    """The vision transformer, a timm model.

    Attributes:
        name: a timm vision transformer's name.
        patch_size: side of a patch, pixels.
        width: embedding dimension; null keeps the named model's.
        depth: number of blocks; null keeps the named model's.
        heads: attention heads per block; null keeps the named model's.
        initialisation: "timm" (the model's own) or "xavier" (of backbone and head, for widths far below 384, where a
            deviation of 0.02 is too small).
        drop_path: rate of stochastic depth in the student; the teacher has none.
    """

    name: str = "vit_small_patch16_224"
    patch_size: int = 16
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    initialisation: Literal["timm", "xavier"] = "timm"
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        shape = {"width": self.width, "depth": self.depth, "heads": self.heads}
        given = {name: value for name, value in shape.items() if value is not None}
        require_positive("backbone", patch_size=self.patch_size, **given)
        require(0 <= self.drop_path < 1, f"backbone.drop_path is {self.drop_path} but must lie in [0, 1).")


@dataclass(frozen=True)
class HeadConfig:
    """The projection head and its prototypes.

    Attributes:
        prototypes: number of prototypes K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension D in which prototypes are compared.
        layers: linear layers before the prototypes.
        batch_norm: put batch normalisation after each hidden layer; small backbones need it.
        norm_prototypes: keep every prototype at norm 1; null means true for dino and false for dino-vmf, where the norms
            are the concentrations.
    """

    prototypes: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    layers: int = 3
    batch_norm: bool = False
    norm_prototypes: bool | None = None

    def __post_init__(self) -> None:
        require_positive("head", hidden_dim=self.hidden_dim, layers=self.layers)
        require(self.bottleneck_dim >= 2, f"head.bottleneck_dim is {self.bottleneck_dim} but at least 2 are needed.")
        require(self.prototypes >= 2, f"head.prototypes is {self.prototypes} but at least 2 are needed.")


@dataclass(frozen=True)
class LossConfig:
    """The loss between the teacher's and the student's prototype distributions.

    Attributes:
        student_temp: the student's temperature.
        warmup_teacher_temp: the teacher's temperature in the first epoch.
        teacher_temp: the teacher's temperature after its warm-up; must be below the student's, or the run collapses to uniform.
        warmup_teacher_temp_epochs: epochs of the teacher temperature's linear warm-up.
        center_momentum: momentum of the teacher's centre.
        center_start: "zero" as published, or "first_batch", which spares a small model some steps toward a constant.
        centering: "probability" or "logit", for dino-vmf; dino always centres logits.
        koleo_weight: weight of the KoLeo regulariser on the student's features of each global view; 0 disables it.
    """

    student_temp: float = 0.1
    warmup_teacher_temp: float = 0.04
    teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 0
    center_momentum: float = 0.9
    center_start: Literal["zero", "first_batch"] = "zero"
    centering: Literal["probability", "logit"] = "probability"
    koleo_weight: float = 0.0

    def __post_init__(self) -> None:
        require_positive(
            "loss",
            student_temp=self.student_temp,
            warmup_teacher_temp=self.warmup_teacher_temp,
            teacher_temp=self.teacher_temp,
        )
        epochs, weight = self.warmup_teacher_temp_epochs, self.koleo_weight
        require_not_negative("loss", warmup_teacher_temp_epochs=epochs, koleo_weight=weight)
        momentum = self.center_momentum
        require(0 <= momentum < 1, f"loss.center_momentum is {momentum} but must lie in [0, 1).")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the schedules, all per iteration.

    Attributes:
        learning_rate: peak learning rate for the batch size as configured (DINO: 0.0005 per 256 images).
        final_learning_rate: learning rate at the end of the cosine.
        warmup_epochs: epochs of the learning rate's linear warm-up.
        weight_decay: weight decay at the start of its cosine.
        final_weight_decay: weight decay at the end.
        clip: largest L2 norm of each parameter's gradient; 0 never clips.
        freeze_last_layer_epochs: epochs at the start in which the prototypes do not move.
        teacher_momentum: momentum of the teacher's moving average at the start of its cosine.
        final_teacher_momentum: the same at the end.
    """

    learning_rate: float = 0.0005
    final_learning_rate: float = 1e-6
    warmup_epochs: int = 10
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    clip: float = 3.0
    freeze_last_layer_epochs: int = 1
    teacher_momentum: float = 0.996
    final_teacher_momentum: float = 1.0

    def __post_init__(self) -> None:
        require_positive("optim", learning_rate=self.learning_rate)
        require_not_negative(
            "optim",
            final_learning_rate=self.final_learning_rate,
            warmup_epochs=self.warmup_epochs,
            weight_decay=self.weight_decay,
            final_weight_decay=self.final_weight_decay,
            clip=self.clip,
            freeze_last_layer_epochs=self.freeze_last_layer_epochs,
        )
        first, last = self.teacher_momentum, self.final_teacher_momentum
        require_share("optim", teacher_momentum=first, final_teacher_momentum=last)


@dataclass(frozen=True)
class TrainConfig:
    """Length, device and bookkeeping of the run.

    Attributes:
        epochs: passes over the training images.
        device: "auto" uses a GPU if there is one.
        precision: "32-true", or "bf16-mixed" for autocast.
        log_every: optimizer steps between two lines of metrics.jsonl.
        checkpoint_every: epochs between two checkpoints; one is always written at the end and on Ctrl-C.
        keep_checkpoints: how many of the newest checkpoints are kept; if one is damaged, a run resumes from the one before.
    """

    epochs: int = 100
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    log_every: int = 10
    checkpoint_every: int = 1
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require_positive(
            "train",
            epochs=self.epochs,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """How features are evaluated during and after training.

    Attributes:
        every: epochs between two evaluations; there is always one before the first and one after the last step.
        neighbours: k of the k-NN classifier.
        temperature: temperature of its votes exp(cosine / temperature).
        max_images: largest number of images of each split that is evaluated.
        duplicate_threshold: cosine distance below which two prototypes count as duplicates.
    """

    every: int = 10
    neighbours: int = 20
    temperature: float = 0.07
    max_images: int = 10000
    duplicate_threshold: float = 0.025

    def __post_init__(self) -> None:
        require_positive(
            "evaluate",
            every=self.every,
            neighbours=self.neighbours,
            temperature=self.temperature,
            max_images=self.max_images,
            duplicate_threshold=self.duplicate_threshold,
        )


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        method: "dino-vmf" (prototypes with their own concentration) or "dino".
        seed: seed of the initialisation, the data order and every augmentation.
        data: which images.
        views: multi-crop and augmentation.
        backbone: the vision transformer.
        head: the projection head.
        loss: temperatures, centring, KoLeo.
        optim: optimizer and schedules.
        train: length and device.
        evaluate: k-NN and the other checks.
    """

    method: Literal["dino-vmf", "dino"] = "dino-vmf"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        sizes = {"views.global_size": self.views.global_size}
        if self.views.local_count:
            sizes["views.local_size"] = self.views.local_size
        for name, size in sizes.items():
            patch = self.backbone.patch_size
            require(size % patch == 0, f"{name} is {size} but must be a multiple of backbone.patch_size, {patch}.")
        missing = self.data.kind == "folder" and self.data.folder is None
        require(not missing, 'data.folder is missing; data.kind "folder" needs the path of a folder of images.')
        frozen = self.method == "dino-vmf" and self.head.norm_prototypes is True
        require(
            not frozen, "head.norm_prototypes is true but dino-vmf learns the norms; leave it out or use method dino."
        )
        alone = self.data.batch_size == 1 and self.loss.koleo_weight > 0
        require(not alone, "data.batch_size is 1 but KoLeo (loss.koleo_weight) compares images; expected at least 2.")
        self._check_digits()
        rising = self.optim.warmup_epochs
        require(
            rising <= self.train.epochs,
            f"optim.warmup_epochs is {rising} but the run has {self.train.epochs} epochs (train.epochs).",
        )
        epochs, warm_up = self.train.epochs, self.loss.warmup_teacher_temp_epochs
        require(
            warm_up <= epochs,
            f"loss.warmup_teacher_temp_epochs is {warm_up} but the run has {epochs} epochs (train.epochs).",
        )
        require(0 <= self.seed < 2**31, f"seed is {self.seed} but must lie between 0 and 2147483647.")

    def _check_digits(self) -> None:
        sizes = self.views.global_size, self.views.local_size
        require(
            self.data.kind == "folder" or (sizes[0] == DIGIT_CANVAS and sizes[1] < DIGIT_CANVAS),
            f"views.global_size {sizes[0]} and views.local_size {sizes[1]} do not fit digits; expected {DIGIT_CANVAS} and "
            "less.",
        )

    @property
    def norm_prototypes(self) -> bool:
        """Whether the prototypes stay at norm 1."""
        chosen = self.head.norm_prototypes
        return self.method == "dino" if chosen is None else chosen

    @property
    def view_count(self) -> int:
        """Views per image that the student sees."""
        return GLOBAL_VIEWS + self.views.local_count
