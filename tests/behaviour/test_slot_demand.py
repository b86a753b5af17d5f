"""A request takes as many slots as it keeps busy: what its client, the others and the operator see."""

import json

import pytest

from support.backend import HELLO, answer, send, stall
from support.gateway import CHAT, KEY, OTHER_KEY, Stack, get, post, request, scenario, until
from support.rawclient import RawClient

COMPLETIONS, EMBEDDINGS, RERANK = b"/v1/completions", b"/v1/embeddings", b"/v1/rerank"
MESSAGES = b'"messages": [{"role": "user", "content": "x"}]'
FILLER = b'"a": [' + b"{}," * 40_000 + b"0], "
LIMITED = "alice:sk-alice-0123456789abcdef:1000000 parallel={}\nbob:sk-bob-0123456789abcdef:1000000\n"


def chat(*members: bytes) -> bytes:
    return b"{" + b", ".join((MESSAGES, *members)) + b"}"


async def occupy(stack: Stack, target: bytes, body: bytes, *fields: bytes) -> RawClient:
    """A client whose request is at work until `stack.finish`."""
    stack.backend.script(stall(stack.finish), send(answer()))
    client = await stack.client()
    client.send(post(target, body, *fields))
    await stack.backend.call()
    return client


async def health(stack: Stack) -> dict[str, int]:
    client = await stack.client()
    client.send(get(b"/health"))
    report = json.loads((await client.response()).body)
    assert isinstance(report, dict)
    return report


@pytest.mark.parametrize(
    ("target", "body", "slots"),
    [
        (CHAT, chat(), 1),
        (CHAT, chat(b'"n": 3'), 3),
        (CHAT, chat(b'"\\u006e": 3'), 3),
        (CHAT, chat(b'"n": 1', b'"n": 3'), 3),
        (CHAT, b"{" + FILLER + b'"n": 3}', 3),
        (CHAT, b'{"n": 3}\0', 3),
        (CHAT, chat(b'"temperature": 1.' + b"0" * 150, b'"n": 3'), 3),
        (CHAT, chat(b'"n": 3.' + b"0" * 150), 3),
        (CHAT, b'{"n": 3', 1),
        (CHAT, chat(b'"response_format": {"n": 3}', b'"user": "\\"n\\": 3"'), 1),
        (CHAT, chat(b'"n": 9'), 4),
        (COMPLETIONS, b'{"prompt": ["a", "b"]}', 2),
        (COMPLETIONS, b'{"prompt": ["a", "b"], "n": 2}', 4),
        (COMPLETIONS, b'{"prompt": [1, 2, 3]}', 1),
        (EMBEDDINGS, b'{"input": ["a", "b", "c"]}', 3),
        (RERANK, b'{"query": "a", "documents": ["a", "b"]}', 2),
        (b"/v1/new", b'{"texts": "a"}', 1),
        (b"/v1/new", b'{"n": 3}', 3),
        (b"/v1/new", b'{"input": ["a", "b", "c"], "prompt": ["a", "b"]}', 3),
    ],
)
@scenario(MAX_CONCURRENT_REQUESTS="4", ALLOW_PATHS="/v1/new")
async def test_slots_of_a_request(stack: Stack, target: bytes, body: bytes, slots: int) -> None:
    client = await occupy(stack, target, body)
    report = await health(stack)
    assert (report["active"], report["queued"]) == (slots, 0)
    stack.finish.set()
    assert (await client.response()).body == HELLO
    assert stack.backend.calls[0].body == body
    assert (await health(stack))["active"] == 0


@scenario(MAX_CONCURRENT_REQUESTS="4")
async def test_a_chunked_body_is_read_as_well(stack: Stack) -> None:
    body = b"{" + FILLER + b'"n": 3}'
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(body[at : at + 999]), body[at : at + 999]) for at in range(0, len(body), 999)
    )
    stack.backend.script(stall(stack.finish), send(answer()))
    client = await stack.client()
    client.send(request(b"POST", CHAT, None, b"Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n")
    await stack.backend.call()
    assert (await health(stack))["active"] == 3
    stack.finish.set()
    assert (await client.response()).body == HELLO


@scenario(MAX_CONCURRENT_REQUESTS="4")
async def test_a_large_request_waits_for_its_slots_and_small_ones_do_not_pass_it(stack: Stack) -> None:
    stack.backend.script(stall(stack.finish), send(answer()))
    first = await stack.client()
    first.send(post())
    await stack.backend.call()
    large, small = await stack.client(), await stack.client()
    large.send(post(CHAT, chat(b'"n": 4'), key=OTHER_KEY))
    await until(lambda: stack.app.queue.queued == 1)
    small.send(post())
    await until(lambda: stack.app.queue.queued == 2)
    report = await health(stack)
    assert [report[name] for name in ("active", "queued", "queued_slots")] == [1, 2, 5]
    metrics = await stack.client()
    metrics.send(get(b"/metrics"))
    page = (await metrics.response()).body
    for line in (b"requests_active 1", b"slots_active 1", b"queue_depth 2", b"queue_slots 5"):
        assert b"\ngateway_" + line + b"\n" in page
    stack.finish.set()
    for client in (first, large, small):
        assert (await client.response()).body == HELLO
    assert b'"n": 4' in stack.backend.calls[1].body


@scenario(MAX_CONCURRENT_REQUESTS="4")
async def test_a_heartbeat_counts_the_slots_before_it(stack: Stack) -> None:
    await occupy(stack, CHAT, chat(b'"n": 4'))
    large, small = await stack.client(), await stack.client()
    large.send(post(CHAT, chat(b'"n": 3')))
    await until(lambda: stack.app.queue.queued == 1)
    small.send(post(CHAT, chat(b'"stream": true')))
    await until(lambda: stack.app.queue.queued == 2)
    stack.advance(15.0)
    assert b": queued 4\n\n" in await small.take_through(b": queued 4\n\n")
    stack.finish.set()


@scenario(KEYS=LIMITED.format(1))
async def test_a_name_that_comes_in_two_parts_is_found(stack: Stack) -> None:
    """A body of several reads, each too large to be kept together with the next."""
    raw = post(CHAT, b'{"a": "' + b"x" * 9000 + b'", "n": 2, "b": "' + b"x" * 9000 + b'"}')
    at = raw.index(b'"n"') + 2
    client = await stack.client()
    client.send(raw[:at])
    await until(lambda: any(each.record.stage == "reading_body" for each in stack.requests))
    client.send(raw[at:])
    assert (await client.response()).code == "too_many_choices"


@scenario(MAX_CONCURRENT_REQUESTS="4", KEYS=LIMITED.format(1))
async def test_more_choices_than_the_key_may_have_are_refused_in_the_callers_dialect(stack: Stack) -> None:
    client = await stack.client()
    for target, body in (
        (CHAT, chat(b'"n": 2')),
        (COMPLETIONS, b'{"prompt": ["a", "b"]}'),
        (b"/v1/responses", b'{"input": "x", "n_cmpl": 2}'),
    ):
        client.send(post(target, body))
        response = await client.response()
        error = json.loads(response.body)["error"]
        assert (response.status, error["code"], error["type"]) == (400, "too_many_choices", "invalid_request_error")
        assert "asks for 2 choices" in error["message"]
        assert "at most 1 is allowed" in error["message"]
        assert response.field(b"x-should-retry") == b"false"
    assert not stack.backend.calls


BATCHES = [
    (COMPLETIONS, b'{"prompt": ["a", "b", "c", "d", "e"]}', "has 5 "),
    (COMPLETIONS, b'{"prompt": ["a", "b", "c", "d", "e"], "stream": true}', "has 5 "),
    (COMPLETIONS, b'{"prompt": ["a", "b", "c"], "n": 2}', "has 6 "),
    (COMPLETIONS, b"{" + FILLER + b'"prompt": ["a", "b", "c", "d", "e"]}', "has 5 "),
    (COMPLETIONS, b'{"prompt": ["a", [1, 2], "c", "d", "e"]}', "has 5 "),
    (EMBEDDINGS, b'{"input": ["a", "b", "c", "d", "e"]}', "has 5 "),
    (b"/embedding", b'{"content": ["a", "b", "c", "d", "e"]}', "has 5 "),
    (RERANK, b'{"query": "a", "documents": ["a", "b", "c", "d", "e"]}', "has 5 "),
    (b"/rerank", b'{"query": "a", "texts": ["a", "b", "c", "d", "e"]}', "has 5 "),
    (CHAT, chat(b'"n": 5'), "has 5 "),
    (CHAT, chat(b'"n": -4294967292'), "has more than 1000000 "),  # 4 for llama-server
    (CHAT, chat(b'"n": 3.' + b"0" * 2000), "has more than 1000000 "),
    (b"/v1/new", b'{"input": ["a", "b", "c", "d", "e"]}', "has 5 "),
]


@pytest.mark.parametrize(("target", "body", "asked"), BATCHES)
@scenario(MAX_CONCURRENT_REQUESTS="8", MAX_BATCH_SIZE="4", ALLOW_PATHS="/v1/new", KEYS=f"alice:{KEY.decode()}:1\n")
async def test_more_tasks_than_allowed_are_refused(stack: Stack, target: bytes, body: bytes, asked: str) -> None:
    response = await stack.ask(post(target, body))
    error = json.loads(response.body)["error"]
    assert (response.status, error["code"], error["type"]) == (400, "batch_too_large", "invalid_request_error")
    assert asked in error["message"]
    assert error["message"].endswith("; at most 4 are allowed (MAX_BATCH_SIZE).")
    assert response.field(b"x-should-retry") == b"false"
    assert response.field(b"x-ratelimit-remaining-requests") == b"1"
    assert not stack.backend.calls
    assert (await stack.ask(post())).status == 200  # the key's only request of this minute


@pytest.mark.parametrize(
    ("target", "body"),
    [
        (COMPLETIONS, b'{"prompt": ["a", "b", "c", "d"]}'),
        (COMPLETIONS, b'{"prompt": ["a", "b"], "n": 2}'),
        (COMPLETIONS, b'{"prompt": [1, 2, 3, 4, 5]}'),
        (EMBEDDINGS, b'{"input": ["a", "b", "c", "d"]}'),
        (EMBEDDINGS, b'{"input": [1, 2, 3, 4, 5]}'),
        (RERANK, b'{"query": "a", "documents": ["a", "b", "c", "d"]}'),
        (CHAT, chat(b'"n": 4')),
        (b"/v1/responses", b'{"input": ["a", "b", "c", "d", "e"]}'),
    ],
)
@scenario(MAX_BATCH_SIZE="4")
async def test_as_many_tasks_as_allowed_are_relayed(stack: Stack, target: bytes, body: bytes) -> None:
    assert (await stack.ask(post(target, body))).body == HELLO
    assert stack.backend.calls[0].body == body


@scenario(KEYS=LIMITED.format(1))
async def test_by_default_2048_tasks_are_allowed_and_a_batch_of_a_key_with_parallel_has_no_more(stack: Stack) -> None:
    for name, target in ((b"input", EMBEDDINGS), (b"documents", RERANK)):
        most, more = (b'{"%b": [%b]}' % (name, b",".join([b'""'] * count)) for count in (2048, 100_000))
        assert (await stack.ask(post(target, most))).status == 200
        response = await stack.ask(post(target, more))
        assert response.code == "batch_too_large"
        assert b"has 100000 prompts or choices, texts or documents; at most 2048 are allowed" in response.body
    assert len(stack.backend.calls) == 2


@scenario(MAX_CONCURRENT_REQUESTS="4", KEYS=LIMITED.format(2))
async def test_choices_count_against_parallel_and_a_batch_counts_as_one(stack: Stack) -> None:
    await occupy(stack, EMBEDDINGS, b'{"input": ["a", "b", "c"]}')
    pair = await stack.client()
    pair.send(post(CHAT, chat(b'"n": 2')))
    await until(lambda: stack.app.queue.queued == 1)
    assert (await health(stack))["active"] == 3
    stack.finish.set()
    assert (await pair.response()).body == HELLO


@scenario(MAX_CONCURRENT_REQUESTS="4")
async def test_a_client_that_leaves_while_its_body_is_read_leaves_nothing(stack: Stack) -> None:
    client = await stack.client()
    body = b"{" + FILLER * 20 + b'"n": 3}'
    client.send(post(CHAT, body)[:-1])
    await until(lambda: stack.app.memory.held_bytes > len(body) // 2)
    client.reset()
    await until(lambda: not stack.app.memory.held_bytes)
    assert not stack.backend.calls


FORM = b'--X\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n' * 3 + b"--X--\r\n"
FORM_TYPES = (
    (b"Content-Type: multipart/form-data; boundary=X",),
    (b"Content-Type: Multipart/Form-Data; Boundary=X",),
    (b"Content-Type: multipart/form-data; boundary=X", b"Content-Type: application/json"),
    (b"Content-Type: application/json", b"Content-Type: multipart/form-data; boundary=X"),
)


@pytest.mark.parametrize("fields", FORM_TYPES)
@pytest.mark.parametrize("target", [CHAT, COMPLETIONS, b"/completion", EMBEDDINGS, RERANK, b"/v1/messages"])
@scenario()
async def test_a_form_is_refused_where_json_is_due(stack: Stack, target: bytes, fields: tuple[bytes, ...]) -> None:
    """llama-server would make a list of the prompts."""
    client = await stack.client()
    client.send(post(target, FORM, *fields) + get(b"/ping"))
    response = await client.response()
    assert response.status == 415
    assert b"takes JSON" in response.body
    assert (await client.response()).status == 200
    assert not stack.backend.calls


@scenario()
async def test_a_form_is_relayed_where_it_is_due(stack: Stack) -> None:
    stack.backend.script(send(answer()))
    client = await stack.client()
    client.send(post(b"/v1/audio/transcriptions", FORM, *FORM_TYPES[0]))
    assert (await client.response()).status == 200
    assert stack.backend.calls[0].body == FORM
