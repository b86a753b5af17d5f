"""The artefacts of a release: the same bytes twice, and what is in them. tests/deploy/test_dist.py installs them."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import dist
from support.boot import PATIENCE_S
from support.together import ENVIRON

TIME_S = 1_700_000_001
FILES = {
    "VERSION": dist.SourceFile(b"1.2.3\n", False),
    "scripts/__main__.py": dist.SourceFile(b"print('main')\n", False),
    "scripts/boot/gpu.py": dist.SourceFile(b"", False),
    "scripts/start.sh": dist.SourceFile(b"#!/bin/sh\n", True),
    "docs/generate.py": dist.SourceFile(b"", False),
}


def in_a_clone() -> bool:
    try:
        return bool(dist.git("rev-parse", "HEAD"))
    except dist.DistError:
        return False


needs_git = pytest.mark.skipif(not in_a_clone(), reason="the artefacts are built from a commit, and this is no clone")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another time zone and umask, as on another machine."""
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture(scope="module")
def artefacts() -> Mapping[str, bytes]:
    return dist.make_artefacts({})


@needs_git
def test_two_builds_give_the_same_bytes(artefacts: Mapping[str, bytes], elsewhere: None) -> None:
    assert dist.make_artefacts({}) == artefacts
    of_another_time = dist.make_artefacts({"SOURCE_DATE_EPOCH": "1000000000"})
    assert of_another_time.keys() == artefacts.keys()
    assert of_another_time != artefacts


@needs_git
def test_the_sums_and_the_bill_of_materials_are_those_of_the_files(artefacts: Mapping[str, bytes]) -> None:
    sums = dict(reversed(line.split("  ")) for line in artefacts["SHA256SUMS"].decode().splitlines())
    assert sums.keys() == artefacts.keys() - {"SHA256SUMS"}
    assert all(hashlib.sha256(artefacts[name]).hexdigest() == digest for name, digest in sums.items())
    (name,) = (name for name in artefacts if name.endswith(".tar.gz"))
    stem = name.removesuffix(".tar.gz")
    with tarfile.open(fileobj=io.BytesIO(artefacts[name])) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    bill = json.loads(artefacts[f"{stem}.cdx.json"])
    listed = {f"{stem}/{each['name']}": each["hashes"][0]["content"] for each in bill["components"]}
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    assert {f"{stem}/{name}" for name in ("VERSION", "README.md", "LICENSE", "scripts/start.sh")} <= contents.keys()
    assert not any("/tests/" in name or "/.git" in name for name in contents)
    pages = {name.rpartition("/")[2] for name in contents if "/scripts/pages/" in name}
    (name,) = (name for name in artefacts if name.endswith(".pyz"))
    with zipfile.ZipFile(io.BytesIO(artefacts[name])) as archive:
        assert {f"pages/{each}" for each in pages} <= set(archive.namelist())
    assert {"chat.html", "loading.html"} <= pages


@needs_git
def test_the_one_file_runs(artefacts: Mapping[str, bytes], tmp_path: Path) -> None:
    (name,) = (name for name in artefacts if name.endswith(".pyz"))
    (tmp_path / name).write_bytes(artefacts[name])
    done = subprocess.run(
        [sys.executable, tmp_path / name, "keys", "--version"],
        env=ENVIRON, capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"{name} keys (llama-gguf-inference) ")


def test_the_archive_has_one_folder_fixed_times_and_no_owner() -> None:
    with tarfile.open(fileobj=io.BytesIO(dist.make_tar(FILES, "x-1.2.3", TIME_S))) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [f"x-1.2.3/{name}" for name in FILES]
    assert {(member.uid, member.gid, member.mtime) for member in members} == {(0, 0, TIME_S)}
    assert [member.name for member in members if member.mode & 0o111] == ["x-1.2.3/scripts/start.sh"]


def test_the_one_file_has_the_programs_and_their_version() -> None:
    data = dist.make_pyz(FILES, TIME_S)
    assert data.startswith(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["VERSION", "__main__.py", "boot/gpu.py"]
        assert archive.read("VERSION") == b"1.2.3\n"
        assert {member.date_time for member in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}
        assert archive.testzip() is None


@pytest.mark.parametrize("text", ["soon", "-1", "1.5"])
def test_a_wrong_time_is_an_error(text: str) -> None:
    with pytest.raises(dist.DistError, match="SOURCE_DATE_EPOCH"):
        dist.source_time({"SOURCE_DATE_EPOCH": text})


def test_without_a_clone_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    assert dist.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("dist: error: git ")
    assert not (tmp_path / "out").exists()


@needs_git
def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dist.main(["--out", str(tmp_path / "out")]) == 0
    version = dist.git("show", "HEAD:VERSION").decode().strip()
    stem = f"llama-gguf-inference-{version}"
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert written.keys() == {f"{stem}.tar.gz", f"{stem}.pyz", f"{stem}.cdx.json", "SHA256SUMS"}
    assert written[f"{stem}.pyz"].stat().st_mode & 0o111
    assert f"{stem}.pyz" in capsys.readouterr().out
