"""Which file is the model: found, or downloaded, verified and renamed; and the process that does it."""

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from boot import model_files
from boot.model_download import Download, sole_writer
from boot.model_errors import ModelError
from boot.model_files import FoundModel, locate, obtain, parts_of
from boot.transfer import FetchLimits
from config.loader import load_config
from config.settings import ModelSettings
from support.boot import FOR_COVERAGE, PATIENCE_S
from support.faults import Fault, make_faults, seen_by_program
from support.fileserver import Site, serve
from support.paths import SCRIPTS
from support.ports import reserved_port
from support.together import aside

GGUF = b"GGUF" + bytes(range(256)) * 40
SHA256 = hashlib.sha256(GGUF).hexdigest()


def model(tmp_path: Path, **settings: str) -> ModelSettings:
    return load_config({"DATA_DIR": str(tmp_path), "MODELS_DIR": str(tmp_path), **settings}).model


def write(path: Path, content: bytes = GGUF) -> Path:
    path.write_bytes(content)
    return path


def fetch(url: str, part: Path, digest_known: bool) -> None:
    """Download without pauses."""
    Download(url, part, FetchLimits(0.0, 0), digest_known=digest_known).run()


# Locate


def test_path_comes_before_name_and_name_before_url(tmp_path: Path) -> None:
    url = "https://x.example/dir/from%20url.gguf?download=true"
    assert locate(model(tmp_path, MODEL_PATH="/m/a.gguf", MODEL_NAME="b.gguf", MODEL_URL=url)) == Path("/m/a.gguf")
    assert locate(model(tmp_path, MODEL_NAME="b.gguf", MODEL_URL=url)) == tmp_path / "b.gguf"
    assert locate(model(tmp_path, MODEL_URL=url)) == tmp_path / "from url.gguf"


def test_a_name_may_lack_its_suffix(tmp_path: Path) -> None:
    write(tmp_path / "b.gguf")
    assert locate(model(tmp_path, MODEL_NAME="b")) == tmp_path / "b.gguf"
    assert locate(model(tmp_path, MODEL_NAME="c")) == tmp_path / "c"


def test_no_setting_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model is set"):
        locate(model(tmp_path))


@pytest.mark.parametrize(
    "url", ["https://x.example", "https://x.example/models/", "https://x.example/..%2Fx", "https://x.example/.bashrc"]
)
def test_a_url_without_a_usable_file_name_needs_model_name(tmp_path: Path, url: str) -> None:
    with pytest.raises(ModelError, match="set MODEL_NAME too"):
        locate(model(tmp_path, MODEL_URL=url))


def test_a_split_set_is_named_by_its_first_file(tmp_path: Path) -> None:
    first = tmp_path / "big-00001-of-00003.gguf"
    assert [path.name for path in parts_of(first)] == [f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    with pytest.raises(ModelError, match=r"name big-00001-of-00003.gguf"):
        parts_of(tmp_path / "big-00002-of-00003.gguf")


# Find


def test_a_file_that_exists_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    assert obtain(model(tmp_path, MODEL_PATH=str(path))) == FoundModel(path, len(GGUF))


def test_the_size_of_a_split_set_is_that_of_all_its_files(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"a-0000{number}-of-00002.gguf")
    found = obtain(model(tmp_path, MODEL_NAME="a-00001-of-00002.gguf"))
    assert found == FoundModel(tmp_path / "a-00001-of-00002.gguf", 2 * len(GGUF))


def test_a_missing_file_of_a_split_set_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a-00001-of-00002.gguf")
    with pytest.raises(ModelError, match=r"a-00002-of-00002.gguf does not exist"):
        obtain(model(tmp_path, MODEL_NAME="a-00001-of-00002.gguf"))


def test_the_error_for_a_missing_file_lists_the_models_that_exist(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / f"m{number}.gguf")
    with pytest.raises(ModelError, match=r"mm.gguf does not exist \(.* contains m0.gguf, .*m7.gguf, …\)"):
        obtain(model(tmp_path, MODEL_NAME="mm.gguf"))


def test_an_error_begins_with_the_setting_that_names_the_model(tmp_path: Path) -> None:
    none, part = tmp_path / "none.gguf", tmp_path / "a-00002-of-00002.gguf"
    with pytest.raises(ModelError, match=f"^MODEL_PATH: {none} does not exist$"):
        obtain(model(tmp_path, MODEL_PATH=str(none)))
    with pytest.raises(ModelError, match=f"^MODEL_NAME: {none} does not exist$"):
        obtain(model(tmp_path, MODEL_NAME=none.name))
    with pytest.raises(ModelError, match=f"^MODEL_NAME: {part} is not the first part of its set: name a-00001-of"):
        obtain(model(tmp_path, MODEL_NAME=part.name))
    write(tmp_path / "there.gguf", b"<html>")
    with pytest.raises(ModelError, match=f"^MODEL_URL: {tmp_path / 'there.gguf'} is "):
        obtain(model(tmp_path, MODEL_URL="https://x.example/there.gguf"))


def test_a_missing_models_dir_is_not_a_second_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist$"):
        obtain(model(tmp_path, MODEL_NAME="m.gguf", MODELS_DIR=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"GGU", "is not a GGUF file"),
        (b"\x80\x02}q\x00" * 20, "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
    ],
)
def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    write(tmp_path / "m.gguf", content)
    with pytest.raises(ModelError, match=complaint):
        obtain(model(tmp_path, MODEL_NAME="m.gguf"))


def test_a_folder_or_an_unreadable_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder, not a model file"):
        obtain(model(tmp_path, MODEL_PATH=str(tmp_path)))
    write(tmp_path / "file")
    with pytest.raises(ModelError, match="cannot be read: Not a directory"):
        obtain(model(tmp_path, MODEL_PATH=str(tmp_path / "file" / "m.gguf")))


# Download


def test_a_download_is_verified_and_then_renamed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serve(Site(GGUF)) as url:
        found = obtain(model(tmp_path / "new", MODEL_URL=f"{url}/m.gguf?token=hush", MODEL_SHA256=SHA256.upper()))
    assert found.path.read_bytes() == GGUF
    assert sorted(path.name for path in found.path.parent.iterdir()) == [".m.gguf.verified", "m.gguf"]
    assert "hush" not in caplog.text


def test_a_download_that_fails_leaves_only_its_part(tmp_path: Path) -> None:
    with serve(Site(GGUF, cuts=[1000, *[0] * 9])) as url, pytest.raises(ModelError, match="will be resumed"):
        obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"), fetch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf.part", "m.gguf.part.json"]


def test_a_file_that_exists_is_not_downloaded(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    site = Site(b"GGUF another")
    with serve(site) as url:
        obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"))
    assert site.seen == []


def test_a_part_of_an_earlier_boot_is_resumed(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf.part", GGUF[:5000])
    site = Site(GGUF)
    with serve(site) as url:
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf", MODEL_SHA256=SHA256))
    assert site.seen == ["bytes=5000-"]
    assert found.path.read_bytes() == GGUF


def test_a_wrong_digest_leaves_nothing_to_load_or_to_resume(tmp_path: Path) -> None:
    with serve(Site(GGUF)) as url, pytest.raises(ModelError, match=f"{SHA256}, MODEL_SHA256 is {'0' * 64}"):
        obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf", MODEL_SHA256="0" * 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rest", [b"<ht", b"GG"])
def test_a_part_that_is_not_gguf_is_removed(tmp_path: Path, rest: bytes) -> None:
    write(tmp_path / "m.gguf.part", rest)
    with serve(Site(rest + b"UX any")) as url, pytest.raises(ModelError, match=r"the download for m.gguf is"):
        obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "file")
    with pytest.raises(ModelError, match="cannot be written"):
        obtain(model(tmp_path, MODELS_DIR=str(tmp_path / "file" / "models"), MODEL_URL="https://x.example/m.gguf"))


def test_a_split_set_is_downloaded_file_by_file(tmp_path: Path) -> None:
    parts = {f"m-0000{number}-of-00003.gguf": GGUF + bytes([number]) for number in (1, 2, 3)}
    write(tmp_path / "m-00002-of-00003.gguf", parts["m-00002-of-00003.gguf"])
    digest = hashlib.sha256(b"".join(parts.values())).hexdigest()
    site = Site(files=parts)
    with serve(site) as url:
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m-00001-of-00003.gguf?x=1", MODEL_SHA256=digest))
    assert found.size_bytes == 3 * len(GGUF) + 3
    assert len(site.seen) == 2
    assert {path.name: path.read_bytes() for path in parts_of(found.path)} == parts


def test_a_split_set_needs_the_same_numbers_in_its_local_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not split alike"):
        obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_URL="https://x.example/m-00001-of-00003.gguf"))


# Verify


def test_a_file_that_exists_is_verified_once(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_SHA256=SHA256))
    assert json.loads((tmp_path / ".m.gguf.verified").read_text())[0] == SHA256
    path.write_bytes(GGUF[:-1] + b"!")
    with pytest.raises(ModelError, match="MODEL_SHA256 is"):
        obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_SHA256=SHA256))
    assert path.exists()


def test_a_verified_file_is_not_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path / "m.gguf")
    for _ in range(2):
        obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_SHA256=SHA256))
    assert caplog.messages == ["verifying m.gguf"]


def test_a_volume_that_cannot_keep_the_record_is_not_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path / "m.gguf")
    (tmp_path / ".m.gguf.verified").mkdir()
    obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_SHA256=SHA256))
    assert "the next boot verifies the model again" in caplog.text


def test_the_digest_of_several_files_is_that_of_their_concatenation(tmp_path: Path) -> None:
    files = [write(tmp_path / "a", GGUF[:5]), write(tmp_path / "b", GGUF[5:])]
    assert model_files.digest(files) == SHA256


# The process


def environment(tmp_path: Path, **settings: str) -> dict[str, str]:
    return {**FOR_COVERAGE, "PATH": os.environ["PATH"], "DATA_DIR": str(tmp_path), **settings}


def command(tmp_path: Path) -> list[str]:
    return [sys.executable, str(SCRIPTS / "supervisor.py"), "--find-model", str(tmp_path / "result")]


def run(tmp_path: Path, **settings: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(tmp_path),
        env=environment(tmp_path, **settings),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@aside
def test_two_workers_on_one_volume_download_once(tmp_path: Path) -> None:
    """The second waits for the lock, then finds the file."""
    site = Site(GGUF)
    with serve(site) as url, sole_writer(tmp_path / "m.gguf.part"):
        worker = subprocess.Popen(
            command(tmp_path),
            env=environment(tmp_path, MODELS_DIR=str(tmp_path), MODEL_URL=f"{url}/m.gguf"),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert worker.stdout is not None
        assert "another worker is fetching m.gguf.part" in worker.stdout.readline()
        write(tmp_path / "m.gguf")
    with worker:
        worker.stdout.read()
        assert worker.wait(PATIENCE_S) == 0
    assert site.seen == []
    assert json.loads((tmp_path / "result").read_text()) == {"path": str(tmp_path / "m.gguf"), "bytes": len(GGUF)}


def test_the_process_reports_the_models_of_a_router(tmp_path: Path) -> None:
    write(tmp_path / "chat.gguf")
    write(tmp_path / "bad.gguf", b"<html>")
    done = run(tmp_path, MODELS="router", MODELS_DIR=str(tmp_path))
    assert json.loads((tmp_path / "result").read_text()) == {"path": None, "bytes": len(GGUF)}
    assert "WARNING supervisor: MODELS_DIR: the model bad: " in done.stdout
    assert "INFO supervisor: models: bad, chat\n" in done.stdout


def test_the_process_logs_one_error_and_ends_with_3(tmp_path: Path) -> None:
    done = run(tmp_path, MODEL_NAME="none.gguf")
    assert (done.returncode, done.stderr) == (3, "")
    (line,) = done.stdout.splitlines()
    assert " ERROR supervisor: error: MODEL_NAME: " in line
    assert line.endswith("none.gguf does not exist")
    assert not (tmp_path / "result").exists()


def test_the_process_ends_with_6_if_another_start_may_find_the_model(tmp_path: Path) -> None:
    with reserved_port() as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/m.gguf"
        done = run(tmp_path, MODEL_URL=url, MODEL_FETCH_TIMEOUT="0")
    assert done.returncode == 6
    assert "refused; giving up after 0 s without progress (MODEL_FETCH_TIMEOUT)" in done.stdout


# Volumes that lack something

ON_A_VOLUME = """
import logging, pathlib, sys
sys.path.insert(0, sys.argv[1])
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from boot import model_files
from config.loader import load_config
for name in sys.stdin:
    folder = pathlib.Path(sys.argv[2], name.strip())
    settings = {"MODELS_DIR": str(folder), "MODEL_URL": sys.argv[3], "MODEL_FETCH_TIMEOUT": "0"}
    try:
        found = model_files.obtain(load_config(settings).model)
        print(found.size_bytes, sorted(path.name for path in folder.iterdir()))
    except Exception as error:
        print("error", repr(error))
    print("end", flush=True)
"""
LACKS: dict[str, tuple[list[Fault], str]] = {
    "fsync-eio": ([Fault("fsync", errno=errno.EIO)], "ModelUnavailable"),
    "rename-eacces": ([Fault("rename", errno=errno.EACCES)], "ModelError"),
    "flock": ([Fault("flock", errno=errno.ENOLCK)], "has no file locks"),
    "fsync-einval": ([Fault("fsync", errno=errno.EINVAL)], "cannot sync files"),
    "fsync-enosys": ([Fault("fsync", errno=errno.ENOSYS)], "cannot sync files"),
    "rename-enosys": ([Fault("rename", errno=errno.ENOSYS)], "cannot rename files"),
    "rename-exdev": ([Fault("rename", errno=errno.EXDEV)], "cannot rename files"),
    "inodes": ([Fault("stat", wrong=True), Fault("fstat", wrong=True)], ""),
    "space": ([Fault("statvfs", wrong=True)], ""),
    "space-enosys": ([Fault("statvfs", errno=errno.ENOSYS)], ""),
}


def test_a_model_is_fetched_on_a_volume_that_lacks_something(tmp_path: Path) -> None:
    cases = {name: lacking for name, (lacking, _) in LACKS.items()}
    with serve(Site(GGUF)) as url:
        command = (sys.executable, "-c", ON_A_VOLUME, str(SCRIPTS), str(tmp_path), f"{url}/m.gguf")
        seen = seen_by_program(make_faults(tmp_path), cases, *command)
    for name, (_, sentence) in LACKS.items():
        *warnings, result = seen[name]
        if sentence.startswith("Model"):
            assert result.startswith(f"error {sentence}("), (name, seen[name])
            continue
        assert result == f"{len(GGUF)} ['m.gguf']", (name, seen[name])
        assert len(warnings) == bool(sentence), (name, warnings)
        assert all(sentence in warning for warning in warnings), (name, warnings)


def test_a_copy_that_was_interrupted_is_not_taken_for_the_model(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", GGUF[:100])
    write(tmp_path / "m.gguf.part")
    site = Site(GGUF)
    with serve(site) as url:
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"), fetch)
    assert found.path.read_bytes() == GGUF
    assert site.seen == [f"bytes={len(GGUF)}-"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
