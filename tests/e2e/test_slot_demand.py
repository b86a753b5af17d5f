"""The gateway counts as many slots as the real llama-server keeps busy, whatever a body says, in any spelling."""

import json
import threading
from collections.abc import Iterator

import httpx
import pytest
from stack import ENDLESS, OPERATOR_KEY, TEAM_KEY, Gateway, LlamaServer, bearer, eventually, fetch, running

WITHIN_S = 30.0
MESSAGES = [{"role": "user", "content": "a cat"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
CHAT, COMPLETIONS, NATIVE = "/v1/chat/completions", "/v1/completions", "/completion"


def spelt(body: dict[str, object], more: str = "", after: str = "") -> bytes:
    """A body with `more` members at its end, and bytes `after` it."""
    return (json.dumps(body)[:-1] + more + "}" + after).encode()


def chat(**members: object) -> dict[str, object]:
    return {"messages": MESSAGES, "max_tokens": ENDLESS, "stream": True, **members}


def completion(prompt: object, **members: object) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": ENDLESS, "stream": True, **members}


CASES = {
    "one": (CHAT, spelt(chat()), 1),
    "n": (CHAT, spelt(chat(n=3)), 3),
    "n_cmpl first": (CHAT, spelt(chat(n=2, n_cmpl=3)), 3),
    "n_cmpl is null": (CHAT, spelt(chat(n=2, n_cmpl=None)), 2),
    "a fraction": (CHAT, spelt(chat(n=3.7)), 3),
    "spelt with an escape": (CHAT, spelt(chat(), ', "\\u006e": 3'), 3),
    "twice": (CHAT, spelt(chat(n=1), ', "n" : 3'), 3),
    "twice and less": (CHAT, spelt(chat(n=3), ', "n" : 2'), 2),
    "a byte order mark": (CHAT, b"\xef\xbb\xbf" + spelt(chat(n=3)), 3),
    "a NUL at the end": (CHAT, spelt(chat(n=3), after="\0 more"), 3),
    "quoted in a text": (CHAT, spelt(chat(user='", "n": 3, "')), 1),
    "nested": (CHAT, spelt(chat(metadata={"n": 3})), 1),
    "behind much else": (CHAT, spelt(chat(metadata={"a": [{}] * 40_000}, n=3)), 3),
    "prompts": (COMPLETIONS, spelt(completion(["a", "cat", "every"])), 3),
    "prompts and n": (COMPLETIONS, spelt(completion(["a", "cat"], n=2)), 4),
    "more prompts than slots": (COMPLETIONS, spelt(completion(["a"] * 9)), 4),
    "the tokens of one prompt": (COMPLETIONS, spelt(completion([5, 6, 7])), 1),
    "tokens and a text": (NATIVE, spelt(completion(["a", 6], n_predict=ENDLESS)), 1),
    "lists of tokens": (NATIVE, spelt(completion([[5, 6], "a"], n_predict=ENDLESS)), 2),
    "native": (NATIVE, spelt(completion("a", n_predict=ENDLESS, n_cmpl=3)), 3),
    "a prompt in chat": (CHAT, spelt(chat(prompt=["a", "b"])), 1),
    "responses": ("/v1/responses", spelt({"input": "a", "max_output_tokens": ENDLESS, "stream": True, "n": 3}), 3),
    "messages": ("/v1/messages", spelt(chat(n=3)), 1),
}


@pytest.fixture(scope="module")
def limited(backend: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway at which the key `team` may have two slots."""
    folder = tmp_path_factory.mktemp("limited")
    keys_file = folder / "keys.txt"
    keys_file.write_text(f"team:{TEAM_KEY}:1000000 parallel=2\nops:{OPERATOR_KEY}:1000000 role=operator\n")
    yield from running(Gateway(folder, backend, AUTH_KEYS_FILE=str(keys_file)))


@pytest.fixture(scope="module")
def bounded(backend: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway at which a request may have three tasks."""
    yield from running(Gateway(tmp_path_factory.mktemp("bounded"), backend, MAX_BATCH_SIZE="3"))


def active(url: str) -> int:
    number = json.loads(fetch(f"{url}/health")[1])["active"]
    assert isinstance(number, int)
    return number


@pytest.mark.parametrize("case", CASES)
def test_as_many_slots_are_counted_as_are_busy(url: str, backend: LlamaServer, case: str) -> None:
    path, body, slots = CASES[case]
    backend.all_free()
    headers = {"Content-Type": "application/json", **bearer(TEAM_KEY)}
    with httpx.stream("POST", url + path, headers=headers, content=body, timeout=WITHIN_S) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_raw()
        next(lines)
        eventually(backend.busy, lambda busy: busy == slots, WITHIN_S)
        assert active(url) == slots
    eventually(lambda: active(url), lambda number: number == 0, WITHIN_S)
    assert backend.busy() == 0


def test_no_request_of_others_finds_more_slots_busy_than_are_counted(url: str, backend: LlamaServer) -> None:
    """While whole answers with choices, prompts and embeddings run, one small request is served between two of them."""
    backend.all_free()
    body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True}
    kinds = [
        ("/v1/completions", body | {"n": 4}),
        ("/v1/completions", body | {"prompt": list("abcdefgh")}),
        ("/v1/embeddings", {"input": ["a cat on a stone"] * 12}),
        ("/v1/completions", body),
    ]
    statuses: list[int] = []

    def ask(path: str, body: dict[str, object], times: int) -> None:
        statuses.extend(fetch(url + path, TEAM_KEY, body)[0] for _ in range(times))

    threads = [threading.Thread(target=ask, args=(path, body, 3)) for path, body in kinds]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        before = active(url)
        busy = backend.busy()
        assert busy <= max(before, active(url))
    for thread in threads:
        thread.join()
    assert statuses == [200] * 12


def test_more_choices_than_the_key_may_have_are_refused(limited: Gateway) -> None:
    for path, body in ((CHAT, chat(n=3)), (COMPLETIONS, completion(["a", "b", "c"]))):
        status, page = fetch(limited.url + path, TEAM_KEY, body)
        error = json.loads(page)["error"]
        assert (status, error["code"]) == (400, "too_many_choices")
        assert "at most 2 are allowed" in error["message"]
    status, page = fetch(limited.url + CHAT, TEAM_KEY, {"messages": MESSAGES, "max_tokens": 5, "n": 2})
    assert (status, len(json.loads(page)["choices"])) == (200, 2)


def test_a_batch_of_any_length_is_served_to_a_key_with_few_slots(limited: Gateway) -> None:
    status, page = fetch(f"{limited.url}/v1/embeddings", TEAM_KEY, {"input": ["a cat"] * 20})
    assert (status, len(json.loads(page)["data"])) == (200, 20)


@pytest.mark.parametrize(
    ("path", "name", "results", "more"),
    [(COMPLETIONS, "prompt", "choices", {"max_tokens": 1}), ("/v1/embeddings", "input", "data", {})],
)
def test_more_tasks_than_a_request_may_have_are_refused(
    bounded: Gateway, path: str, name: str, results: str, more: dict[str, object]
) -> None:
    status, page = fetch(bounded.url + path, TEAM_KEY, {name: ["a cat"] * 3, **more})
    assert (status, len(json.loads(page)[results])) == (200, 3)
    for body in ({name: ["a cat"] * 4, **more}, {name: ["a cat"] * 4, "stream": True, **more}):
        status, page = fetch(bounded.url + path, TEAM_KEY, body)
        error = json.loads(page)["error"]
        assert (status, error["code"]) == (400, "batch_too_large")
        assert "has 4 prompts" in error["message"]
    status, page = fetch(bounded.url + path, TEAM_KEY, {name: [5, 6, 7, 8], **more})
    assert (status, len(json.loads(page)[results])) == (200, 1)
