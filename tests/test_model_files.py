"""Which file is the model: found, fetched, resumed, verified; never half a file, never another one's half."""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import config
import gpu
import model_download
import model_files
from config import Model
from model_download import Download, ModelError, Origin
from model_files import Found, obtain, parts_of, place
from support.boot import FOR_COVERAGE
from support.fileserver import Shelf, serve

GGUF = b"GGUF" + bytes(range(256)) * 40
SHA256 = hashlib.sha256(GGUF).hexdigest()


def model(tmp_path: Path, **settings: str) -> Model:
    return config.load_config({"DATA_DIR": str(tmp_path), "MODELS_DIR": str(tmp_path), **settings}).model


def write(path: Path, content: bytes = GGUF) -> Path:
    path.write_bytes(content)
    return path


def fetcher(slept: list[float]) -> model_files.Fetch:
    def fetch(url: str, part: Path, digest_known: bool) -> None:
        Download(url, part, digest_known=digest_known, sleep=slept.append).run()

    return fetch


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# Where


def test_path_wins_over_name_and_name_over_url(tmp_path: Path) -> None:
    url = "https://x.example/dir/from%20url.gguf?download=true"
    assert place(model(tmp_path, MODEL_PATH="/m/a.gguf", MODEL_NAME="b.gguf", MODEL_URL=url)) == Path("/m/a.gguf")
    assert place(model(tmp_path, MODEL_NAME="b.gguf", MODEL_URL=url)) == tmp_path / "b.gguf"
    assert place(model(tmp_path, MODEL_URL=url)) == tmp_path / "from url.gguf"


def test_a_name_may_leave_its_suffix_out(tmp_path: Path) -> None:
    write(tmp_path / "b.gguf")
    assert place(model(tmp_path, MODEL_NAME="b")) == tmp_path / "b.gguf"
    assert place(model(tmp_path, MODEL_NAME="c")) == tmp_path / "c"


def test_no_setting_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model is set"):
        place(model(tmp_path))


@pytest.mark.parametrize(
    "url", ["https://x.example", "https://x.example/models/", "https://x.example/..%2Fx", "https://x.example/.bashrc"]
)
def test_a_url_without_a_usable_file_name_asks_for_one(tmp_path: Path, url: str) -> None:
    with pytest.raises(ModelError, match="set MODEL_NAME too"):
        place(model(tmp_path, MODEL_URL=url))


def test_a_split_set_is_named_by_its_first_part(tmp_path: Path) -> None:
    first = tmp_path / "big-00001-of-00003.gguf"
    assert [path.name for path in parts_of(first)] == [f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    with pytest.raises(ModelError, match=r"name big-00001-of-00003.gguf"):
        parts_of(tmp_path / "big-00002-of-00003.gguf")


# Found


def test_a_file_that_is_there_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    assert obtain(model(tmp_path, MODEL_PATH=str(path))) == Found(path, len(GGUF))


def test_a_whole_split_set_is_taken_and_its_sizes_add_up(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"a-0000{number}-of-00002.gguf")
    found = obtain(model(tmp_path, MODEL_NAME="a-00001-of-00002.gguf"))
    assert found == Found(tmp_path / "a-00001-of-00002.gguf", 2 * len(GGUF))


def test_a_missing_part_of_a_split_set_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a-00001-of-00002.gguf")
    with pytest.raises(ModelError, match=r"a-00002-of-00002.gguf does not exist"):
        obtain(model(tmp_path, MODEL_NAME="a-00001-of-00002.gguf"))


def test_a_missing_file_names_what_there_is(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / f"m{number}.gguf")
    with pytest.raises(ModelError, match=r"mm.gguf does not exist \(.* has m0.gguf, .*m7.gguf, …\)"):
        obtain(model(tmp_path, MODEL_NAME="mm.gguf"))


def test_the_setting_that_leads_to_no_model_is_named(tmp_path: Path) -> None:
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


def test_a_missing_folder_is_no_second_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist$"):
        obtain(model(tmp_path, MODEL_NAME="m.gguf", MODELS_DIR=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"GGU", "is not a GGUF file"),
        (b"\x80\x02}q\x00" * 20, "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
    ],
)
def test_what_is_no_gguf_is_refused_by_its_magic(tmp_path: Path, content: bytes, words: str) -> None:
    write(tmp_path / "m.gguf", content)
    with pytest.raises(ModelError, match=words):
        obtain(model(tmp_path, MODEL_NAME="m.gguf"))


def test_a_folder_or_an_unreadable_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        obtain(model(tmp_path, MODEL_PATH=str(tmp_path)))
    write(tmp_path / "file")
    with pytest.raises(ModelError, match="cannot be read: Not a directory"):
        obtain(model(tmp_path, MODEL_PATH=str(tmp_path / "file" / "m.gguf")))


# Fetched


def test_a_download_gets_its_name_only_when_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serve(Shelf(GGUF)) as url:
        found = obtain(model(tmp_path / "new", MODEL_URL=f"{url}/m.gguf?token=hush", MODEL_SHA256=SHA256.upper()))
    assert found.path.read_bytes() == GGUF
    assert sorted(path.name for path in found.path.parent.iterdir()) == [".m.gguf.verified", "m.gguf"]
    assert "hush" not in caplog.text


def test_a_file_that_is_there_is_not_fetched(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    shelf = Shelf(b"GGUF another")
    with serve(shelf) as url:
        obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"))
    assert shelf.seen == []


def test_a_cut_download_is_resumed_where_it_broke_off(tmp_path: Path) -> None:
    shelf, slept = Shelf(GGUF, cuts=[1000, 2000]), []
    with serve(shelf) as url:
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"), fetcher(slept))
    assert found.path.read_bytes() == GGUF
    assert shelf.seen == ["", "bytes=1000-", "bytes=3000-"]
    assert slept == [1.0, 1.0]


def test_the_next_boot_resumes_what_the_last_one_left(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf.part", GGUF[:5000])
    shelf = Shelf(GGUF)
    with serve(shelf) as url:
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf", MODEL_SHA256=SHA256))
    assert shelf.seen == ["bytes=5000-"]
    assert found.path.read_bytes() == GGUF


def test_a_part_that_was_whole_already_is_only_renamed(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf.part")
    shelf = Shelf(GGUF)
    with serve(shelf) as url:
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"))
    assert (shelf.seen, found.size_bytes) == ([f"bytes={len(GGUF)}-"], len(GGUF))


def test_a_part_that_is_longer_than_the_file_is_forgotten(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf.part", GGUF + b"more")
    with serve(Shelf(GGUF)) as url:
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"), fetcher([]))
    assert found.path.read_bytes() == GGUF


@pytest.mark.parametrize("etag", ['"two"', ""])
def test_halves_of_two_versions_are_never_joined(tmp_path: Path, etag: str) -> None:
    new = b"GGUF" + GGUF[::-1] + b"and more"
    slept: list[float] = []
    shelf = Shelf(GGUF, cuts=[1000, *[0] * 9], etag='"one"' if etag else "")
    with serve(shelf) as url:
        with pytest.raises(ModelError, match="will be resumed"):
            obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"), fetcher(slept))
        shelf.content, shelf.etag, shelf.cuts = new, etag, []
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"), fetcher(slept))
    assert found.path.read_bytes() == new


def test_another_urls_part_is_not_resumed(tmp_path: Path) -> None:
    shelf = Shelf(GGUF, cuts=[1000, *[0] * 9])
    with serve(shelf) as url:
        with pytest.raises(ModelError):
            obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_URL=f"{url}/one.gguf"), fetcher([]))
        shelf.cuts.clear()
        shelf.seen.clear()
        obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_URL=f"{url}/two.gguf"), fetcher([]))
    assert shelf.seen == [""]


def test_a_server_without_ranges_sends_it_all_again(tmp_path: Path) -> None:
    shelf = Shelf(GGUF, cuts=[1000], ranges=False)
    with serve(shelf) as url:
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"), fetcher([]))
    assert found.path.read_bytes() == GGUF


def test_a_chunked_answer_is_whole_only_with_its_last_chunk(tmp_path: Path) -> None:
    shelf = Shelf(GGUF, chunked=True, cuts=[1000], ranges=False)
    with serve(shelf) as url:
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"), fetcher([]))
    assert found.path.read_bytes() == GGUF
    assert len(shelf.seen) == 2


def test_a_length_that_nobody_tells_needs_the_digest(tmp_path: Path) -> None:
    with serve(Shelf(GGUF, sized=False)) as url:
        with pytest.raises(ModelError, match="set MODEL_SHA256"):
            obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"))
        assert obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf", MODEL_SHA256=SHA256)).size_bytes == len(GGUF)


def test_a_wrong_digest_leaves_nothing_to_load_or_to_resume(tmp_path: Path) -> None:
    with serve(Shelf(GGUF)) as url, pytest.raises(ModelError, match=f"{SHA256}, MODEL_SHA256 says {'0' * 64}"):
        obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf", MODEL_SHA256="0" * 64))
    assert list(tmp_path.iterdir()) == []


def test_a_web_page_is_not_downloaded_to_its_end(tmp_path: Path) -> None:
    with serve(Shelf(b"<html>please log in</html>")) as url, pytest.raises(ModelError, match="gives is a web page"):
        obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rest", [b"<ht", b"GG"])
def test_a_part_that_is_no_gguf_is_removed(tmp_path: Path, rest: bytes) -> None:
    write(tmp_path / "m.gguf.part", rest)
    with serve(Shelf(rest + b"UX any")) as url, pytest.raises(ModelError, match=r"what was fetched for m.gguf is"):
        obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final(tmp_path: Path, status: int) -> None:
    shelf = Shelf(GGUF, statuses=[status])
    with serve(shelf) as url, pytest.raises(ModelError, match=f"HTTP status {status}"):
        obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"))
    assert len(shelf.seen) == 1


def test_an_overloaded_server_is_asked_again(tmp_path: Path) -> None:
    shelf, slept = Shelf(GGUF, statuses=[503, 429]), []
    with serve(shelf) as url:
        assert obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"), fetcher(slept)).size_bytes == len(GGUF)
    assert slept == [0.5, 1.0]


def test_nobody_there_is_told_after_three_tries(tmp_path: Path) -> None:
    slept: list[float] = []
    with pytest.raises(ModelError, match=r"cannot be fetched: .*refused"):
        obtain(model(tmp_path, MODEL_URL=f"http://127.0.0.1:{free_port()}/m.gguf"), fetcher(slept))
    assert slept == [0.5, 1.0]


def test_a_wrong_range_is_not_appended(tmp_path: Path) -> None:
    part = write(tmp_path / "m.part", GGUF[:100])
    download = Download("http://127.0.0.1:1/x", part, digest_known=True)
    response = type("Response", (), {"status": 206, "headers": {"Content-Range": "bytes 7-9/10"}})()
    with pytest.raises(model_download.Interrupted, match="another range"):
        download._start(response, 100)
    assert not part.exists()


def test_a_disk_that_is_too_small_is_told_before_it_is_full(tmp_path: Path) -> None:
    download = Download("http://127.0.0.1:1/x", tmp_path / "m.part", digest_known=True)
    with pytest.raises(ModelError, match="free, the download needs"):
        download._check_room(1 << 60, 0)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    write(tmp_path / "file")
    with pytest.raises(ModelError, match="cannot be written"):
        obtain(model(tmp_path, MODELS_DIR=str(tmp_path / "file" / "models"), MODEL_URL="https://x.example/m.gguf"))


def test_a_part_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.gguf.part").mkdir()
    with serve(Shelf(GGUF)) as url, pytest.raises(ModelError, match=r"m.gguf.part cannot be written: Is a directory"):
        obtain(model(tmp_path, MODEL_URL=f"{url}/m.gguf"))


def test_a_redirect_is_followed_without_the_credentials(tmp_path: Path) -> None:
    shelf = Shelf(GGUF)
    other = Shelf(GGUF)
    with serve(other) as there, serve(shelf) as url:
        shelf.redirect = f"{there}/moved.gguf"
        obtain(model(tmp_path, MODEL_URL=f"{url.replace('//', '//me:secret@')}/m.gguf"))
    assert shelf.fields_seen[0]["Authorization"] == "Basic bWU6c2VjcmV0"
    assert "Authorization" not in other.fields_seen[0]


def test_a_redirect_from_https_to_plain_http_needs_the_digest() -> None:
    import urllib.request

    request = urllib.request.Request("https://x.example/m.gguf")
    arguments = (request, None, 302, "Found", {}, "http://y.example/m.gguf")
    with pytest.raises(ModelError, match="redirects to plain http"):
        model_download._Redirects(False).redirect_request(*arguments)  # type: ignore[arg-type]
    assert model_download._Redirects(True).redirect_request(*arguments) is not None  # type: ignore[arg-type]


def test_a_split_set_is_fetched_part_by_part(tmp_path: Path) -> None:
    parts = {f"m-0000{number}-of-00003.gguf": GGUF + bytes([number]) for number in (1, 2, 3)}
    write(tmp_path / "m-00002-of-00003.gguf", parts["m-00002-of-00003.gguf"])
    digest = hashlib.sha256(b"".join(parts.values())).hexdigest()
    shelf = Shelf(files=parts)
    with serve(shelf) as url:
        found = obtain(model(tmp_path, MODEL_URL=f"{url}/m-00001-of-00003.gguf?x=1", MODEL_SHA256=digest))
    assert found.size_bytes == 3 * len(GGUF) + 3
    assert len(shelf.seen) == 2
    assert {path.name: path.read_bytes() for path in parts_of(found.path)} == parts


def test_a_split_set_keeps_its_numbers_in_the_local_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not split alike"):
        obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_URL="https://x.example/m-00001-of-00003.gguf"))


# Verified


def test_a_file_that_was_there_is_verified_once(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_SHA256=SHA256))
    note = tmp_path / ".m.gguf.verified"
    assert json.loads(note.read_text())[0] == SHA256
    path.write_bytes(GGUF[:-1] + b"!")
    with pytest.raises(ModelError, match="MODEL_SHA256 says"):
        obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_SHA256=SHA256))
    assert path.exists()


def test_a_volume_that_takes_no_note_is_no_reason_to_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path / "m.gguf")
    (tmp_path / ".m.gguf.verified").mkdir()
    obtain(model(tmp_path, MODEL_NAME="m.gguf", MODEL_SHA256=SHA256))
    assert "the next boot verifies the model again" in caplog.text


# Waiting, progress, words


def test_two_workers_on_one_volume_fetch_once(tmp_path: Path) -> None:
    """The second waits for the lock, then finds the file."""
    shelf = Shelf(GGUF)
    with serve(shelf) as url, model_download.sole_writer(tmp_path / "m.gguf.part"):
        (tmp_path / "result").touch()
        environ = {**FOR_COVERAGE, "PATH": os.environ["PATH"], "DATA_DIR": str(tmp_path), "MODELS_DIR": str(tmp_path)}
        worker = subprocess.Popen(
            [sys.executable, model_files.__file__, str(tmp_path / "result")],
            env={**environ, "MODEL_URL": f"{url}/m.gguf"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert worker.stdout is not None
        assert "another worker is fetching m.gguf.part" in worker.stdout.readline()
        write(tmp_path / "m.gguf")
    with worker:
        worker.stdout.read()
        assert worker.wait(10) == 0
    assert shelf.seen == []
    assert json.loads((tmp_path / "result").read_text()) == {"path": str(tmp_path / "m.gguf"), "bytes": len(GGUF)}


def test_a_volume_without_locks_is_written_to_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (tmp_path / "file").open("wb") as file:
        # A descriptor that no lock can be had on, as on some network volumes.
        with os.fdopen(os.open(tmp_path / "file", os.O_PATH), "rb") as no_locks:
            assert model_download._lock(no_locks)
        assert "the models' volume has no file locks" in caplog.text
        assert model_download._lock(file)


def test_a_lock_on_a_removed_file_keeps_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / ".m.part.lock"
    with path.open("wb") as file:
        path.unlink()
        assert not model_download._still_there(file, path)


def test_progress_is_told_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ticks = iter(range(0, 1000, 4))
    content = GGUF + bytes(1 << 20)
    with serve(Shelf(content)) as url:
        Download(f"{url}/m.gguf", tmp_path / "m.part", digest_known=False, clock=lambda: next(ticks)).run()
    assert "downloaded 524 KB of 1.06 MB (49 %), 65.5 KB/s, 8 s left" in caplog.text
    assert model_download.progress(5_000_000_000, None, 250) == "downloaded 5.000 GB, 250 B/s"
    assert model_download.progress(0, 150_000_000_000, 0) == "downloaded 0 B of 150 GB (0 %), 0 B/s"


def test_a_urls_secrets_are_not_shown() -> None:
    assert model_download.shown("https://me:pw@x.example/a/m.gguf?sig=1#f") == "https://x.example/a/m.gguf"


def test_what_neither_side_tells_cannot_differ() -> None:
    assert Origin("u", "", 5).resumes(Origin("u", '"e"', None))
    assert not Origin("u", '"d"', 5).resumes(Origin("u", '"e"', 5))
    assert not Origin("u", "", 5).resumes(Origin("u", "", 6))
    assert not Origin("u", "", 5).resumes(Origin("v", "", 5))


# The process and the GPU


def run(tmp_path: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    env = {**FOR_COVERAGE, "PATH": os.environ["PATH"], "DATA_DIR": str(tmp_path), **environ}
    argv = [sys.executable, model_files.__file__, str(tmp_path / "result")]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30, check=False)


def test_the_process_says_one_thing_and_ends_with_3(tmp_path: Path) -> None:
    done = run(tmp_path, MODEL_NAME="none.gguf")
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 1
    assert "none.gguf does not exist" in done.stdout
    assert done.stderr == ""
    assert not (tmp_path / "result").exists()


def test_a_model_larger_than_the_free_memory_is_a_warning(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 1\n")
    smi.chmod(0o755)
    with write(tmp_path / "m.gguf").open("ab") as file:
        file.truncate(3 << 20)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(tmp_path, MODEL_PATH=str(tmp_path / "m.gguf"), PATH=path)
    assert "the model has 3.15 MB, the GPU 1.05 MB free" in done.stdout
    assert "WARNING" in done.stdout
    assert done.returncode == 0
    assert "the GPU" not in run(tmp_path, MODEL_PATH=str(tmp_path / "m.gguf"), PATH=path, NGL="0").stdout


def answers(**tools: str) -> gpu.Run:
    return lambda argv: tools.get(argv[0].replace("-", "_"), "")


@pytest.mark.parametrize(
    ("nvidia", "rocm", "free_bytes"),
    [
        ("", "", None),
        ("81000\n 40000\n", "", 121000 << 20),
        ("[N/A]\n5\n", "", 5 << 20),
        ("No devices were found\n", "", None),
        ("", '{"card0": {"VRAM Total Memory (B)": "100", "VRAM Total Used Memory (B)": "30"}, "system": {}}', 70),
        ("", '{"system": {}}', None),
        ("", '{"card0": {"VRAM Total Memory (B)": "x", "VRAM Total Used Memory (B)": "30"}}', None),
        ("", "[1]", None),
    ],
)
def test_free_memory_is_summed_over_the_cards(nvidia: str, rocm: str, free_bytes: int | None) -> None:
    assert gpu.free_vram_bytes(answers(nvidia_smi=nvidia, rocm_smi=rocm)) == free_bytes
