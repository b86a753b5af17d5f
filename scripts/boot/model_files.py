"""Which file is the model: found at the configured path, or downloaded there, verified, and only then renamed.

It runs in a process of its own (supervisor.py --find-model): downloads and files on a network volume may block for any
time, while the supervisor must handle signals. A MODEL_HF model does not come here, since llama-server downloads it.
Most starts download nothing, and HTTP is slow to import: so only what downloads imports `model_download`.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from boot.model_errors import LOCAL_ERRORS, NO_MODEL_MESSAGE, ModelError, ModelUnavailable, magic_complaint, redact
from boot.transfer import FetchLimits
from config.loader import load_config
from config.settings import Config, ModelSettings
from core import logs

SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>[0-9]{5})-of-(?P<parts>[0-9]{5})\.gguf")
MAX_LISTED_NAMES = 8

log = logging.getLogger(__name__)
Fetch = Callable[[str, Path, bool], None]


class FoundModel(NamedTuple):
    """A model that can be loaded: its (first) file, and the size of all its files."""

    path: Path
    size_bytes: int


def locate(model: ModelSettings) -> Path:
    """Return the path of the model's (first) file, which may not exist. Raises ModelError if no setting names it."""
    if model.path:
        return Path(model.path)
    if model.name:
        return _by_name(model.dir, model.name)
    if model.url:
        return model.dir / _name_in_url(model.url)
    raise ModelError(NO_MODEL_MESSAGE)


def _setting(model: ModelSettings) -> str:
    """Return the name of the setting that `locate` follows."""
    return "MODEL_PATH" if model.path else "MODEL_NAME" if model.name else "MODEL_URL"


def _by_name(folder: Path, name: str) -> Path:
    path = folder / name
    suffixed = folder / f"{name}.gguf"
    return suffixed if not path.exists() and suffixed.exists() else path


def _name_in_url(url: str) -> str:
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not name or name.startswith(".") or "/" in name or not name.isprintable():
        raise ModelError(f"{redact(url)} does not end in a file name: set MODEL_NAME too")
    return name


def parts_of(first: Path) -> list[Path]:
    """Return a split set's files in order, given its first file; the file itself if it is not split."""
    match = SPLIT.fullmatch(first.name)
    if match is None:
        return [first]
    if int(match["part"]) != 1:
        first_name = f"{match['stem']}-00001-of-{match['parts']}.gguf"
        raise ModelError(f"{first} is not the first part of its set: name {first_name}")
    numbers = range(1, int(match["parts"]) + 1)
    return [first.with_name(f"{match['stem']}-{number:05}-of-{match['parts']}.gguf") for number in numbers]


# Find


def obtain(model: ModelSettings, fetch: Fetch | None = None) -> FoundModel:
    """Find the model, or download it. Raises ModelError. `fetch` is a parameter for tests."""
    first = locate(model)
    if model.url and not _all_exist(first):
        _fetch_set(model, first, fetch or _downloader(model))
    return _examine_and_verify(model, first)


def check(model: ModelSettings) -> None:
    """Check that `obtain` would find the model, or could begin to download it. Raises ModelError."""
    from boot.model_download import Download

    first = locate(model)
    if model.url and not _all_exist(first):
        for url, path in zip(_part_urls(model.url, first), parts_of(first), strict=True):
            if not _is_complete(path):
                Download(url, _part(path), _limits(model), digest_known=model.sha256 is not None).check()
    else:
        _examine_and_verify(model, first)


def folder(model: ModelSettings) -> Path | None:
    """Return the folder to which `obtain` would download the model; None if it downloads nothing. Raises ModelError."""
    first = locate(model)
    return first.parent if model.url and not _all_exist(first) else None


def _examine_and_verify(model: ModelSettings, first: Path) -> FoundModel:
    try:
        found = examine(first, model.dir)
    except ModelError as error:
        raise type(error)(f"{_setting(model)}: {error}") from None
    if model.sha256:
        _verify_once(first, model.sha256)
    return found


def _all_exist(first: Path) -> bool:
    return all(_is_complete(path) for path in parts_of(first))


def _is_complete(path: Path) -> bool:
    """Return whether a file exists whole. It does not while its .part is copied, on a volume that cannot rename."""
    part = _part(path)
    return path.exists() and not (part.exists() and part.stat().st_size > path.stat().st_size)


def examine(first: Path, models_dir: Path) -> FoundModel:
    """Check that a model's files exist, can be read and begin with the GGUF magic. Raises ModelError."""
    size_bytes = 0
    for path in parts_of(first):
        try:
            with path.open("rb") as file:
                complaint = magic_complaint(file.read(64))
                size_bytes += file.seek(0, os.SEEK_END)
        except FileNotFoundError:
            raise ModelError(f"{path} does not exist{_available(models_dir)}") from None
        except IsADirectoryError:
            raise ModelError(f"{path} is a folder, not a model file") from None
        except OSError as error:
            lasting = error.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR)
            raise (ModelError if lasting else ModelUnavailable)(f"{path} cannot be read: {error.strerror}") from None
        if complaint:
            raise ModelError(f"{path} {complaint}")
    return FoundModel(first, size_bytes)


def _available(folder: Path) -> str:
    """Name the models in MODELS_DIR: most wrong names are near misses."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    except OSError:
        return ""
    more = ", …" if len(names) > MAX_LISTED_NAMES else ""
    return f" ({folder} contains {', '.join(names[:MAX_LISTED_NAMES])}{more})" if names else ""


# Download


def _limits(model: ModelSettings) -> FetchLimits:
    return FetchLimits(model.fetch_timeout_s, model.fetch_min_rate, model.hf_token)


def _downloader(model: ModelSettings) -> Fetch:
    from boot.model_download import Download

    limits = _limits(model)
    return lambda url, part, digest_known: Download(url, part, limits, digest_known=digest_known).run()


def _fetch_set(model: ModelSettings, first: Path, fetch: Fetch) -> None:
    """Download the missing files of a set, verify them, then rename them."""
    from boot.model_download import sole_writer

    assert model.url
    urls = _part_urls(model.url, first)
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(_part(first)):
            for url, path in zip(urls, parts_of(first), strict=True):
                if not _is_complete(path):
                    log.info("fetching %s to %s", redact(url), path)
                    fetch(url, _part(path), model.sha256 is not None)
            _verify_and_rename(first, model.sha256)
    except OSError as error:
        raise ModelError(f"{first.parent} cannot be written: {error.strerror}") from None


def _verify_and_rename(first: Path, sha256: str | None) -> None:
    """Verify the downloaded files and give them their names; remove wrong ones, since a resume would not repair them.

    The first file is renamed last: it stands for the whole set.
    """
    paths = parts_of(first)
    files = [path if _is_complete(path) else _part(path) for path in paths]
    try:
        for file in files:
            with file.open("rb") as opened:
                if complaint := magic_complaint(opened.read(64)):
                    raise ModelError(f"the download for {first.name} {complaint}")
        if sha256:
            _compare(files, sha256, f"the download for {first.name}")
    except ModelError:
        for path in paths:
            _part(path).unlink(missing_ok=True)
        raise
    for file, path in reversed(list(zip(files, paths, strict=True))):
        if file != path:
            _rename(file, path)
    if sha256:
        _record_verified(first, sha256)
    log.info("fetched %s", first)


def _rename(part: Path, path: Path) -> None:
    """Rename a complete .part, or copy it on a volume that cannot rename. Raises OSError."""
    try:
        part.replace(path)
    except OSError as error:
        if error.errno in LOCAL_ERRORS:
            raise
        reason = f"cannot rename files ({error.strerror})"
        log.warning("the models' volume %s: copying %s, which other programs see incomplete until then", reason, path)
        shutil.copyfile(part, path)
        part.unlink()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _part_urls(url: str, first: Path) -> list[str]:
    """Return the URLs of a set's files. The local name must have the same numbers, by which llama-server finds them."""
    remote, local = SPLIT.fullmatch(_name_in_url(url)), SPLIT.fullmatch(first.name)
    if (remote and (remote["part"], remote["parts"])) != (local and (local["part"], local["parts"])):
        raise ModelError(
            f"{first.name} and {redact(url)} are not split alike: both names need the same -00001-of-0000N"
        )
    if remote is None:
        return [url]
    of = f"-of-{remote['parts']}.gguf"
    head, _, tail = url.rpartition(f"-00001{of}")
    return [f"{head}-{number:05}{of}{tail}" for number in range(1, int(remote["parts"]) + 1)]


# Verify


def digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of the files one after the other, as `cat FILES | sha256sum` prints it."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


def _compare(files: list[Path], sha256: str, subject: str) -> None:
    log.info("verifying %s", ", ".join(path.name for path in files))
    actual = digest(files)
    if actual != sha256.lower():
        raise ModelError(f"{subject} has the SHA-256 {actual}, MODEL_SHA256 is {sha256.lower()}")


def _verify_once(first: Path, sha256: str) -> None:
    """Verify a file that existed before this boot, unless this very file has been verified before."""
    if not _was_verified(first, sha256):
        _compare(parts_of(first), sha256, str(first))
        _record_verified(first, sha256)


def _record_file(first: Path) -> Path:
    return first.with_name(f".{first.name}.verified")


def _fingerprint(first: Path, sha256: str) -> str:
    stats = [path.stat() for path in parts_of(first)]
    return json.dumps([sha256.lower(), [[stat.st_size, stat.st_mtime_ns] for stat in stats]])


def _was_verified(first: Path, sha256: str) -> bool:
    try:
        return _record_file(first).read_text() == _fingerprint(first, sha256)
    except (OSError, ValueError):
        return False


def _record_verified(first: Path, sha256: str) -> None:
    """Record the verification, which the next boot can then skip. On a read-only volume every boot verifies."""
    record = _record_file(first)
    try:
        record.write_text(_fingerprint(first, sha256))
    except OSError as error:
        log.info("%s cannot be written (%s): the next boot verifies the model again", record, error.strerror)


# The process


def main(result: Path) -> int:
    """Write `{"path": …, "bytes": …}` to the file `result`; return the exit status: 0, or why there is none.

    A router's models have no one path: it is null, and the bytes are those of the largest that are loaded at once.
    """
    config = load_config(os.environ)
    logs.setup("supervisor", config.log.level, config.log.format)
    try:
        if config.router.enabled:
            path, size_bytes = None, _find_all(config)
        else:
            found = obtain(config.model)
            path, size_bytes = str(found.path), found.size_bytes
    except ModelError as error:
        log.error("error: %s", error)
        return error.exit_status
    result.write_text(json.dumps({"path": path, "bytes": size_bytes}))
    return 0


def _find_all(config: Config) -> int:
    """Log the models of a router; return the size of the largest that are loaded at once. Raises ModelError."""
    from boot.router_models import find_models  # it imports this module

    found = find_models(config, os.environ)
    for warning in found.warnings:
        log.warning("%s", warning)
    log.info("models: %s", ", ".join(model.name for model in found.models) or "those downloaded before")
    return found.largest_bytes(config.router.max_loaded)
