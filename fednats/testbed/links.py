"""Show and cut the links of a running federation from another terminal, over a unix socket in the run's folder."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from fednats.errors import FednatsError
from fednats.testbed.wan import Wan

SOCKET_FILE = "links.sock"
"""A symbolic link in the run's folder; it points to a short path, as the path of a socket is limited to 100 bytes."""


@asynccontextmanager
async def serving_links(links: Mapping[str, Wan], output: Path) -> AsyncIterator[None]:
    """Answer requests of `ask` about ``links`` while the context is open."""

    async def show(_request: web.Request) -> web.Response:
        return web.json_response([_describe(wan) for wan in links.values()])

    async def switch(request: web.Request) -> web.Response:
        asked = request.match_info["name"]
        name = next((name for name in (asked, f"region-{asked}", f"site-{asked}") if name in links), None)
        if name is None:
            return web.Response(status=404, text=f"there is no link {asked!r}; there are {', '.join(links)}")
        wan = links[name]
        if request.match_info["verb"] == "cut":
            wan.cut()
        else:
            wan.restore()
        return web.json_response([_describe(wan)])

    app = web.Application()
    app.add_routes([web.get("/links", show), web.post("/links/{name}/{verb:cut|restore}", switch)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with _socket(output) as socket:
        try:
            await web.UnixSite(runner, socket).start()
            yield
        finally:
            await runner.cleanup()


async def ask(output: Path, verb: str, name: str = "") -> list[dict[str, Any]]:
    """Ask the federation that runs in ``output`` to ``cut`` or ``restore`` a link, or to ``show`` all; return links.

    ``name`` is the name of a link, a region or a site.

    Raises:
        FednatsError: no federation runs there, or it has no such link.
    """
    try:
        connector = aiohttp.UnixConnector(str(await asyncio.to_thread((output / SOCKET_FILE).resolve)))
        async with aiohttp.ClientSession("http://links", connector=connector) as session:
            call = session.get("/links") if verb == "show" else session.post(f"/links/{name}/{verb}")
            async with call as response:
                if response.status != 200:  # noqa: PLR2004 -- HTTP's own number
                    raise FednatsError(await response.text())
                links: list[dict[str, Any]] = await response.json()
                return links
    except (aiohttp.ClientError, OSError):
        raise FednatsError(f"{output}: no federation runs there; give the --output of one that does") from None


@contextmanager
def _socket(output: Path) -> Iterator[Path]:
    """Yield a short path for the socket, with a symbolic link to it in ``output``."""
    entry = output / SOCKET_FILE
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fednats-", ignore_cleanup_errors=True) as folder:
        socket = Path(folder) / SOCKET_FILE
        entry.unlink(missing_ok=True)
        entry.symlink_to(socket)
        try:
            yield socket
        finally:
            entry.unlink(missing_ok=True)


def _describe(wan: Wan) -> dict[str, Any]:
    return {
        "link": wan.name,
        "state": "cut" if wan.is_cut else "up",
        "bytes_up": wan.bytes_up,
        "bytes_down": wan.bytes_down,
        **wan.settings.model_dump(exclude_defaults=True),
    }
