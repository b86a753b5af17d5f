"""Records of requests that have ended, for the tests of what counts them."""

from dataclasses import fields
from typing import Any

from accounting.request_record import LeftWork, Outcome, RequestRecord, Stage
from accounting.token_counter import TokenCounter
from config.settings import Limits
from policy.cors import Cors
from policy.prepared_request import LastHead, PreparedRequest, RequestCache
from policy.routes import Routes

REQUEST_CACHE = RequestCache(Limits(), Routes(ui=True), Cors(()), b"")
ANSWER = b'{"choices":[],"timings":{"cache_n":3,"prompt_n":7,"prompt_ms":350.0,"predicted_n":20,"predicted_ms":500.0}}'
EVENTS = (b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', b'data: {"choices":[{"delta":{"content":"b"}}]}\n\n')
ENDED_S = 102.0
ENDED_AT = 1767323045.678  # in seconds since the epoch


def prepare(method: str, target: str) -> PreparedRequest:
    return REQUEST_CACHE.find(f"{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode(), LastHead())[0]


CHAT = prepare("POST", "/v1/chat/completions?secret=1")
PING = prepare("GET", "/ping")
NO_HEAD = REQUEST_CACHE.fallback()


def counted(*payloads: bytes) -> TokenCounter:
    """Return what counted the tokens of a response in pieces."""
    counter = TokenCounter(CHAT.route.label)
    for payload in payloads:
        counter.feed(payload)
    return counter


def record(of: PreparedRequest = CHAT, name: str = "req-1", **changes: Any) -> RequestRecord:
    """Return a chat that went well: 2 s in all, 0.5 s queued, answered after 1 s."""
    made = RequestRecord(name.encode(), "192.0.2.7", of, 100.0, Stage.DONE)
    values = {
        "key_id": "alice",
        "status": 200,
        "backend_status": 200,
        "bytes_in": 11,
        "bytes_out": 222,
        "queued_s": 100.25,
        "left_queue_s": 100.75,
        "first_byte_s": 101.0,
        "ended_s": ENDED_S,
        "usage_source": counted(ANSWER) if of is CHAT else None,
    }
    for field, value in {**values, **changes}.items():
        setattr(made, field, value)
    return made


def left_record(of: PreparedRequest = CHAT, **changes: Any) -> RequestRecord:
    """Return a chat whose client left while the backend worked on it; changes of its LeftWork are among `changes`."""
    known = {field.name: changes.pop(field.name) for field in fields(LeftWork) if field.name in changes}
    usual = {"outcome": Outcome.CANCELLED, "usage_source": None, "bytes_in": 100}
    return record(of, left=LeftWork(**known), **(usual | changes))
