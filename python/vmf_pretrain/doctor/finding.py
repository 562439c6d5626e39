"""What the doctor finds: one fact in words, how bad it is, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["fine", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes:
        severity: "fine"; "note": a run works, but slower or with less than it could; "problem": a run would fail.
        subject: what it is about, in a word or two.
        words: what was found.
        advice: what to do about it; empty where there is nothing to do.
    """

    severity: Severity
    subject: str
    words: str
    advice: str = ""


def fine(subject: str, words: str) -> Finding:
    """Nothing to do."""
    return Finding("fine", subject, words)


def note(subject: str, words: str, advice: str) -> Finding:
    """A run works, but there is something to gain or to know."""
    return Finding("note", subject, words, advice)


def problem(subject: str, words: str, advice: str = "") -> Finding:
    """A run would fail. The words of an error often say already what to do."""
    return Finding("problem", subject, words, advice)


def verdict(findings: Sequence[Finding]) -> str:
    """One line: whether a run would fail, and because of what."""
    problems = [one.subject for one in findings if one.severity == "problem"]
    notes = sum(one.severity == "note" for one in findings)
    rest = f" {notes} notes above say what could be better." if notes > 1 else " One note above." if notes else ""
    if not problems:
        return f"Nothing is in the way of a run.{rest}"
    return f"A run would fail: {', '.join(dict.fromkeys(problems))}.{rest}"


def counted(count: int, what: str) -> str:
    """``1 file``, ``1,200 files``."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def size_text(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
