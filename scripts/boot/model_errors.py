"""Why there is no model to load: the errors with their exit statuses, and what is wrong with a file's first bytes."""

import errno
from urllib.parse import urlsplit, urlunsplit

from boot.shutdown import EXIT_MODEL_UNAVAILABLE, EXIT_NO_MODEL

MAGIC = b"GGUF"
NO_MODEL_MESSAGE = "no model is set: set MODEL_PATH, MODEL_NAME, MODEL_URL or MODEL_HF (or MOCK_BACKEND=true)"
# Of the local disk: no later attempt helps.
LOCAL_ERRORS = frozenset({errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EISDIR, errno.ENOSPC, errno.EROFS})


class ModelError(Exception):
    """There is no model to load. The message is the one line that gives the reason; `exit_status` is the process's."""

    exit_status = EXIT_NO_MODEL


class ModelUnavailable(ModelError):
    """There is no model to load, for a reason that may pass: another start may find it."""

    exit_status = EXIT_MODEL_UNAVAILABLE


def magic_complaint(head: bytes) -> str | None:
    """Return why these first bytes are not a GGUF file's, as a sentence without its subject; None if they are."""
    if head.startswith(MAGIC):
        return None
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself (fetch it with git lfs pull)"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not a GGUF file"
    return "is not a GGUF file (its first four bytes are not GGUF)" if head else "is empty"


def redact(url: str) -> str:
    """Return the part of a URL that may be logged: without user, password and query (which may be a signature)."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
