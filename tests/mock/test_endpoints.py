"""The answers that need no generation."""

import base64
import struct

import pytest

from mock.endpoints import PAGES, PUBLIC, WITH_SLOT, WITHOUT_SLOT
from mock.request_bodies import ApiError

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def test_counts_are_those_of_a_generation() -> None:
    assert WITHOUT_SLOT["/v1/chat/completions/input_tokens"](CHAT)["input_tokens"] == 53
    assert WITHOUT_SLOT["/responses/input_tokens"]({"input": "hi"}) == {
        "input_tokens": 53,
        "object": "response.input_tokens",
    }
    assert WITHOUT_SLOT["/v1/messages/count_tokens"](CHAT) == {"input_tokens": 53}


def test_tokens_are_bytes_in_both_directions() -> None:
    tokens = WITHOUT_SLOT["/tokenize"]({"content": "grün"})["tokens"]
    assert WITHOUT_SLOT["/detokenize"]({"tokens": tokens}) == {"content": "grün"}
    assert WITHOUT_SLOT["/detokenize"]({"tokens": [256, "x", 65]}) == {"content": "A"}
    assert WITHOUT_SLOT["/apply-template"](CHAT)["prompt"].startswith("<|im_start|>user\nhi<|im_end|>")


def test_embeddings_of_one_input_and_of_several() -> None:
    one, several = (
        WITH_SLOT["/v1/embeddings"]({"input": "a"}),
        WITH_SLOT["/embeddings"]({"input": ["a", "bc"]}),
    )
    assert one["data"][0]["embedding"] == several["data"][0]["embedding"] != several["data"][1]["embedding"]
    assert sum(value * value for value in one["data"][0]["embedding"]) == pytest.approx(1.0)
    assert several["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert WITH_SLOT["/embedding"]({"content": "a"})[0]["embedding"] == [one["data"][0]["embedding"]]


def test_embeddings_in_base64() -> None:
    answer = WITH_SLOT["/v1/embeddings"]({"input": [1, 2], "encoding_format": "base64"})
    values = struct.unpack("<64f", base64.b64decode(answer["data"][0]["embedding"]))
    assert (len(values), answer["usage"]["prompt_tokens"]) == (64, 2)


def test_rerank_returns_the_best_documents_first() -> None:
    answer = WITH_SLOT["/v1/rerank"]({"query": "q", "documents": ["a", "b", "c"], "top_n": 2})
    scores = [row["relevance_score"] for row in answer["results"]]
    assert (len(scores), scores) == (2, sorted(scores, reverse=True))
    assert len(WITH_SLOT["/rerank"]({"query": "q", "documents": ["a"]})["results"]) == 1


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/embedding"])
def test_a_body_without_input_is_refused(path: str) -> None:
    with pytest.raises(ApiError) as caught:
        WITH_SLOT[path]({"query": "q"})
    assert caught.value.args[:2] == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "status"), [("/props", 501), ("/slots/0", 501), ("/v1/chat/completions/control", 400)]
)
def test_paths_that_llama_server_refuses_without_further_flags(path: str, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        WITHOUT_SLOT[path]({})
    assert caught.value.args[0] == status


def test_health_needs_no_key() -> None:
    assert set(PUBLIC) == {path for path, answer in PAGES.items() if answer == "/health"}
