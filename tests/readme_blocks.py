"""The examples of a README: its blocks of Python, which run as they stand."""

from __future__ import annotations

import re
from pathlib import Path


def python_blocks(readme: Path) -> list[str]:
    """Source of every block that is marked as Python, in order."""
    return re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
