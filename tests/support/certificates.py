"""Certificates for TLS tests: an authority, and servers and clients that it vouches for. Made anew each run."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOUR = datetime.timedelta(hours=1)
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority of one test.

    Attributes:
        file: its own certificate, PEM: what `mqtt.ca_file` and mosquitto's `cafile` take.
    """

    def __init__(self, folder: Path, name: str = "Test CA", *, lasts: datetime.timedelta = 24 * HOUR) -> None:
        self._folder = folder
        self._name = _common_name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.file = folder / f"{name.replace(' ', '-').lower()}.crt"
        unsigned = (
            _builder(self._name, self._name, self._key.public_key(), lasts=lasts)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        self.file.write_bytes(_pem(unsigned.sign(self._key, hashes.SHA256())))

    def server(
        self,
        hosts: tuple[str, ...] = LOOPBACK,
        *,
        name: str = "server",
        lasts: datetime.timedelta = 24 * HOUR,
    ) -> Pair:
        """A server's certificate.

        Args:
            hosts: DNS names and addresses that it is for.
            name: of its files, which are replaced.
            lasts: from now; one that is negative has expired.
        """
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        return self._issue(name, hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, lasts, names)

    def client(self, common_name: str, *, lasts: datetime.timedelta = 24 * HOUR) -> Pair:
        """A client's certificate; its common name is who it is."""
        return self._issue(common_name, common_name, ExtendedKeyUsageOID.CLIENT_AUTH, lasts, None)

    def _issue(
        self,
        file_name: str,
        common_name: str,
        purpose: x509.ObjectIdentifier,
        lasts: datetime.timedelta,
        names: x509.SubjectAlternativeName | None,
    ) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        unsigned = (
            _builder(_common_name(common_name), self._name, key.public_key(), lasts=lasts)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )
        if names is not None:
            unsigned = unsigned.add_extension(names, critical=False)
        pair = Pair(certificate=self._folder / f"{file_name}.crt", key=self._folder / f"{file_name}.key")
        pair.certificate.write_bytes(_pem(unsigned.sign(self._key, hashes.SHA256())))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        pair.key.chmod(0o600)
        return pair


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, lasts: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + lasts) - HOUR)
        .not_valid_after(now + lasts)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
