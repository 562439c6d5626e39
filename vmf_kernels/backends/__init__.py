"""Implementations of the one operator; see ``contract`` for what each computes and ``vmf_kernels.assign`` for the choice."""
