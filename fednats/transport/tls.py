"""The socket under a connection: TLS from the first byte, and a close that does not hang."""

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
    """Return a context that verifies the server's certificate and name, and requires TLS 1.3.

    Raises:
        ConfigError: ``ca_file`` is not a certificate.
    """
    try:
        made = ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:  # ssl.SSLError is a subclass
        text = f"{settings.ca_file}: no certificate of an authority ({error.strerror or error}); give the kit's ca.pem"
        raise ConfigError(text) from None
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    return made


async def certificates_end_at(settings: BusSettings) -> float:
    """Return the earliest end of the server's certificate and those in ``ca_file``, in seconds since 1970.

    Opens a new connection, since an existing one does not notice a renewed certificate. Returns 0 if the certificate
    has expired.

    Raises:
        BusError: the server cannot be reached, or its certificate is invalid for another reason.
        ConfigError: like `context`.
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
    """nats-py's transport, except that it does not wait without end for the close after a failed handshake."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._secured = False

    def __bool__(self) -> bool:
        return True  # nats-py replaces a transport that is false

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        """Open the socket."""
        self._secured = False
        await super().connect(uri, buffer_size, connect_timeout)

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        """Do the TLS handshake."""
        await super().connect_tls(uri, ssl_context, buffer_size, connect_timeout)
        self._secured = True
        if self._io_writer is not None:  # else asyncio warns at every end of the stream
            self._io_writer.transport.get_protocol()._over_ssl = True  # type: ignore[attr-defined]  # noqa: SLF001

    async def wait_closed(self) -> None:
        """Wait until the socket is closed; returns at once before the handshake is done, when no close is reported."""
        if self._secured:
            await super().wait_closed()  # type: ignore[no-untyped-call]

    def abort(self) -> None:
        """Drop the connection at once; nats-py has no call for this."""
        if self._io_writer is not None:
            self._io_writer.transport.abort()
