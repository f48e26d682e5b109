"""The HTTP server of each daemon: /healthz, /readyz, /metrics, /status."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from fednats.config import WebSettings
from fednats.errors import ConfigError
from fednats.web.metrics import Metrics

PORT_FILE = "web.port"


@asynccontextmanager
async def serving(
    settings: WebSettings,
    state_dir: Path,
    metrics: Metrics,
    not_ready: Callable[[], str | None],
    status: Callable[[], Mapping[str, Any]],
) -> AsyncIterator[int]:
    """Serve while the context is open; yield the port and write it to ``state_dir/web.port``.

    ``not_ready`` returns what the daemon waits for, or None if it is ready. ``status`` returns the content of /status.

    Raises:
        ConfigError: the server cannot listen on the address.
    """

    async def healthz(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_request: web.Request) -> web.Response:
        why = not_ready()
        return web.Response(text="ready\n") if why is None else web.Response(status=503, text=f"not ready: {why}\n")

    async def show_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def show_status(_request: web.Request) -> web.Response:
        return web.json_response(dict(status()))

    app = web.Application()
    app.add_routes(
        [
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", show_metrics),
            web.get("/status", show_status),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, settings.host, settings.port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"web.port: cannot listen on {settings.host}:{settings.port} ({error.strerror})"
            ) from error
        port = int(runner.addresses[0][1])
        (state_dir / PORT_FILE).write_text(f"{port}\n", encoding="ascii")
        yield port
    finally:
        await runner.cleanup()
