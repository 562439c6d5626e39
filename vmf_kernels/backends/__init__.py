"""Implementations of the operators. ``contract`` says what each computes; ``choice`` selects the one that runs."""
