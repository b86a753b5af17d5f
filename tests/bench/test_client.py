"""The benchmark's client: when a token counts, how failures are named, and how connections are reused."""

import asyncio
import json

import pytest

from bench.client import RequestFailed, Sample, Target, TargetConnection, error_name
from support.benchmarks import mock, scripted, served

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True}


def stream(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def event(data: object) -> bytes:
    return b"data: %b\n\n" % (data if isinstance(data, bytes) else json.dumps(data).encode())


def delta(text: str) -> bytes:
    return event({"choices": [{"delta": {"content": text}}]})


DONE = event(b"[DONE]")
TIMED = event({"choices": [], "timings": {"cache_n": 4, "prompt_n": 6, "predicted_n": 9, "predicted_per_second": 50.0}})


def measure(url: str, body: object = CHAT, *, times: int = 1, timeout_s: float = 10.0) -> list[Sample]:
    """Send the same request some times on one connection."""

    async def run() -> list[Sample]:
        target = Target("direct", url)
        connection = TargetConnection(target, timeout_s)
        request = target.request("POST", "/v1/chat/completions", body)
        try:
            return [await connection.measure(request) for _ in range(times)]
        finally:
            connection.close()

    return asyncio.run(run())


def measure_answer(answer: bytes) -> Sample:
    with served(scripted(answer)) as url:
        return measure(url)[0]


# Requests


def test_a_request_has_the_path_of_the_url_and_the_key() -> None:
    request = Target("gateway", "http://[::1]:8000/llm/", "secret").request("POST", "/v1/embeddings", {"input": "x"})
    assert request.startswith(
        b"POST /llm/v1/embeddings HTTP/1.1\r\nHost: [::1]:8000\r\nAuthorization: Bearer secret\r\n"
    )
    assert Target("gateway", "https://example.org").address == ("example.org", 443, True)
    assert "secret" not in repr(Target("gateway", "http://x", "secret"))


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:0", "http://x:99999", "x:8080"])
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"not an http or https URL|Port out of range"):
        Target("direct", url).validate()


@pytest.mark.parametrize("key", ["a\r\nb", "a\0", "ä"])
def test_a_key_with_characters_that_no_field_can_have_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="the key for --gateway contains"):
        Target("gateway", "http://x", key).validate()


# Answers


def test_a_stream_is_measured_to_its_end() -> None:
    with mock(cached_tokens=10) as url:
        sample = measure(url)[0]
    assert (sample.error, sample.events, len(sample.gaps_s), sample.tokens) == ("", 5, 4, 5)
    assert (sample.prompt_tokens, sample.cached_tokens) == (53, 10)
    assert sample.first_s is not None
    assert 0 < sample.first_s <= sample.total_s


def test_tokens_are_those_that_the_backend_reports_and_never_words() -> None:
    assert measure_answer(stream(delta("many words in one event"), TIMED, DONE)).tokens == 9
    usage = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}})
    sample = measure_answer(stream(delta("many words"), usage, DONE))
    assert (sample.tokens, sample.prompt_tokens) == (7, 3)
    assert measure_answer(stream(delta("many words"), DONE)).tokens is None


@pytest.mark.parametrize("chunk_bytes", [1, 7, 10_000])
def test_events_are_read_from_chunks_of_any_size(chunk_bytes: int) -> None:
    events = delta("a") + b": heartbeat\n\n" + delta("b") + TIMED + DONE
    chunks = [events[at : at + chunk_bytes] for at in range(0, len(events), chunk_bytes)]
    sample = measure_answer(stream(*chunks))
    assert (sample.error, sample.events, sample.tokens) == ("", 2, 9)


def test_a_role_without_text_is_not_the_first_token() -> None:
    role = event({"choices": [{"delta": {"role": "assistant", "content": None}}]})
    assert measure_answer(stream(role, DONE)).first_s is None


def test_an_answer_without_length_is_read_until_the_target_closes() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    assert measure_answer(head + delta("a") + TIMED + DONE).tokens == 9


# Failures


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (stream(delta("a"), TIMED), "stream ended early"),
        (stream(delta("a"), end=b""), "connection closed early"),
        (stream(delta("a"), event({"error": {"code": 500, "type": "server_error"}})), "error in stream: server_error"),
        (stream(event(b"{")), "answer is not JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", "answer is not JSON"),
        (
            b'HTTP/1.1 429 X\r\nContent-Length: 41\r\n\r\n{"error":{"code":"rate_limit_exceeded"}} ',
            "429 rate_limit_exceeded",
        ),
        (b"HTTP/1.1 502 X\r\nContent-Length: 3\r\n\r\nbad", "502 unknown"),
        (b"HTTP/1.1 503 X\r\n\r\n[]", "503 unknown"),
        (b"hello\r\n\r\n", "answer is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfive\r\n", "answer is not HTTP"),
        (b"", "connection closed early"),
    ],
)
def test_failures_are_named(answer: bytes, error: str) -> None:
    assert measure_answer(answer).error == error


def test_a_refused_connection_is_named() -> None:
    with mock() as url:
        pass
    assert measure(url)[0].error == "cannot connect: Connection refused"
    with pytest.raises(RequestFailed, match="cannot connect"):
        asyncio.run(TargetConnection(Target("direct", url), 5.0).open())


def test_a_target_that_does_not_answer_times_out() -> None:
    with mock(prompt_ms=60_000.0) as url:
        assert measure(url, timeout_s=0.05)[0].error == "timed out"


def test_an_error_without_a_number_is_named_by_its_class() -> None:
    assert error_name(OSError("two messages")) == "OSError"


# Connections


def test_a_kept_alive_connection_that_the_target_closed_is_no_failure() -> None:
    with mock() as url:
        samples = measure(url, times=4)
    assert [(sample.error, sample.tokens) for sample in samples] == [("", 5)] * 4


def test_a_kept_alive_connection_is_reused() -> None:
    accepted: list[asyncio.StreamWriter] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)
        await scripted(*[b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"] * 3)(reader, writer)

    with served(handler) as url:
        assert [sample.error for sample in measure(url, times=3)] == [""] * 3
    assert len(accepted) == 1


def test_fetch_returns_a_json_object_or_an_empty_one() -> None:
    async def fetch(url: str, path: str) -> dict[str, object]:
        connection = TargetConnection(Target("direct", url), 5.0)
        try:
            return await connection.fetch(path)
        finally:
            connection.close()

    with mock(slots=7) as url:
        assert asyncio.run(fetch(url, "/props"))["total_slots"] == 7
        assert "error" in asyncio.run(fetch(url, "/nope"))
    assert asyncio.run(fetch(url, "/props")) == {}
