"""The loss head of self-distillation, exact and streaming: no [rows, prototypes] tensor is ever stored."""

from vmf_kernels.bessel import log_vmf_constant, vmf_mean_resultant_length
from vmf_kernels.centering.logit import LogitCenter
from vmf_kernels.centering.probability import ProbabilityCenter
from vmf_kernels.centering.rule import CenteringRule
from vmf_kernels.centering.sinkhorn import SinkhornKnopp
from vmf_kernels.diagnostics import UniquePrototypes, unique_prototypes
from vmf_kernels.heads.dino import DINOHead, DINOvMFHead
from vmf_kernels.heads.fuse import fuse_head
from vmf_kernels.heads.prototype_layer import PrototypeLayer
from vmf_kernels.losses.dino import DINOLoss, DINOvMFLoss
from vmf_kernels.losses.ibot import IBOTLoss, IBOTPatchLoss, IBOTvMFLoss, IBOTvMFPatchLoss
from vmf_kernels.losses.koleo import DistributedKoLeoLoss, KoLeoLoss
from vmf_kernels.losses.prototype_koleo import PrototypeKoLeoLoss
from vmf_kernels.ops.assignments import prototype_usage
from vmf_kernels.ops.logit_cross_entropy import logit_cross_entropy
from vmf_kernels.ops.prototype_cross_entropy import (
    CrossEntropy,
    matched_prototype_cross_entropy,
    prototype_cross_entropy,
)
from vmf_kernels.ops.target_cross_entropy import target_cross_entropy
from vmf_kernels.pairing import multi_crop_weights
from vmf_kernels.prototypes import (
    Prototypes,
    linear_prototypes,
    normalized_prototypes,
    vmf_prototypes,
    weight_norm_prototypes,
    weight_norm_vmf_prototypes,
)
from vmf_kernels.statistics import AssignmentStatistics
from vmf_kernels.unstored.prototype_logits import PrototypeLogits
from vmf_kernels.unstored.teacher_targets import TeacherTargets

__version__ = "0.2.0"

__all__ = [
    "AssignmentStatistics",
    "CenteringRule",
    "CrossEntropy",
    "DINOHead",
    "DINOLoss",
    "DINOvMFHead",
    "DINOvMFLoss",
    "DistributedKoLeoLoss",
    "IBOTLoss",
    "IBOTPatchLoss",
    "IBOTvMFLoss",
    "IBOTvMFPatchLoss",
    "KoLeoLoss",
    "LogitCenter",
    "ProbabilityCenter",
    "PrototypeKoLeoLoss",
    "PrototypeLayer",
    "PrototypeLogits",
    "Prototypes",
    "SinkhornKnopp",
    "TeacherTargets",
    "UniquePrototypes",
    "fuse_head",
    "linear_prototypes",
    "log_vmf_constant",
    "logit_cross_entropy",
    "matched_prototype_cross_entropy",
    "multi_crop_weights",
    "normalized_prototypes",
    "prototype_cross_entropy",
    "prototype_usage",
    "target_cross_entropy",
    "unique_prototypes",
    "vmf_mean_resultant_length",
    "vmf_prototypes",
    "weight_norm_prototypes",
    "weight_norm_vmf_prototypes",
]
