"""The access log's lines: one table of fields. No line has a prompt, a query string or a key in it.

A new field is a new row of FIELDS. The text form is `ts | key | METHOD /path | status | name=value …`; the JSON form
has the fields by name.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mod
from typing import Any

from accounting.record_batch import RecordBatch, spans_ms
from core.logs import escape, timestamps

Column = Callable[[RecordBatch], Sequence[Any]]


@dataclass(frozen=True)
class Field:
    """One field: its name, its meaning for the docs, and its value for each request of a batch.

    `format` is how the text form writes it: %b for bytes that need no escaping, %d for an integer, or nothing for any
    other value. Fields without a format have few values, and are written once for all requests alike.
    """

    name: str
    help: str
    column: Column
    format: str = ""
    text: bool = True
    json: bool = True


def _timestamps(batch: RecordBatch) -> Sequence[bytes]:
    return timestamps([ended_s + batch.epoch_s for ended_s in batch.ended_s])


def _methods(batch: RecordBatch) -> Sequence[str]:
    return [record.prepared.request_line.partition(b" ")[0].decode() for record in batch.records]


# fmt: off
FIELDS: tuple[Field, ...] = (
    Field("ts", "When the request ended, in UTC.", _timestamps, "%b"),
    Field("id", "The request's id, the client's own or the gateway's, as in X-Request-Id.",
          lambda batch: batch.ids, "%b"),
    Field("key", "The key's id; - if there was no valid key. With a 401 it came from elsewhere than its from=.",
          lambda batch: batch.key_ids),
    Field("peer", "The client's address, behind TRUSTED_PROXIES too.",
          lambda batch: [record.peer for record in batch.records]),
    Field("method", "The request's method.", _methods, text=False),
    Field("request_line", "Method and path, without the query.",
          lambda batch: [record.prepared.request_line for record in batch.records], "%b", json=False),
    Field("route", "The route, as the table of routes has it.", lambda batch: batch.labels),
    Field("status", "The status sent; 499 if the client left before.", lambda batch: batch.statuses),
    Field("backend_status", "llama-server's status; 0 if it was not asked or did not answer.",
          lambda batch: [record.backend_status for record in batch.records]),
    Field("outcome", "done, truncated, cancelled, refused or timed_out.", lambda batch: batch.outcomes),
    Field("stage", "How far the request came.", lambda batch: [record.stage for record in batch.records]),
    Field("bytes_in", "Bytes of the request's body.",
          lambda batch: [record.bytes_in for record in batch.records], "%d"),
    Field("bytes_out", "Bytes of the response, its head included.",
          lambda batch: [record.bytes_out for record in batch.records], "%d"),
    Field("queue_ms", "Milliseconds that it waited for a slot.",
          lambda batch: spans_ms(batch.queued_s, batch.left_queue_s), "%d"),
    Field("first_byte_ms", "Milliseconds from the head to the response's first byte.",
          lambda batch: spans_ms(batch.started_s, batch.first_byte_s), "%d"),
    Field("total_ms", "Milliseconds from the head to the end.",
          lambda batch: spans_ms(batch.started_s, batch.ended_s), "%d"),
    Field("prompt_tokens", "Tokens of the prompt, those from the cache included.",
          lambda batch: batch.used.prompts, "%d"),
    Field("cached_tokens", "Tokens of the prompt that llama-server found in its cache.",
          lambda batch: batch.used.cacheds, "%d"),
    Field("completion_tokens", "Tokens generated.", lambda batch: batch.used.completions, "%d"),
    Field("estimated_tokens", "How many tokens of prompt and completion are an estimate; 0 if all were reported.",
          lambda batch: batch.used.estimateds, "%d"),
    Field("model", "The model with MODELS=router; - if it is not known, or there is one only.",
          lambda batch: [record.model for record in batch.records]),
)
# fmt: on

# The text form begins with these, without their names.
_LEADING = ("ts", "key", "request_line", "status")
_BY_NAME = {field.name: field for field in FIELDS}
_TEXT = (*(_BY_NAME[name] for name in _LEADING), *(each for each in FIELDS if each.text and each.name not in _LEADING))
_SHARED = tuple(field for field in _TEXT if not field.format)
_OWN = tuple(field for field in _TEXT if field.format)
_JSON = tuple(field for field in FIELDS if field.json)
_TEXT_FORM = " | ".join(
    [
        *(f"{{{field.name}}}" for field in _TEXT[: len(_LEADING)]),
        " ".join(f"{field.name}={{{field.name}}}" for field in _TEXT[len(_LEADING) :]),
    ]
)


def text_lines(batch: RecordBatch) -> Iterable[bytes]:
    """Return the lines in text form, without their ends. No part holds a blank or a control byte."""
    templates = map(_template, *[field.column(batch) for field in _SHARED])
    return map(mod, templates, zip(*[field.column(batch) for field in _OWN], strict=True))


@lru_cache(maxsize=256)
def _template(*shared: object) -> bytes:
    """Return the text line of all requests that have these values in common."""
    values = {field.name: field.format for field in _OWN}
    for field, value in zip(_SHARED, shared, strict=True):
        values[field.name] = escape(str(value)).replace("%", "%%")
    return _TEXT_FORM.format(**values).encode()


def json_lines(batch: RecordBatch) -> Iterable[bytes]:
    """Return the lines as JSON objects, without their ends."""
    values = [_as_text(field, field.column(batch)) for field in _JSON]
    names = [field.name for field in _JSON]
    return [json.dumps(dict(zip(names, row, strict=True))).encode() for row in zip(*values, strict=True)]


def _as_text(field: Field, column: Sequence[Any]) -> Iterable[Any]:
    return map(bytes.decode, column) if field.format == "%b" else column
