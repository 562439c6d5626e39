"""The loss on stored logits: ``contract`` says what a backend of it computes, ``choice`` which one runs."""
