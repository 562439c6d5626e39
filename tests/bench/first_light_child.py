"""A stand-in for ``bench.light.child``: a process of first light that fails in a way given by the variant's family.

It imports nothing slow, so a test can start many.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

RIGHT = {"status": "right", "cases": ["one"], "largest_error": 0.0, "seconds": 0.0}
WRONG = {"status": "wrong", "cases": ["one"], "differences": [], "notes": ["made up"], "verdict": "", "saved": None}


def say(state: str, **more: Any) -> None:
    print(json.dumps({"state": state} | more), flush=True)


def attempt(family: str, tried: list[str]) -> dict[str, Any]:
    """One variant; ``tried`` are the families before it."""
    if family == "rows-keys":
        say("launched", case="one")
        time.sleep(100)
    elif family == "columns":
        say("launched", case="one")
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    elif family == "usage":
        time.sleep(1.0)  # longer than a kernel may take, but before its launch
    elif family == "rows-own" or (family == "pack" and tried):  # pack is right by itself
        return WRONG
    return RIGHT


if __name__ == "__main__":
    if "--module" in sys.argv:
        sys.exit("that module is of another Python")
    before = list[str]()
    say("ready")
    for line in sys.stdin:
        name = line.strip()
        say("compiling", name=name, case="one")
        say("done", name=name, result=attempt(name.split("/")[1], before))
        before.append(name)
