"""Errors a user can mend, told in one sentence."""


class PretrainError(Exception):
    """What was got and what was expected, in one sentence; the command line prints it without a traceback and exits with 2."""
