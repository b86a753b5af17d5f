"""The reports as text, CSV and JSON."""

import csv
import io
import json
import re

import pytest

from bench import report
from support.benchmarks import make_result


def test_the_text_contains_facts_tables_and_notes() -> None:
    text = report.to_text(make_result())
    assert "model tiny" in text
    assert "chat, concurrency 4" in text
    assert re.search(r"direct +100\.0 +100\.0 +100\.0 +20\.0 ", text)
    assert re.search(r"chat: first token +1 +\+2\.00 ms +\+2\.00 ms +\+2\.00 ms", text)
    assert text.endswith("note: a note\n")
    assert "2 × timed out" not in text
    assert "4 × timed out" in report.to_text(make_result(error="timed out"))


def test_numbers_have_about_three_digits() -> None:
    assert [report.format_number(value) for value in (None, 0.123, 12.34, 1234.5)] == ["–", "0.12", "12.3", "1234"]


def test_csv_has_one_line_per_concurrency_and_target() -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv(make_result()))))
    assert [(row["concurrency"], row["target"]) for row in rows] == [
        (concurrency, target) for concurrency in "14" for target in ("direct", "gateway")
    ]
    assert float(rows[0]["first_ms_p50"]) == pytest.approx(100.0)
    assert rows[0]["prompt_tokens_per_second_p50"] == ""


def test_json_contains_everything_except_gaps() -> None:
    data = json.loads(report.to_json(make_result()))
    assert set(data) == {"facts", "notes", "summaries", "overheads", "runs"}
    assert data["runs"][0]["samples"][0]["first_s"] == 0.1
    assert "gaps_s" not in data["runs"][0]["samples"][0]
