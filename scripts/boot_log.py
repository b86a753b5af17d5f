"""llama-server's output: one file a boot with `latest` linked and old ones pruned; whole lines out of torn chunks."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

KEPT_FILES = 10
LINE_BYTES = 65536
LINK = "latest"
_NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z_server_.+\.log")


class BootLog:
    """The file of this boot. A full disk silences the file, not the server: `write` never raises."""

    def __init__(self, folder: Path, instance_id: str, started_at: datetime) -> None:
        """Make folder and file; raises OSError where that is not possible. `started_at` is aware UTC."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{started_at:%Y%m%dT%H%M%SZ}_server_{instance_id}.log"
        self._fd: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        # A volume without symbolic links is no reason not to serve.
        with suppress(OSError):
            _link(folder, self.path.name)
            _prune(folder, keep=self.path)

    def write(self, data: bytes) -> None:
        if self._fd is not None:
            with suppress(OSError):
                os.write(self._fd, data)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _link(folder: Path, name: str) -> None:
    """Point `latest` at a file of the same folder, in one step, so that it never points nowhere."""
    new = folder / f".{LINK}.{os.getpid()}"
    with suppress(FileNotFoundError):
        new.unlink()
    new.symlink_to(name)
    new.replace(folder / LINK)


def _prune(folder: Path, keep: Path) -> None:
    """Remove all but the newest; names sort by time. Files of other names are not ours to remove."""
    files = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path != keep)
    for path in files[: max(0, len(files) - KEPT_FILES + 1)]:
        path.unlink(missing_ok=True)


class Lines:
    """Cuts a byte stream into lines; what has no end for LINE_BYTES is passed on in pieces."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *whole, rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._tell(line)
        while len(rest) > LINE_BYTES:
            self._tell(rest[:LINE_BYTES])
            rest = rest[LINE_BYTES:]
        self._rest = rest

    def end(self) -> None:
        if self._rest:
            self._tell(self._rest)
        self._rest = b""

    def _tell(self, line: bytes) -> None:
        text = line.removesuffix(b"\r").decode(errors="replace")
        if text:
            self._take(text)
