"""Which file is the model: found where the settings say, or fetched there whole, verified, and then given its name.

    python3 model_files.py RESULT     writes {"path": …, "bytes": …} to the file RESULT; exit status 0, or 3

It is a process of its own, since files on a network volume and downloads take as long as they like while the supervisor
must answer signals. A MODEL_HF model is llama-server's own business and does not come here.
"""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import gpu
import logs
from config import Model, load_config
from llama import NO_MODEL
from model_download import Download, ModelError, human, magic_complaint, shown, sole_writer

EXIT_NO_MODEL = 3
SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>[0-9]{5})-of-(?P<parts>[0-9]{5})\.gguf")
SHOWN_NAMES = 8

log = logging.getLogger(__name__)
Fetch = Callable[[str, Path, bool], None]


@dataclass(frozen=True)
class Found:
    """A model that may be loaded: its (first) file, and the size of all its files."""

    path: Path
    size_bytes: int


def place(model: Model) -> Path:
    """Tell where the model's (first) file lies or will lie. Raises ModelError where no setting says."""
    if model.path:
        return Path(model.path)
    if model.name:
        return _named(model.dir, model.name)
    if model.url:
        return model.dir / _url_name(model.url)
    raise ModelError(NO_MODEL)


def _setting(model: Model) -> str:
    """The setting that says where the file lies."""
    return "MODEL_PATH" if model.path else "MODEL_NAME" if model.name else "MODEL_URL"


def _named(folder: Path, name: str) -> Path:
    path = folder / name
    suffixed = folder / f"{name}.gguf"
    return suffixed if not path.exists() and suffixed.exists() else path


def _url_name(url: str) -> str:
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not name or name.startswith(".") or "/" in name or not name.isprintable():
        raise ModelError(f"{shown(url)} does not end in a file name: set MODEL_NAME too")
    return name


def parts_of(first: Path) -> list[Path]:
    """The files of a split set, in order, by its first; the one file where the model is not split."""
    match = SPLIT.fullmatch(first.name)
    if match is None:
        return [first]
    if int(match["part"]) != 1:
        first_name = f"{match['stem']}-00001-of-{match['parts']}.gguf"
        raise ModelError(f"{first} is not the first part of its set: name {first_name}")
    numbers = range(1, int(match["parts"]) + 1)
    return [first.with_name(f"{match['stem']}-{number:05}-of-{match['parts']}.gguf") for number in numbers]


# Found


def obtain(model: Model, fetch: Fetch | None = None) -> Found:
    """Find the model, or fetch it. Raises ModelError with the one message that says why there is none."""
    first = place(model)
    if model.url and not _all_there(first):
        _fetch_set(model, first, fetch or _download)
    try:
        found = examine(first, model.dir)
    except ModelError as error:
        raise ModelError(f"{_setting(model)}: {error}") from None
    if model.sha256:
        _verify_once(first, model.sha256)
    return found


def _all_there(first: Path) -> bool:
    return all(path.exists() for path in parts_of(first))


def examine(first: Path, models_dir: Path) -> Found:
    """Look at a model's files: all there, readable, and GGUF by their magic."""
    size_bytes = 0
    for path in parts_of(first):
        try:
            with path.open("rb") as file:
                complaint = magic_complaint(file.read(64))
                size_bytes += file.seek(0, os.SEEK_END)
        except FileNotFoundError:
            raise ModelError(f"{path} does not exist{_others(models_dir)}") from None
        except IsADirectoryError:
            raise ModelError(f"{path} is a folder, not a model's file") from None
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from None
        if complaint:
            raise ModelError(f"{path} {complaint}")
    return Found(first, size_bytes)


def _others(folder: Path) -> str:
    """Name what MODELS_DIR does have: most wrong names are near misses."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    except OSError:
        return ""
    more = ", …" if len(names) > SHOWN_NAMES else ""
    return f" ({folder} has {', '.join(names[:SHOWN_NAMES])}{more})" if names else ""


# Fetched


def _download(url: str, part: Path, digest_known: bool) -> None:
    Download(url, part, digest_known=digest_known).run()


def _fetch_set(model: Model, first: Path, fetch: Fetch) -> None:
    """Fetch what is not there yet of a set, then verify, then rename; the first part last, as it stands for all."""
    assert model.url
    urls = _part_urls(model.url, first)
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(_part(first)):
            for url, path in zip(urls, parts_of(first), strict=True):
                if not path.exists():
                    log.info("fetching %s to %s", shown(url), path)
                    fetch(url, _part(path), model.sha256 is not None)
            _settle(first, model.sha256)
    except OSError as error:
        raise ModelError(f"{first.parent} cannot be written: {error.strerror}") from None


def _settle(first: Path, sha256: str | None) -> None:
    """Give what was fetched its name, if it is what it should be; else remove it, since a resume would not mend it."""
    paths = parts_of(first)
    files = [path if path.exists() else _part(path) for path in paths]
    try:
        for file in files:
            with file.open("rb") as opened:
                if complaint := magic_complaint(opened.read(64)):
                    raise ModelError(f"what was fetched for {first.name} {complaint}")
        if sha256:
            _compare(files, sha256, f"what was fetched for {first.name}")
    except ModelError:
        for path in paths:
            _part(path).unlink(missing_ok=True)
        raise
    for file, path in reversed(list(zip(files, paths, strict=True))):
        if file != path:
            file.replace(path)
    if sha256:
        _remember(first, sha256)
    log.info("fetched %s", first)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _part_urls(url: str, first: Path) -> list[str]:
    """The URLs of a set's parts. The local name must be split alike, as llama-server finds the others by it."""
    there, here = SPLIT.fullmatch(_url_name(url)), SPLIT.fullmatch(first.name)
    if (there and (there["part"], there["parts"])) != (here and (here["part"], here["parts"])):
        raise ModelError(f"{first.name} and {shown(url)} are not split alike: both names need the same -00001-of-0000N")
    if there is None:
        return [url]
    of = f"-of-{there['parts']}.gguf"
    head, _, tail = url.rpartition(f"-00001{of}")
    return [f"{head}-{number:05}{of}{tail}" for number in range(1, int(there["parts"]) + 1)]


# Verified


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of the files one after the other, as `cat FILES | sha256sum` has it."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


def _compare(files: list[Path], sha256: str, what: str) -> None:
    log.info("verifying %s", ", ".join(path.name for path in files))
    actual = digest(files)
    if actual != sha256.lower():
        raise ModelError(f"{what} has the SHA-256 {actual}, MODEL_SHA256 says {sha256.lower()}")


def _verify_once(first: Path, sha256: str) -> None:
    """Verify a file that was there already, unless this very file has been verified before."""
    if not _remembered(first, sha256):
        _compare(parts_of(first), sha256, str(first))
        _remember(first, sha256)


def _note(first: Path) -> Path:
    return first.with_name(f".{first.name}.verified")


def _fingerprint(first: Path, sha256: str) -> str:
    stats = [path.stat() for path in parts_of(first)]
    return json.dumps([sha256.lower(), [[stat.st_size, stat.st_mtime_ns] for stat in stats]])


def _remembered(first: Path, sha256: str) -> bool:
    try:
        return _note(first).read_text() == _fingerprint(first, sha256)
    except (OSError, ValueError):
        return False


def _remember(first: Path, sha256: str) -> None:
    """Spare the next boot the reading of many GB; a read-only volume cannot be noted on, and is verified each time."""
    try:
        _note(first).write_text(_fingerprint(first, sha256))
    except OSError as error:
        log.info("%s cannot be written (%s): the next boot verifies the model again", _note(first), error.strerror)


# The process


def warn_of_vram(found: Found, free_bytes: int | None) -> None:
    """A model that does not fit may still run, slowly or with fewer layers: a warning, not a refusal."""
    if free_bytes is not None and found.size_bytes > free_bytes:
        size, free = human(found.size_bytes), human(free_bytes)
        log.warning("the model has %s, the GPU %s free: llama-server may fail or be slow; lower NGL or CTX", size, free)


def main(argv: list[str] | None = None) -> int:
    result = Path((sys.argv[1:] if argv is None else argv)[0])
    config = load_config(os.environ)
    logs.setup("supervisor", config.log.level, config.log.format)
    try:
        found = obtain(config.model)
    except ModelError as error:
        log.error("%s", error)
        return EXIT_NO_MODEL
    if config.model.ngl:
        warn_of_vram(found, gpu.free_vram_bytes())
    result.write_text(json.dumps({"path": str(found.path), "bytes": found.size_bytes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
