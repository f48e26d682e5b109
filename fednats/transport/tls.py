"""The socket under a connection: TLS before the first word, and an end that is noticed."""

import ssl
from urllib.parse import ParseResult

from nats.aio.transport import TcpTransport

from fednats.config import BusSettings
from fednats.errors import ConfigError


def context(settings: BusSettings) -> ssl.SSLContext:
    """Return what a server is verified with: its authority, its name, TLS 1.3.

    Raises:
        ConfigError: ``ca_file`` is no certificate.
    """
    try:
        made = ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:  # of which ssl.SSLError is one
        text = f"{settings.ca_file}: no certificate of an authority ({error.strerror or error}); give the kit's ca.pem"
        raise ConfigError(text) from None
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    return made


class TlsTransport(TcpTransport):
    """nats-py's own, which after a handshake that failed would wait for ever for the end of the connection."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._secured = False

    def __bool__(self) -> bool:
        return True  # it is the one to connect with, whatever it is connected to

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        """Open the socket."""
        self._secured = False
        await super().connect(uri, buffer_size, connect_timeout)

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        """Shake hands."""
        await super().connect_tls(uri, ssl_context, buffer_size, connect_timeout)
        self._secured = True
        if self._io_writer is not None:  # asyncio warns at every end of a reader that does not know of TLS
            self._io_writer.transport.get_protocol()._over_ssl = True  # type: ignore[attr-defined]  # noqa: SLF001

    async def wait_closed(self) -> None:
        """Wait for the end; nobody tells of one before the handshake is done."""
        if self._secured:
            await super().wait_closed()  # type: ignore[no-untyped-call]

    def abort(self) -> None:
        """Break the connection as it stands; nats-py has no way to."""
        if self._io_writer is not None:
            self._io_writer.transport.abort()
