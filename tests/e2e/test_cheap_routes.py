"""Requests that take no slot do not hold up those that do, at the real llama-server."""

import json
import threading
from collections.abc import Iterator

import pytest
from stack import TEAM_KEY, Gateway, LlamaServer, fetch, running

LIMITS = {"MAX_CHEAP_REQUESTS": "1", "MAX_CHEAP_REQUESTS_PER_MINUTE": "40", "MAX_CHEAP_BODY_SIZE": "64KiB"}
TEXT = {"content": "a cat on a stone " * 3000}


@pytest.fixture(scope="module")
def bounded(backend: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    yield from running(Gateway(tmp_path_factory.mktemp("bounded"), backend, **LIMITS))


def test_they_are_bounded_in_size_and_rate_while_a_slot_is_served(bounded: Gateway) -> None:
    statuses: list[int] = []

    def ask() -> None:
        statuses.extend(fetch(f"{bounded.url}/tokenize", TEAM_KEY, TEXT)[0] for _ in range(15))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    status, page = fetch(f"{bounded.url}/v1/completions", TEAM_KEY, {"prompt": "a", "max_tokens": 50})
    for thread in threads:
        thread.join()
    assert (status, json.loads(page)["usage"]["completion_tokens"]) == (200, 50)
    assert sorted(statuses) == [200] * 40 + [429] * 20
    too_large = {"content": "a" * 65536}
    assert fetch(f"{bounded.url}/tokenize", TEAM_KEY, too_large)[0] == 413
    assert fetch(f"{bounded.url}/v1/completions", TEAM_KEY, {"prompt": "a" * 500, "max_tokens": 5})[0] == 200
