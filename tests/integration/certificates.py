"""A certificate authority for servers on loopback."""

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Certificates:
    """A certificate authority, and what it signs. Its name tells the folder: two of one name would be taken for the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(f"authority in {folder.name}")
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        authority = _builder(self._name, self._name, self._key, 1).add_extension(constraints, critical=True).sign(self._key, hashes.SHA256())
        pem = authority.public_bytes(serialization.Encoding.PEM)
        self.ca_file = folder / "authority.pem"
        self.ca_file.write_bytes(pem)
        self.trusting = ssl.create_default_context(cadata=pem.decode())

    def file(self, *names: str, days: int = 1, self_signed: bool = False) -> Path:
        """Certificate and private key of a server with these host names and IP addresses, valid for so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _named("a server")
        builder = _builder(subject, subject if self_signed else self._name, key, days)
        alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
        certificate = builder.add_extension(alternatives, critical=False).sign(key if self_signed else self._key, hashes.SHA256())
        file = self._folder / f"server-{certificate.serial_number}.pem"
        file.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return file

    def server(self, *names: str, days: int = 1, self_signed: bool = False) -> ssl.SSLContext:
        """The same, for a server in this process."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file(*names, days=days, self_signed=self_signed))
        return context


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=90))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
