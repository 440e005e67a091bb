"""Opening the pages in the browser of this machine."""

from __future__ import annotations

import html
import os
import sys
import webbrowser
from pathlib import Path

from mule import fsio


def has_screen() -> bool:
    """Whether a browser of this machine would be seen; over ssh it would be a text browser."""
    if sys.platform == "darwin":
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def open_in_browser(address: str, file: Path) -> None:
    """Open a private file that leads to `address`: command lines can be read by other users."""
    place = html.escape(address, quote=True)
    file.unlink(missing_ok=True)  # of a server that was killed on this port
    fsio.write_private(file, f'<meta http-equiv="refresh" content="0;url={place}">\n')
    webbrowser.open(file.as_uri())
