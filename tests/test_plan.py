"""What is kept of a head is what that head would be parsed to again, and no head is ever taken for another."""

import random
import re
from dataclasses import fields

import pytest

from cors import Cors
from errors import BAD_REQUEST, INVALID_API_KEY, PAYLOAD_TOO_LARGE, GatewayError
from http1 import Limits
from plan import Plan, Planner
from routes import Routes

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


def planner() -> Planner:
    return Planner(Limits(body_bytes=9999), Routes(), Cors(("https://a.example",)), b"Host: backend\r\n")


def head(*lines: bytes, method: bytes = b"POST", target: bytes = b"/v1/chat/completions") -> bytes:
    return b"\r\n".join([method + b" " + target + b" HTTP/1.1", *lines, b"", b""])


def sized(octets: int) -> bytes:
    return head(b"Host: a", b"Authorization: Bearer " + SECRET, b"Content-Length: %d" % octets, b"A: b")


def told(made: Planner, raw: bytes) -> object:
    """All that a planner says of a head, comparable."""
    try:
        plan, length = made.find(raw)
    except GatewayError as error:
        return error.kind, error.message
    values = {field.name: getattr(plan, field.name) for field in fields(Plan) if field.name != "length"}
    for name in ("fault", "no_credential"):
        values[name] = values[name] and (values[name].kind, values[name].message)
    return values, length


def test_heads_that_differ_in_the_length_alone_share_a_plan() -> None:
    made = planner()
    plans = [made.find(sized(octets)) for octets in (1, 22, 333)]
    assert [length for _, length in plans] == [1, 22, 333]
    assert plans[0][0] is plans[1][0] is plans[2][0]
    assert len(made) == 1


def test_backend_gets_the_length_of_this_request() -> None:
    made = planner()
    for octets in (3, 4444):
        plan, length = made.find(sized(octets))
        assert plan.backend_request(b"r-1", length or 0, [b"bo", b"dy"]) == (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: backend\r\nX-Request-Id: r-1\r\nA: b\r\n"
            b"Content-Length: %d\r\n\r\nbody" % octets
        )


def test_a_length_beyond_the_limit_is_refused_though_the_head_is_known() -> None:
    made = planner()
    assert made.find(sized(9999))[0].fault is None
    fault = made.find(sized(10000))[0].fault
    assert fault is not None
    assert fault.kind is PAYLOAD_TOO_LARGE
    assert made.find(sized(9999))[0].fault is None


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
def test_what_is_wrong_is_wrong_each_time_and_never_kept(line: bytes, kind: object) -> None:
    made = planner()
    made.find(sized(5))
    for _ in range(2):
        fault = made.find(head(b"Host: a", b"Authorization: Bearer " + SECRET, line, b"A: b"))[0].fault
        assert fault is not None
        assert fault.kind is kind
    assert len(made) == 1


def test_two_keys_are_refused_and_not_kept() -> None:
    made = planner()
    plan, _ = made.find(head(b"Host: a", b"x-api-key: " + SECRET, b"api-key: " + SECRET[::-1]))
    assert plan.no_credential is not None
    assert plan.no_credential.kind is INVALID_API_KEY
    assert len(made) == 0


def test_nothing_kept_holds_the_key() -> None:
    made = planner()
    made.find(sized(5))
    assert len(made) == 1
    kept = [(key, [getattr(plan, each.name) for each in fields(Plan)]) for key, plan in made._kept.items()]
    assert SECRET.decode() not in repr(kept)


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
def test_what_will_not_come_again_is_not_kept(raw: bytes) -> None:
    made = planner()
    made.find(raw)
    assert len(made) == 0


def test_what_is_kept_is_bounded() -> None:
    made = planner()
    most = 0
    for number in range(3000):
        made.find(head(b"Host: a", b"A: %d" % number))
        most = max(most, len(made))
    assert most == 256


def test_a_known_head_is_told_as_a_new_one_is() -> None:
    """Random heads out of lines that contradict each other: what is kept of one never shows in another."""
    choose, made = random.Random(7), planner()
    hits = 0
    for _ in range(6000):
        lines = [b"Host: a", *choose.choices(LINES, k=choose.randrange(4))]
        choose.shuffle(lines)
        method, target = choose.choice((b"POST", b"GET")), choose.choice((b"/v1/models", b"/completion"))
        raw = head(*lines, method=method, target=target)
        before = len(made)
        assert told(made, raw) == told(planner(), raw), raw
        hits += len(made) == before
    assert hits > 1000


@pytest.mark.parametrize("octet", range(256))
def test_what_goes_into_the_access_log_needs_no_escape(octet: int) -> None:
    """Whatever octet a path or a method holds, the parser refuses it or it is plain to read."""
    for method, target in ((b"POST", b"/%c?%c" % (octet, octet)), (b"P%c" % octet, b"/x"), (b"P", b"/\\%c" % octet)):
        try:
            plan, _ = planner().find(head(b"Host: a", method=method, target=target))
        except GatewayError:
            continue
        assert re.fullmatch(rb"[!-~]+ /[!->@-~]*", plan.words)


@pytest.mark.parametrize("sane", ["a", "req-1", "A1b2.C3_~+/=:@-", "x" * 128])
def test_a_sane_request_id_is_taken_over(sane: str) -> None:
    assert planner().find(head(b"Host: a", b"X-Request-Id: " + sane.encode()))[0].request_id == sane.encode()


@pytest.mark.parametrize("odd", ["", "-a", "a b", "a;b", "x" * 129, "ä", "a\r\nX-Request-Id: b"])
def test_any_other_is_not(odd: str) -> None:
    assert planner().find(head(b"Host: a", b"X-Request-Id: " + odd.encode()))[0].request_id == b""
