"""Features with labels, of training and of held-out images."""

from torch import Tensor


def check_split(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    """Raise ValueError unless the features are [N, F] with [N] labels, in both splits with the same F."""
    for side, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or not features.shape[0] or tuple(labels.shape) != (features.shape[0],):
            raise ValueError(
                f"{side} features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; "
                "expected [N, F] and [N] with N >= 1"
            )
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train features have {train.shape[1]} columns but test features {test.shape[1]}")
