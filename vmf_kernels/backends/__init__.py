"""Implementations of the operators: ``contract`` says what each computes, ``choice`` which one runs."""
