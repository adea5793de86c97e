"""Write a private key in a form that a passphrase protects: PKCS#8 with scrypt and AES-256.

`cryptography` reads that form but writes only PBKDF2 with 2,048 rounds, which is too few; so the lines that write it
are here. OpenSSL opens it as well.
"""

from __future__ import annotations

import binascii
import secrets

from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

# The strongest scrypt that OpenSSL 3.0 opens under its default memory limit of 32 MiB: 16 MiB, a fifth of a second.
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 14, 8, 5


def protected_pem(pkcs8: bytes, passphrase: bytes) -> bytes:
    """PKCS#8 `EncryptedPrivateKeyInfo`: PBES2 with scrypt and AES-256-CBC.

    Source: RFC 5958 section 3, RFC 8018 appendix A.4, RFC 7914 section 7.
    """
    salt, iv = secrets.token_bytes(16), secrets.token_bytes(16)
    secret = Scrypt(salt=salt, length=32, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P).derive(passphrase)
    padder, encryptor = padding.PKCS7(128).padder(), Cipher(algorithms.AES(secret), modes.CBC(iv)).encryptor()
    ciphertext = encryptor.update(padder.update(pkcs8) + padder.finalize()) + encryptor.finalize()
    scrypt = _sequence(
        _oid("2b06010401da47040b"),  # 1.3.6.1.4.1.11591.4.11
        _sequence(_octets(salt), _integer(SCRYPT_N), _integer(SCRYPT_R), _integer(SCRYPT_P)),
    )
    aes = _sequence(_oid("60864801650304012a"), _octets(iv))  # 2.16.840.1.101.3.4.1.42
    pbes2 = _sequence(_oid("2a864886f70d01050d"), _sequence(scrypt, aes))  # 1.2.840.113549.1.5.13
    return _pem("ENCRYPTED PRIVATE KEY", _sequence(pbes2, _octets(ciphertext)))


def _pem(label: str, der: bytes) -> bytes:
    text = binascii.b2a_base64(der, newline=False)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join([f"-----BEGIN {label}-----".encode(), *lines, f"-----END {label}-----".encode(), b""])


def _der(tag: int, content: bytes) -> bytes:
    """Tag, length, content; the length in one byte below 128, else after the number of its bytes."""
    size = len(content)
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    length = bytes([size]) if size < 128 else bytes([0x80 | len(octets)]) + octets
    return bytes([tag]) + length + content


def _sequence(*items: bytes) -> bytes:
    return _der(0x30, b"".join(items))


def _octets(data: bytes) -> bytes:
    return _der(0x04, data)


def _integer(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _oid(encoded_hex: str) -> bytes:
    return _der(0x06, bytes.fromhex(encoded_hex))
