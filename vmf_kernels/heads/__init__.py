"""Projection heads whose last layer never computes its logits."""
