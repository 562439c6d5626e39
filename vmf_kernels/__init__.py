"""The loss head of self-distillation, exact and streaming: no [rows, prototypes] tensor is ever stored."""

from vmf_kernels.assign import prototype_usage
from vmf_kernels.bessel import log_vmf_constant, vmf_mean_resultant_length
from vmf_kernels.cross_entropy import CrossEntropy, matched_prototype_cross_entropy, prototype_cross_entropy
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

__all__ = [
    "AssignmentStatistics",
    "CrossEntropy",
    "Prototypes",
    "linear_prototypes",
    "log_vmf_constant",
    "matched_prototype_cross_entropy",
    "multi_crop_weights",
    "normalized_prototypes",
    "prototype_cross_entropy",
    "prototype_usage",
    "vmf_mean_resultant_length",
    "vmf_prototypes",
    "weight_norm_prototypes",
    "weight_norm_vmf_prototypes",
]
