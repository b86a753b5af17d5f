"""last_responses.py: which responses are kept, for which requests, and how old they are."""

import pytest

from policy.prepared_request import PreparedRequest
from proxy.last_responses import MAX_BYTES, KeptResponse, LastResponses, PayloadCollector
from proxy.response_info import ResponseInfo, parse_response
from support.clock import Clock
from support.gateway import get, request
from support.memory_gateway import prepare

MODELS = prepare(get(b"/v1/models"))


def info(*lines: bytes, status: bytes = b"200 OK") -> ResponseInfo:
    head = b"\r\n".join([b"HTTP/1.1 " + status, b"Content-Type: application/json", *lines, b"", b""])
    return parse_response(head, b"GET")


def test_the_last_good_response_is_found_again_with_its_age() -> None:
    clock = Clock()
    responses = LastResponses(clock)
    assert responses.find(MODELS) is None
    responses.keep(MODELS, info(), b"first")
    responses.keep(MODELS, info(), b"second")
    clock.advance(30)
    assert responses.find(MODELS) == KeptResponse(b"application/json", b"second", 30.0)


def test_each_route_has_its_own() -> None:
    responses = LastResponses(Clock())
    responses.keep(MODELS, info(), b"v1")
    assert responses.find(prepare(get(b"/models"))) is None


def test_it_serves_other_requests_for_the_same_route() -> None:
    responses = LastResponses(Clock())
    responses.keep(MODELS, info(), b"v1")
    for raw in (get(b"/v1/models?x=1"), request(b"HEAD", b"/v1/models"), get(b"/v1/models", key=None)):
        assert responses.find(prepare(raw)) is not None


@pytest.mark.parametrize(
    ("prepared", "head", "payload"),
    [
        (prepare(request(b"HEAD", b"/v1/models")), info(), b""),
        (prepare(get(b"/v1/models?x=1")), info(), b"x"),
        (MODELS, info(status=b"500 Internal Server Error"), b"x"),
        (MODELS, info(b"Content-Encoding: gzip"), b"x"),
        (MODELS, info(), b"x" * (MAX_BYTES + 1)),
        (MODELS, info(), None),
    ],
    ids=["to HEAD", "with a query", "an error", "compressed", "too long", "too long in pieces"],
)
def test_others_are_not_kept(prepared: PreparedRequest, head: ResponseInfo, payload: bytes | None) -> None:
    responses = LastResponses(Clock())
    responses.keep(MODELS, info(), b"good")
    responses.keep(prepared, head, payload)
    found = responses.find(MODELS)
    assert found is not None
    assert found.payload == b"good"


def test_a_response_without_a_type_has_none_again() -> None:
    responses = LastResponses(Clock())
    responses.keep(MODELS, parse_response(b"HTTP/1.1 200 OK\r\n\r\n", b"GET"), b"x")
    assert responses.find(MODELS) == KeptResponse(b"", b"x", 0.0)


# --- In pieces ---


def test_pieces_are_collected() -> None:
    collector = PayloadCollector()
    collector.feed(b"he")
    collector.feed(b"llo")
    assert collector.payload == b"hello"


@pytest.mark.parametrize(("more", "kept"), [(0, True), (1, False)])
def test_too_many_bytes_are_not_collected(more: int, kept: bool) -> None:
    collector = PayloadCollector()
    collector.feed(b"x" * MAX_BYTES)
    collector.feed(b"x" * more)
    collector.feed(b"")
    assert (collector.payload is not None) is kept
