"""Tokens read from a passing answer without changing a byte.

A Meter keeps a bounded part of an answer, whatever its size, and reads it where it ends. It relies on one fact of JSON:
a quote inside a string is escaped, so the bytes `"usage":` or `"timings":` never come from what a model says.

It knows no HTTP: an answer under a Content-Encoding cannot be read, and tells nothing.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

# Of an answer in JSON, the beginning (where embeddings and rerank tell their usage) and the end (where all others do)
# are kept; of an event, its name and its end. An answer or event that fits is read whole.
HEAD_BYTES = 4096
TAIL_BYTES = 16384
FRONT_BYTES = 128
# No more than so many places are tried in a tail that holds the names many times, as a tool call's arguments may.
MAX_TRIES = 8
# What a backend tells beyond these is a mistake, and would overflow sums and columns.
MAX_TOKENS = 1 << 40
MAX_MS = 1e12


class Tokens(NamedTuple):
    """What one answer took. `prompt` includes `cached`; the times are 0 where the backend did not tell them."""

    prompt: int
    cached: int
    completion: int
    prompt_ms: float = 0.0
    predicted_ms: float = 0.0


_tokens = partial(tuple.__new__, Tokens)  # a NamedTuple's own constructor takes thrice as long


def _sum(one: Tokens, other: Tokens, *, one_prompt: bool) -> Tokens:
    """Add what two choices of an answer took; where they share a prompt it was read once."""
    return Tokens(
        max(one.prompt, other.prompt) if one_prompt else one.prompt + other.prompt,
        max(one.cached, other.cached) if one_prompt else one.cached + other.cached,
        one.completion + other.completion,
        max(one.prompt_ms, other.prompt_ms) if one_prompt else one.prompt_ms + other.prompt_ms,
        one.predicted_ms + other.predicted_ms,
    )


# Reading what the backend tells


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else 0


def _milliseconds(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= MAX_MS else 0.0


def _members(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _from_timings(timings: Mapping[str, Any]) -> Tokens:
    cached = _count(timings.get("cache_n"))
    return Tokens(
        prompt=cached + _count(timings.get("prompt_n")),
        cached=cached,
        completion=_count(timings.get("predicted_n")),
        prompt_ms=_milliseconds(timings.get("prompt_ms")),
        predicted_ms=_milliseconds(timings.get("predicted_ms")),
    )


def _from_usage(usage: Mapping[str, Any]) -> Tokens:
    """Read OpenAI's two spellings and Anthropic's, whose input tokens do not include those of the cache."""
    details = _members(usage.get("prompt_tokens_details") or usage.get("input_tokens_details"))
    beside = _count(usage.get("cache_read_input_tokens"))
    written = _count(usage.get("cache_creation_input_tokens"))
    return Tokens(
        prompt=_count(usage.get("prompt_tokens")) + _count(usage.get("input_tokens")) + beside + written,
        cached=_count(details.get("cached_tokens")) + beside,
        completion=_count(usage.get("completion_tokens")) + _count(usage.get("output_tokens")),
    )


def _told(answer: Mapping[str, Any]) -> Tokens | None:
    """Return what an answer, or an event, tells: llama-server's timings first, since only they have the times."""
    kind = answer.get("type")
    inner: Mapping[str, Any] = {}
    if kind == "message_start":
        inner = _members(answer.get("message"))
    elif type(kind) is str and kind.startswith("response."):
        inner = _members(answer.get("response"))
    if timings := _members(answer.get("timings")):
        return _from_timings(timings)
    if usage := _members(answer.get("usage") or inner.get("usage")):
        return _from_usage(usage)
    if "tokens_evaluated" in answer:
        return Tokens(_count(answer["tokens_evaluated"]), 0, _count(answer.get("tokens_predicted")))
    return None


def _parse(text: bytes) -> Mapping[str, Any]:
    """Return the members of a JSON object; none of anything else. A model may nest deeper than Python recurses."""
    try:
        return _members(json.loads(text.decode()))  # of bytes, json would first guess at their encoding
    except (ValueError, RecursionError):
        return {}


_NAMES = re.compile(rb'"(?:usage|timings)"\s*:\s*\{')


def _last_members(tail: bytes) -> Mapping[str, Any]:
    """Return the members with which an object ends, given the end of its text.

    An opening brace put before a member of the outermost object makes valid JSON of the rest; before one that lies
    deeper it leaves closing brackets over.
    """
    found: Mapping[str, Any] = {}
    places = [match.start() for match in _NAMES.finditer(tail)]
    for place in reversed(places[-MAX_TRIES:]):
        found = _parse(b"{" + tail[place:]) or found
    return found


def _first_members(head: bytes) -> Mapping[str, Any]:
    """Return the members with which an object begins, up to and with its usage, given the beginning of its text."""
    text = head.decode("latin-1")
    for match in list(_NAMES.finditer(head))[:MAX_TRIES]:
        try:
            _, end = json.JSONDecoder().raw_decode(text, match.end() - 1)
        except (ValueError, RecursionError):
            continue
        # One brace completes the object where the member is one of the outermost.
        if found := _parse(head[:end] + b"}"):
            return found
    return {}


def _event(text: bytes) -> Mapping[str, Any]:
    """Return the members of an event's data, or, where that is long or deep, those at its end."""
    whole = len(text) <= TAIL_BYTES
    found = _parse(text[text.rfind(b"\n") + 1 :].removeprefix(b"data:")) if whole else {}
    return found or _last_members(text[-TAIL_BYTES:])


_TIMINGS = b'"timings":{'
_USAGE = b'"usage":{'
_TIMINGS_BYTES = 4096  # they are flat, and take some 300
_PROGRESS = b'"prompt_progress":{'
# How an event says that it is not the last of its choice.
_UNFINISHED = (b'"finish_reason":null', b'"stop":false')

# An event with content, as llama-server begins it.
_ORDINARY_EVENT = b'data: {"choices":[{"finish_reason":null'

# What stands for one token in a stream, as near as framing tells, and how many of these carry none. An event may tell
# more than one token, and a token that is half a character has none; this matters only where a stream was cut.
_MARKS = {
    "messages": (b": content_block_delta\n", 0),
    "responses": (b".delta\n", 0),
    "chat": (b"}\n\n", 1),  # the first names the role
}
_OTHER_MARK = (b"}\n\n", 0)
_MARK_AFTER_PROGRESS = b'"}\n\n'

_UNDECIDED, _STREAM, _OBJECT, _LIST, _UNREADABLE = range(5)


@lru_cache(maxsize=64)
def _dialect(kind: str) -> tuple[bytes, int, bool, bool]:
    """Tell the mark of an event with content, how many of these carry none, and how several choices add up.

    The last word counts in some dialects; in the others each choice of an answer ends with its own.
    """
    name = "chat" if kind.endswith("chat/completions") else kind.rpartition("/")[2]
    mark, idle = _MARKS.get(name, _OTHER_MARK)
    return mark, idle, name not in ("messages", "responses"), name == "chat"


def _form(first: int) -> int:
    """Tell from its first byte whether an answer is an object, a list, a stream of events, or cannot be read."""
    if first == 0x7B:
        return _OBJECT
    if first == 0x5B:
        return _LIST
    return _STREAM if first in b":deir" else _UNREADABLE  # comment, data, event, id, retry


# How llama-server spells what its answers end with: read with one anchored expression where it is spelt so, which is
# nearly always, and costs a fifth of parsing JSON. Anything else is parsed.
_COUNT = rb"(0|[1-9][0-9]{0,11})"
_MS = rb"((?:0|[1-9][0-9]{0,10})(?:\.[0-9]{1,17})?)"
_NUMBER = rb"[0-9.e+-]{1,30}"
_TIMINGS_AT_END = re.compile(
    rb'"timings":\{"cache_n":%b,"prompt_n":%b,"prompt_ms":%b,"prompt_per_token_ms":%b,"prompt_per_second":%b,'
    rb'"predicted_n":%b,"predicted_ms":%b,"predicted_per_token_ms":%b,"predicted_per_second":%b\}\}\s*'
    % (_COUNT, _COUNT, _MS, _NUMBER, _NUMBER, _COUNT, _MS, _NUMBER, _NUMBER)
).fullmatch
# With no brace or bracket between the usage and the answer's last brace, it is one of the outermost members.
_USAGE_AT_END = re.compile(
    rb'"usage":\{"completion_tokens":%b,"prompt_tokens":%b,"total_tokens":[0-9]{1,12}'
    rb'(?:,"prompt_tokens_details":\{"cached_tokens":%b\})?\}[^][{}\\]*\}\s*' % (_COUNT, _COUNT, _COUNT)
).fullmatch


def _told_as_usual(text: bytes) -> Tokens | None:
    """Return what an answer tells that ends as llama-server's answers do; None where it must be parsed."""
    place = text.rfind(_TIMINGS) if text[-2:] == b"}}" else -1
    if place >= 0:
        if match := _TIMINGS_AT_END(text, place):
            cached, prompt, prompt_ms, completion, predicted_ms = match.groups()
            beside = int(cached)
            return _tokens((beside + int(prompt), beside, int(completion), float(prompt_ms), float(predicted_ms)))
        return None
    place = text.rfind(_USAGE)
    if place >= 0 and (match := _USAGE_AT_END(text, place)):
        completion, prompt, cached = match.groups()
        return _tokens((int(prompt), int(cached) if cached else 0, int(completion), 0.0, 0.0))
    return None


class Meter:
    """Reads one answer's tokens from its payload, however that is torn.

    `kind` is the route's label. `events` counts the events of a stream that carry content. Holds at most some 40 KiB
    and the piece that was fed last.
    """

    __slots__ = (
        "_final",
        "_form",
        "_head",
        "_idle",
        "_last",
        "_mark",
        "_one_prompt",
        "_rest",
        "_size",
        "_start",
        "_sums",
        "events",
    )

    def __init__(self, kind: str) -> None:
        self.events = 0
        self._form = _UNDECIDED
        self._mark, self._idle, self._sums, self._one_prompt = _dialect(kind)
        self._head = b""  # the beginning of JSON
        self._rest = b""  # its end; or an event that is not whole yet
        self._size = 0
        self._last = b""  # the events that were fed last
        self._start: Tokens | None = None  # what was told before the end
        self._final: Tokens | None = None

    def feed(self, payload: bytes) -> None:
        """Take the next piece of the payload, chunk coding removed."""
        if (
            self.events
            and not self._rest
            and payload.startswith(_ORDINARY_EVENT)
            and payload.find(b"\n\n") == len(payload) - 2
        ):  # as nearly all pieces are: one event, and not the last of its choice
            if payload.endswith(self._mark):
                self.events += 1
                self._last = payload
            return
        if self._rest or self._form != _STREAM or not payload.endswith(b"\n\n"):
            payload = self._whole_events(payload)
        if count := payload.count(self._mark):
            if not self.events and self._start is None and _PROGRESS in payload:
                count = self._begin_with_progress(payload)
            self.events += count
            self._last = payload
        # In these few hundred octets, which hold neither, CPython's rfind takes half the time of its find.
        if payload.rfind(_TIMINGS) >= 0 or payload.rfind(_USAGE) >= 0:
            self._note(payload)

    def finish(self) -> Tokens | None:
        """Return the tokens of the answer, or of the part that passed; None where it told nothing."""
        if self._form == _STREAM:
            return self._from_events()
        if self._form == _OBJECT:
            return self._from_object()
        return self._final

    # Pieces

    def _whole_events(self, payload: bytes) -> bytes:
        """Return the events that the piece completes, none where the answer is JSON, and keep the rest."""
        if self._form == _UNDECIDED:
            payload = payload.lstrip()
            if payload:
                self._form = _form(payload[0])
        if self._form == _STREAM:
            return self._join(payload)
        if self._form == _OBJECT:
            self._keep(payload)
        elif self._form == _LIST:
            self._scan(payload)
        return b""

    def _join(self, payload: bytes) -> bytes:
        text = self._rest + payload
        end = text.rfind(b"\n\n")
        whole, rest = (text[: end + 2], text[end + 2 :]) if end >= 0 else (b"", text)
        if len(rest) > FRONT_BYTES + 2 * TAIL_BYTES:
            rest = rest[:FRONT_BYTES] + rest[-TAIL_BYTES:]
        self._rest = rest
        return whole

    def _keep(self, payload: bytes) -> None:
        """Keep an object's beginning and end."""
        self._size += len(payload)
        if room := HEAD_BYTES - len(self._head):
            self._head += payload[:room]
            payload = payload[room:]
        if len(payload) < TAIL_BYTES:
            payload = self._rest + payload
        self._rest = payload[-TAIL_BYTES:]

    def _scan(self, payload: bytes) -> None:
        """Sum the timings in a list: llama-server's own dialect answers several prompts so, each with all it has."""
        text = self._rest + payload
        done = 0
        while (place := text.find(_TIMINGS, done)) >= 0:
            end = text.find(b"}", place, place + _TIMINGS_BYTES) + 1
            if not end and len(text) < place + _TIMINGS_BYTES:
                self._rest = text[place:]
                return
            self._conclude(_told(_parse(b"{" + text[place:end] + b"}")))
            done = end or place + len(_TIMINGS)
        self._rest = text[done:][1 - len(_TIMINGS) :]

    # Events

    def _begin_with_progress(self, payload: bytes) -> int:
        """Take the prompt from the first event; return how many events carry content.

        While a prompt is read its events end with two braces, those with content with one.
        """
        first = payload[: payload.find(self._mark) + 1].rpartition(b"\n\n")[2]
        if self._sums and _PROGRESS in first[-TAIL_BYTES:]:
            progress = _members(_event(first).get("prompt_progress"))
            self._start = Tokens(_count(progress.get("total")), _count(progress.get("cache")), 0)
            if _TIMINGS in first[-TAIL_BYTES:]:
                self._idle = MAX_TOKENS  # every event that matters tells its own
            else:
                self._mark = _MARK_AFTER_PROGRESS
        return payload.count(self._mark)

    def _note(self, payload: bytes) -> None:
        """Read the events that tell tokens; a choice ends with one."""
        for text in payload.split(b"\n\n"):
            if _TIMINGS not in text and _USAGE not in text:
                continue
            if any(word in text[-TAIL_BYTES:] for word in _UNFINISHED):
                continue
            event = _event(text)
            if event.get("type") == "message_start":
                self._start = _told(event)
            else:
                self._conclude(_told(event))

    def _conclude(self, told: Tokens | None) -> None:
        if told is None:
            return
        if self._final is None or not self._sums:
            self._final = told
        else:
            self._final = _sum(self._final, told, one_prompt=self._one_prompt)

    def _from_events(self) -> Tokens | None:
        final, start = self._final, self._start or Tokens(0, 0, 0)
        if final is None:
            if not self.events and self._start is None:
                return None
            final = self._so_far()
        return final._replace(prompt=max(final.prompt, start.prompt), cached=max(final.cached, start.cached))

    def _so_far(self) -> Tokens:
        """Return what a stream that was cut had told: its last event does, in some dialects, else the events count."""
        if not self.events:
            return Tokens(0, 0, 0)
        end = self._last.find(b"\n\n", self._last.rfind(self._mark))
        told = _told(_event(self._last[:end].rpartition(b"\n\n")[2]))
        if told is None:
            return Tokens(0, 0, max(self.events - self._idle, 0))
        # Of several choices the last event tells its own only.
        return told if self._start else told._replace(completion=max(told.completion, self.events - self._idle))

    def _from_object(self) -> Tokens | None:
        if self._size > HEAD_BYTES + TAIL_BYTES:
            return _told(_last_members(self._rest) or _first_members(self._head))
        text = self._head + self._rest
        return _told_as_usual(text) or _told(_last_members(text)) or _told(_parse(text) or _first_members(text))


def keep_whole(kind: str, answer: bytes) -> Meter | bytes:
    """What is to be kept of a whole answer until somebody has time to read it: no more than a Meter would hold."""
    if len(answer) <= HEAD_BYTES + TAIL_BYTES:
        return answer
    meter = Meter(kind)
    meter.feed(answer)
    return meter


def read_tokens(kind: str, told: Meter | bytes | None) -> Tokens | None:
    """Return what an answer took: one that was metered as it passed, one that is here whole, or none."""
    if not isinstance(told, bytes):
        return None if told is None else told.finish()
    if told[:1] == b"{" and (tokens := _told_as_usual(told)):
        return tokens
    meter = Meter(kind)
    meter.feed(told)
    return meter.finish()
