"""Rules that turn a teacher's logits into targets: running means and Sinkhorn-Knopp, each as one [K] bias."""
