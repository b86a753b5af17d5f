"""report_search.py: reports anywhere in a large response, and how many tokens it lists."""

import json

import pytest

from accounting.report_search import ReportSearch
from accounting.token_counter import TokenCounter
from accounting.usage_reports import Tokens
from support.feeds import FEEDS, Feed

TIMINGS = {"cache_n": 1, "prompt_n": 2, "prompt_ms": 3.0, "predicted_n": 4, "predicted_ms": 5.0}
USAGE = {"prompt_tokens": 7, "completion_tokens": 8}
each_feed = pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)


def found(text: bytes, feed: Feed) -> tuple[list[tuple[bytes, Tokens]], int]:
    search = ReportSearch()
    reports = [each for piece in feed(text) for each in search.feed(piece)]
    return reports, search.listed


@each_feed
@pytest.mark.parametrize("separators", [(",", ":"), (" , ", " : ")])
def test_reports_are_found_wherever_they_are(feed: Feed, separators: tuple[str, str]) -> None:
    members = [{"a": "x" * 300, "timings": TIMINGS, "b": ["y"] * 300}, {"usage": USAGE}, {"timings": TIMINGS}]
    text = json.dumps(members, separators=separators).encode()
    timings = (b"timings", Tokens(3, 1, 4, 3.0, 5.0))
    assert found(text, feed)[0] == [timings, (b"usage", Tokens(7, 0, 8)), timings]


@each_feed
def test_what_looks_like_a_report_and_is_none_is_passed_over(feed: Feed) -> None:
    quoted = json.dumps({"content": json.dumps({"timings": TIMINGS, "usage": USAGE})}).encode()
    for text in (quoted, b'{"timings":5,"usage":{}}', b'{"timings":{"a":', b'{"timings":{"a"' + b"]" * 5000):
        assert found(text, feed)[0] == []


@each_feed
def test_listed_tokens_are_counted_each_once(feed: Feed) -> None:
    token = {"id": 1, "token": "a", "logprob": -1.0, "top_logprobs": [{"id": 2, "token": "b", "logprob": -2.0}] * 3}
    sampled = {"id": 1, "token": "a", "prob": 0.5, "top_probs": []}
    text = json.dumps({"completion_probabilities": [token] * 20 + [sampled] * 5, "content": '"top_probs"'}).encode()
    assert found(text, feed)[1] == 25


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are decoded."""
    texts: list[str] = []
    raw_decode = json.JSONDecoder.raw_decode

    def note(self: json.JSONDecoder, text: str, start: int = 0) -> tuple[object, int]:
        texts.append(text)
        return raw_decode(self, text, start)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", note)
    return texts


@pytest.mark.parametrize(
    ("other", "end", "most"),
    [
        (b'"usage":{', b"}", 40),
        (b'"usage" : {"a":[', b"]}", 40),
        (b'{"usage":{' + b'"a":1,' * 20, b'"b":1}}', 40),
        (b'"timings":{"a":1},', b"", 1300),
    ],
)
def test_a_report_is_found_behind_many_others_of_which_few_are_decoded(
    other: bytes, end: bytes, most: int, decoded: list[str]
) -> None:
    count = 60_000 // len(other)
    text = other * count + end * count + b" " * 4096 + b'{"usage":%b}' % json.dumps(USAGE).encode()
    (*_, last), _ = found(text, FEEDS["whole"])
    assert last == (b"usage", Tokens(7, 0, 8))
    assert len(decoded) <= most


def test_all_reports_of_a_list_of_nothing_else_are_found(decoded: list[str]) -> None:
    rates = dict.fromkeys(
        ("prompt_per_token_ms", "prompt_per_second", "predicted_per_token_ms", "predicted_per_second"), 1.5
    )
    text = json.dumps([{"timings": TIMINGS | rates}] * 3000, separators=(",", ":")).encode()
    assert len(found(text, FEEDS["whole"])[0]) == len(decoded) == 3000


def test_a_response_that_ends_with_its_report_is_only_searched_for_listed_tokens(decoded: list[str]) -> None:
    counter = TokenCounter("/v1/messages")
    counter.feed(b'{"content":[{"input":{' + b'"usage":{"top_probs":1},' * 1000)
    assert (counter.is_stream, decoded) == (False, [])
