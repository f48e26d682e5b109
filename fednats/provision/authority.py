"""The federation's certificate authority: it certifies servers to services, and regions' servers to those above.

Keys are on the curve P-256. Certificates are valid from a week before they are made, because clocks differ.
"""

import datetime as dt
import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fednats.errors import ConfigError
from fednats.provision.files import Files

CA_FILE = "ca.pem"
CERTIFICATE_FILE = "server.pem"
KEY_FILE = "server.key"

AUTHORITY_YEARS = 10
SERVER_DAYS = 730
RENEWED_BEFORE_DAYS = 90
"""A server's certificate is renewed when it has this many days left or fewer."""

_BEFORE = dt.timedelta(days=7)


class Authority:
    """The authority in a folder; created if there is none.

    Raises:
        ConfigError: the certificate is missing, but its key is there.
    """

    def __init__(self, folder: Path, run: str, files: Files) -> None:
        self._key_file, certificate = folder / "ca.key", folder / CA_FILE
        self._files = files
        if not certificate.exists():
            if self._key_file.exists():
                raise ConfigError(f"{certificate} is missing, but its key is there; restore it from a copy")
            self._make(run, certificate)
        self.pem = certificate.read_bytes()
        self._certificate = x509.load_pem_x509_certificate(self.pem)

    def certify(self, kit: Path, name: str, hosts: Sequence[str], *, links_up: bool) -> None:
        """Put a server's key and certificate into its kit; keep an existing key.

        Also keeps an existing certificate if it fits the key, this authority and ``hosts``, and is valid for more than
        `RENEWED_BEFORE_DAYS`. ``links_up``: the server connects to one above, which asks for its certificate.

        Raises:
            ConfigError: the authority's key is needed and missing, or a key file is damaged.
        """
        certificate_file = kit / CERTIFICATE_FILE
        key = self._server_key(kit / KEY_FILE)
        if certificate_file.exists() and self._serves(certificate_file, key, hosts):
            return
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if links_up else [])]
        builder = _builder(_name(name), self._certificate.subject, key.public_key(), SERVER_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_host, hosts))), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(_public(self._certificate))
        builder = builder.add_extension(issuer, critical=False)
        signed = builder.sign(self._key(), hashes.SHA256())
        self._files.public(certificate_file, signed.public_bytes(serialization.Encoding.PEM))

    def _make(self, run: str, certificate: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"fednats {run}")
        builder = _builder(name, name, key.public_key(), AUTHORITY_YEARS * 365)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
        self._files.private(self._key_file, _pem(key))
        signed = builder.sign(key, hashes.SHA256())
        self._files.public(certificate, signed.public_bytes(serialization.Encoding.PEM))

    def _key(self) -> ec.EllipticCurvePrivateKey:
        if not self._key_file.exists():
            raise ConfigError(f"{self._key_file} is needed to make a certificate; bring it back from where it is kept")
        return _load(self._key_file)

    def _server_key(self, file: Path) -> ec.EllipticCurvePrivateKey:
        if not file.exists():
            self._files.private(file, _pem(ec.generate_private_key(ec.SECP256R1())))
        return _load(file)

    def _serves(self, file: Path, key: ec.EllipticCurvePrivateKey, hosts: Sequence[str]) -> bool:
        found = x509.load_pem_x509_certificate(file.read_bytes())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        left = found.not_valid_after_utc - dt.datetime.now(dt.UTC)
        return (
            _public(found).public_numbers() == key.public_key().public_numbers()
            and found.issuer == self._certificate.subject
            and list(names) == list(map(_host, hosts))
            and left > dt.timedelta(days=RENEWED_BEFORE_DAYS)
        )


def certificates(kits: Path) -> Iterator[tuple[Path, dt.datetime]]:
    """Yield each certificate in the folder of kits with its end: the authority's, then the servers'."""
    for file in (kits / "authority" / CA_FILE, *sorted(kits.glob(f"*/{CERTIFICATE_FILE}"))):
        if file.exists():
            yield file, x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _public(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"certificate of {certificate.subject.rfc4514_string()}: not a key on the curve P-256")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load(file: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except ValueError as error:
        raise ConfigError(f"{file}: not a private key ({error}); restore it from a copy") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{file}: not a key on the curve P-256")
    return key
