"""Counts the tokens of a response while it is relayed, without changing it.

A TokenCounter keeps a limited part of a response of any size, and reads it at the end. It relies on one property of
JSON: a quote inside a string is escaped, so the bytes `"usage":` or `"timings":` are never part of generated text.

It knows no HTTP: from a response with a Content-Encoding it reads no tokens.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from accounting.report_search import TIMINGS, TORN_BYTES, USAGE, ReportSearch
from accounting.usage_reports import (
    NO_TOKENS,
    Choice,
    Tokens,
    add_tokens,
    choices_in,
    count_of,
    first_members,
    generated_bytes,
    is_unfinished,
    last_members,
    listed_tokens,
    make_tokens,
    object_of,
    parse_json,
    parse_members,
    reported,
    says_generated,
)

# What is kept of a JSON response: its beginning (with the usage of embeddings and rerank) and its end (with that of all
# others); of an event: its name and its end. A response or event that fits is parsed as a whole.
HEAD_BYTES = 4096
TAIL_BYTES = 16384
FRONT_BYTES = 128


class Count(NamedTuple):
    """What a response reports, and what its reports leave out.

    `tokens` are the reported ones; of a stream that was cut, those of its events are in them. `reports` is how many
    choices ended with a report. `choices` are those of a whole response, of which `tokens` counts the first only; there
    are none if it has one choice. `text_bytes` is the size of generated text that no report counts, `listed` how many
    tokens are listed one by one.
    """

    tokens: Tokens
    has_prompt: bool
    has_completion: bool
    reports: int = 1
    choices: tuple[Choice, ...] = ()
    text_bytes: int = 0
    listed: int = 0

    @property
    def is_reported(self) -> bool:
        return self.has_prompt or self.has_completion or self.reports > 0


# --- Parsing events ---


def _event(text: bytes) -> Mapping[str, Any]:
    """Return the members of an event's data, or, if that is long or deeply nested, those at its end."""
    whole = len(text) <= TAIL_BYTES
    found = parse_members(text[text.rfind(b"\n") + 1 :].removeprefix(b"data:")) if whole else {}
    return found or last_members(text[-TAIL_BYTES:])


_ESCAPED = b"\\u00"  # how the escape of an ASCII character begins; a name may be spelt so
# llama-server's own form has the listed tokens after the report, and nothing that the model has formed as JSON.
_NATIVE = frozenset(("/completion", "/completions", "/infill"))
_CHOICES = b'"choices"'
_PROGRESS = b'"prompt_progress":'
# An event with one of these, as llama-server spells them, is not the last of its choice.
_UNFINISHED = (b'"finish_reason":null', b'"stop":false')
_INDEX = re.compile(rb'"index"[ \t\r\n]*:[ \t\r\n]*[0-9]+')
_MAX_CHOICES = 4096

# How an event with content begins in llama-server.
_ORDINARY_EVENT = b'data: {"choices":[{"finish_reason":null'

# For each kind of stream: bytes that occur once per event with content, and how many of these events have no token. The
# tokens of a cut stream are estimated from them: an event may have several tokens, and half a character has no event.
_CONTENT_MARKS = {
    "messages": (b"content_block_delta\n", 0),
    "responses": (b".delta\n", 0),
    "chat": (b"}\n\n", 1),  # the first event has the role only
}
_DEFAULT_CONTENT_MARK = (b"}\n\n", 0)

_UNDECIDED, _STREAM, _OBJECT, _LIST, _UNREADABLE = range(5)


@lru_cache(maxsize=64)
def _formats(label: str) -> tuple[bytes, int, bool, bool, bool]:
    """Return the content mark, the number of marked events without a token, and how reports are combined.

    In messages the last report counts. In all others each choice ends with its own report, which are added up (third
    value); in chat and responses the choices share one prompt (fourth value). Last: whether it is
    llama-server's own form.
    """
    name = "chat" if label.endswith("chat/completions") else label.rpartition("/")[2]
    mark, empty_events = _CONTENT_MARKS.get(name, _DEFAULT_CONTENT_MARK)
    return mark, empty_events, name != "messages", name in ("chat", "responses"), label in _NATIVE


# How an event begins that ends its stream: the last one of OpenAI's, of its /v1/responses, of Anthropic's; an error.
_LAST_EVENT = re.compile(
    rb'data: ?(?:\[DONE\]|\{[ \t]*"error")|event: ?(?:response\.(?:completed|failed|incomplete)|message_stop|error)\n'
).match
_ERROR_EVENT = re.compile(rb'event: ?error\n|data: ?\{[ \t]*"error"').match


def _detect_format(first: int) -> int:
    """Detect from its first byte whether a response is an object, a list, a stream of events, or unreadable."""
    if first == 0x7B:
        return _OBJECT
    if first == 0x5B:
        return _LIST
    return _STREAM if first in b":deir" else _UNREADABLE  # comment, data, event, id, retry


# The end of a response as llama-server formats it: one anchored expression reads it in a fifth of the time that parsing
# JSON takes. A response that ends differently is parsed.
_COUNT = rb"(0|[1-9][0-9]{0,11})"
_MS = rb"([0-9]{1,11}\.?[0-9]{0,17})"
_NUMBER = rb"[0-9.e+-]{1,30}"
_TIMINGS_AT_END = re.compile(
    rb'"timings":\{"cache_n":%b,"prompt_n":%b,"prompt_ms":%b,"prompt_per_token_ms":%b,"prompt_per_second":%b,'
    rb'"predicted_n":%b,"predicted_ms":%b,"predicted_per_token_ms":%b,"predicted_per_second":%b\}\}\s*'
    % (_COUNT, _COUNT, _MS, _NUMBER, _NUMBER, _COUNT, _MS, _NUMBER, _NUMBER)
).fullmatch
# Without a brace or bracket between it and the response's last brace, the usage belongs to the outermost object.
_USAGE_AT_END = re.compile(
    rb'"usage":\{"completion_tokens":%b,"prompt_tokens":%b,"total_tokens":[0-9]{1,12}'
    rb'(?:,"prompt_tokens_details":\{"cached_tokens":%b\})?\}[^][{}\\]*\}\s*' % (_COUNT, _COUNT, _COUNT)
).fullmatch


class _Integers(dict[bytes, int]):
    """Integers by their digits. To look a number up takes a third of the time that to read it does."""

    def __missing__(self, digits: bytes) -> int:
        return int(digits)


_INTEGERS = _Integers({b"%d" % number: number for number in range(1000)})


def fast_tokens(text: bytes) -> Tokens | None:
    """Return the tokens of an object that ends as llama-server formats it; None if it must be parsed.

    They are those of the first choice: a response with several must be parsed.
    """
    place = text.rfind(TIMINGS) if text[-2:] == b"}}" else -1
    if place >= 0:
        if match := _TIMINGS_AT_END(text, place):
            cached, prompt, prompt_ms, completion, predicted_ms = match.groups()
            cache_n, prompt_n, predicted_n = _INTEGERS[cached], _INTEGERS[prompt], _INTEGERS[completion]
            return make_tokens((cache_n + prompt_n, cache_n, predicted_n, float(prompt_ms), float(predicted_ms), 0))
        return None
    place = text.rfind(USAGE)
    if place >= 0 and (match := _USAGE_AT_END(text, place)):
        completion, prompt, cached = match.groups()
        return make_tokens((int(prompt), int(cached) if cached else 0, int(completion), 0.0, 0.0, 0))
    return None


def _has_one_choice(text: bytes) -> bool:
    """Whether the last index is 0, or there is none."""
    place = text.rfind(b'"index":')
    return place < 0 or text[place + 8 : place + 10] == b"0,"


class TokenCounter:
    """Reads one response's tokens from its payload, in whatever pieces it arrives.

    `label` is the route's label. `events` is the number of events with content. Keeps at most about 40 KiB and the
    piece that was fed last.
    """

    __slots__ = (
        "_adds_choices",
        "_empty_events",
        "_final",
        "_format",
        "_head",
        "_initial",
        "_is_native",
        "_last",
        "_last_events",
        "_listed_before",
        "_mark",
        "_one_prompt",
        "_places",
        "_report_name",
        "_reports",
        "_search",
        "_size",
        "_tail",
        "events",
    )

    _search: ReportSearch  # in JSON

    def __init__(self, label: str, prompts: int = 0) -> None:
        """`prompts` is how many the request has, 0 if that is not known: choices of one prompt report it each."""
        self.events = 0
        self._format = _UNDECIDED
        self._mark, self._empty_events, self._adds_choices, self._one_prompt, self._is_native = _formats(label)
        self._one_prompt = self._one_prompt or prompts == 1
        self._head = b""  # the beginning of JSON, or all of a small list
        self._tail = b""  # the end of JSON, or an incomplete event
        self._size = 0
        self._places: list[int] = []  # where the choices of a large object have their indexes
        self._listed_before: list[int] = []  # how many tokens are listed before each of them
        self._report_name = b""  # of the reports in a list
        self._reports = 0
        self._last_events = b""
        self._last = b""  # the events that came last, except ordinary ones
        self._initial: Tokens | None = None  # reported before the content
        self._final: Tokens | None = None  # reported at the end, the sum of the choices so far

    def feed(self, payload: bytes) -> None:
        """Consume the next piece of the payload, without chunk framing."""
        if (
            self.events
            and not self._tail
            and self._initial is None
            and payload.startswith(_ORDINARY_EVENT)
            and payload.find(b"\n\n") == len(payload) - 2
        ):  # one event that is not the last of its choice, as nearly all pieces are
            if payload.endswith(self._mark):
                self.events += 1
                self._last_events = payload
            return
        if self._tail or self._format != _STREAM or not payload.endswith(b"\n\n"):
            payload = self._complete_events(payload)
            if not payload:
                return
        self._last = payload
        if count := payload.count(self._mark):
            if self._initial is not None or not self.events:
                count -= self._count_progress(payload)
            self.events += count
            self._last_events = payload
        # In these few hundred bytes, which contain neither, CPython's rfind takes half the time of its find.
        if payload.rfind(TIMINGS) >= 0 or payload.rfind(USAGE) >= 0 or payload.rfind(_ESCAPED) >= 0:
            self._read_reports(payload)

    def count(self) -> Count | None:
        """Return what the response reports, and what it does not; None if nothing of it was fed, or it is no text."""
        if self._format == _STREAM:
            return self._from_events()
        if self._format == _OBJECT:
            return self._from_object()
        return self._from_list() if self._format == _LIST else None

    @property
    def is_stream(self) -> bool:
        return self._format == _STREAM

    @property
    def relayed_tokens(self) -> int:
        """The tokens of a stream, by its events."""
        return max(self.events - self._empty_events, 0)

    @property
    def last_event(self) -> bytes:
        """The last event of a stream, besides ordinary ones; of a long one its beginning and its end."""
        start = self._last.rfind(b"\n\n", 0, -2)
        return self._last[start + 2 :] if start >= 0 else self._last

    @property
    def has_failed(self) -> bool:
        """Whether a stream ends with an error."""
        return _ERROR_EVENT(self.last_event) is not None

    def is_complete(self, answers: int) -> bool:
        """Whether the event that ends a stream of so many answers has been fed.

        llama-server's native streams say so in a member, for each answer: of several it is not known which is the last.
        """
        text = self.last_event
        if _LAST_EVENT(text) is not None:
            return True
        event = _event(text[:-2])
        return answers == 1 and event.get("stop") is True and not event.get("index")

    # --- Pieces ---

    def _complete_events(self, payload: bytes) -> bytes:
        """Return the events that the piece completes, none if the response is JSON, and keep the remainder."""
        if self._format == _UNDECIDED:
            payload = payload.lstrip()
            if payload:
                self._format = _detect_format(payload[0])
                if self._format != _STREAM:
                    self._search = ReportSearch()
        if self._format == _STREAM:
            return self._join(payload)
        if self._format == _OBJECT:
            self._find_report(payload, self._keep(payload))
        elif self._format == _LIST:
            self._scan(payload)
        return b""

    def _join(self, payload: bytes) -> bytes:
        text = self._tail + payload
        end = text.rfind(b"\n\n")
        complete, remainder = (text[: end + 2], text[end + 2 :]) if end >= 0 else (b"", text)
        if len(remainder) > FRONT_BYTES + 2 * TAIL_BYTES:
            remainder = remainder[:FRONT_BYTES] + remainder[-TAIL_BYTES:]
        self._tail = remainder
        return complete

    def _keep(self, payload: bytes) -> Sequence[int]:
        """Keep an object's beginning and end, and note where its choices are; return where those of this piece are."""
        new: list[int] = []
        may_have_places = self._adds_choices and len(self._places) < _MAX_CHOICES
        if may_have_places and (self._has_choices or _CHOICES in self._head[-TORN_BYTES:] + payload[:HEAD_BYTES]):
            before = (self._head[-TORN_BYTES:] + self._tail)[-TORN_BYTES:]
            start = self._size - len(before)
            found = [start + match.start() for match in _INDEX.finditer(before + payload)]
            last = self._places[-1] if self._places else -1
            new = [place for place in found if place > last][: _MAX_CHOICES - len(self._places)]
            self._places += new
        within = [max(place - self._size, 0) for place in new]
        self._size += len(payload)
        if room := HEAD_BYTES - len(self._head):
            self._head += payload[:room]
            payload = payload[room:]
        if len(payload) < TAIL_BYTES:
            payload = self._tail + payload
        self._tail = payload[-TAIL_BYTES:]
        return within

    def _find_report(self, payload: bytes, places: Sequence[int]) -> None:
        """Look for an object's report if it may not be at its end, and count the tokens that the object lists.

        They are counted for each choice, which begin in `places`.
        """
        if b'"embedding":' in self._head:  # it has no text, and the search takes twenty times as long as all else
            return
        if self._is_native:
            for _, tokens in self._search.feed(payload):
                self._final = tokens
            return
        for begin, end in zip([0, *places], [*places, len(payload)], strict=True):
            self._search.count_listed(payload[begin:end])
            self._listed_before.append(self._search.listed)
        self._listed_before.pop()  # it ends with no place

    def _scan(self, payload: bytes) -> None:
        """Add up the reports in a list, which answers several prompts or has several choices."""
        self._size += len(payload)
        self._head += payload[: HEAD_BYTES + TAIL_BYTES - len(self._head)]
        for name, tokens in self._search.feed(payload):
            self._report_name = self._report_name or name
            if name == self._report_name:
                self._add_report(tokens)

    def _from_list(self) -> Count:
        if self._final is None and self._size == len(self._head):
            for response in parse_json(self._head) or ():
                self._add_report(reported(object_of(response)))
        tokens = self._final
        if tokens is None:
            if self._size > len(self._head):
                listed = self._search.listed
                return _count_report(None, 0 if listed else self._size, listed)
            responses = parse_json(self._head) or ()
            return _count_report(None, generated_bytes(responses), sum(map(listed_tokens, responses)))
        return Count(tokens, tokens.prompt > 0, tokens.completion > 0, self._reports)

    # --- Events ---

    def _count_progress(self, payload: bytes) -> int:
        """Return how many of the marked events are about the prompt's progress; the first has the prompt's tokens.

        A stream that reports its progress begins with that. Its later choices may do so among the first one's content.
        """
        if self._mark != _DEFAULT_CONTENT_MARK[0] or _PROGRESS not in payload:
            return 0
        if self._initial is None:
            first = payload[: payload.find(self._mark) + 1].rpartition(b"\n\n")[2]
            if _PROGRESS not in first[-TAIL_BYTES:]:
                return 0
            progress = object_of(_event(first).get("prompt_progress"))
            self._initial = Tokens(count_of(progress.get("total")), count_of(progress.get("cache")), 0)
        return payload.count(_PROGRESS)

    def _read_reports(self, payload: bytes) -> None:
        """Read the events that report tokens, which are the last ones of their choices."""
        for text in payload.split(b"\n\n"):
            if TIMINGS not in text and USAGE not in text and _ESCAPED not in text:
                continue
            if any(mark in text[-TAIL_BYTES:] for mark in _UNFINISHED):
                continue
            event = _event(text)
            if event.get("type") == "message_start":
                self._initial = reported(event)
            elif is_unfinished(event):
                continue
            elif says_generated(event):
                self._add_report(reported(event))
            else:
                self._initial = reported(event)

    def _add_report(self, tokens: Tokens | None) -> None:
        if tokens is None:
            return
        self._reports += 1
        if self._final is None or not self._adds_choices:
            self._final = tokens
        else:
            self._final = add_tokens(self._final, tokens, one_prompt=self._one_prompt)

    def _from_events(self) -> Count | None:
        final, initial = self._final, self._initial or NO_TOKENS
        if final is None:
            if not self.events and self._initial is None:
                return None
            final = self._estimate()
            final = final._replace(estimated=final.completion)
        tokens = final._replace(prompt=max(final.prompt, initial.prompt), cached=max(final.cached, initial.cached))
        return Count(tokens, tokens.prompt > 0, True, self._reports)

    def _estimate(self) -> Tokens:
        """Return the tokens of a stream that was cut: as reported by its last event, else the number of events."""
        if not self.events:
            return NO_TOKENS
        end = self._last_events.find(b"\n\n", self._last_events.rfind(self._mark))
        tokens = reported(_event(self._last_events[:end].rpartition(b"\n\n")[2]))
        if tokens is None:
            return Tokens(0, 0, self.relayed_tokens)
        # With several choices, the last event reports only its own.
        return tokens._replace(completion=max(tokens.completion, self.relayed_tokens))

    def _from_object(self) -> Count:
        if self._size > HEAD_BYTES + TAIL_BYTES:
            return self._from_ends()
        text = self._head + self._tail
        if _has_one_choice(text) and (tokens := fast_tokens(text)):
            return Count(tokens, True, True)
        response = parse_json(text)
        if isinstance(response, dict):
            return _count_whole(response)
        return _count_report(reported(last_members(text) or first_members(text)), self._size)

    def _from_ends(self) -> Count:
        """Return the tokens of an object of which only the ends are kept. The text between two indexes is a choice."""
        tokens = reported(last_members(self._tail)) or self._final or reported(first_members(self._head))
        places, listed = self._places, self._search.listed
        count = _count_report(tokens, 0 if listed else self._size, listed)
        if len(places) < 2:
            return count
        if listed and tokens is not None:
            ends = [*self._listed_before[1:], listed]
            each = [after - before for before, after in zip(self._listed_before, ends, strict=False)]
            return count._replace(choices=tuple([Choice(0, number) for number in each]))
        sizes = [after - before for before, after in zip(places, [*places[1:], self._size], strict=True)]
        if b'"text"' in self._head.partition(b'"index"')[0]:  # the text of a choice precedes its index
            sizes = [after - before for before, after in zip([0, *places], places, strict=False)]
        return count._replace(choices=tuple(map(Choice, sizes)))

    @property
    def _has_choices(self) -> bool:
        return _CHOICES in self._head


def _count_whole(response: Mapping[str, Any]) -> Count:
    """Return the count of a parsed response."""
    tokens = reported(response)
    choices = choices_in(response)
    if tokens is None or not (tokens.prompt and tokens.completion):
        count = _count_report(tokens, generated_bytes(response), listed_tokens(response))
        return count._replace(choices=tuple(choices))
    if len(choices) < 2:
        return Count(tokens, True, True)
    # A report of more tokens than the first choice's timings is one of all choices.
    total = reported({"usage": response.get("usage")})
    if total is not None and total.completion > tokens.completion:
        return Count(tokens._replace(completion=total.completion), True, True, len(choices))
    return Count(tokens, True, True, 1, tuple(choices))


def _count_report(tokens: Tokens | None, text_bytes: int, listed: int = 0) -> Count:
    """Return the count of a response of which nothing but its report is known."""
    if tokens is None:
        return Count(NO_TOKENS, False, False, 0, text_bytes=text_bytes, listed=listed)
    return Count(tokens, tokens.prompt > 0, tokens.completion > 0, 1, text_bytes=text_bytes, listed=listed)


def buffer_if_small(label: str, response: bytes, prompts: int = 0) -> TokenCounter | bytes:
    """Return what to keep of a complete response until it is read: itself if it is small, else a TokenCounter."""
    if len(response) <= HEAD_BYTES + TAIL_BYTES:
        return response
    counter = TokenCounter(label, prompts)
    counter.feed(response)
    return counter


def read_count(label: str, response: TokenCounter | bytes | None, prompts: int = 0) -> Count | None:
    """Return the count of a response: one that was fed while it was relayed, one that was kept, or none."""
    if not isinstance(response, bytes):
        return None if response is None else response.count()
    counter = TokenCounter(label, prompts)
    counter.feed(response)
    return counter.count()
