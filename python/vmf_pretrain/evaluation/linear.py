"""Accuracy of a linear probe.

Legend: N training rows, M test rows, F feature dim.
"""

import warnings

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.splits import check_split

PROBE_ITERATIONS = 1000  # of L-BFGS; a warning says if that was too few


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a logistic regression on standardised features, in percent; deterministic (L-BFGS from zero).

    Arguments and errors as ``knn_accuracy``.

    Raises:
        PretrainError: the training labels have only one class.
    """
    # here, for a run without labels does without, and scikit-learn takes seconds to import
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_split(train, train_labels, test, test_labels)
    if torch.unique(train_labels).shape[0] < 2:
        raise PretrainError(
            f"The linear probe got {train.shape[0]} training images of 1 class but needs at least 2 classes."
        )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBE_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the warning below says it
        probe.fit(train.double().cpu().numpy(), train_labels.cpu().numpy())
    if int(probe[-1].n_iter_.max()) >= PROBE_ITERATIONS:
        warnings.warn(
            f"The linear probe of {train.shape[1]} features had not settled after {PROBE_ITERATIONS} iterations; "
            "its accuracy may be a little off.",
            stacklevel=2,
        )
    return 100.0 * float(probe.score(test.double().cpu().numpy(), test_labels.cpu().numpy()))
