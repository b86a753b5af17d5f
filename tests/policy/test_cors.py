"""cors.py: which origins may read a response, and the response to a preflight."""

import pytest

from config.settings import Limits
from core.errors import Fields
from http1.grammar import RequestHead, parse_request_head
from policy.cors import Cors

OURS = "https://app.example"
EXACT = Cors((OURS, "http://127.0.0.1:3000"))
ANY = Cors(("*",))
OFF = Cors(())
RATE = b", ".join(
    b"x-ratelimit-%b-%b" % (what, unit)
    for unit in (b"requests", b"tokens")
    for what in (b"limit", b"remaining", b"reset")
)
EXPOSED = (b"Access-Control-Expose-Headers", b"x-request-id, request-id, retry-after, x-should-retry, " + RATE)
VARY = (b"Vary", b"Origin")


def head(*lines: str, method: str = "POST") -> RequestHead:
    text = "\r\n".join([f"{method} /v1/chat/completions HTTP/1.1", "Host: a", *lines, "", ""])
    return parse_request_head(text.encode(), Limits())


def preflight(cors: Cors, *lines: str, origin: str = OURS) -> dict[bytes, bytes]:
    fields = cors.preflight(head(f"Origin: {origin}", *lines, method="OPTIONS"))
    assert len(dict(fields)) == len(fields)
    return dict(fields)


# --- Every response ---


def test_without_origins_no_field_is_added() -> None:
    for request in (None, head(), head(f"Origin: {OURS}")):
        assert OFF.fields(request) == ()
    assert preflight(OFF, "Access-Control-Request-Method: POST") == {}
    assert (OFF.on, EXACT.on, ANY.on) == (False, True, True)


@pytest.mark.parametrize("origin", [OURS, "http://127.0.0.1:3000"])
def test_a_listed_origin_is_echoed(origin: str) -> None:
    allowed: Fields = ((b"Access-Control-Allow-Origin", origin.encode()), EXPOSED, VARY)
    assert EXACT.fields(head(f"Origin: {origin}")) == allowed
    assert EXACT.fields(head(f"ORIGIN:  {origin}\t")) == allowed


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example.evil.example",
        "https://app.example:443",
        "https://app.example:8443",
        "https://app.example/",
        "https://app.exampl",
        "https://evil-app.example",
        "https://sub.app.example",
        "https://evil.example/https://app.example",
        "https://evil.example#https://app.example",
        "https://app.example@evil.example",
        "https://app_example",
        "https://appXexample",
        "http://app.example",
        "HTTPS://APP.EXAMPLE",
        "app.example",
        "https://app.example, https://evil.example",
        "https://app.example https://evil.example",
        "http://127.0.0.1:30000",
        "http://127.0.0.1",
        "http://127.0.0.1:3000.evil.example",
        "null",
        "*",
        "",
    ],
)
def test_any_other_origin_is_not_echoed(origin: str) -> None:
    assert EXACT.fields(head(f"Origin: {origin}")) == (VARY,)
    assert preflight(EXACT, "Access-Control-Request-Method: POST", origin=origin) == {}


def test_two_origins_are_not_echoed() -> None:
    request = head(f"Origin: {OURS}", f"Origin: {OURS}")
    assert EXACT.fields(request) == (VARY,)
    assert EXACT.preflight(request) == ()


def test_vary_is_sent_without_an_origin_too() -> None:
    assert EXACT.fields(head()) == (VARY,)
    assert EXACT.fields(None) == (VARY,)


@pytest.mark.parametrize("lines", [[], [f"Origin: {OURS}"], ["Origin: null"], ["Origin: a", "Origin: b"]])
def test_with_a_wildcard_every_origin_gets_the_same_fields(lines: list[str]) -> None:
    """Also a request without an origin: a cache may reuse the response for another one."""
    assert ANY.fields(head(*lines)) == ((b"Access-Control-Allow-Origin", b"*"), EXPOSED)
    assert ANY.fields(None) == ANY.fields(head(*lines))


def test_one_allow_origin_field() -> None:
    for cors in (EXACT, ANY):
        request = head(f"Origin: {OURS}", "Access-Control-Request-Method: POST", method="OPTIONS")
        names = [name for name, _ in cors.fields(request) + cors.preflight(request)]
        assert names.count(b"Access-Control-Allow-Origin") == 1
        assert len(set(names)) == len(names)


def test_an_unparsable_request_gets_cors_fields_too() -> None:
    assert dict(ANY.fields(None))[b"Access-Control-Allow-Origin"] == b"*"


def test_credentials_are_never_allowed() -> None:
    for cors in (EXACT, ANY):
        request = head(f"Origin: {OURS}", "Access-Control-Request-Method: POST", method="OPTIONS")
        for name, _ in cors.fields(request) + cors.preflight(request):
            assert name != b"Access-Control-Allow-Credentials"


# --- Preflights ---

SDK_NAMES = "authorization,anthropic-version,content-type,x-api-key,x-stainless-arch,x-stainless-retry-count"


@pytest.mark.parametrize("cors", [EXACT, ANY], ids=["exact", "any"])
def test_requested_method_and_headers_are_echoed(cors: Cors) -> None:
    fields = preflight(cors, "Access-Control-Request-Method: POST", f"Access-Control-Request-Headers: {SDK_NAMES}")
    assert fields == {
        b"Access-Control-Max-Age": b"600",
        b"Access-Control-Allow-Methods": b"POST",
        b"Access-Control-Allow-Headers": SDK_NAMES.encode(),
    }


@pytest.mark.parametrize("names", ["a", "a, b", "a ,\tb,c", "A-b_c.d!#$%&'*+^`|~9", "*"])
def test_names_are_tokens(names: str) -> None:
    fields = preflight(EXACT, f"Access-Control-Request-Headers: {names}")
    assert fields[b"Access-Control-Allow-Headers"] == names.encode()


@pytest.mark.parametrize(
    "names",
    ["", ",", "a,", ",a", "a,,b", "a b", "a;b", "a, b c", "a:b", "a, (b)", 'a, "b"', "a/b", "caf\u00e9", "a, @"],
)
def test_header_names_that_are_not_tokens_are_not_echoed(names: str) -> None:
    fields = preflight(EXACT, "Access-Control-Request-Method: GET", f"Access-Control-Request-Headers: {names}")
    assert b"Access-Control-Allow-Headers" not in fields
    assert fields[b"Access-Control-Allow-Methods"] == b"GET"


@pytest.mark.parametrize("method", ["DELETE", "M-SEARCH"])
def test_a_method_is_echoed(method: str) -> None:
    assert (
        preflight(EXACT, f"Access-Control-Request-Method: {method}")[b"Access-Control-Allow-Methods"] == method.encode()
    )


@pytest.mark.parametrize("method", ["", "GET, POST", "GET POST", "GET,", "G(T)"])
def test_a_method_that_is_not_a_token_is_not_echoed(method: str) -> None:
    assert b"Access-Control-Allow-Methods" not in preflight(EXACT, f"Access-Control-Request-Method: {method}")


def test_repeated_fields_are_not_echoed() -> None:
    fields = preflight(
        EXACT,
        "Access-Control-Request-Method: GET",
        "Access-Control-Request-Method: PUT",
        "Access-Control-Request-Headers: a",
        "Access-Control-Request-Headers: b",
    )
    assert set(fields) == {b"Access-Control-Max-Age"}


def test_names_are_checked_in_linear_time() -> None:
    """A pattern that could match the same whitespace in two ways would not finish."""
    names = "a" + " \t" * 100_000 + "(" + ",a" * 100_000
    long = Limits(request_line_bytes=1 << 20, header_line_bytes=1 << 20, head_bytes=1 << 20)
    raw = f"OPTIONS / HTTP/1.1\r\nHost: a\r\nOrigin: {OURS}\r\nAccess-Control-Request-Headers: {names}\r\n\r\n"
    assert EXACT.preflight(parse_request_head(raw.encode(), long)) == ((b"Access-Control-Max-Age", b"600"),)
