"""The tokens that llama-server reports, in all of its spellings: its timings, OpenAI's usage, Anthropic's.

Input is JSON or what was parsed from it; nothing here raises for any input.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

# Numbers above these are errors of the backend, and would overflow sums and columns.
MAX_TOKENS = 1 << 40
MAX_MS = 1e12
# At most this many places are tried in a tail that contains the names many times, as a tool call's arguments may.
MAX_TRIES = 8

_NAMES = re.compile(rb'"(?:usage|timings)"\s*:\s*\{')
# Strings of a response that no model has generated.
_NOT_GENERATED = frozenset(
    (
        "completion_probabilities",
        "created",
        "finish_reason",
        "generation_settings",
        "id",
        "logprobs",
        "model",
        "object",
        "prompt",
        "role",
        "status",
        "stop_reason",
        "stop_type",
        "stopping_word",
        "system_fingerprint",
        "type",
    )
)
_PROMPT_TOKENS, _GENERATED_TOKENS = "tokens_evaluated", "tokens_predicted"  # in native answers, beside the timings
_LISTS_OF_TOKENS = ("tokens", "completion_probabilities")
_ENDS_OF_RESPONSES = ("response.completed", "response.incomplete", "response.failed")


class Tokens(NamedTuple):
    """The tokens of one response. `prompt` includes `cached`. The times are 0 if the backend did not report them.

    `estimated` is how many of prompt and completion are an estimate.
    """

    prompt: int
    cached: int
    completion: int
    prompt_ms: float = 0.0
    predicted_ms: float = 0.0
    estimated: int = 0


make_tokens = partial(tuple.__new__, Tokens)  # a third of the time of NamedTuple's own constructor
NO_TOKENS = Tokens(0, 0, 0)


class TokenColumns(NamedTuple):
    """The tokens of many responses, each part of them as one sequence: that is summed up and sorted at once."""

    prompts: Sequence[int] = ()
    cacheds: Sequence[int] = ()
    completions: Sequence[int] = ()
    prompt_ms: Sequence[float] = ()
    predicted_ms: Sequence[float] = ()
    estimateds: Sequence[int] = ()

    def cacheds_of_reports(self) -> Sequence[int]:
        """Return how many tokens were cached, of those responses that reported any tokens."""
        rows = zip(self.prompts, self.cacheds, self.completions, self.estimateds, strict=True)
        return [cached for prompt, cached, completion, estimated in rows if estimated < max(prompt + completion, 1)]


def token_columns(tokens: Sequence[Tokens]) -> TokenColumns:
    return TokenColumns._make(zip(*tokens, strict=True)) if tokens else TokenColumns()


class Choice(NamedTuple):
    """One choice of a whole response. `tokens` is 0 if nothing says how many it has.

    `text_bytes` is the size of its text in UTF-8, `limited` whether the limit on tokens ended it.
    """

    text_bytes: int
    tokens: int = 0
    limited: bool = False


def add_tokens(one: Tokens, other: Tokens, *, one_prompt: bool) -> Tokens:
    """Add the tokens of two choices of a response. A prompt that they share was processed once."""
    return Tokens(
        max(one.prompt, other.prompt) if one_prompt else one.prompt + other.prompt,
        max(one.cached, other.cached) if one_prompt else one.cached + other.cached,
        one.completion + other.completion,
        max(one.prompt_ms, other.prompt_ms) if one_prompt else one.prompt_ms + other.prompt_ms,
        one.predicted_ms + other.predicted_ms,
        one.estimated + other.estimated,
    )


# --- Members ---


def count_of(value: object) -> int:
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else 0


def _milliseconds(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= MAX_MS else 0.0


def object_of(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _from_timings(timings: Mapping[str, Any]) -> Tokens:
    cached = count_of(timings.get("cache_n"))
    return Tokens(
        prompt=cached + count_of(timings.get("prompt_n")),
        cached=cached,
        completion=count_of(timings.get("predicted_n")),
        prompt_ms=_milliseconds(timings.get("prompt_ms")),
        predicted_ms=_milliseconds(timings.get("predicted_ms")),
    )


def _from_usage(usage: Mapping[str, Any]) -> Tokens:
    """Parse OpenAI's two spellings, and Anthropic's, whose input tokens do not include cached ones."""
    details = object_of(usage.get("prompt_tokens_details") or usage.get("input_tokens_details"))
    cache_read = count_of(usage.get("cache_read_input_tokens"))
    cache_written = count_of(usage.get("cache_creation_input_tokens"))
    return Tokens(
        prompt=count_of(usage.get("prompt_tokens")) + count_of(usage.get("input_tokens")) + cache_read + cache_written,
        cached=count_of(details.get("cached_tokens")) + cache_read,
        completion=count_of(usage.get("completion_tokens")) + count_of(usage.get("output_tokens")),
    )


def reported(response: Mapping[str, Any]) -> Tokens | None:
    """Return the tokens that a response or event reports; llama-server's timings first: only they have the times."""
    kind = response.get("type")
    inner: Mapping[str, Any] = {}
    if kind == "message_start":
        inner = object_of(response.get("message"))
    elif type(kind) is str and kind.startswith("response."):
        inner = object_of(response.get("response"))
    if timings := object_of(response.get("timings")):
        return _from_timings(timings)
    if usage := object_of(response.get("usage") or inner.get("usage")):
        return _from_usage(usage)
    if _PROMPT_TOKENS in response or _GENERATED_TOKENS in response:
        return Tokens(count_of(response.get(_PROMPT_TOKENS)), 0, count_of(response.get(_GENERATED_TOKENS)))
    return None


def is_unfinished(event: Mapping[str, Any]) -> bool:
    """Whether an event is not the last of its choice, so that its report is not the final one.

    A native event without its `stop` is none that is known to be the last: the client asked for other fields.
    """
    kind = event.get("type")
    if type(kind) is str and kind.startswith("response."):
        return kind not in _ENDS_OF_RESPONSES
    choices = event.get("choices")
    if isinstance(choices, list):
        return any(isinstance(choice, dict) and choice.get("finish_reason", 0) is None for choice in choices)
    if _PROMPT_TOKENS in event or _GENERATED_TOKENS in event:
        return event.get("stop") is not True
    return event.get("stop") is False


def says_generated(response: Mapping[str, Any]) -> bool:
    """Whether a report has more than the prompt: of a native one the client may ask for that alone."""
    return _GENERATED_TOKENS in response or _PROMPT_TOKENS not in response or "timings" in response


# --- Choices ---


def choices_in(response: Mapping[str, Any]) -> list[Choice]:
    """Return the choices of a whole response of OpenAI's form."""
    choices = response.get("choices")
    return [_choice(choice) for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _choice(choice: Mapping[str, Any]) -> Choice:
    logprobs = object_of(choice.get("logprobs")).get("content")
    tokens = len(logprobs) if isinstance(logprobs, list) else 0
    return Choice(generated_bytes(choice), tokens, choice.get("finish_reason") == "length")


def generated_bytes(value: object) -> int:
    """Return the size of all generated text in a part of a response, in UTF-8."""
    size = 0
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            size += len(part.encode("utf-8", "surrogatepass"))
        elif isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            # A name may be a path: with `response_fields` a native answer has `generation_settings/grammar`.
            parts += [inner for name, inner in part.items() if name.partition("/")[0] not in _NOT_GENERATED]
    return size


def listed_tokens(response: object) -> int:
    """Return how many tokens a native response lists one by one: their ids, or their probabilities."""
    members = object_of(response)
    lists = [members.get(name) for name in _LISTS_OF_TOKENS]
    return max(len(each) if isinstance(each, list) else 0 for each in lists)


# --- Text ---


def parse_json(text: bytes) -> Any:
    """Return the value of a JSON text; None if it is no JSON, or nested deeper than Python can parse."""
    try:
        return json.loads(text.decode())  # from bytes, json would first have to detect the encoding
    except (ValueError, RecursionError):
        return None


def parse_members(text: bytes) -> Mapping[str, Any]:
    """Return the members of a JSON object; none if it is anything else."""
    return object_of(parse_json(text))


def last_members(tail: bytes) -> Mapping[str, Any]:
    """Return the members at the end of an object, given the end of its text.

    An opening brace before a member of the outermost object makes valid JSON of the text that follows; before a member
    of a nested object there would be closing brackets too many.
    """
    found: Mapping[str, Any] = {}
    places = [match.start() for match in _NAMES.finditer(tail)]
    for place in reversed(places[-MAX_TRIES:]):
        found = parse_members(b"{" + tail[place:]) or found
    return found


def first_members(head: bytes) -> Mapping[str, Any]:
    """Return the members at the beginning of an object, up to its usage, given the beginning of its text."""
    text = head.decode("latin-1")
    for match in list(_NAMES.finditer(head))[:MAX_TRIES]:
        try:
            _, end = json.JSONDecoder().raw_decode(text, match.end() - 1)
        except (ValueError, RecursionError):
            continue
        # One brace completes the object if the member belongs to the outermost object.
        if found := parse_members(head[:end] + b"}"):
            return found
    return {}
