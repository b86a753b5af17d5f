"""The HTML report: well-formed, self-contained and escaped."""

import re
from html.parser import HTMLParser

import pytest

from bench.html_report import ticks, to_html
from bench.stats import Result
from support.benchmarks import make_result


class Balance(HTMLParser):
    """Fails unless every element is closed in order, and if an element would load or run anything."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


EMPTY = Result({}, (), (), (), ())


@pytest.mark.parametrize(
    "result",
    [make_result(), make_result(both=False), make_result(error="timed out"), EMPTY],
    ids=["both", "direct", "failed", "empty"],
)
def test_the_page_is_well_formed_and_self_contained(result: Result) -> None:
    page = to_html(result)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"https?:|url\(|@import|src=|href=|nan|inf\b", page)
    assert "prefers-color-scheme: dark" in page


def test_the_page_begins_with_what_the_gateway_adds() -> None:
    page = to_html(make_result())
    assert "<b>+2.00 ms</b>" in page
    assert page.count("<svg") == 6
    assert "Nothing was measured" in to_html(EMPTY)
    assert "Medians of direct" in to_html(make_result(both=False))


def test_text_from_outside_is_escaped() -> None:
    page = to_html(make_result(error="<script>", facts={"model": '<script>alert("x")</script>'}))
    assert "<script" not in page


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0.0, 9.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    low, *_, high = ticks(-1.3, 0.4)
    assert low <= -1.3 < 0.4 <= high
    assert len(ticks(0.0, 0.0)) >= 2
