"""The paths that the mock serves, and the answers that need no generation. Pure functions of the request body."""

import base64
import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mock.request_bodies import (
    ApiError,
    Body,
    count_tokens,
    prompt_of_chat,
    prompt_of_infill,
    prompt_of_input,
    prompt_of_text,
    require,
    require_list,
)
from mock.templates import Json

Answerer = Callable[[Body], Json]


def tokenize(body: Body) -> Json:
    return {"tokens": list(str(body.get("content", "")).encode())}


def detokenize(body: Body) -> Json:
    tokens = require_list({"tokens": [], **body}, "tokens")
    values = [token for token in tokens if isinstance(token, int) and 0 <= token < 256]
    return {"content": bytes(values).decode("utf-8", "replace")}


def apply_template(body: Body) -> Json:
    return {"prompt": prompt_of_chat(body)}


def embed_native(body: Body) -> Json:
    """Answer /embedding, whose format is older than OpenAI's."""
    return [{"index": 0, "embedding": [vector_of(require(body, "content"))]}]


def refusing(status: int, kind: str, message: str) -> Answerer:
    """Return the function of a path that llama-server refuses without further flags."""

    def refuse(_body: Body) -> Json:
        raise ApiError(status, kind, message)

    return refuse


def counting(prompt_of: Callable[[Body], Json], **more: str) -> Answerer:
    """Return the function of a path that counts the tokens of a prompt."""
    return lambda body: {"input_tokens": count_tokens(prompt_of(body)), **more}


def embed(body: Body) -> Json:
    value = require(body, "input")
    inputs = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    rows = enumerate(map(vector_of, inputs))
    data: list[dict[str, Json]] = [{"embedding": row, "index": index, "object": "embedding"} for index, row in rows]
    if body.get("encoding_format") == "base64":
        for each in data:
            packed = struct.pack("<64f", *each["embedding"])
            each.update(embedding=base64.b64encode(packed).decode(), encoding_format="base64")
    return {"model": "mock", "object": "list", "usage": usage_of(inputs), "data": data}


def rerank(body: Body) -> Json:
    """Score the documents by a digest and return the best first."""
    query, documents = require(body, "query"), require_list(body, "documents")
    pairs = [f"{query}{document}" for document in documents]
    rows = [{"index": index, "relevance_score": vector_of(pair)[0]} for index, pair in enumerate(pairs)]
    rows.sort(key=lambda row: row["relevance_score"], reverse=True)
    wanted = body["top_n"] if isinstance(body.get("top_n"), int) else len(rows)
    return {"model": "mock", "object": "list", "usage": usage_of(pairs), "results": rows[:wanted]}


def vector_of(text: Json) -> list[float]:
    """Return a unit vector of 64 dimensions that is derived from a digest of the text."""
    digest = [value - 127.5 for value in hashlib.sha512(str(text).encode()).digest()]
    return [value / math.hypot(*digest) for value in digest]


def usage_of(inputs: Sequence[Json]) -> Json:
    tokens = sum(map(count_tokens, inputs))
    return {"prompt_tokens": tokens, "total_tokens": tokens}


# Endpoints


@dataclass(frozen=True)
class GenerationEndpoint:
    """How a generating path answers: its templates, its prompt, and its two finish reasons."""

    answer: str  # the name in mock.templates.TEMPLATES
    prompt_of: Callable[[Body], Json]
    finished: str = "stop"
    truncated: str = "length"  # at the requested maximum length


CHAT = GenerationEndpoint("chat", prompt_of_chat)
NATIVE = GenerationEndpoint("native", prompt_of_text, "eos", "limit")
RESPONSES = GenerationEndpoint("responses", prompt_of_input)
# POST: a slot, one token after the other
GENERATING = {
    "/v1/chat/completions": CHAT,
    "/chat/completions": CHAT,
    "/v1/completions": GenerationEndpoint("text", prompt_of_text),
    "/completions": NATIVE,
    "/completion": NATIVE,
    "/infill": GenerationEndpoint("native", prompt_of_infill, "eos", "limit"),
    "/v1/messages": GenerationEndpoint("messages", prompt_of_chat, "end_turn", "max_tokens"),
    "/v1/responses": RESPONSES,
    "/responses": RESPONSES,
}
# POST: a slot, one answer
WITH_SLOT: dict[str, Answerer] = {
    "/v1/embeddings": embed,
    "/embeddings": embed,
    "/embedding": embed_native,
    "/v1/rerank": rerank,
    "/rerank": rerank,
    "/v1/reranking": rerank,
    "/reranking": rerank,
}
COUNT_CHAT = counting(prompt_of_chat, object="response.input_tokens")
COUNT_INPUT = counting(prompt_of_input, object="response.input_tokens")
# POST: no slot
WITHOUT_SLOT: dict[str, Answerer] = {
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/apply-template": apply_template,
    "/v1/chat/completions/input_tokens": COUNT_CHAT,
    "/chat/completions/input_tokens": COUNT_CHAT,
    "/v1/responses/input_tokens": COUNT_INPUT,
    "/responses/input_tokens": COUNT_INPUT,
    "/v1/messages/count_tokens": counting(prompt_of_chat),
    "/v1/chat/completions/control": refusing(400, "invalid_request_error", "missing completion id"),
    "/props": refusing(501, "not_supported_error", "Start it with `--props`"),
    "/slots/0": refusing(501, "not_supported_error", "Start it with `--slot-save-path`"),
    "/lora-adapters": lambda body: {"success": True},
}
# GET: the name in mock.templates.TEMPLATES
PAGES = {
    "/health": "/health",
    "/v1/health": "/health",
    "/v1/models": "/v1/models",
    "/models": "/v1/models",
    "/props": "/props",
    "/lora-adapters": "/lora-adapters",
}
# Paths that need no key
PUBLIC = ("/health", "/v1/health")
