#!/usr/bin/env python3
"""Build the artefacts of a release in dist/, from the last commit: the same commit gives the same bytes.

    llama-gguf-inference-VERSION.tar.gz     the programs, deploy/ and the pages
    llama-gguf-inference-VERSION.pyz        the programs as one file: python3 X.pyz --help
    llama-gguf-inference-VERSION.cdx.json   a bill of materials (CycloneDX 1.6): every file of the archive with its hash
    SHA256SUMS                              check them with `sha256sum -c SHA256SUMS`

All times in them are SOURCE_DATE_EPOCH, by default the time of the commit. What is not committed is left out. The
archive is compressed with zlib, so another build of zlib may give other bytes; the .pyz is not compressed.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NAME = "llama-gguf-inference"
# What an operator needs. The pages of the site are in docs/.
CONTENTS = (
    "CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md", "VERSION",
    "Dockerfile", ".dockerignore", "docker-compose.yml", ".env.example", "api_keys.txt.example",
    "deploy", "docs", "scripts", "tools/collect.sh",
)  # fmt: skip
SHEBANG = b"#!/usr/bin/env python3\n"
EARLIEST_ZIP = 315532800  # 1980-01-01: a ZIP file has no earlier time


class SourceFile(NamedTuple):
    """A committed file: its contents, and whether it can be executed."""

    data: bytes
    executable: bool


class DistError(Exception):
    """The artefacts cannot be built; the message says why."""


def git(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise DistError("git is not installed") from None
    except subprocess.CalledProcessError as error:
        raise DistError(f"git {arguments[0]}: {error.stderr.decode(errors='replace').strip()}") from None


def committed_files() -> dict[str, SourceFile]:
    """Return the files of the last commit that belong into the archive, by name, in the order of their names."""
    present = git("ls-tree", "--name-only", "-z", "HEAD", "--", *CONTENTS).decode().split("\0")
    archive = git("archive", "--format=tar", "HEAD", "--", *filter(None, present))
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            contents = tar.extractfile(member)
            if contents is not None:
                found[member.name] = SourceFile(contents.read(), bool(member.mode & 0o100))
    return dict(sorted(found.items()))


def source_time(environ: Mapping[str, str]) -> int:
    """Return SOURCE_DATE_EPOCH, or the time of the commit, in seconds since 1970."""
    text = environ.get("SOURCE_DATE_EPOCH") or git("show", "--no-patch", "--format=%ct", "HEAD").decode().strip()
    if not text.isdecimal():
        raise DistError(f"SOURCE_DATE_EPOCH: {text!r} is not a number of seconds")
    return int(text)


def make_tar(files: Mapping[str, SourceFile], folder: str, time_s: int) -> bytes:
    """Return a .tar.gz with all files below one folder, owned by root."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, source in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mtime = len(source.data), time_s
            member.mode = 0o755 if source.executable else 0o644
            member.uname = member.gname = "root"
            tar.addfile(member, io.BytesIO(source.data))
    return gzip.compress(raw.getvalue(), compresslevel=9, mtime=0)


def make_pyz(files: Mapping[str, SourceFile], time_s: int) -> bytes:
    """Return the programs as one executable file, with VERSION."""
    wanted = {name: source for name, source in files.items() if name.endswith((".py", ".html"))}
    contents = {name.removeprefix("scripts/"): source for name, source in wanted.items()}
    contents = {name: source for name, source in contents.items() if f"scripts/{name}" in files}
    contents["VERSION"] = files["VERSION"]
    date = datetime.fromtimestamp(max(time_s, EARLIEST_ZIP), timezone.utc).timetuple()[:6]
    raw = io.BytesIO(SHEBANG)
    raw.seek(0, io.SEEK_END)
    with zipfile.ZipFile(raw, "a", zipfile.ZIP_STORED) as archive:
        for name in sorted(contents):
            member = zipfile.ZipInfo(name, date)
            member.create_system = 3  # Unix, whose modes these are
            member.external_attr = 0o644 << 16
            archive.writestr(member, contents[name].data)
    return raw.getvalue()


def make_sbom(files: Mapping[str, SourceFile], version: str, time_s: int) -> bytes:
    """Return a CycloneDX document. The product has no dependencies except Python, which it does not contain."""
    components = [
        {
            "type": "file",
            "bom-ref": name,
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(source.data).hexdigest()}],
        }
        for name, source in files.items()
    ]
    reference = f"{NAME}@{version}"
    product = {
        "type": "application",
        "bom-ref": reference,
        "name": NAME,
        "version": version,
        "description": "A gateway in front of llama-server. It needs Python 3.10 or later, and no package.",
        "licenses": [{"license": {"id": "MIT"}}],
    }
    time = datetime.fromtimestamp(time_s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([reference, time, components]))}",
        "version": 1,
        "metadata": {"timestamp": time, "component": product},
        "components": components,
        "dependencies": [{"ref": reference, "dependsOn": []}],
    }
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def make_artefacts(environ: Mapping[str, str]) -> dict[str, bytes]:
    """Return the contents of each artefact by its file name. Raises DistError."""
    files, time_s = committed_files(), source_time(environ)
    version = files["VERSION"].data.decode().strip()
    stem = f"{NAME}-{version}"
    artefacts = {
        f"{stem}.tar.gz": make_tar(files, stem, time_s),
        f"{stem}.pyz": make_pyz(files, time_s),
        f"{stem}.cdx.json": make_sbom(files, version, time_s),
    }
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in artefacts.items())
    return {**artefacts, "SHA256SUMS": sums.encode()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the artefacts of a release from the last commit.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER", help="default: dist")
    out = parser.parse_args(argv).out
    try:
        artefacts = make_artefacts(os.environ)
        out.mkdir(parents=True, exist_ok=True)
        for name, data in artefacts.items():
            (out / name).write_bytes(data)
            (out / name).chmod(0o755 if name.endswith(".pyz") else 0o644)
            print(f"{len(data):>9} bytes  {out / name}")
    except (DistError, OSError) as error:
        print(f"dist: error: {error}", file=sys.stderr)
        return 1
    print(artefacts["SHA256SUMS"].decode(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
