"""The table of contents of the pages, and the application that a server runs."""

from __future__ import annotations

from starlette.routing import Router

from mule.serve.guard import Door, Guard, check_routes
from mule.serve.watch import Watch
from mule.web import assets, changes
from mule.web.pages import chat, compare, data, export, jobs, run, runs, start
from mule.web.site import Site

PAGES = (runs, run, export, chat, start, jobs, data, compare)


class Ui:
    """Every page of a site behind the guard of `mule serve`."""

    def __init__(self, site: Site, *, token: str, hosts: frozenset[str]) -> None:
        self.site, self.limits = site, site.limits
        open_routes = assets.routes(site)
        self.routes = [*open_routes, *changes.routes(site)]
        for page in PAGES:
            self.routes += page.routes(site)
        self.guard = Guard(
            Router(self.routes, redirect_slashes=False),
            check_routes(self.routes),
            door=Door(
                token,
                hosts,
                frozenset(route.path for route in open_routes),
                command="mule ui",
                content_policy=assets.CONTENT_POLICY,
            ),
            limits=self.limits,
            watch=Watch(),
        )

    def cancel_all(self) -> None:
        """Let the streams end; nothing is lost with a page: jobs are processes of their own."""
        self.site.closing.set()
