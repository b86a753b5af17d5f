"""The templates of llama-server's answers."""

import json
from types import SimpleNamespace

import pytest

from mock.endpoints import GENERATING, PAGES
from mock.generation import Generation
from mock.templates import TEMPLATES, fill, parse_templates, to_event, to_events, to_json

PARTS = parse_templates(TEMPLATES)


def generation() -> Generation:
    made = Generation("x", "mock", 1, max_tokens=1, finish_reason="stop")
    made.next_word()
    return made


def test_a_template_is_parsed_with_its_fragments_and_continuation_lines() -> None:
    text = '\n<part>       "b":$b\nname whole   {"a":1,\n             <part>}\nname end     [DONE]\n'
    assert parse_templates(text) == {"name": {"whole": ['{"a":1,"b":$b}'], "end": ["[DONE]"]}}


def test_attributes_are_inserted_as_json() -> None:
    source = SimpleNamespace(text='a"ü', count=2, cached_tokens=None)
    assert fill('{"t":$text,"n":$count,"c":$cached_tokens}', source) == '{"t":"a\\"ü","n":2,"c":null}'


def test_events_have_a_type_if_they_have_a_name() -> None:
    assert to_event('{"a":1}') == 'data: {"a":1}\n\n'
    assert to_event("[DONE]") == "data: [DONE]\n\n"
    assert to_event("message_stop {}") == 'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    assert to_event('delta {"a":1}') == 'event: delta\ndata: {"type":"delta","a":1}\n\n'
    assert to_events(["[1]", "[2]"], None) == b"data: [1]\n\ndata: [2]\n\n"


def test_json_is_compact() -> None:
    assert to_json({"a": [1, "ü"]}) == '{"a":[1,"ü"]}'


@pytest.mark.parametrize("answer", PARTS)
def test_every_template_is_json_and_names_existing_attributes(answer: str) -> None:
    page = SimpleNamespace(**dict.fromkeys(("slots", "model", "created"), 0))
    source = page if answer.startswith("/") else generation()
    for templates in PARTS[answer].values():
        for template in templates:
            data = fill(to_event(template), source).rpartition("data: ")[2].strip()
            assert data == "[DONE]" or isinstance(json.loads(data), dict | list)


def test_every_endpoint_has_its_templates() -> None:
    for endpoint in GENERATING.values():
        assert {"delta", "closing", "whole"} <= set(PARTS[endpoint.answer])
    for answer in PAGES.values():
        assert set(PARTS[answer]) == {"whole"}
