"""own_page.py: each page of the gateway's own is whole in itself, and may run what it contains and nothing else."""

import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest

from core.installation import page
from proxy.own_page import OwnPage, board_page, own_page

PAGES = ("board.html", "chat.html", "loading.html")
MOST_BYTES = 60 << 10  # of all together


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def policy_of(own: OwnPage) -> dict[str, str]:
    policy = dict(own.fields)[b"Content-Security-Policy"].decode()
    return {part.split(" ", 1)[0]: part.partition(" ")[2] for part in policy.split("; ")}


def test_the_pages_are_small() -> None:
    assert sum(len(page(name)) for name in PAGES) < MOST_BYTES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_one_file_that_loads_nothing(name: str) -> None:
    text = page(name).decode()
    targets = [
        value or ""
        for _, fields in Elements(page(name)).found
        for attribute, value in fields.items()
        if attribute in ("src", "href", "action")
    ]
    assert all(target.startswith("data:") for target in targets), targets
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|@import|url\(", text)


@pytest.mark.parametrize("name", PAGES)
def test_no_element_has_a_script_or_a_style_of_its_own(name: str) -> None:
    for tag, fields in Elements(page(name)).found:
        assert not [attribute for attribute in fields if attribute.startswith("on") or attribute == "style"], tag


@pytest.mark.parametrize("name", PAGES)
def test_a_page_makes_no_elements_of_text_and_keeps_no_key_for_long(name: str) -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|eval\(|document\.(cookie|write)|localStorage", page(name).decode()
    )


@pytest.mark.parametrize("name", PAGES)
def test_a_page_may_run_its_own_script_and_nothing_else(name: str) -> None:
    policy = policy_of(own_page(name))
    for source, element in (("script-src", b"script"), ("style-src", b"style")):
        (text,) = re.findall(b"<%b>(.*?)</%b>" % (element, element), page(name), re.DOTALL)
        assert policy[source] == f"'sha256-{b64encode(sha256(text).digest()).decode()}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"


def test_each_script_of_a_page_has_its_hash() -> None:
    policy = policy_of(own_page("x", lambda name: b"<script>1</script><script>2</script>"))
    assert policy["script-src"].count("'sha256-") == 2
    assert policy["style-src"] == "'none'"


def test_a_page_without_script_may_run_none() -> None:
    assert policy_of(own_page("x", lambda name: b"<p>"))["script-src"] == "'none'"


@pytest.mark.parametrize("name", PAGES)
def test_the_fields_keep_other_pages_out_and_the_page_out_of_caches(name: str) -> None:
    fields = dict(own_page(name).fields)
    assert fields[b"X-Frame-Options"] == b"DENY"
    assert fields[b"X-Content-Type-Options"] == b"nosniff"
    assert fields[b"Referrer-Policy"] == b"no-referrer"
    assert fields[b"Cross-Origin-Opener-Policy"] == fields[b"Cross-Origin-Resource-Policy"] == b"same-origin"
    assert fields[b"Cache-Control"] == b"no-store"
    assert fields[b"Content-Type"] == b"text/html; charset=utf-8"


def test_the_board_asks_for_a_key_only_if_there_are_keys() -> None:
    assert b'data-keys="needed"' in board_page(needs_key=True).content
    assert b'data-keys="none"' in board_page(needs_key=False).content
