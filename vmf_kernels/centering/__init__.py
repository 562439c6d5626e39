"""Rules by which a teacher's logits become targets: running means and Sinkhorn-Knopp, each as one [K] bias."""
