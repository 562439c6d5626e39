"""What ends the command, and what becomes the reason in a row."""


class BenchError(Exception):
    """One sentence: what was given and what was expected. The command prints it without a traceback and exits with 2."""


class UnavailableError(RuntimeError):
    """A loss cannot run here; the message says why."""


class DisagreementError(ValueError):
    """A loss computes something else; the message has the numbers."""


class LeftOutError(RuntimeError):
    """There is no time for a loss; the message says why."""
