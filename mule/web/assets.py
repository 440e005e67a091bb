"""What a browser loads without the token: the shell and its scripts, none of which holds data."""

from __future__ import annotations

from functools import cache
from importlib import metadata, resources
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mule.errors import UserError
from mule.web.site import Site

_KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# Scripts of ours only, nothing inline; plotly sets styles of its own, and makes pictures of blobs.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def routes(site: Site) -> list[Route]:
    """`/` and every file of mule/web/static, each by its name in a table made at the start."""

    async def shell(_request: Request) -> Response:
        return await site.fragment("shell.html")

    return [Route("/", shell, methods=["GET"])] + [_file(name) for name in _names()]


def _names() -> list[str]:
    folder = resources.files("mule.web") / "static"
    files = [path for path in folder.iterdir() if path.name[path.name.rfind(".") :] in _KINDS]
    return [*sorted(path.name for path in files), "plotly.js"]


def _file(name: str) -> Route:
    async def content(_request: Request) -> Response:
        kind = _KINDS[name[name.rfind(".") :]]
        return Response(_find(name).read_bytes(), media_type=f"{kind}; charset=utf-8")

    return Route(f"/static/{name}", content, methods=["GET"])


@cache
def _find(name: str) -> Traversable:
    if name == "plotly.js":
        return plotly_script()
    return resources.files("mule.web") / "static" / name


def plotly_script() -> Traversable:
    """The script of the installed plotly package. UserError where it is not installed."""
    try:
        metadata.version("plotly")
        return resources.files("plotly") / "package_data" / "plotly.min.js"
    except (metadata.PackageNotFoundError, ModuleNotFoundError):
        raise UserError(
            "the pages draw with plotly, which is not installed",
            "install it: pip install plotly (or Mule with its extra: mule[ui])",
        ) from None
