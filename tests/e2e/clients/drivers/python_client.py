"""One question by one Python client, with that client's own defaults: retries, timeouts, error handling.

    GATEWAY_URL=http://… GATEWAY_KEY=sk-… PROMPT=… python python_client.py NAME whole|stream

NAME is a key of CLIENTS. Prints one JSON object: `text` is what the client returned, and `error` is the exception that
reached the application, empty if none did. The exit status is 0 in both cases.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator

URL, KEY, PROMPT = os.environ["GATEWAY_URL"], os.environ["GATEWAY_KEY"], os.environ["PROMPT"]
MODEL = "tiny"
TOKENS = 12
MESSAGES = [{"role": "user", "content": PROMPT}]

Pieces = Iterator[str]


def openai_chat(stream: bool) -> Pieces:
    from openai import OpenAI

    create = OpenAI(base_url=f"{URL}/v1", api_key=KEY).chat.completions.create
    if stream:
        for chunk in create(model=MODEL, messages=MESSAGES, max_tokens=TOKENS, stream=True):
            if chunk.choices:
                yield chunk.choices[0].delta.content or ""
    else:
        yield create(model=MODEL, messages=MESSAGES, max_tokens=TOKENS).choices[0].message.content


def openai_responses(stream: bool) -> Pieces:
    """Take the deltas and ignore all other events, as most applications do."""
    from openai import OpenAI

    create = OpenAI(base_url=f"{URL}/v1", api_key=KEY).responses.create
    if stream:
        for event in create(model=MODEL, input=PROMPT, max_output_tokens=TOKENS, stream=True):
            if event.type == "response.output_text.delta":
                yield event.delta
    else:
        yield create(model=MODEL, input=PROMPT, max_output_tokens=TOKENS).output_text


def anthropic_messages(stream: bool) -> Pieces:
    from anthropic import Anthropic

    messages = Anthropic(base_url=URL, api_key=KEY).messages
    if stream:
        with messages.stream(model=MODEL, max_tokens=TOKENS, messages=MESSAGES) as answer:
            yield from answer.text_stream
    else:
        yield messages.create(model=MODEL, max_tokens=TOKENS, messages=MESSAGES).content[0].text


def _langchain(stream: bool, *, responses: bool) -> Pieces:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, max_tokens=TOKENS, use_responses_api=responses)
    if stream:
        for chunk in model.stream(PROMPT):
            yield chunk.text
    else:
        yield model.invoke(PROMPT).text


def langchain_chat(stream: bool) -> Pieces:
    return _langchain(stream, responses=False)


def langchain_responses(stream: bool) -> Pieces:
    return _langchain(stream, responses=True)


def _pydantic_ai(stream: bool, *, responses: bool) -> Pieces:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    kind = OpenAIResponsesModel if responses else OpenAIChatModel
    model = kind(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))
    agent = Agent(model, model_settings={"max_tokens": TOKENS})

    async def read() -> list[str]:
        async with agent.run_stream(PROMPT) as answer:
            return [piece async for piece in answer.stream_text(delta=True)]

    if stream:
        yield from asyncio.run(read())
    else:
        yield agent.run_sync(PROMPT).output


def pydantic_ai_chat(stream: bool) -> Pieces:
    return _pydantic_ai(stream, responses=False)


def pydantic_ai_responses(stream: bool) -> Pieces:
    return _pydantic_ai(stream, responses=True)


def _litellm(stream: bool, model: str, base: str) -> Pieces:
    import litellm

    asked = {"model": model, "messages": MESSAGES, "max_tokens": TOKENS, "api_base": base, "api_key": KEY}
    if stream:
        for chunk in litellm.completion(**asked, stream=True):
            yield chunk.choices[0].delta.content or ""
    else:
        yield litellm.completion(**asked).choices[0].message.content


def litellm_chat(stream: bool) -> Pieces:
    return _litellm(stream, f"openai/{MODEL}", f"{URL}/v1")


def litellm_messages(stream: bool) -> Pieces:
    return _litellm(stream, f"anthropic/{MODEL}", URL)


def litellm_responses(stream: bool) -> Pieces:
    import litellm

    asked = {"model": f"openai/{MODEL}", "input": PROMPT, "max_output_tokens": TOKENS}
    if stream:
        for event in litellm.responses(**asked, api_base=f"{URL}/v1", api_key=KEY, stream=True):
            if event.type == "response.output_text.delta":
                yield event.delta
    else:
        yield litellm.responses(**asked, api_base=f"{URL}/v1", api_key=KEY).output_text


CLIENTS: dict[str, Callable[[bool], Pieces]] = {
    "openai-chat": openai_chat,
    "openai-responses": openai_responses,
    "anthropic": anthropic_messages,
    "langchain-chat": langchain_chat,
    "langchain-responses": langchain_responses,
    "pydantic-ai-chat": pydantic_ai_chat,
    "pydantic-ai-responses": pydantic_ai_responses,
    "litellm-chat": litellm_chat,
    "litellm-responses": litellm_responses,
    "litellm-messages": litellm_messages,
}


def main(name: str, mode: str) -> None:
    text = error = ""
    try:
        for piece in CLIENTS[name](mode == "stream"):
            text += piece
    except Exception as raised:
        error = f"{type(raised).__module__.partition('.')[0]}.{type(raised).__name__}: {raised}"
    print(json.dumps({"text": text, "error": error}))


if __name__ == "__main__":
    main(*sys.argv[1:])
