"""The record of one request: filled as the request moves, read once at its end."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from accounting.token_counter import TokenCounter
from auth import NO_KEY
from backend.generation_watch import Generated
from backend.left_stream import Shown
from core.errors import Kind
from policy.prepared_request import PreparedRequest
from policy.token_limiter import Reservation
from policy.token_limits import ONE_ANSWER

# The status of a response that was not sent, since its client had left before; nginx has the same.
CLIENT_CLOSED_REQUEST = 499
NO_MODEL = "-"  # in logs


class Stage:
    """How far a request has come; also the `phase` of gateway_cancelled_total."""

    READING_HEAD = "reading_head"
    AUTHENTICATING = "authenticating"
    READING_BODY = "reading_body"
    QUEUED = "queued"
    AWAITING_RESPONSE = "awaiting_response"
    STREAMING = "streaming"
    DONE = "done"


class Outcome:
    """How a request ended."""

    DONE = "done"
    TRUNCATED = "truncated"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    TIMED_OUT = "timed_out"


def request_ids() -> Iterator[bytes]:
    """Yield ids for requests that bring no sane one: unique across processes, cheap to make."""
    return map(f"req-{os.urandom(6).hex()}-%d".encode().__mod__, count(1))


@dataclass(frozen=True, slots=True)
class LeftWork:
    """What is known of the backend's work on a request that ended before that work did.

    `generated` is what the backend was seen to generate for a client that has left, and `shown` what the slots have
    shown of a stream whose client has. `prompt_limit` is the most tokens that the prompts can have. `is_behind`: more
    may have been generated than was received and counted. The backend worked until `worked_until_s`, 0 if that is not
    known.
    """

    generated: Generated | None = None
    shown: Shown | None = None
    prompt_limit: int | None = None
    is_behind: bool = False
    worked_until_s: float = 0.0

    def with_shown(self, shown: Shown) -> "LeftWork":
        """Add what the slots have shown of a stream.

        If it was generated far ahead of its client, it may have ended long before they were looked at. They show
        nothing of it then if its slot may have had another task meanwhile.
        """
        return self if self.is_behind and shown.may_be_reused else replace(self, shown=shown)


NOTHING_LEFT = LeftWork()


class RequestRecord:
    """One request and its outcome. Times are monotonic seconds, 0 for what was not reached.

    `bytes_in`, `bytes_out` and `ended_s` are set at its end; `left_queue_s` is when it was admitted or gave up waiting.
    """

    __slots__ = (
        "asked",
        "backend_status",
        "bytes_in",
        "bytes_out",
        "ended_s",
        "first_byte_s",
        "id",
        "key_id",
        "left",
        "left_queue_s",
        "model",
        "outcome",
        "peer",
        "prepared",
        "queued_s",
        "refusal",
        "reservation",
        "stage",
        "started_s",
        "status",
        "usage_source",
    )

    bytes_in: int
    bytes_out: int
    ended_s: float

    def __init__(self, request_id: bytes, peer: str, prepared: PreparedRequest, started_s: float, stage: str) -> None:
        self.id = request_id
        self.peer = peer
        self.prepared = prepared
        self.key_id = NO_KEY
        self.model = NO_MODEL  # with several models: the one that it is for, once that is known
        self.stage = stage
        self.outcome = Outcome.DONE
        self.started_s = started_s
        self.queued_s = self.left_queue_s = self.first_byte_s = 0.0
        self.status = CLIENT_CLOSED_REQUEST
        self.backend_status = 0
        self.refusal: Kind | None = None
        self.asked = ONE_ANSWER  # what the body asks for, and the key allows
        self.reservation: Reservation | None = None  # of tokens within a minute
        self.left = NOTHING_LEFT
        self.usage_source: TokenCounter | bytes | None = None  # the response, or what counted its tokens

    @property
    def is_unfinished(self) -> bool:
        """Whether the backend had begun, and the end of its response was not passed on, once it is recorded."""
        return self.left is not NOTHING_LEFT
