"""The coordinator's own certificate authority, and the certificate of its listener: `tls/` of its folder.

    tls/ca.pem       the authority's certificate; the signed invitation carries it to the sites
    tls/server.pem   the listener's certificate, for the names by which sites reach it
    tls/server.key   its key, for the owner alone

The authority's key signs once and is thrown away: a new certificate needs a new authority and with it a new
invitation, and nothing is left that a thief could make certificates with.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcompose.errors import ConfigError
from fedcompose.files import write_atomic

TLS = "tls"
CA_FILE, CERTIFICATE_FILE, KEY_FILE = "ca.pem", "server.pem", "server.key"
VALIDITY = timedelta(days=398)  # what browsers accept at most; as long as a signing key
RENEWAL = timedelta(days=30)  # before the end a new certificate is made, so that invitations have time to travel
BACKDATED = timedelta(hours=1)  # for sites whose clock is behind


def make_certificates(home: Path, names: Sequence[str], now: datetime) -> datetime:
    """Write a new authority and a certificate for these names; until when it counts.

    Raises: ConfigError: `TLS_NAME`, for a name that is neither a DNS name nor an address.
    """
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = _named("fedcompose coordinator CA")
    root = (
        _builder(issuer, issuer, authority.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    leaf = (
        _builder(_named("fedcompose coordinator"), issuer, server.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    private = server.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomic(home / TLS / KEY_FILE, private, 0o600)
    write_atomic(home / TLS / CERTIFICATE_FILE, leaf.public_bytes(serialization.Encoding.PEM))
    write_atomic(home / TLS / CA_FILE, root.public_bytes(serialization.Encoding.PEM))
    return leaf.not_valid_after_utc


def certificate_fits(home: Path, names: Sequence[str], now: datetime, longer: timedelta = RENEWAL) -> bool:
    """Whether there is a certificate for exactly these names that counts for so much longer."""
    path = home / TLS / CERTIFICATE_FILE
    if not path.is_file():
        return False
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    listed = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return list(listed) == [_general_name(name) for name in names] and now + longer < certificate.not_valid_after_utc


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + VALIDITY)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise ConfigError("TLS_NAME", f"{name!a} is no DNS name and no address", fix="write it in ASCII") from error
