"""`mule ui`: the pages of the working folder, on this machine."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mule.errors import Interrupted, UserError
from mule.run import RUNS
from mule.serve import server
from mule.serve.redaction import start_logging
from mule.serve.token_file import TokenFile
from mule.web.app import Ui
from mule.web.assets import plotly_script
from mule.web.opening import has_screen, open_in_browser
from mule.web.site import Site

HOST, PORT = "127.0.0.1", 8700


def run(
    *,
    runs: Path = RUNS,
    host: str = HOST,
    port: int = PORT,
    token_file: Path | None = None,
    read_only: bool = False,
    browser: bool = False,
    on_start: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Answer until a signal; `on_start` gets the address to open. Raises Interrupted with it.

    The token is in the address behind `#`, which browsers do not send: a page takes it from there.
    """
    plotly_script()  # refused here rather than on a page
    with ExitStack() as stack:
        bound = server.bind(host, port)
        stack.callback(bound.close)
        if not server.is_loopback(bound) and token_file is None:
            raise UserError(
                f"{host} can be reached from other machines, and what goes there is not encrypted",
                "leave --host out and use a tunnel (ssh -L); or name the file of a token that you "
                "hand over: --token-file FILE",
            )
        hosts = server.own_hosts(bound, host, [])
        token = TokenFile(token_file, bound.getsockname()[1])
        stack.callback(token.close)
        start_logging(frozenset({token.token}))
        site = Site(runs=runs, read_only=read_only)
        stack.callback(site.at_close.close)
        ui = Ui(site, token=token.token, hosts=hosts)
        address = server.shown_address(bound, hosts)
        started = {
            "url": address,
            "open": f"{address}/#token={token.token}",
            "token_file": str(token.path),
            "read_only": read_only,
        }
        page = token.path.with_name(f"{token.path.name}.html")
        stack.callback(page.unlink, missing_ok=True)

        def listening() -> None:
            on_start(started)
            if browser and has_screen():
                open_in_browser(started["open"], page)

        signum = server.Server(ui, bound, listening).answer()
    if signum is not None:
        raise Interrupted(signum, f"stopped by {signal.Signals(signum).name}; jobs go on")
    return started
