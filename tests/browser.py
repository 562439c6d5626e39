"""A headless browser without a network, for pages that tests open."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
REQUIRED = "VMF_REQUIRE_BROWSER"
DARK = "--blink-settings=preferredColorScheme=0"
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
SECONDS = 120


def browser() -> str | None:
    """The program, if there is one."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(browser() is None and REQUIRED not in os.environ, reason="there is no browser here")


def dumped(page: Path, *options: str) -> tuple[str, str]:
    """The document after its scripts have run, and what the browser said, with ``--enable-logging=stderr`` its console too."""
    found = browser()
    assert found is not None, f"{REQUIRED} is set, and there is none of {', '.join(BROWSERS)}"
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [found, *OPTIONS, *options, profile, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr
