"""prepared_request.py: a known head is prepared as a new one is, and no head is ever taken for another."""

import gc
import random
import re
import types
from dataclasses import fields
from hashlib import sha256

import pytest

from config.settings import Limits
from core.errors import BAD_REQUEST, INVALID_API_KEY, PAYLOAD_TOO_LARGE, GatewayError
from policy.cors import Cors
from policy.prepared_request import LastHead, PreparedRequest, RequestCache
from policy.routes import UNROUTED, Routes

SECRET = b"sk-alice-0123456789abcdef"
LINES = (
    b"Host: a",
    b"Host: b",
    b"Authorization: Bearer " + SECRET,
    b"Content-Length: 5",
    b"Content-Length: 17",
    b"content-length: 5",
    b"CONTENT-LENGTH: 5",
    b"Content-Length:5",
    b"Content-Length:  5",
    b"Content-Length: 5 ",
    b"Content-Length: ",
    b"Content-Length: 05",
    b"Content-Length: +5",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 10000",
    b"X: \r\nContent-Length: 3",
    b"Transfer-Encoding: chunked",
    b"Connection: close",
    b"Expect: 100-continue",
    b"X-Request-Id: r-1",
    b"A: b",
)


ROUTES = Routes()


def request_cache() -> RequestCache:
    return RequestCache(Limits(body_bytes=9999), ROUTES, Cors(("https://a.example",)), b"Host: backend\r\n")


def find(made: RequestCache, raw: bytes) -> tuple[PreparedRequest, int | None]:
    """Find the first request of a connection."""
    return made.find(raw, LastHead())


def head(*lines: bytes, method: bytes = b"POST", target: bytes = b"/v1/chat/completions") -> bytes:
    return b"\r\n".join([method + b" " + target + b" HTTP/1.1", *lines, b"", b""])


def sized(length: int) -> bytes:
    return head(b"Host: a", b"Authorization: Bearer " + SECRET, b"Content-Length: %d" % length, b"A: b")


def prepared_values(made: RequestCache, raw: bytes) -> object:
    """Return all that a cache says of a head, in a form that can be compared."""
    try:
        prepared, length = find(made, raw)
    except GatewayError as error:
        return error.kind, error.message
    values = {field.name: getattr(prepared, field.name) for field in fields(PreparedRequest) if field.name != "length"}
    for name in ("error", "credential_error"):
        values[name] = values[name] and (values[name].kind, values[name].message)
    return values, length


def test_heads_that_differ_in_the_length_alone_share_a_prepared_request() -> None:
    made = request_cache()
    found = [find(made, sized(length)) for length in (1, 22, 333)]
    assert [length for _, length in found] == [1, 22, 333]
    assert found[0][0] is found[1][0] is found[2][0]
    assert len(made) == 1


def test_the_backend_gets_the_length_of_this_request() -> None:
    made = request_cache()
    for body_bytes in (3, 4444):
        prepared, length = find(made, sized(body_bytes))
        assert prepared.backend_request(b"r-1", length or 0, [b"bo", b"d" * (body_bytes - 2)]) == (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: backend\r\nX-Request-Id: r-1\r\nA: b\r\n"
            b"Content-Length: %d\r\n\r\nbo%b" % (body_bytes, b"d" * (body_bytes - 2))
        )


def test_a_large_body_is_not_joined() -> None:
    prepared, _ = find(request_cache(), sized(9999))
    pieces = [b"a" * 9000, b"d" * 11_000]
    request = prepared.backend_request(b"r-1", 20_000, pieces)
    assert not isinstance(request, bytes)
    begin, *rest = request
    assert begin.endswith(b"\r\nContent-Length: 20000\r\n\r\n")
    assert [id(piece) for piece in rest] == [id(piece) for piece in pieces]


def test_a_connection_that_repeats_its_head_gets_the_same_with_another_length() -> None:
    made, last = request_cache(), LastHead()
    found = [made.find(sized(length), last) for length in (1, 22, 333, 4)]
    assert [length for _, length in found] == [1, 22, 333, 4]
    assert {id(prepared) for prepared, _ in found} == set(map(id, last.values()))


def test_a_connection_with_another_clients_head_gets_what_that_one_asks_for() -> None:
    made, last = request_cache(), LastHead()
    for raw in (sized(5), sized(5).replace(SECRET, SECRET[:-1] + b"x"), sized(5).replace(b"A: b", b"A: c")):
        for _ in range(3):
            assert made.find(raw, last)[0] is find(made, raw)[0]
        assert list(last) == [raw.replace(b"Content-Length: 5\r\n", b"Content-Length: ")]
    too_long = sized(10000)
    assert made.find(too_long, last)[0].error is not None


def test_a_connection_keeps_no_head_that_is_not_kept_for_all() -> None:
    made, last = request_cache(), LastHead()
    for line in (b"X-Request-Id: mine", b"A: " + b"b" * 4096):
        for _ in range(3):
            made.find(head(b"Host: a", b"Content-Length: 5", line), last)
    assert not last


def test_a_length_beyond_the_limit_is_refused_even_if_the_head_is_known() -> None:
    made = request_cache()
    assert find(made, sized(9999))[0].error is None
    error = find(made, sized(10000))[0].error
    assert error is not None
    assert error.kind is PAYLOAD_TOO_LARGE
    assert find(made, sized(9999))[0].error is None


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"Content-Length: +5", BAD_REQUEST),
        (b"Content-Length: ", BAD_REQUEST),
        (b"Content-Length: 5\r\nContent-Length: 5", BAD_REQUEST),
        (b"content-length: 5\r\nContent-Length: 5", BAD_REQUEST),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5", BAD_REQUEST),
    ],
)
def test_a_wrong_head_is_wrong_each_time_and_never_kept(line: bytes, kind: object) -> None:
    made = request_cache()
    find(made, sized(5))
    for _ in range(2):
        error = find(made, head(b"Host: a", b"Authorization: Bearer " + SECRET, line, b"A: b"))[0].error
        assert error is not None
        assert error.kind is kind
    assert len(made) == 1


def test_a_repeated_credential_is_refused_and_not_kept() -> None:
    made = request_cache()
    prepared, _ = find(made, head(b"Host: a", b"x-api-key: " + SECRET, b"x-api-key: " + SECRET))
    assert prepared.credential_error is not None
    assert prepared.credential_error.kind is INVALID_API_KEY
    assert len(made) == 0


def test_one_secret_is_the_credential_and_several_are_candidates() -> None:
    def digests(*secrets: bytes) -> tuple[bytes, ...]:
        return tuple(sha256(secret).digest() for secret in secrets)

    made = request_cache()
    jwt, other = b"Authorization: Bearer ey.J.wt", b"Authorization: Bearer " + SECRET[::-1]
    for lines, credential, credentials in (
        ((), None, ()),
        ((jwt,), None, ()),
        ((b"api-key: " + SECRET,), digests(SECRET)[0], ()),
        ((jwt, b"x-api-key: " + SECRET), digests(SECRET)[0], ()),
        ((b"api-key: " + SECRET, b"x-api-key: " + SECRET), digests(SECRET)[0], ()),
        ((b"x-api-key: " + SECRET, other), None, digests(SECRET[::-1], SECRET)),
    ):
        prepared, _ = find(made, head(b"Host: a", b"Content-Length: 1", *lines))
        assert (prepared.credential, prepared.credentials) == (credential, credentials)
        assert prepared.credential_error is None


def test_a_head_is_kept_only_if_it_is_within_the_limit_with_any_length() -> None:
    """The same head with a longer number in Content-Length would be found without a look at the limit."""
    made = RequestCache(Limits(head_bytes=121), Routes(), Cors(()), b"Host: backend\r\n")
    raw = sized(1)
    assert len(raw) == 121
    find(made, raw)
    assert len(made) == 0
    with pytest.raises(GatewayError, match=r"MAX_REQUEST_HEADER_SIZE \(121 bytes\)"):
        find(made, sized(22))


def test_an_error_in_the_framing_hides_neither_the_route_nor_the_credential() -> None:
    prepared, _ = find(request_cache(), sized(10000))
    assert prepared.error is not None
    assert (prepared.route.label, prepared.needs_authorization) == ("/v1/chat/completions", True)
    assert prepared.credential == sha256(SECRET).digest()


def test_nothing_that_is_kept_contains_the_key() -> None:
    made = request_cache()
    find(made, sized(5))
    assert len(made) == 1
    assert SECRET not in b"".join(reachable_bytes(made))


def reachable_bytes(thing: object) -> list[bytes]:
    """Every bytes object that can be reached from a thing of this package, or from containers in it."""
    found, seen, left = [], set(), [thing]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, bytes):
            found.append(each)
        elif not isinstance(each, (type, types.ModuleType, types.FunctionType)):
            left += gc.get_referents(each)
    return found


@pytest.mark.parametrize(
    "raw",
    [
        head(b"Host: a", b"A: " + b"b" * 3000),
        head(b"Host: a", b"X-Request-Id: r-1"),
        head(b"Host: a", target=b"/unknown"),
        head(b"Host: a", target=b"/ping"),
    ],
    ids=["long", "with an id of its own", "unknown", "with the wrong method"],
)
def test_a_head_that_will_not_come_again_is_not_kept(raw: bytes) -> None:
    made = request_cache()
    find(made, raw)
    assert len(made) == 0


def test_the_number_of_kept_heads_is_limited() -> None:
    made = request_cache()
    most = 0
    for number in range(3000):
        find(made, head(b"Host: a", b"A: %d" % number))
        most = max(most, len(made))
    assert most == 256


def test_a_known_head_is_prepared_as_a_new_one_is() -> None:
    """Random heads of lines that contradict each other: what is kept of one never shows in another."""
    choose, made = random.Random(7), request_cache()
    hits = 0
    for _ in range(6000):
        lines = [b"Host: a", *choose.choices(LINES, k=choose.randrange(4))]
        choose.shuffle(lines)
        method, target = choose.choice((b"POST", b"GET")), choose.choice((b"/v1/models", b"/completion"))
        raw = head(*lines, method=method, target=target)
        before = len(made)
        assert prepared_values(made, raw) == prepared_values(request_cache(), raw), raw
        hits += len(made) == before
    assert hits > 1000


@pytest.mark.parametrize("byte", range(256))
def test_what_goes_into_the_access_log_needs_no_escape(byte: int) -> None:
    """Whatever byte a path or a method contains, the parser refuses it or it is plain to read."""
    for method, target in ((b"POST", b"/%c?%c" % (byte, byte)), (b"P%c" % byte, b"/x"), (b"P", b"/\\%c" % byte)):
        try:
            prepared, _ = find(request_cache(), head(b"Host: a", method=method, target=target))
        except GatewayError:
            continue
        assert re.fullmatch(rb"[!-~]+ /[!->@-~]*", prepared.request_line)


@pytest.mark.parametrize("sane", ["a", "req-1", "A1b2.C3_~+/=:@-", "x" * 128])
def test_a_sane_request_id_is_used(sane: str) -> None:
    assert find(request_cache(), head(b"Host: a", b"X-Request-Id: " + sane.encode()))[0].request_id == sane.encode()


@pytest.mark.parametrize("odd", ["", "-a", "a b", "a;b", "x" * 129, "ä", "a\r\nX-Request-Id: b"])
def test_any_other_request_id_is_not(odd: str) -> None:
    assert find(request_cache(), head(b"Host: a", b"X-Request-Id: " + odd.encode()))[0].request_id == b""


# --- What stands for a head that could not be read ---


def test_the_fallback_leads_nowhere() -> None:
    fallback = request_cache().fallback()
    assert (fallback.route, fallback.keep_alive, fallback.length, fallback.credential) == (UNROUTED, False, None, None)
    assert (fallback.request_line, fallback.error) == (b"- -", None)


def test_the_fallback_has_the_cors_fields_of_every_response() -> None:
    assert request_cache().fallback().response_lines == b"\r\nVary: Origin\r\n"


@pytest.mark.parametrize(("raw", "method"), [(b"HEAD / HTTP/1.1\r\n\r\n", b"HEAD"), (b"GET /", b"GET"), (b"", b"GET")])
def test_the_fallback_for_head_gets_no_content(raw: bytes, method: bytes) -> None:
    assert request_cache().fallback(raw).method == method


# --- What a head asks for ---


@pytest.mark.parametrize(
    ("raw", "wants"),
    [
        (sized(2), True),
        (head(b"Host: a", b"Content-Length: 2", target=b"/tokenize"), False),
        (head(b"Host: a", method=b"GET", target=b"/v1/models"), False),
    ],
)
def test_heartbeats_are_for_posts_that_take_a_slot(raw: bytes, wants: bool) -> None:
    assert find(request_cache(), raw)[0].wants_heartbeats is wants


@pytest.mark.parametrize(
    ("method", "length", "request_end"),
    [
        (b"GET", 0, b"A: b\r\n\r\n"),
        (b"POST", 0, b"A: b\r\nContent-Length: 0\r\n\r\n"),
        (b"GET", 2, b"Content-Length: 2\r\n\r\nhi"),
    ],
)
def test_a_request_without_a_body_has_a_length_only_if_its_method_expects_one(
    method: bytes, length: int, request_end: bytes
) -> None:
    prepared, _ = find(request_cache(), head(b"Host: a", b"A: b", method=method, target=b"/v1/models"))
    assert prepared.backend_request(b"r-1", length, [b"hi"][: length // 2]).endswith(request_end)


@pytest.mark.parametrize(
    "line",
    [
        b"Authorization: Bearer " + SECRET,
        b"X-Api-Key: " + SECRET,
        b"Expect: 100-continue",
        b"X-Conversation-Id: 1",
        b"TE: x",
        b"Range: bytes=9999999999-",
        b"If-Range: x",
    ],
)
def test_the_backend_does_not_get_what_is_the_gateways(line: bytes) -> None:
    prepared, _ = find(request_cache(), head(b"Host: a", line, b"Content-Length: 0", b"A: b"))
    assert prepared.backend_request(b"r-1", 0, []) == (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: backend\r\nX-Request-Id: r-1\r\nA: b\r\nContent-Length: 0\r\n\r\n"
    )


def test_the_backend_does_not_get_fields_that_connection_names() -> None:
    prepared, _ = find(
        request_cache(), head(b"Host: a", b"Connection: x-one", b"X-One: 1", b"A: b", b"Content-Length: 0")
    )
    assert prepared.after_id == b"\r\nA: b\r\n"


@pytest.mark.parametrize(
    ("raw", "needs"),
    [
        (sized(2), False),
        (head(b"Host: a", method=b"GET", target=b"/v1/models"), False),
        (head(b"Host: a"), True),
        (head(b"Host: a", method=b"GET", target=b"/slots"), True),
        (head(b"Host: a", method=b"GET", target=b"/ping"), True),
        (head(b"Host: a", method=b"GET", target=b"/nowhere"), True),
        (head(b"Host: a", b"Expect: a-pony", b"Content-Length: 2"), True),
    ],
)
def test_a_valid_key_alone_decides_for_inference_with_its_body(raw: bytes, needs: bool) -> None:
    assert find(request_cache(), raw)[0].needs_authorization is needs


# --- What a page's file depends on ---


def prepared_file(*lines: bytes) -> PreparedRequest:
    made = RequestCache(Limits(), Routes(ui=True), Cors(()), b"Host: backend\r\n")
    return find(made, head(b"Host: a", *lines, method=b"GET", target=b"/sw.js"))[0]


@pytest.mark.parametrize(
    ("coding", "accepted"),
    [
        (b"gzip", True),
        (b"gzip, deflate, br, zstd", True),
        (b"br,gzip;q=0.5", True),
        (b"br, x-gzip ; q=1.0", True),
        (b"GZIP", True),
        (b"gzip;q=0", False),
        (b"gzip; q=0.000, br", False),
        (b"gzip;q=0.001", True),
        (b"br", False),
        (b"gzipped", False),
        (b"", False),
    ],
)
def test_whether_gzip_is_accepted(coding: bytes, accepted: bool) -> None:
    assert prepared_file(b"Accept-Encoding: " + coding).accepts_gzip is accepted


def test_codings_and_tags_may_be_in_several_lines() -> None:
    found = prepared_file(
        b"accept-encoding: br", b"Accept-Encoding: gzip", b'If-None-Match: "a"', b'if-none-match: "b"'
    )
    assert found.accepts_gzip
    assert found.etags == b'"a", "b"'
    assert (prepared_file().accepts_gzip, prepared_file().etags) == (False, b"")


def test_they_are_not_looked_for_in_relayed_requests() -> None:
    made = find(request_cache(), head(b"Host: a", b"Accept-Encoding: gzip", b'If-None-Match: "a"'))[0]
    assert (made.accepts_gzip, made.etags) == (False, b"")
