"""Finds the reports of a large JSON response as it arrives in pieces, and counts the tokens that it lists one by one.

Nothing is parsed but the reports. A quote inside a string is escaped, so a member's name in quotes is never part of
generated text.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from accounting.usage_reports import Tokens, object_of, reported

TIMINGS = b'"timings"'
USAGE = b'"usage"'
TORN_BYTES = 64  # of a name and the colon after it
_REPORT = re.compile(rb'"(timings|usage)"[ \t\r\n]*:[ \t\r\n]*(?=\{)')
_REPORT_BYTES = 4096  # they take about 300 bytes
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
        """Consume the next piece; yield the reports that it completes, each with its name."""
        self._count_listed(payload)
        text, self._rest = self._rest + payload, b""
        done = 0
        while match := self._next_report(text, done):
            place = match.start()
            report = _decode(text[match.end() : place + _REPORT_BYTES])
            if report is None and len(text) < place + _REPORT_BYTES:
                self._rest = text[place:]
                return
            tokens = reported({match[1].decode(): report}) if report else None
            if tokens is not None:
                yield match[1], tokens
            done = match.end()
        self._rest = text[done:][-TORN_BYTES:]

    @staticmethod
    def _next_report(text: bytes, start: int) -> "re.Match[bytes] | None":
        """Return the next name of a report. Without one, to look for the names first takes much less time."""
        places = [place for name in (TIMINGS, USAGE) if (place := text.find(name, start)) >= 0]
        return _REPORT.search(text, min(places)) if places else None

    def _count_listed(self, payload: bytes) -> None:
        before = self._end
        for name in _LISTED:
            self.listed += payload.count(name) + (before[1 - len(name) :] + payload[: len(name) - 1]).count(name)
        self._end = (before + payload)[1 - _LONGEST :]


def _decode(text: bytes) -> Mapping[str, Any] | None:
    """Return the object with which a text begins; None if there is no whole one."""
    try:
        return object_of(json.JSONDecoder().raw_decode(text.decode("latin-1"))[0])
    except (ValueError, RecursionError):
        return None
