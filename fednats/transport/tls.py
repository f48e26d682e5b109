"""The socket under a connection: TLS before the first word, and an end that is noticed."""

import asyncio
import contextlib
import ssl
from urllib.parse import ParseResult, urlsplit

from nats.aio.transport import TcpTransport

from fednats.config import BusSettings
from fednats.errors import BusError, ConfigError

HANDSHAKE_TIMEOUT_S = 20.0
_EXPIRED = 10
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED."""


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


async def certificates_end_at(settings: BusSettings) -> float:
    """Return when the server's certificate ends, or its authority's in ``ca_file`` if that is sooner, seconds since 1970.

    The server is asked anew: a connection that stands does not notice that it has another certificate by now. One that
    has ended already ends now.

    Raises:
        BusError: it cannot be reached.
        ConfigError: as `context`.
    """
    verifying, url = context(settings), urlsplit(settings.url)
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(url.hostname, url.port, ssl=verifying)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            return 0.0
        raise BusError(f"{settings.url}: {error.verify_message}") from error
    except (OSError, TimeoutError) as error:
        raise BusError(f"{settings.url}: {error or 'no answer'}") from error
    try:
        found = [writer.get_extra_info("peercert"), *(verifying.get_ca_certs() if settings.ca_file else ())]
    finally:
        writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
    return min(ssl.cert_time_to_seconds(certificate["notAfter"]) for certificate in found)


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
