"""Image retrieval on rOxford5k and rParis6k, or on any folder whose ground truth is said likewise."""
