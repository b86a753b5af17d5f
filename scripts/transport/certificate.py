"""When a certificate expires. ssl reports that only of a peer's certificate that has been verified."""

import re
import ssl
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

_PEM = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME, _GENERALIZED_TIME, _EXPLICIT_VERSION = 0x17, 0x18, 0xA0


def expires_at(path: Path) -> float:
    """Return the end of the validity of the first certificate in a PEM file, in seconds since 1970; 0 if unreadable."""
    try:
        pem = _PEM.search(path.read_text("latin-1"))
        return _not_after(ssl.PEM_cert_to_DER_cert(pem[0])) if pem else 0.0
    except (OSError, ValueError, IndexError, StopIteration):
        return 0.0


def _not_after(der: bytes) -> float:
    """Return notAfter of a certificate (RFC 5280 section 4.1). Raises ValueError, IndexError or StopIteration."""
    (_, certificate) = next(_elements(der))
    (_, to_be_signed) = next(_elements(certificate))
    fields = [each for each in _elements(to_be_signed) if each[0] != _EXPLICIT_VERSION]
    validity = fields[3][1]  # after the serial number, the signature's algorithm and the issuer
    _, (tag, text) = _elements(validity)
    digits = text.decode("ascii").removesuffix("Z")
    if tag == _UTC_TIME:
        digits = ("19" if digits >= "50" else "20") + digits
    elif tag != _GENERALIZED_TIME:
        raise ValueError(f"the tag {tag} is not that of a time")
    return datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=timezone.utc).timestamp()


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and the contents of each element. Raises IndexError if the last one is cut in its head."""
    at = 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & 0x80:
            count = length & 0x7F
            length, at = int.from_bytes(der[at : at + count], "big"), at + count
        yield tag, der[at : at + length]
        at += length
