"""The anthropic package, which sends its key as x-api-key and expects errors in its own dialect."""

import asyncio

import anthropic
import pytest
from stack import TEAM_KEY

QUESTION = [{"role": "user", "content": "the cat is on the moon"}]


@pytest.fixture
def client(url: str):
    with anthropic.Anthropic(base_url=url, api_key=TEAM_KEY, max_retries=0, timeout=30) as client:
        yield client


def test_messages(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="tiny", max_tokens=9, messages=QUESTION)
    assert answer.content[0].text
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 9


def test_messages_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="tiny", max_tokens=9, messages=QUESTION) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 9


def test_count_tokens(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="tiny", messages=QUESTION)
    assert counted.input_tokens > 0


def test_a_bearer_token(url: str) -> None:
    with anthropic.Anthropic(base_url=url, auth_token=TEAM_KEY, max_retries=0) as client:
        assert client.messages.create(model="tiny", max_tokens=1, messages=QUESTION).usage.output_tokens == 1


def test_concurrent_async_streams(url: str) -> None:
    async def ask(client: anthropic.AsyncAnthropic, tokens: int) -> int:
        async with client.messages.stream(model="tiny", max_tokens=tokens, messages=QUESTION) as stream:
            return (await stream.get_final_message()).usage.output_tokens

    async def main() -> list[int]:
        async with anthropic.AsyncAnthropic(base_url=url, api_key=TEAM_KEY, max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, tokens) for tokens in range(5, 15)))

    assert asyncio.run(main()) == list(range(5, 15))


def test_wrong_key(url: str) -> None:
    with (
        anthropic.Anthropic(base_url=url, api_key="sk-nobody-0123456789abcdef", max_retries=0) as intruder,
        pytest.raises(anthropic.AuthenticationError) as refusal,
    ):
        intruder.messages.create(model="tiny", max_tokens=1, messages=QUESTION)
    assert refusal.value.body["type"] == "error"
    assert refusal.value.body["error"]["type"] == "authentication_error"


def test_bad_body(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.APIStatusError) as refusal:
        client.messages.create(model="tiny", max_tokens=1, messages=[{"role": "user", "content": "the cat " * 4000}])
    assert refusal.value.status_code == 400
