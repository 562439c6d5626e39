"""k-NN accuracy of features.

Legend: N training rows, M test rows, F feature dim, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from vmf_pretrain.evaluation.splits import check_split

TEST_ROWS_AT_ONCE = 256  # of cosines: 50 MiB of fp32 against 50,000 training rows


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, neighbours: int, temperature: float
) -> float:
    """Accuracy of the weighted k-NN classifier on cosine similarity, in percent.

    Each of the ``neighbours`` most similar training rows votes ``exp(cosine / temperature)`` for its class.

    Args:
        train: [N, F] features, floating point, of any norm.
        train_labels: [N] integers.
        test: [M, F] features.
        test_labels: [M] integers; a row whose class is not among the training labels counts as wrong.
        neighbours: k; if N is smaller, all N.
        temperature: positive.

    Raises:
        ValueError: shapes do not fit, or ``neighbours`` or ``temperature`` is not positive.
    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018, section 3.4.
    """
    check_split(train, train_labels, test, test_labels)
    if neighbours < 1 or not temperature > 0:
        raise ValueError(f"neighbours is {neighbours} and temperature {temperature}; both must be greater than 0")
    classes_C, class_N = torch.unique(train_labels, return_inverse=True)
    train_NF = functional.normalize(train.float(), dim=1)
    correct = 0
    for rows, labels in zip(
        torch.split(test, TEST_ROWS_AT_ONCE), torch.split(test_labels, TEST_ROWS_AT_ONCE), strict=True
    ):
        cosines = functional.normalize(rows.float(), dim=1) @ train_NF.T
        nearest, index = cosines.topk(min(neighbours, train.shape[0]), dim=1)
        votes = ((nearest - nearest[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
        counts = votes.new_zeros(rows.shape[0], classes_C.shape[0]).scatter_add_(1, class_N[index], votes)
        correct += int((classes_C[counts.argmax(dim=1)] == labels).sum())
    return 100.0 * correct / test.shape[0]
