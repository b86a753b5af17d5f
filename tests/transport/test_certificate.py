"""The end of a certificate's validity, from its file."""

import shutil
import ssl
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest

from transport.certificate import expires_at

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificate")


def make(folder: Path, days: int) -> Path:
    key, certificate = folder / "key", folder / "cert"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x"
    argv = [*command.split(), "-days", str(days), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(argv, check=True, capture_output=True)
    return certificate


def by_openssl(certificate: Path) -> float:
    argv = ["openssl", "x509", "-noout", "-enddate", "-in", str(certificate)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return float(ssl.cert_time_to_seconds(done.stdout.strip().removeprefix("notAfter=")))


@needs_openssl
@pytest.mark.parametrize("days", [1, 9000, 36500], ids=["soon", "UTCTime", "GeneralizedTime"])
def test_it_is_what_openssl_reads(tmp_path: Path, days: int) -> None:
    certificate = make(tmp_path, days)
    assert expires_at(certificate) == by_openssl(certificate)
    text = certificate.read_text()
    certificate.write_text(f"Bag Attributes: é\n{text}\n{text[:40]}")
    assert expires_at(certificate) == by_openssl(certificate)


def certificate_with(validity: bytes, version: bytes = b"") -> bytes:
    def element(tag: int, contents: bytes) -> bytes:
        return bytes([tag, 0x82, *len(contents).to_bytes(2, "big")]) + contents

    fields = version + element(2, b"\x01") + element(0x30, b"") + element(0x30, b"") + element(0x30, validity)
    return element(0x30, element(0x30, fields))


def written(folder: Path, der: bytes) -> Path:
    (folder / "cert").write_text(ssl.DER_cert_to_PEM_cert(der))
    return folder / "cert"


@pytest.mark.parametrize(
    ("not_after", "expected"),
    [
        (b"\x17\x0d491231235959Z", datetime(2049, 12, 31, 23, 59, 59, tzinfo=timezone.utc)),
        (b"\x17\x0d500101000000Z", datetime(1950, 1, 1, tzinfo=timezone.utc)),
        (b"\x18\x0f20500101000000Z", datetime(2050, 1, 1, tzinfo=timezone.utc)),
    ],
)
def test_both_forms_of_time(tmp_path: Path, not_after: bytes, expected: datetime) -> None:
    der = certificate_with(b"\x17\x0d000101000000Z" + not_after)
    assert expires_at(written(tmp_path, der)) == expected.timestamp()
    der = certificate_with(b"\x17\x0d000101000000Z" + not_after, b"\xa0\x03\x02\x01\x02")
    assert expires_at(written(tmp_path, der)) == expected.timestamp()


@pytest.mark.parametrize(
    "der",
    [b"", b"\x30", b"\x30\x00", certificate_with(b""), certificate_with(b"\x05\x00\x05\x00"), b"\x30\x03\x30\x01\x02"],
)
def test_what_cannot_be_read_is_0(tmp_path: Path, der: bytes) -> None:
    assert expires_at(written(tmp_path, der)) == 0
    (tmp_path / "cert").write_bytes(b"no certificate")
    assert expires_at(tmp_path / "cert") == 0
    assert expires_at(tmp_path / "none") == 0
