"""Finds the reports of a large JSON response as it arrives in pieces, and counts the tokens that it lists one by one.

Nothing is parsed but the reports. A quote inside a string is escaped, so a member's name in quotes is never part of
generated text.
"""

import json
import re
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

from accounting.usage_reports import Tokens, object_of, reported

TIMINGS = b'"timings"'
USAGE = b'"usage"'
TORN_BYTES = 64  # of a name and the colon after it
_REPORT = re.compile(rb'"(timings|usage)"[ \t\r\n]*:[ \t\r\n]*(?=\{)')
_REPORT_BYTES = 4096  # they take about 300 bytes
# What decoding costs, in bytes, each of which takes about 20 nanoseconds: a report besides its size, and what is none.
_REPORT_COST = 128
_OTHER_COST = 8192
_LAST_REPORTS = 8
_DECODER = json.JSONDecoder()
# Each listed token has one of these: with `logprobs` or `n_probs`, and with `post_sampling_probs`.
_LISTED = (b'"top_logprobs"', b'"top_probs"')
_LONGEST = max(map(len, _LISTED))


class ReportSearch:
    """The search in one response. `listed` is how many tokens have been listed so far."""

    __slots__ = ("_end", "_rest", "listed")

    def __init__(self) -> None:
        self.listed = 0
        self._rest = b""  # what may be the beginning of a report
        self._end = b""  # of what has come

    def feed(self, payload: bytes) -> Iterator[tuple[bytes, Tokens]]:
        """Consume the next piece; yield the reports that it completes, each with its name.

        If decoding them costs more than a piece full of reports does, most are none: then only the last ones are.
        """
        self.count_listed(payload)
        text, self._rest = self._rest + payload, b""
        done, left, first = 0, 2.0 * (len(text) + _OTHER_COST), 0
        for match in _names(text):
            place = match.start()
            if left < 0:
                left, first = inf, _last_names(text)
            if place < first:
                continue
            report, size = _decode(text[match.end() : place + _REPORT_BYTES])
            if report is None and len(text) < place + _REPORT_BYTES:
                self._rest = text[place:]
                return
            left -= _OTHER_COST if report is None else _REPORT_COST + size
            tokens = reported({match[1].decode(): report}) if report else None
            if tokens is not None:
                yield match[1], tokens
            done = match.end()
        self._rest = text[done:][-TORN_BYTES:]

    def count_listed(self, payload: bytes) -> None:
        """Count the tokens that the next piece lists, of a response whose reports are not asked for."""
        before = self._end
        for name in _LISTED:
            self.listed += payload.count(name) + (before[1 - len(name) :] + payload[: len(name) - 1]).count(name)
        self._end = (before + payload)[1 - _LONGEST :]


def _names(text: bytes) -> Iterator["re.Match[bytes]"]:
    """Return the names of reports. If there are none, to look for the first one in this way takes half of the time."""
    places = [place for name in (TIMINGS, USAGE) if (place := text.find(name)) >= 0]
    return _REPORT.finditer(text, min(places)) if places else iter(())


def _last_names(text: bytes) -> int:
    """Return where the last names begin of a text that has many."""
    place = len(text)
    for _ in range(_LAST_REPORTS):
        place = max(text.rfind(TIMINGS, 0, place), text.rfind(USAGE, 0, place))
    return place


def _decode(text: bytes) -> tuple[Mapping[str, Any] | None, int]:
    """Return the object with which a text begins, and its size; None if there is no whole one."""
    try:
        value, size = _DECODER.raw_decode(text.decode("latin-1"))
    except (ValueError, RecursionError):
        return None, 0
    return object_of(value), size
