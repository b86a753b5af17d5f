"""token_counter.py: responses of llama-server b11434, captured in tests/answers, in whatever pieces they arrive."""

import json
import pickle
import random
import re
from collections.abc import Callable, Iterable

import pytest

from accounting.token_counter import (
    HEAD_BYTES,
    TAIL_BYTES,
    TokenCounter,
    buffer_if_small,
    fast_tokens,
    read_count,
)
from accounting.usage_reports import MAX_TOKENS, Choice, Tokens
from support.feeds import in_pieces
from support.paths import TESTS

ANSWERS = TESTS / "answers"

CHAT, COMPLETIONS, NATIVE = "/v1/chat/completions", "/v1/completions", "/completion"
RESPONSES, MESSAGES, EMBEDDINGS = "/v1/responses", "/v1/messages", "/v1/embeddings"

# file: route, tokens of the complete response, events with content
SAMPLES: dict[str, tuple[str, Tokens | None, int]] = {
    "chat.sse": (CHAT, Tokens(28, 0, 6, 1.251, 1.31), 8),
    "chat_usage.sse": (CHAT, Tokens(28, 27, 6, 0.367, 1.055), 9),
    "chat_logprobs.sse": (CHAT, Tokens(28, 27, 3, 0.279, 0.343), 5),
    "chat_pertoken.sse": (CHAT, Tokens(28, 27, 3, 0.462, 0.522), 5),
    "chat_progress.sse": (CHAT, Tokens(924, 11, 3, 41.133, 1.252), 5),
    "chat_n2.sse": (CHAT, Tokens(28, 27, 12, 0.614, 4.649), 16),
    "chat_n2_usage.sse": (CHAT, Tokens(28, 27, 6, 0.403, 1.88), 12),
    "chat.json": (CHAT, Tokens(28, 27, 6, 0.349, 0.736), 0),
    "completions.sse": (COMPLETIONS, Tokens(3, 1, 6, 0.341, 0.829), 7),
    "completions2.sse": (COMPLETIONS, Tokens(6, 4, 12, 0.678, 2.413), 14),
    "completions.json": (COMPLETIONS, Tokens(3, 2, 6, 0.193, 0.494), 0),
    "completion.sse": (NATIVE, Tokens(3, 2, 6, 0.363, 1.203), 7),
    "completion_pertoken.sse": (NATIVE, Tokens(3, 2, 6, 0.434, 1.139), 7),
    "completion2.sse": (NATIVE, Tokens(6, 4, 12, 0.809, 3.202), 14),
    "completion.json": (NATIVE, Tokens(3, 2, 6, 0.187, 0.452), 0),
    "completion2.json": (NATIVE, Tokens(6, 4, 12, 0.794, 1.435), 0),
    "responses.sse": (RESPONSES, Tokens(25, 11, 6, 0.803, 0.88), 6),
    "responses.json": (RESPONSES, Tokens(25, 24, 6), 0),
    "messages.sse": (MESSAGES, Tokens(28, 11, 6), 6),
    "messages.json": (MESSAGES, Tokens(28, 27, 6), 0),
    "embeddings.json": (EMBEDDINGS, Tokens(6, 0, 0), 0),
    "embeddings_b64.json": (EMBEDDINGS, Tokens(6, 0, 0), 0),
    "embedding.json": ("/embedding", None, 0),
    "rerank.json": ("/v1/rerank", Tokens(8, 0, 0), 0),
    "error.json": (CHAT, None, 0),
}
each_sample = pytest.mark.parametrize("name", SAMPLES)


def reported(counter: TokenCounter) -> Tokens | None:
    """Return the tokens of the response, or of the part that was fed; None if there is no report."""
    count = counter.count()
    return None if count is None or not count.is_reported else count.tokens


def count_tokens(label: str, pieces: Iterable[bytes]) -> tuple[Tokens | None, int]:
    counter = TokenCounter(label)
    for piece in pieces:
        counter.feed(piece)
    tokens = reported(counter)
    if tokens is not None:
        # Sums of floats depend on nothing but their order; the samples are written with three decimals.
        prompt_ms, predicted_ms = round(tokens.prompt_ms, 3), round(tokens.predicted_ms, 3)
        tokens = Tokens(tokens.prompt, tokens.cached, tokens.completion, prompt_ms, predicted_ms)
    return tokens, counter.events


def read_tokens(label: str, response: TokenCounter | bytes | None) -> Tokens | None:
    """Return the tokens of a response that was kept, as a batch reads them."""
    if isinstance(response, bytes) and (tokens := fast_tokens(response)):
        return tokens
    count = read_count(label, response)
    return None if count is None or not count.is_reported else count.tokens


def bytewise(raw: bytes) -> list[bytes]:
    return [raw[place : place + 1] for place in range(len(raw))]


def torn(raw: bytes, dice: random.Random) -> list[bytes]:
    places = sorted(dice.randrange(len(raw) + 1) for _ in range(dice.randrange(12)))
    return [raw[start:end] for start, end in zip([0, *places], [*places, len(raw)], strict=True)]


FEEDS: dict[str, Callable[[bytes], list[bytes]]] = {
    "whole": lambda raw: [raw],
    "bytewise": bytewise,
    "by event": lambda raw: [event + b"\n\n" for event in raw.split(b"\n\n")[:-1]] or [raw],
    "two events": lambda raw: (
        [b"\n\n".join(raw.split(b"\n\n")[:2]) + b"\n\n", raw.split(b"\n\n", 2)[2]] if raw.count(b"\n\n") > 1 else [raw]
    ),
    "inside the separator": lambda raw: raw.replace(b"\n\n", b"\n\0\n").split(b"\0"),
    "empty pieces": lambda raw: [b"", raw, b""],
}


# --- Captured responses ---


def test_each_sample_is_tested() -> None:
    assert sorted(SAMPLES) == sorted(path.name for path in ANSWERS.iterdir())


@each_sample
@pytest.mark.parametrize("feed", FEEDS)
def test_tokens_are_those_that_the_backend_reports(name: str, feed: str) -> None:
    label, tokens, events = SAMPLES[name]
    assert count_tokens(label, FEEDS[feed]((ANSWERS / name).read_bytes())) == (tokens, events)


@each_sample
def test_tokens_are_the_same_wherever_a_response_is_split(name: str) -> None:
    label, tokens, events = SAMPLES[name]
    raw = (ANSWERS / name).read_bytes()
    # The head and the end of a response are read by other means than what is between.
    first = random.Random(name).randrange(7)
    for place in {*range(50), *range(first, len(raw), 7), *range(max(0, len(raw) - 200), len(raw) + 1)}:
        assert count_tokens(label, (raw[:place], raw[place:])) == (tokens, events), place


@each_sample
def test_tokens_of_a_cut_response_do_not_depend_on_its_pieces(name: str) -> None:
    label, dice = SAMPLES[name][0], random.Random(name)
    raw = (ANSWERS / name).read_bytes()
    for end in dice.sample(range(len(raw)), 30):
        part = raw[:end]
        expected = count_tokens(label, [part])
        for _ in range(5):
            assert count_tokens(label, torn(part, dice)) == expected, end


@each_sample
def test_damaged_responses_never_raise_and_do_not_depend_on_their_pieces(name: str) -> None:
    label, dice = SAMPLES[name][0], random.Random(name)
    raw = (ANSWERS / name).read_bytes()
    for _ in range(60):
        damaged = bytearray(raw[-2500:] if dice.random() < 0.3 else raw[:2500])
        for _ in range(dice.randrange(1, 6)):
            place = dice.randrange(len(damaged))
            damaged[place : place + dice.randrange(3)] = dice.choice(
                [b"\n\n", b"}", b"{", b'"', b"\\", b"\0", b"9" * 30, b"-1", b"null", b"[" * 20, b"\xff", b" "]
            )
        expected = count_tokens(label, [bytes(damaged)])
        for _ in range(5):
            assert count_tokens(label, torn(bytes(damaged), dice)) == expected


# --- Other spellings of the same JSON ---


def with_blanks(value: object) -> str:
    return json.dumps(value, separators=(" , ", " :  "))


def reversed_members(value: object) -> str:
    def turned(part: object) -> object:
        if isinstance(part, dict):
            return {name: turned(inner) for name, inner in reversed(part.items())}
        return [turned(inner) for inner in part] if isinstance(part, list) else part

    return json.dumps(turned(value), separators=(",", ":"))


def with_escapes(value: object) -> str:
    text = json.dumps(value, separators=(",", ":"))
    for name in ("timings", "usage", "finish_reason", "prompt_n", "predicted_n", "stop", "type"):
        text = text.replace(f'"{name}":', f'"\\u{ord(name[0]):04x}{name[1:]}":')
    return text


SPELLINGS = {"blanks": with_blanks, "reversed members": reversed_members, "escaped names": with_escapes}


def spelt(raw: bytes, spell: Callable[[object], str]) -> bytes:
    if raw[:1] in b"{[":
        return spell(json.loads(raw)).encode()
    lines = raw.decode().split("\n")
    is_json = re.compile("data: ?[{]").match
    return "\n".join("data: " + spell(json.loads(line[5:])) if is_json(line) else line for line in lines).encode()


@each_sample
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_tokens_do_not_depend_on_the_spelling_of_json(name: str, spelling: str) -> None:
    label, tokens, _ = SAMPLES[name]
    raw = spelt((ANSWERS / name).read_bytes(), SPELLINGS[spelling])
    for feed in ("whole", "by event", "inside the separator"):
        assert count_tokens(label, FEEDS[feed](raw))[0] == tokens
    assert count_tokens(label, torn(raw, random.Random(name)))[0] == tokens


# --- Several choices ---


def chat_of(*choices: dict[str, object], **more: object) -> bytes:
    answer = {"choices": [{"index": at, **choice} for at, choice in enumerate(choices)], **more}
    return json.dumps(answer, separators=(",", ":")).encode()


def said(text: str, finish: str = "length", **more: object) -> dict[str, object]:
    return {"finish_reason": finish, "message": {"role": "assistant", "content": text}, **more}


FIRST_CHOICE = {"usage": {"completion_tokens": 6, "prompt_tokens": 28, "total_tokens": 34}}


def test_a_whole_response_with_several_choices_has_a_report_of_the_first_only() -> None:
    raw = chat_of(said("a b c"), said("a b"), said("ä", "stop"), **FIRST_CHOICE)
    count = read_count(CHAT, raw)
    assert count is not None
    assert count.tokens == Tokens(28, 0, 6)
    assert count.choices == (Choice(5, 0, True), Choice(3, 0, True), Choice(2, 0, False))


def test_choices_with_log_probabilities_have_a_token_for_each() -> None:
    raw = chat_of(said("a"), said("a b", logprobs={"content": [{"token": "a"}, {"token": " b"}]}), **FIRST_CHOICE)
    count = read_count(CHAT, raw)
    assert count is not None
    assert count.choices[1] == Choice(3, 2, True)


def test_a_report_of_more_than_the_first_choice_is_one_of_all() -> None:
    timings = {"cache_n": 1, "prompt_n": 2, "predicted_n": 6}
    raw = chat_of(said("a"), said("b"), usage={"completion_tokens": 12, "prompt_tokens": 3}, timings=timings)
    count = read_count(CHAT, raw)
    assert count is not None
    assert (count.tokens, count.choices) == (Tokens(3, 1, 12), ())


@pytest.mark.parametrize("piece", [777, 65536, 1 << 22])
@pytest.mark.parametrize("label", [CHAT, COMPLETIONS])
def test_the_choices_of_a_large_response_are_measured_as_they_pass(label: str, piece: int) -> None:
    sizes = (30_000, 60_000, 10)
    if label == CHAT:
        raw = chat_of(*(said("x" * size) for size in sizes), **FIRST_CHOICE)
    else:
        texts = [{"text": "x" * size, "index": at, "finish_reason": "stop"} for at, size in enumerate(sizes)]
        raw = json.dumps({"choices": texts, **FIRST_CHOICE}, separators=(",", ":")).encode()
    counter = TokenCounter(label)
    for place in range(0, len(raw), piece):
        counter.feed(raw[place : place + piece])
    count = counter.count()
    assert count is not None
    assert (count.tokens, len(count.choices)) == (Tokens(28, 0, 6), 3)
    assert all(size <= choice.text_bytes <= size + 300 for size, choice in zip(sizes, count.choices, strict=True))


def test_the_places_of_few_thousand_choices_are_kept() -> None:
    counter = TokenCounter(CHAT)
    raw = chat_of(*(said("x") for _ in range(9000)), **FIRST_CHOICE)
    for place in range(0, len(raw), 65536):
        counter.feed(raw[place : place + 65536])
    assert kept_bytes(counter) < 60_000
    count = counter.count()
    assert count is not None
    assert len(count.choices) == 4096


def test_a_list_of_responses_is_summed() -> None:
    one = (ANSWERS / "responses.json").read_bytes()
    for raw in (b"[" + one + b"," + one + b"]", b"[\n" + spelt(one, with_blanks) + b" , " + one + b"]"):
        assert count_tokens(RESPONSES, [raw]) == count_tokens(RESPONSES, bytewise(raw)) == (Tokens(25, 24, 12), 0)


def test_a_stream_of_two_responses_is_summed() -> None:
    raw = (ANSWERS / "responses.sse").read_bytes()
    assert count_tokens(RESPONSES, [raw, raw]) == (Tokens(25, 11, 12, 0.803, 1.76), 12)


# --- What reports leave out ---


@pytest.mark.parametrize(
    ("raw", "tokens", "known", "text_bytes"),
    [
        (b'{"content":" a b","stop":true}', Tokens(0, 0, 0), (False, False), 4),
        (b'{"content":"a","tokens_predicted":6}', Tokens(0, 0, 6), (False, True), 1),
        (b'{"content":"a","tokens_evaluated":2}', Tokens(2, 0, 0), (True, False), 1),
        (b'[{"content":" a b"},{"content":""}]', Tokens(0, 0, 0), (False, False), 4),
        (
            b'{"choices":[{"message":{"tool_calls":[{"function":{"arguments":"abc"}}]}}]}',
            Tokens(0, 0, 0),
            (False, False),
            3,
        ),
    ],
)
def test_what_a_response_does_not_report_is_known(
    raw: bytes, tokens: Tokens, known: tuple[bool, bool], text_bytes: int
) -> None:
    count = read_count(NATIVE, raw)
    assert count is not None
    assert (count.tokens, (count.has_prompt, count.has_completion), count.text_bytes) == (tokens, known, text_bytes)


# --- Streams that were cut ---


def cut(name: str, events: int) -> tuple[str, bytes]:
    """Return the first events of a sample, and half of the next."""
    raw = (ANSWERS / name).read_bytes()
    parts = raw.split(b"\n\n")
    return SAMPLES[name][0], b"\n\n".join(parts[:events]) + b"\n\n" + parts[events][:40]


@pytest.mark.parametrize(
    ("name", "events", "expected"),
    [
        ("chat.sse", 1, Tokens(0, 0, 0)),
        ("chat.sse", 4, Tokens(0, 0, 3)),
        ("chat_n2.sse", 6, Tokens(0, 0, 5)),
        ("chat_pertoken.sse", 1, Tokens(28, 27, 0)),
        ("chat_pertoken.sse", 3, Tokens(28, 27, 0)),
        ("chat_pertoken.sse", 5, Tokens(28, 27, 2, 0.462, 0.334)),
        ("chat_progress.sse", 1, Tokens(924, 11, 0)),
        ("chat_progress.sse", 2, Tokens(924, 11, 0)),
        ("chat_progress.sse", 5, Tokens(924, 11, 2)),
        ("completions.sse", 3, Tokens(0, 0, 3)),
        ("completion.sse", 3, Tokens(3, 0, 3)),
        ("completion_pertoken.sse", 3, Tokens(3, 2, 3, 0.434, 0.35)),
        ("completion2.sse", 1, None),
        ("completion2.sse", 6, Tokens(3, 0, 5)),
        ("responses.sse", 4, None),
        ("responses.sse", 7, Tokens(0, 0, 3)),
        ("messages.sse", 1, Tokens(28, 11, 0)),
        ("messages.sse", 5, Tokens(28, 11, 3)),
    ],
)
def test_a_cut_stream_is_charged_for_what_was_relayed(name: str, events: int, expected: Tokens | None) -> None:
    label, part = cut(name, events)
    tokens, _ = count_tokens(label, [part])
    assert tokens == expected


def test_comments_and_pings_are_not_counted() -> None:
    raw = (ANSWERS / "chat.sse").read_bytes()
    first, rest = raw.split(b"\n\n", 1)
    assert count_tokens(CHAT, [b":\n\n", first + b"\n\n:\n\n", b":\n\n" + rest]) == SAMPLES["chat.sse"][1:]
    raw = (ANSWERS / "messages.sse").read_bytes()
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    assert count_tokens(MESSAGES, [ping, raw, ping]) == SAMPLES["messages.sse"][1:]


def test_a_stream_that_ends_in_an_error_is_charged_for_what_was_relayed() -> None:
    label, part = cut("chat.sse", 4)
    error = b'\n\ndata: {"error":{"code":500,"message":"x","type":"server_error"}}\n\n'
    assert count_tokens(label, [part.rpartition(b"\n\n")[0], error]) == (Tokens(0, 0, 4), 5)


# --- Responses without a sample ---


def test_an_audio_transcription_is_read() -> None:
    usage = '"usage":{"type":"tokens","input_tokens":40,"output_tokens":7,"input_tokens_details":{"cached_tokens":4}}'
    raw = f'{{"type":"transcript.text.done","text":"a",{usage}}}'.encode()
    delta = b'data: {"type":"transcript.text.delta","delta":"a"}\n\n'
    assert count_tokens("/v1/audio/transcriptions", [raw]) == (Tokens(40, 4, 7), 0)
    assert count_tokens("/v1/audio/transcriptions", [delta, b"data: " + raw + b"\n\n"]) == (Tokens(40, 4, 7), 2)
    assert count_tokens("/v1/audio/transcriptions", [delta, delta]) == (Tokens(0, 0, 2), 2)


def test_anthropic_tokens_written_to_the_cache_are_prompt() -> None:
    usage = {"input_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 11, "output_tokens": 2}
    assert count_tokens(MESSAGES, [json.dumps({"usage": usage}).encode()]) == (Tokens(23, 7, 2), 0)


def test_the_last_of_several_message_deltas_counts() -> None:
    raw = (ANSWERS / "messages.sse").read_bytes()
    early = b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":3}}\n\n'
    place = raw.index(b"event: content_block_stop")
    assert count_tokens(MESSAGES, [raw[:place], early, raw[place:]]) == SAMPLES["messages.sse"][1:]


def test_a_response_without_timings_is_read_by_its_usage() -> None:
    done = {"type": "response.completed", "response": {"usage": {"input_tokens": 3, "output_tokens": 2}}}
    raw = b"event: response.completed\ndata: " + json.dumps(done, separators=(",", ":")).encode() + b"\n\n"
    assert count_tokens(RESPONSES, [raw]) == (Tokens(3, 0, 2), 0)


def test_usage_with_every_chunk_counts_once() -> None:
    """Some backends report the usage so far with every event; only a choice's last event counts."""
    chunk = (
        b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":%s}],"usage":{"prompt_tokens":5,%s}}\n\n'
    )
    early, last = chunk % (b"null", b'"completion_tokens":1'), chunk % (b'"stop"', b'"completion_tokens":2')
    assert count_tokens(CHAT, [early, last]) == (Tokens(5, 0, 2), 2)
    assert count_tokens(CHAT, [early]) == (Tokens(5, 0, 1), 1)


@pytest.mark.parametrize("raw", [b"", b" \r\n", b"\x1f\x8b\x08 gzip", b"\xce\xb2\xcf brotli", b"OK", b"data", b"null"])
def test_an_unreadable_response_has_no_tokens(raw: bytes) -> None:
    assert count_tokens(CHAT, [raw]) == count_tokens(CHAT, bytewise(raw)) == (None, 0)


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ("-1", 0),
        ("true", 0),
        ("1.5", 0),
        ('"7"', 0),
        ("null", 0),
        (str(MAX_TOKENS), MAX_TOKENS),
        (str(MAX_TOKENS + 1), 0),
        ("9" * 400, 0),
    ],
)
def test_implausible_counts_are_ignored(reported: str, expected: int) -> None:
    raw = f'{{"usage":{{"completion_tokens":{reported}}}}}'.encode()
    assert count_tokens(CHAT, [raw])[0] == Tokens(0, 0, expected)


@pytest.mark.parametrize(
    ("reported", "expected"), [("2", 2.0), ("-1", 0), ("NaN", 0), ("Infinity", 0), ("1e400", 0), ('"x"', 0)]
)
def test_implausible_times_are_ignored(reported: str, expected: float) -> None:
    raw = f'{{"timings":{{"predicted_n":1,"predicted_ms":{reported}}}}}'.encode()
    assert count_tokens(CHAT, [raw])[0] == Tokens(0, 0, 1, 0.0, expected)


@pytest.mark.parametrize("usage", ["[]", "7", "null", '"usage"', "{}"])
def test_usage_that_is_not_an_object_is_ignored(usage: str) -> None:
    assert count_tokens(CHAT, [f'{{"usage":{usage}}}'.encode()]) == (None, 0)
    assert count_tokens(CHAT, [f'{{"type":"response.x","response":{usage},"usage":{usage}}}'.encode()]) == (None, 0)


# --- Generated text ---


FORGED = '"usage":{"prompt_tokens":999,"completion_tokens":999},"timings":{"prompt_n":999,"predicted_n":999}'
ARGUMENTS = json.loads("{" + FORGED + "}")


@pytest.mark.parametrize("text", [FORGED, "{" + FORGED + "}}]}", "\\" + FORGED, FORGED * 2000, "\n\ndata: {" + FORGED])
@pytest.mark.parametrize("size", [0, HEAD_BYTES, HEAD_BYTES + TAIL_BYTES], ids=["small", "middle", "large"])
def test_generated_text_about_usage_is_ignored(text: str, size: int) -> None:
    answer = {
        "choices": [{"message": {"content": text + "x" * size}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
        "id": text[:2000],
    }
    raw = json.dumps(answer, separators=(",", ":")).encode()
    assert count_tokens(CHAT, [raw])[0] == Tokens(3, 0, 4)
    event = b"data: " + raw + b"\n\n"
    assert count_tokens(CHAT, [event])[0] == Tokens(3, 0, 4)
    said = json.dumps(
        {"choices": [{"delta": {"content": text}, "finish_reason": None}]}, separators=(",", ":")
    ).encode()
    assert count_tokens(CHAT, [b"data: " + said + b"\n\n", event])[0] == Tokens(3, 0, 4)


@pytest.mark.parametrize("size", [0, HEAD_BYTES, HEAD_BYTES + TAIL_BYTES], ids=["small", "middle", "large"])
@pytest.mark.parametrize("copies", [1, 3, 400])
@pytest.mark.parametrize("first", [True, False], ids=["text last", "text first"])
def test_tool_call_arguments_named_usage_are_ignored(size: int, copies: int, first: bool) -> None:
    """In Anthropic's API a tool call contains generated arguments as JSON, not as a string."""
    content = [{"type": "tool_use", "input": ARGUMENTS}] * copies
    content.insert(copies if first else 0, {"type": "text", "text": "x" * size})
    answer = {"content": content, "usage": {"input_tokens": 3, "output_tokens": 4}}
    raw = json.dumps(answer, separators=(",", ":")).encode()
    assert count_tokens(MESSAGES, [raw])[0] == Tokens(3, 0, 4)
    del answer["usage"]
    assert count_tokens(MESSAGES, [json.dumps(answer, separators=(",", ":")).encode()])[0] is None


def test_deep_nesting_is_not_an_error() -> None:
    deep = b"[" * 5000 + b"]" * 5000
    assert count_tokens(MESSAGES, [b'{"a":' + deep + b',"usage":{"output_tokens":4}}']) == (Tokens(0, 0, 4), 0)
    assert count_tokens(EMBEDDINGS, [b'{"usage":{"a":' + deep + b'},"b":"' + b"x" * 30000 + b'"}']) == (None, 0)
    assert count_tokens(CHAT, [b'data: {"usage":{"a":' + deep + b"}}\n\n"]) == (Tokens(0, 0, 0), 1)


# --- Large responses ---


def test_usage_is_found_before_or_after_megabytes() -> None:
    data = '"data":[' + ",".join(["0.12345678901234567"] * 200_000) + "]"
    usage = '"usage":{"prompt_tokens":6,"prompt_tokens_details":{"cached_tokens":2},"total_tokens":6}'
    for raw in (f'{{"object":"list",{usage},{data}}}', f'{{"object":"list",{data},{usage}}}'):
        pieces = [raw.encode()[place : place + 65536] for place in range(0, len(raw), 65536)]
        assert count_tokens(EMBEDDINGS, pieces) == (Tokens(6, 2, 0), 0)
        assert count_tokens(EMBEDDINGS, [raw.encode()]) == (Tokens(6, 2, 0), 0)


def test_a_large_response_that_was_cut_is_read_by_its_beginning() -> None:
    raw = (ANSWERS / "embeddings.json").read_bytes()
    assert count_tokens(EMBEDDINGS, [raw[:1000]]) == (Tokens(6, 0, 0), 0)
    assert count_tokens(EMBEDDINGS, [raw[:1000] + b"1" * 90000]) == (Tokens(6, 0, 0), 0)


TOKEN = {"id": 1, "token": "a", "logprob": -1.0, "top_logprobs": [{"id": 2, "token": "b", "logprob": -2.0}] * 5}
REPORT = {"cache_n": 1, "prompt_n": 9, "prompt_ms": 1.0, "predicted_n": 200, "predicted_ms": 2.0}


@pytest.mark.parametrize("size", [100, 65536, 1 << 22])
def test_a_report_with_long_lists_of_tokens_behind_it_is_found(size: int) -> None:
    """llama-server writes the probabilities after all else."""
    whole = {"content": "x" * 5000, "timings": REPORT, "completion_probabilities": [TOKEN] * 200}
    raw = json.dumps(whole).encode()
    assert count_tokens(NATIVE, in_pieces(raw, size))[0] == Tokens(10, 1, 200, 1.0, 2.0)
    del whole["timings"]  # as with `response_fields`
    counter = TokenCounter(NATIVE)
    for piece in in_pieces(json.dumps(whole).encode(), size):
        counter.feed(piece)
    count = counter.count()
    assert count is not None
    assert (count.reports, count.listed, count.text_bytes) == (0, 200, 0)


@pytest.mark.parametrize("size", [100, 65536, 1 << 22])
def test_the_listed_tokens_of_several_choices_are_no_text(size: int) -> None:
    choices = [{"text": "x", "index": index, "logprobs": {"content": [TOKEN] * 200}} for index in range(4)]
    counter = TokenCounter(COMPLETIONS)
    for piece in in_pieces(json.dumps({"choices": choices, "timings": REPORT}).encode(), size):
        counter.feed(piece)
    count = counter.count()
    assert count is not None
    assert [choice.tokens for choice in count.choices] == [200] * 4
    choices = [
        {"text": "x", "index": index, "logprobs": {"content": [TOKEN] * (100 + index)}, "finish_reason": "stop"}
        for index in range(4)
    ]
    counter = TokenCounter(COMPLETIONS)
    for piece in in_pieces(json.dumps({"choices": choices, "timings": REPORT}).encode(), size):
        counter.feed(piece)
    count = counter.count()
    assert count is not None
    assert [choice.tokens for choice in count.choices] == [100, 101, 102, 103]
    several = json.dumps([{"completion_probabilities": [TOKEN] * 300}] * 3).encode()
    counter = TokenCounter(NATIVE)
    for piece in in_pieces(several, size):
        counter.feed(piece)
    count = counter.count()
    assert count is not None
    assert (count.reports, count.listed, count.text_bytes) == (0, 900, 0)


def test_a_list_of_any_length_is_summed() -> None:
    raw = (ANSWERS / "completion.json").read_bytes()
    answer = b"[" + b",".join([raw] * 200) + b"]"
    for size in (1000, 65536, len(answer)):
        pieces = [answer[place : place + size] for place in range(0, len(answer), size)]
        tokens, _ = count_tokens(NATIVE, pieces)
        assert tokens is not None
        assert (tokens.prompt, tokens.cached, tokens.completion) == (600, 400, 1200)


def test_endless_timings_in_a_list_are_not_kept() -> None:
    counter = TokenCounter(NATIVE)
    counter.feed(b'[{"timings":{')
    for _ in range(100):
        counter.feed(b'"predicted_n":1,' * 1000)
    assert kept_bytes(counter) < 30_000
    counter.feed(b'"x":1}}]')
    assert reported(counter) is None


@pytest.mark.parametrize("size", [TAIL_BYTES, 3 * TAIL_BYTES, 1 << 20])
@pytest.mark.parametrize("piece", [7919, 65536, 1 << 22])
def test_a_last_event_of_any_size_is_read_by_its_end(size: int, piece: int) -> None:
    """The last event of llama-server's native API repeats the prompt, that of /v1/responses the whole output."""
    native = (ANSWERS / "completion.sse").read_bytes().replace(b"<s> the moon", b"<s>" + b"moon " * (size // 5))
    response = (ANSWERS / "responses.sse").read_bytes().replace(b".u on riv c no", b"." * size)
    for label, raw, name in ((NATIVE, native, "completion.sse"), (RESPONSES, response, "responses.sse")):
        pieces = [raw[place : place + piece] for place in range(0, len(raw), piece)]
        assert count_tokens(label, pieces) == SAMPLES[name][1:]


def kept_bytes(counter: TokenCounter) -> int:
    return len(pickle.dumps(counter))


@pytest.mark.parametrize("start", [b"data: {", b"{", b"[", b"\x1f"])
def test_memory_does_not_grow_with_the_response(start: bytes) -> None:
    counter = TokenCounter(CHAT)
    counter.feed(start)
    for _ in range(200):
        counter.feed(b'"x":"' + b"y" * 8000 + b'",')
        assert kept_bytes(counter) <= 48 << 10
    counter.feed(b"\n\n")
    assert reported(counter) is None


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_are_read_without_raising(seed: int) -> None:
    dice = random.Random(seed)
    words = [
        b'"usage":{',
        b'"timings":{',
        b"}",
        b"}}",
        b"\n\n",
        b"data: {",
        b"[",
        b"{",
        b"]",
        b'"a":1',
        b",",
        b"\\",
        b'"',
    ]
    for _ in range(25):
        raw = dice.choice([b"{", b"[", b"data: {", b""]) + b"".join(dice.choices(words, k=dice.randrange(40)))
        raw += dice.randbytes(dice.randrange(3))
        for label in (CHAT, MESSAGES, RESPONSES, NATIVE):
            assert count_tokens(label, [raw]) == count_tokens(label, bytewise(raw))


# --- Complete responses ---


@each_sample
def test_a_complete_response_has_the_same_tokens_as_a_relayed_one(name: str) -> None:
    label, tokens, _ = SAMPLES[name]
    raw = (ANSWERS / name).read_bytes()
    for text in (raw, raw + b"\n", b" " + raw, raw.replace(b'":', b'" : ') if name.endswith("json") else raw):
        assert read_tokens(label, buffer_if_small(label, text)) == count_in_pieces(label, text)
    assert tokens is None or read_tokens(label, raw) is not None


def count_in_pieces(label: str, raw: bytes) -> Tokens | None:
    counter = TokenCounter(label)
    for place in range(0, len(raw), 100):
        counter.feed(raw[place : place + 100])
    return reported(counter)


def test_a_large_response_is_kept_as_a_token_counter() -> None:
    raw = (ANSWERS / "chat.json").read_bytes()
    large = raw.replace(b'"content":"', b'"content":"' + b"x" * (HEAD_BYTES + TAIL_BYTES))
    kept = buffer_if_small(CHAT, large)
    assert isinstance(kept, TokenCounter)
    assert read_tokens(CHAT, kept) == read_tokens(CHAT, raw)
    assert buffer_if_small(CHAT, raw) is raw
    assert read_tokens(CHAT, None) is None


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (b'{"usage":{"completion_tokens":5,"prompt_tokens":7,"total_tokens":12},"id":"a"}', Tokens(7, 0, 5)),
        (
            b'{"usage":{"completion_tokens":5,"prompt_tokens":7,"total_tokens":12,'
            b'"prompt_tokens_details":{"cached_tokens":3}},"id":"a"}',
            Tokens(7, 3, 5),
        ),
        (b'{"a":{"usage":{"completion_tokens":5,"prompt_tokens":7,"total_tokens":12}}}', None),
        (b'{"usage":{"completion_tokens":5,"prompt_tokens":07,"total_tokens":12}}', None),
        (b'{"usage":{"prompt_tokens":7},"a":[{"b":1}]}', Tokens(7, 0, 0)),
        (b'{"timings":{"cache_n":1,"prompt_n":2,"predicted_n":3}}', Tokens(3, 1, 3)),
        (b'{"a":"\\"usage\\":{","usage":{"completion_tokens":5,"prompt_tokens":7,"total_tokens":12}}', Tokens(7, 0, 5)),
    ],
)
def test_only_members_of_the_outermost_object_count(text: bytes, tokens: Tokens | None) -> None:
    assert read_tokens(CHAT, text) == tokens == count_in_pieces(CHAT, text)


def test_events_about_progress_are_not_counted_as_content() -> None:
    progress = b'data: {"choices":[{"finish_reason":null,"delta":{}}],"prompt_progress":{"total":9,"cache":1}}\n\n'
    content = b'data: {"choices":[{"finish_reason":null,"delta":{"content":"a"}}],"object":"chat.completion.chunk"}\n\n'
    counter = TokenCounter(CHAT)
    for text in (progress, content, progress, content):
        counter.feed(text)
    assert (counter.events, reported(counter)) == (2, Tokens(9, 1, 1, estimated=1))  # the first event has the role only


@pytest.mark.parametrize("has_timings", [False, True])
@pytest.mark.parametrize("end", [b'"tokens_evaluated":4}', b'"probs":[]}', b'"content":"a"}'])
def test_all_events_of_a_native_stream_that_begins_with_progress_are_counted(end: bytes, *, has_timings: bool) -> None:
    """With `response_fields` its last event alone has other members, and no report."""
    timings = b'"timings":{"predicted_n":0},' if has_timings else b""
    progress = b'data: {"index":0,"stop":false,%b"prompt_progress":{"total":9,"cache":1,"processed":9}}\n\n' % timings
    counter = TokenCounter(NATIVE)
    for text in (
        progress,
        progress,
        *[b'data: {"index":0,"stop":false,%b\n\n' % end] * 300,
        b'data: {"content":""}\n\n',
    ):
        counter.feed(text)
    count = counter.count()
    assert count is not None
    assert (counter.relayed_tokens, count.reports, count.tokens) == (301, 0, Tokens(9, 1, 301, estimated=301))


@pytest.mark.parametrize(
    ("members", "prompt"),
    [('"tokens_evaluated":4', 0), ('"tokens_evaluated":4,"stop":true', 4), ('"tokens_predicted":1', 0)],
)
def test_a_native_report_is_one_of_what_was_generated_if_it_says_so(members: str, prompt: int) -> None:
    """With `response_fields` an event has any of its members; an escape in it lets it be read."""
    counter = TokenCounter(NATIVE)
    for text in (f'"content":"a",{members},"prompt":"\\u0001"', *['"content":"a"'] * 300):
        counter.feed(b"data: {%b}\n\n" % text.encode())
    count = counter.count()
    assert count is not None
    assert (counter.relayed_tokens, count.reports, count.tokens) == (301, 0, Tokens(prompt, 0, 301, estimated=301))


def test_choices_of_one_prompt_have_read_it_once() -> None:
    done = b'data: {"index":%d,"stop":true,"timings":{"cache_n":%d,"prompt_n":%d,"predicted_n":5}}\n\n'
    for prompts, expected in ((1, 1300), (2, 2600), (0, 2600)):
        counter = TokenCounter(NATIVE, prompts)
        for text in (done % (0, 0, 1300), done % (1, 1299, 1)):
            counter.feed(text)
        tokens = reported(counter)
        assert tokens is not None
        assert (tokens.prompt, tokens.completion) == (expected, 10)


def test_a_text_that_is_called_as_a_member_is_content() -> None:
    progress = b'data: {"index":0,"prompt_progress":{"total":9,"cache":1,"processed":9}}\n\n'
    counter = TokenCounter(NATIVE)
    for text in (progress, b'data: {"index":0,"content":"prompt_progress"}\n\n' * 3):
        counter.feed(text)
    assert counter.relayed_tokens == 3


@pytest.mark.parametrize("size", [1, 50, 200, 4095])
def test_choices_are_found_however_the_beginning_is_torn(size: int) -> None:
    choices = [{"text": "x" * 2000, "index": index} for index in range(12)]
    raw = json.dumps({"choices": choices, "timings": REPORT}).encode()
    counter = TokenCounter(COMPLETIONS)
    for piece in in_pieces(raw, size):
        counter.feed(piece)
    count = counter.count()
    assert count is not None
    assert len(count.choices) == 12


def test_the_progress_of_a_later_choice_is_none_of_the_first_ones_content() -> None:
    progress = b'data: {"index":%d,"prompt_progress":{"total":9,"cache":1,"processed":9}}\n\n'
    content = b'data: {"index":0,"content":"a"}\n\n'
    counter = TokenCounter(NATIVE)
    for text in (progress % 0, content * 5, progress % 1 + content, content + progress % 1 + content):
        counter.feed(text)
    assert counter.relayed_tokens == 8


# --- The last event ---

LAST_EVENTS = {
    "chat.sse": b"data: [DONE]\n\n",
    "completions.sse": b"data: [DONE]\n\n",
    "responses.sse": b"event: response.completed\n",
    "messages.sse": b"event: message_stop\n",
    "completion.sse": b'data: {"index":0,"content":"","tokens":[],"id_slot":',
}


@pytest.mark.parametrize("name", LAST_EVENTS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1 << 20])
def test_a_stream_is_complete_with_its_last_event_and_not_before(name: str, size: int) -> None:
    stream = (ANSWERS / name).read_bytes()
    counter = TokenCounter(SAMPLES[name][0])
    for start in range(0, len(stream), size):
        assert not counter.is_complete(1)
        counter.feed(stream[start : start + size])
    assert counter.is_complete(1)
    assert counter.last_event.startswith(LAST_EVENTS[name])


def test_an_answer_that_has_ended_says_nothing_of_the_others() -> None:
    counter = TokenCounter("/completion")
    counter.feed((ANSWERS / "completion.sse").read_bytes())
    assert counter.is_complete(1)
    assert not counter.is_complete(2)


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.endswith(".json")])
def test_what_is_no_stream_has_no_last_event(name: str) -> None:
    counter = TokenCounter(SAMPLES[name][0])
    counter.feed((ANSWERS / name).read_bytes())
    assert not counter.is_complete(1)


@pytest.mark.parametrize(
    ("last", "complete"),
    [
        (b"data:[DONE]\n\n", True),
        (b'data: {"error":{"code":500,"message":"x","type":"server_error"}}\n\n', True),
        (b'event: error\ndata: {"type":"error","error":{"type":"api_error"}}\n\n', True),
        (b"event: response.failed\ndata: {}\n\n", True),
        (b"event: response.incomplete\ndata: {}\n\n", True),
        (b"event: response.output_text.done\ndata: {}\n\n", False),
        (b'data: {"choices":[{"delta":{"content":"data: [DONE]\\n\\n"}}]}\n\n', False),
        (b'event: content_block_delta\ndata: {"delta":{"text":"\\nevent: message_stop\\n"}}\n\n', False),
        (b'data: {"content":"x","stop":false}\n\n', False),
        (b'data: {"content":"","stop":true,"index":1}\n\n', False),
        (b"data: [DONE]\n", False),
        (b":\n\n", False),
    ],
)
def test_which_events_end_a_stream(last: bytes, complete: bool) -> None:
    counter = TokenCounter(CHAT)
    counter.feed(b'data: {"choices":[]}\n\n' + last)
    assert counter.is_complete(1) is complete


def test_a_long_last_event_is_known_by_its_beginning() -> None:
    counter = TokenCounter(RESPONSES)
    event = b'event: response.completed\ndata: {"type":"response.completed","response":{"x":"%b"}}\n\n' % (
        b"x" * 300_000
    )
    for start in range(0, len(event), 65536):
        counter.feed(event[start : start + 65536])
    assert counter.is_complete(1)


@pytest.mark.parametrize("number", [0, 9, 999, 1000, 31_415, 999_999_999_999])
def test_numbers_of_any_size_are_read_fast(number: int) -> None:
    timings = (
        f'{{"content":"a","timings":{{"cache_n":{number},"prompt_n":1,"prompt_ms":2.5,"prompt_per_token_ms":1,'
        f'"prompt_per_second":1,"predicted_n":{number},"predicted_ms":3,"predicted_per_token_ms":1,'
        f'"predicted_per_second":1}}}}'
    )
    assert fast_tokens(timings.encode()) == Tokens(number + 1, number, number, 2.5, 3.0)


def test_a_list_with_both_kinds_of_reports_is_counted_once() -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 200}
    tokens, _ = count_tokens(NATIVE, [json.dumps([{"timings": REPORT, "usage": usage}] * 2).encode()])
    assert tokens is not None
    assert tokens.completion == 400


def test_an_event_that_does_not_end_as_an_object_is_no_content() -> None:
    counter = TokenCounter(CHAT)
    for end in (b"}]}", b"}]", b"}]}"):
        counter.feed(b'data: {"choices":[{"finish_reason":null' + end + b"\n\n")
    assert counter.events == 2
