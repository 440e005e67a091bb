"""docs/cli.md: every verb with its arguments, options and exit codes, as the command line has them.

The command line stands above this layer, so that it is asked in a process of its own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

PAGE = "cli.md"
_WIDTH = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}


@functools.cache
def cli_markdown() -> str:
    """The page, from `python -m mule.cli.reference`."""
    ran = subprocess.run(
        [sys.executable, "-m", "mule.cli.reference"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        env={**os.environ, **_WIDTH, "PYTHONIOENCODING": "utf-8"},
    )
    return ran.stdout
