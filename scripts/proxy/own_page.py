"""The gateway's own pages, files of scripts/pages/: each is whole in itself, and may run what it contains only."""

import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from core.errors import Fields
from core.installation import page
from policy.prepared_request import PreparedRequest
from proxy.response import Response

# What every page says, llama-server's too: it is in no frame, and is what its type says.
GUARDS: Fields = (
    (b"X-Content-Type-Options", b"nosniff"),
    (b"X-Frame-Options", b"DENY"),
    (b"Referrer-Policy", b"no-referrer"),
    (b"Cross-Origin-Resource-Policy", b"same-origin"),
)
_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
_STYLE = re.compile(rb"<style>(.*?)</style>", re.DOTALL)
_KEYS = b'data-keys="needed"'


@dataclass(frozen=True, slots=True)
class OwnPage:
    """One page. `fields` say what it may do, and that it must not be kept."""

    content: bytes
    fields: Fields

    def send(self, response: Response, prepared: PreparedRequest, status: int = 200, fields: Fields = ()) -> None:
        """Answer a request with it. `fields` are further ones."""
        response.begin(status, len(self.content), self.fields + fields)
        if prepared.method != b"HEAD":
            response.write(self.content)


def own_page(name: str, read: Callable[[str], bytes] = page) -> OwnPage:
    """Read a page, and allow it its own scripts and styles by their hashes. Raises OSError if it is missing."""
    return _with_fields(read(name))


def board_page(*, needs_key: bool) -> OwnPage:
    """Return the board's page. `needs_key`: it asks for a key first."""
    content = page("board.html")
    return _with_fields(content if needs_key else content.replace(_KEYS, b'data-keys="none"'))


def _with_fields(content: bytes) -> OwnPage:
    scripts = " ".join(f"'{each}'" for each in hashes(_SCRIPT, content)) or "'none'"
    styles = " ".join(f"'{each}'" for each in hashes(_STYLE, content)) or "'none'"
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    own: Fields = (
        (b"Content-Type", b"text/html; charset=utf-8"),
        (b"Cache-Control", b"no-store"),
        (b"Content-Security-Policy", policy.encode()),
        (b"Cross-Origin-Opener-Policy", b"same-origin"),
    )
    return OwnPage(content, own + GUARDS)


def hashes(element: "re.Pattern[bytes]", content: bytes) -> list[str]:
    """Return the hashes of what is in each of a page's elements, as a policy names them."""
    return ["sha256-" + b64encode(sha256(text).digest()).decode() for text in element.findall(content) if text]
