"""What llama-server b11434 answers (tests/answers, as captured), and what is made of it however it is torn."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from meter import HEAD_BYTES, MAX_TOKENS, TAIL_BYTES, Meter, Tokens, keep_whole, read_tokens

ANSWERS = Path(__file__).parent / "answers"

CHAT, COMPLETIONS, NATIVE = "/v1/chat/completions", "/v1/completions", "/completion"
RESPONSES, MESSAGES, EMBEDDINGS = "/v1/responses", "/v1/messages", "/v1/embeddings"

# file: route, tokens of the whole answer, events that carry content
SAMPLES: dict[str, tuple[str, Tokens | None, int]] = {
    "chat.sse": (CHAT, Tokens(28, 0, 6, 1.251, 1.31), 8),
    "chat_usage.sse": (CHAT, Tokens(28, 27, 6, 0.367, 1.055), 9),
    "chat_logprobs.sse": (CHAT, Tokens(28, 27, 3, 0.279, 0.343), 5),
    "chat_pertoken.sse": (CHAT, Tokens(28, 27, 3, 0.462, 0.522), 7),
    "chat_progress.sse": (CHAT, Tokens(924, 11, 3, 41.133, 1.252), 4),
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


def measured(kind: str, pieces: Iterable[bytes]) -> tuple[Tokens | None, int]:
    meter = Meter(kind)
    for piece in pieces:
        meter.feed(piece)
    tokens = meter.finish()
    if tokens is not None:
        # Sums of floats depend on nothing but their order; the samples are written with three decimals.
        prompt_ms, predicted_ms = round(tokens.prompt_ms, 3), round(tokens.predicted_ms, 3)
        tokens = Tokens(tokens.prompt, tokens.cached, tokens.completion, prompt_ms, predicted_ms)
    return tokens, meter.events


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


# As llama-server answers


def test_each_sample_is_tested() -> None:
    assert sorted(SAMPLES) == sorted(path.name for path in ANSWERS.iterdir())


@each_sample
@pytest.mark.parametrize("feed", FEEDS)
def test_tokens_are_those_that_the_backend_told(name: str, feed: str) -> None:
    kind, tokens, events = SAMPLES[name]
    assert measured(kind, FEEDS[feed]((ANSWERS / name).read_bytes())) == (tokens, events)


@each_sample
def test_tokens_are_the_same_when_torn_at_any_byte(name: str) -> None:
    kind, tokens, events = SAMPLES[name]
    raw = (ANSWERS / name).read_bytes()
    for place in range(len(raw) + 1):
        assert measured(kind, (raw[:place], raw[place:])) == (tokens, events), place


@each_sample
def test_what_passed_of_a_cut_answer_does_not_depend_on_how_it_was_torn(name: str) -> None:
    kind, dice = SAMPLES[name][0], random.Random(name)
    raw = (ANSWERS / name).read_bytes()
    for end in dice.sample(range(len(raw)), 80):
        part = raw[:end]
        expected = measured(kind, [part])
        for _ in range(5):
            assert measured(kind, torn(part, dice)) == expected, end


@each_sample
def test_damaged_answers_are_read_alike_however_they_are_torn_and_never_raise(name: str) -> None:
    kind, dice = SAMPLES[name][0], random.Random(name)
    raw = (ANSWERS / name).read_bytes()
    for _ in range(60):
        damaged = bytearray(raw[-2500:] if dice.random() < 0.3 else raw[:2500])
        for _ in range(dice.randrange(1, 6)):
            place = dice.randrange(len(damaged))
            damaged[place : place + dice.randrange(3)] = dice.choice(
                [b"\n\n", b"}", b"{", b'"', b"\\", b"\0", b"9" * 30, b"-1", b"null", b"[" * 20, b"\xff", b" "]
            )
        expected = measured(kind, [bytes(damaged)])
        for _ in range(5):
            assert measured(kind, torn(bytes(damaged), dice)) == expected


# Streams that were cut


def cut(name: str, events: int) -> tuple[str, bytes]:
    """Return so many whole events of a sample, and half of the next."""
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
def test_a_stream_that_was_cut_is_charged_for_what_passed(name: str, events: int, expected: Tokens | None) -> None:
    kind, part = cut(name, events)
    tokens, _ = measured(kind, [part])
    assert tokens == expected


def test_comments_and_pings_are_no_events() -> None:
    raw = (ANSWERS / "chat.sse").read_bytes()
    first, rest = raw.split(b"\n\n", 1)
    assert measured(CHAT, [b":\n\n", first + b"\n\n:\n\n", b":\n\n" + rest]) == SAMPLES["chat.sse"][1:]
    raw = (ANSWERS / "messages.sse").read_bytes()
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    assert measured(MESSAGES, [ping, raw, ping]) == SAMPLES["messages.sse"][1:]


def test_a_stream_that_ends_in_an_error_is_charged_for_what_passed() -> None:
    kind, part = cut("chat.sse", 4)
    error = b'\n\ndata: {"error":{"code":500,"message":"x","type":"server_error"}}\n\n'
    assert measured(kind, [part.rpartition(b"\n\n")[0], error]) == (Tokens(0, 0, 4), 5)


# What no sample shows


def test_an_audio_transcription_is_read() -> None:
    usage = '"usage":{"type":"tokens","input_tokens":40,"output_tokens":7,"input_tokens_details":{"cached_tokens":4}}'
    raw = f'{{"type":"transcript.text.done","text":"a",{usage}}}'.encode()
    delta = b'data: {"type":"transcript.text.delta","delta":"a"}\n\n'
    assert measured("/v1/audio/transcriptions", [raw]) == (Tokens(40, 4, 7), 0)
    assert measured("/v1/audio/transcriptions", [delta, b"data: " + raw + b"\n\n"]) == (Tokens(40, 4, 7), 2)
    assert measured("/v1/audio/transcriptions", [delta, delta]) == (Tokens(0, 0, 2), 2)


def test_anthropic_tokens_written_to_the_cache_are_prompt() -> None:
    usage = {"input_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 11, "output_tokens": 2}
    assert measured(MESSAGES, [json.dumps({"usage": usage}).encode()]) == (Tokens(23, 7, 2), 0)


def test_the_last_of_several_message_deltas_counts() -> None:
    raw = (ANSWERS / "messages.sse").read_bytes()
    early = b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":3}}\n\n'
    place = raw.index(b"event: content_block_stop")
    assert measured(MESSAGES, [raw[:place], early, raw[place:]]) == SAMPLES["messages.sse"][1:]


def test_a_response_without_timings_is_read_by_its_usage() -> None:
    done = {"type": "response.completed", "response": {"usage": {"input_tokens": 3, "output_tokens": 2}}}
    raw = b"event: response.completed\ndata: " + json.dumps(done, separators=(",", ":")).encode() + b"\n\n"
    assert measured(RESPONSES, [raw]) == (Tokens(3, 0, 2), 0)


def test_usage_with_every_chunk_counts_once() -> None:
    """Some backends repeat the usage so far; only a choice's last event counts."""
    chunk = (
        b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":%s}],"usage":{"prompt_tokens":5,%s}}\n\n'
    )
    early, last = chunk % (b"null", b'"completion_tokens":1'), chunk % (b'"stop"', b'"completion_tokens":2')
    assert measured(CHAT, [early, last]) == (Tokens(5, 0, 2), 2)
    assert measured(CHAT, [early]) == (Tokens(5, 0, 1), 1)


@pytest.mark.parametrize("raw", [b"", b" \r\n", b"\x1f\x8b\x08 gzip", b"\xce\xb2\xcf brotli", b"OK", b"data", b"null"])
def test_what_cannot_be_read_tells_nothing(raw: bytes) -> None:
    assert measured(CHAT, [raw]) == measured(CHAT, bytewise(raw)) == (None, 0)


@pytest.mark.parametrize(
    ("told", "expected"),
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
def test_only_sane_counts_are_believed(told: str, expected: int) -> None:
    raw = f'{{"usage":{{"completion_tokens":{told}}}}}'.encode()
    assert measured(CHAT, [raw])[0] == Tokens(0, 0, expected)


@pytest.mark.parametrize(
    ("told", "expected"), [("2", 2.0), ("-1", 0), ("NaN", 0), ("Infinity", 0), ("1e400", 0), ('"x"', 0)]
)
def test_only_sane_times_are_believed(told: str, expected: float) -> None:
    raw = f'{{"timings":{{"predicted_n":1,"predicted_ms":{told}}}}}'.encode()
    assert measured(CHAT, [raw])[0] == Tokens(0, 0, 1, 0.0, expected)


@pytest.mark.parametrize("usage", ["[]", "7", "null", '"usage"', "{}"])
def test_usage_that_is_no_object_tells_nothing(usage: str) -> None:
    assert measured(CHAT, [f'{{"usage":{usage}}}'.encode()]) == (None, 0)
    assert measured(CHAT, [f'{{"type":"response.x","response":{usage},"usage":{usage}}}'.encode()]) == (None, 0)


# What a model says


FORGED = '"usage":{"prompt_tokens":999,"completion_tokens":999},"timings":{"prompt_n":999,"predicted_n":999}'
ARGUMENTS = json.loads("{" + FORGED + "}")


@pytest.mark.parametrize("text", [FORGED, "{" + FORGED + "}}]}", "\\" + FORGED, FORGED * 2000, "\n\ndata: {" + FORGED])
@pytest.mark.parametrize("size", [0, HEAD_BYTES, HEAD_BYTES + TAIL_BYTES], ids=["small", "middle", "large"])
def test_text_about_usage_is_not_believed(text: str, size: int) -> None:
    answer = {
        "choices": [{"message": {"content": text + "x" * size}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
        "id": text[:2000],
    }
    raw = json.dumps(answer, separators=(",", ":")).encode()
    assert measured(CHAT, [raw])[0] == Tokens(3, 0, 4)
    event = b"data: " + raw + b"\n\n"
    assert measured(CHAT, [event])[0] == Tokens(3, 0, 4)
    said = json.dumps(
        {"choices": [{"delta": {"content": text}, "finish_reason": None}]}, separators=(",", ":")
    ).encode()
    assert measured(CHAT, [b"data: " + said + b"\n\n", event])[0] == Tokens(3, 0, 4)


@pytest.mark.parametrize("size", [0, HEAD_BYTES, HEAD_BYTES + TAIL_BYTES], ids=["small", "middle", "large"])
@pytest.mark.parametrize("copies", [1, 3, 400])
@pytest.mark.parametrize("first", [True, False], ids=["text last", "text first"])
def test_arguments_named_usage_are_not_believed(size: int, copies: int, first: bool) -> None:
    """A tool call in Anthropic's dialect holds what the model made up as JSON, not as a string."""
    content = [{"type": "tool_use", "input": ARGUMENTS}] * copies
    content.insert(copies if first else 0, {"type": "text", "text": "x" * size})
    answer = {"content": content, "usage": {"input_tokens": 3, "output_tokens": 4}}
    raw = json.dumps(answer, separators=(",", ":")).encode()
    assert measured(MESSAGES, [raw])[0] == Tokens(3, 0, 4)
    del answer["usage"]
    assert measured(MESSAGES, [json.dumps(answer, separators=(",", ":")).encode()])[0] is None


def test_nesting_deeper_than_python_recurses_is_no_trouble() -> None:
    deep = b"[" * 5000 + b"]" * 5000
    assert measured(MESSAGES, [b'{"a":' + deep + b',"usage":{"output_tokens":4}}']) == (Tokens(0, 0, 4), 0)
    assert measured(EMBEDDINGS, [b'{"usage":{"a":' + deep + b'},"b":"' + b"x" * 30000 + b'"}']) == (None, 0)
    assert measured(CHAT, [b'data: {"usage":{"a":' + deep + b"}}\n\n"]) == (Tokens(0, 0, 0), 1)


# However large


def test_usage_is_found_before_or_after_megabytes() -> None:
    data = '"data":[' + ",".join(["0.12345678901234567"] * 200_000) + "]"
    usage = '"usage":{"prompt_tokens":6,"prompt_tokens_details":{"cached_tokens":2},"total_tokens":6}'
    for raw in (f'{{"object":"list",{usage},{data}}}', f'{{"object":"list",{data},{usage}}}'):
        pieces = [raw.encode()[place : place + 65536] for place in range(0, len(raw), 65536)]
        assert measured(EMBEDDINGS, pieces) == (Tokens(6, 2, 0), 0)
        assert measured(EMBEDDINGS, [raw.encode()]) == (Tokens(6, 2, 0), 0)


def test_a_large_answer_that_was_cut_tells_what_its_beginning_told() -> None:
    raw = (ANSWERS / "embeddings.json").read_bytes()
    assert measured(EMBEDDINGS, [raw[:1000]]) == (Tokens(6, 0, 0), 0)
    assert measured(EMBEDDINGS, [raw[:1000] + b"1" * 90000]) == (Tokens(6, 0, 0), 0)


def test_a_list_of_any_length_is_summed() -> None:
    raw = (ANSWERS / "completion.json").read_bytes()
    answer = b"[" + b",".join([raw] * 200) + b"]"
    for size in (1000, 65536, len(answer)):
        pieces = [answer[place : place + size] for place in range(0, len(answer), size)]
        tokens, _ = measured(NATIVE, pieces)
        assert tokens is not None
        assert (tokens.prompt, tokens.cached, tokens.completion) == (600, 400, 1200)


def test_timings_in_a_list_that_never_end_are_let_go() -> None:
    meter = Meter(NATIVE)
    meter.feed(b'[{"timings":{')
    for _ in range(100):
        meter.feed(b'"predicted_n":1,' * 1000)
    assert held(meter) < 10_000
    meter.feed(b'"x":1}}]')
    assert meter.finish() is None


@pytest.mark.parametrize("size", [TAIL_BYTES, 3 * TAIL_BYTES, 1 << 20])
@pytest.mark.parametrize("piece", [7919, 65536, 1 << 22])
def test_a_last_event_of_any_size_is_read_by_its_end(size: int, piece: int) -> None:
    """The last event of llama-server's own dialect repeats the prompt; a completed response repeats the answer."""
    native = (ANSWERS / "completion.sse").read_bytes().replace(b"<s> the moon", b"<s>" + b"moon " * (size // 5))
    response = (ANSWERS / "responses.sse").read_bytes().replace(b".u on riv c no", b"." * size)
    for kind, raw, name in ((NATIVE, native, "completion.sse"), (RESPONSES, response, "responses.sse")):
        pieces = [raw[place : place + piece] for place in range(0, len(raw), piece)]
        assert measured(kind, pieces) == SAMPLES[name][1:]


def held(meter: Meter) -> int:
    values = [getattr(meter, name) for name in Meter.__slots__]
    return sum(len(value) for value in values if isinstance(value, bytes))


@pytest.mark.parametrize("start", [b"data: {", b"{", b"[", b"\x1f"])
def test_memory_does_not_grow_with_the_answer(start: bytes) -> None:
    meter = Meter(CHAT)
    meter.feed(start)
    for _ in range(200):
        meter.feed(b'"x":"' + b"y" * 8000 + b'",')
        assert held(meter) <= 48 << 10
    meter.feed(b"\n\n")
    assert meter.finish() is None


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
    for _ in range(100):
        raw = dice.choice([b"{", b"[", b"data: {", b""]) + b"".join(dice.choices(words, k=dice.randrange(40)))
        raw += dice.randbytes(dice.randrange(3))
        for kind in (CHAT, MESSAGES, RESPONSES, NATIVE):
            assert measured(kind, [raw]) == measured(kind, bytewise(raw))


# Whole answers


@each_sample
def test_a_whole_answer_tells_what_it_would_in_passing(name: str) -> None:
    kind, tokens, _ = SAMPLES[name]
    raw = (ANSWERS / name).read_bytes()
    for text in (raw, raw + b"\n", b" " + raw, raw.replace(b'":', b'" : ') if name.endswith("json") else raw):
        assert read_tokens(kind, keep_whole(kind, text)) == measured_exactly(kind, text)
    assert tokens is None or read_tokens(kind, raw) is not None


def measured_exactly(kind: str, raw: bytes) -> Tokens | None:
    meter = Meter(kind)
    for place in range(0, len(raw), 100):
        meter.feed(raw[place : place + 100])
    return meter.finish()


def test_of_a_large_answer_no_more_is_kept_than_a_meter_holds() -> None:
    raw = (ANSWERS / "chat.json").read_bytes()
    large = raw.replace(b'"content":"', b'"content":"' + b"x" * (HEAD_BYTES + TAIL_BYTES))
    kept = keep_whole(CHAT, large)
    assert isinstance(kept, Meter)
    assert read_tokens(CHAT, kept) == read_tokens(CHAT, raw)
    assert keep_whole(CHAT, raw) is raw
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
def test_only_members_of_the_answer_itself_count(text: bytes, tokens: Tokens | None) -> None:
    assert read_tokens(CHAT, text) == tokens == measured_exactly(CHAT, text)


def test_an_event_of_progress_among_those_with_content_is_none_of_them() -> None:
    progress = b'data: {"choices":[{"finish_reason":null,"delta":{}}],"prompt_progress":{"total":9,"cache":1}}\n\n'
    content = b'data: {"choices":[{"finish_reason":null,"delta":{"content":"a"}}],"object":"chat.completion.chunk"}\n\n'
    meter = Meter(CHAT)
    for text in (progress, content, progress, content):
        meter.feed(text)
    assert (meter.events, meter.finish()) == (2, Tokens(9, 1, 1))  # the first names the role
