"""access_lines.py: each line in its two forms, as docs/CONFIGURATION.md says."""

import json
import re
from collections.abc import Iterable
from typing import Any

import pytest

from accounting.access_lines import FIELDS, json_lines, text_lines
from accounting.record_batch import RecordBatch
from accounting.request_record import Outcome, RequestRecord, Stage
from accounting.token_estimates import TokenEstimator
from support.paths import ROOT
from support.records import ENDED_AT, ENDED_S, NO_HEAD, PING, prepare, record


def batch(*records: RequestRecord) -> RecordBatch:
    return RecordBatch(records, TokenEstimator(), ENDED_AT - ENDED_S)


def text_line(*records: RequestRecord) -> str:
    (line,) = text_lines(batch(*records))
    return line.decode()


def json_line(*records: RequestRecord) -> dict[str, Any]:
    (line,) = json_lines(batch(*records))
    found: dict[str, Any] = json.loads(line)
    return found


def check_names(made: Iterable[str], expected: Iterable[str]) -> None:
    different = sorted(set(made) ^ set(expected))
    assert not different, f"scripts/accounting/access_lines.py and this test differ in {different}: add it to both."


# --- The text form ---


def test_text_line_has_every_field_and_no_query() -> None:
    line, expected = (
        text_line(record(outcome=Outcome.TRUNCATED)),
        "2026-01-02T03:04:05.678Z | alice | POST /v1/chat/completions | 200 | id=req-1 peer=192.0.2.7"
        " route=/v1/chat/completions backend_status=200 outcome=truncated stage=done bytes_in=11 bytes_out=222"
        " queue_ms=500 first_byte_ms=1000 total_ms=2000 prompt_tokens=10 cached_tokens=3 completion_tokens=20"
        " estimated_tokens=0 model=-",
    )
    check_names(re.findall(r" (\w+)=", line), re.findall(r" (\w+)=", expected))
    assert line == expected


def test_a_peer_with_a_zone_has_its_line() -> None:
    assert " id=req-1 peer=fe80::1%eth0 route=" in text_line(record(peer="fe80::1%eth0"))


def test_control_characters_are_escaped() -> None:
    assert " peer=a\\nb\\x1b route=" in text_line(record(peer="a\nb\x1b"))


def test_lines_that_have_most_in_common_differ_in_the_rest() -> None:
    first, second, third = text_lines(
        batch(record(), record(name="req-2", bytes_in=12), record(PING, "req-3", key_id="-", stage=Stage.QUEUED))
    )
    assert (b" id=req-1 " in first, b" bytes_in=11 " in first) == (True, True)
    assert (b" id=req-2 " in second, b" bytes_in=12 " in second) == (True, True)
    assert b" | - | GET /ping | 200 | id=req-3 " in third


# --- The JSON form ---


def test_json_line_has_every_field_and_no_path() -> None:
    line, expected = (
        json_line(record()),
        {
            "ts": "2026-01-02T03:04:05.678Z",
            "id": "req-1",
            "key": "alice",
            "peer": "192.0.2.7",
            "method": "POST",
            "route": "/v1/chat/completions",
            "status": 200,
            "backend_status": 200,
            "outcome": "done",
            "stage": "done",
            "bytes_in": 11,
            "bytes_out": 222,
            "queue_ms": 500,
            "first_byte_ms": 1000,
            "total_ms": 2000,
            "prompt_tokens": 10,
            "cached_tokens": 3,
            "completion_tokens": 20,
            "estimated_tokens": 0,
            "model": "-",
        },
    )
    check_names(line, expected)
    assert line == expected


# --- Both ---


def test_a_request_without_a_head_has_a_line_too() -> None:
    nothing = {"key_id": "-", "status": 400, "outcome": Outcome.REFUSED, "queued_s": 0.0, "left_queue_s": 0.0}
    made = record(NO_HEAD, "req-2", **nothing, first_byte_s=0.0)
    assert " | - | - - | 400 | id=req-2 " in text_line(made)
    assert text_line(made).endswith(
        " queue_ms=0 first_byte_ms=0 total_ms=2000 prompt_tokens=0 cached_tokens=0 completion_tokens=0"
        " estimated_tokens=0 model=-"
    )
    assert json_line(made)["method"] == "-"


def test_the_two_forms_agree() -> None:
    made = record(prepare("DELETE", "/models"), status=403, outcome=Outcome.REFUSED, backend_status=0)
    as_json = json_line(made)
    ts, key, request_line, status, rest = text_line(made).split(" | ")
    as_text = dict(part.split("=", 1) for part in rest.split(" "))
    as_text |= {"ts": ts, "key": key, "status": status, "method": request_line.partition(" ")[0]}
    assert as_text == {name: str(value) for name, value in as_json.items()}


def documented() -> dict[str, str]:
    """The fields of the table in docs/CONFIGURATION.md, in order, and the forms that have them."""
    page = (ROOT / "docs" / "CONFIGURATION.md").read_text(encoding="utf-8")
    section = page.partition("\n## Access log\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"(?m)^\| `(\w+)` \| ([a-z, ]+) \|", section))


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_has_the_documented_fields_in_the_documented_order(form: str) -> None:
    names = [name for name, forms in documented().items() if form in forms.split(", ")]
    if form == "json":
        assert list(json_line(record())) == names
    else:
        leading = ["ts", "key", "request_line", "status"]
        rest = text_line(record()).rpartition(" | ")[2]
        assert re.findall(r"(\w+)=", rest) == [name for name in names if name not in leading]
        assert set(leading) <= set(names)


def test_every_field_says_what_it_means() -> None:
    assert list(documented()) == [field.name for field in FIELDS]
    assert all(field.help.endswith(".") for field in FIELDS)
