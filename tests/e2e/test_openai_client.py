"""The openai package, sync and async, as an application uses it."""

import asyncio

import openai
import pytest
from stack import TEAM_KEY, LlamaServer, bearer, fetch

QUESTION = [{"role": "user", "content": "the cat is on the moon"}]


@pytest.fixture
def client(url: str):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TEAM_KEY, max_retries=0, timeout=30) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=12)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_chat_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=12, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12


def test_a_completion_and_its_stream_have_the_same_text(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "prompt": "the dog", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**options)
    with client.completions.create(**options, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=["the cat", "the dog"])
    assert [item.index for item in answer.data] == [0, 1]
    assert {len(item.embedding) for item in answer.data} == {64}
    assert answer.usage.prompt_tokens > 0
    floats = client.embeddings.create(model="tiny", input="the cat", encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-5)


def test_responses_and_their_stream(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tiny", input="the cat", max_output_tokens=8)
    assert whole.output_text
    assert whole.usage.output_tokens == 8
    with client.responses.create(model="tiny", input="the cat", max_output_tokens=8, stream=True) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") > 1


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_concurrent_async_streams(url: str) -> None:
    async def ask(client: openai.AsyncOpenAI, tokens: int) -> int:
        stream = await client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=tokens, stream=True, stream_options={"include_usage": True}
        )
        async with stream:
            return [chunk async for chunk in stream][-1].usage.completion_tokens

    async def main() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=TEAM_KEY, max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, tokens) for tokens in range(5, 25)))

    assert asyncio.run(main()) == list(range(5, 25))


def test_async_chat_embeddings_and_models(url: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=TEAM_KEY, max_retries=0, timeout=30) as client:
            chat = await client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=3)
            assert chat.usage.completion_tokens == 3
            embedded = await client.embeddings.create(model="tiny", input="the cat")
            assert len(embedded.data[0].embedding) == 64
            assert [model.id async for model in client.models.list()] == ["tiny"]

    asyncio.run(main())


def test_stop_ends_a_response(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="the", max_tokens=4000, stop=["e"])
    assert answer.choices[0].finish_reason == "stop"


def test_wrong_key(url: str) -> None:
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="sk-nobody-0123456789abcdef", max_retries=0) as intruder,
        pytest.raises(openai.AuthenticationError) as refusal,
    ):
        intruder.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
    assert refusal.value.code == "invalid_api_key"


def test_wrong_key_async(url: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="sk-nobody-0123456789abcdef", max_retries=0
        ) as client:
            await client.models.list()

    with pytest.raises(openai.AuthenticationError):
        asyncio.run(main())


def test_unknown_route(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        client.post("/no/such/route", body={}, cast_to=object)
    assert refusal.value.code == "route_not_found"


def test_operator_route_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError) as refusal:
        client.get("/../slots", cast_to=object)
    assert refusal.value.code == "route_not_allowed"


BAD_BODIES = {
    "no messages": {"model": "tiny"},
    "messages of a wrong type": {"model": "tiny", "messages": "hello"},
    "longer than the context": {"model": "tiny", "messages": [{"role": "user", "content": "the cat " * 4000}]},
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_refusal_of_the_backend_passes_unchanged(url: str, backend: LlamaServer, body: dict) -> None:
    direct = fetch(f"{backend.url}/v1/chat/completions", backend.key, body)
    assert direct[0] in {400, 500}
    assert fetch(f"{url}/v1/chat/completions", TEAM_KEY, body) == direct


def test_a_bad_request_raises_an_exception_of_the_package(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refusal:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "the cat " * 4000}])
    assert refusal.value.status_code == 400


def test_responses_have_a_request_id(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=QUESTION, max_tokens=1, extra_headers={"X-Request-Id": "e2e-1234"}
    )
    assert raw.headers["x-request-id"] == "e2e-1234"
    assert raw.headers.get_list("access-control-allow-origin") == []
    assert bearer(TEAM_KEY)["Authorization"] not in str(raw.headers)
