"""Implementations of the one operator; ``contract`` says what each computes, ``vmf_kernels.assign`` chooses."""
