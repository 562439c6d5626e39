"""Scores of classes for patches, from labelled patches: by the nearest ones, or by a linear classifier.

Legend: N labelled patches, M others, F features, C classes.
"""

import warnings
from collections.abc import Callable

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from vmf_pretrain.config.errors import PretrainError

SIMILARITIES_AT_ONCE = 2**22  # 16 MiB of fp32
Classifier = Callable[[Tensor], Tensor]


def nearest_patches(train: Tensor, labels: Tensor, classes: int, *, neighbours: int, temperature: float) -> Classifier:
    """[M, F] to [M, C] votes that sum to 1: each of the k nearest patches by cosine votes exp(cosine / temperature).

    Args:
        train: [N, F] features, of any norm.
        labels: [N] int64 classes.
        classes: C.
        neighbours: k; all N if there are fewer.
        temperature: positive.
    """
    train_NF = functional.normalize(train.float(), dim=1)
    at_once = max(1, SIMILARITIES_AT_ONCE // len(train_NF))

    def classify(patches: Tensor) -> Tensor:
        parts = []
        for block in torch.split(functional.normalize(patches.float(), dim=1), at_once):
            cosines, places = (block @ train_NF.T).topk(min(neighbours, len(train_NF)), dim=1)
            weights = (cosines / temperature).softmax(dim=1)
            parts.append(weights.new_zeros(len(block), classes).scatter_add_(1, labels[places], weights))
        return torch.cat(parts)

    return classify


def linear_patches(
    train: Tensor, labels: Tensor, classes: int, *, inverse_penalty: float, iterations: int
) -> Classifier:
    """[M, F] to [M, C] probabilities of a logistic regression on standardised features; classes never seen have 0.

    Args:
        train: [N, F] features.
        labels: [N] int64 classes.
        classes: C.
        inverse_penalty: C of scikit-learn.
        iterations: of L-BFGS at most; a warning says if that was too few.

    Raises:
        PretrainError: the patches have one class.
    """
    seen = torch.unique(labels)
    if len(seen) < 2:
        raise PretrainError("linear segmentation needs training patches of at least 2 classes, and has those of 1.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=iterations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the warning below says it
        probe.fit(train.double().numpy(), labels.numpy())
    if int(probe[-1].n_iter_.max()) >= iterations:
        warnings.warn(f"The linear segmentation had not settled after {iterations} iterations.", stacklevel=2)

    def classify(patches: Tensor) -> Tensor:
        found = torch.zeros(len(patches), classes)
        found[:, seen] = torch.from_numpy(probe.predict_proba(patches.double().numpy())).float()
        return found

    return classify
