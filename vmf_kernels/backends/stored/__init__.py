"""The loss on stored logits. ``contract`` says what a backend computes; ``choice`` selects the one that runs."""
