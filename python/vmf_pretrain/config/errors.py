"""Errors that a user can correct, each of one sentence."""


class PretrainError(Exception):
    """One sentence: what was given and what was expected. The command prints it without a traceback and exits with 2."""
