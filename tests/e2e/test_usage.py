"""Tokens: what the gateway counted in passing equals what llama-server counted itself."""

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from stack import ENDLESS, OPERATOR_KEY, TEAM_KEY, Gateway, LlamaServer, bearer, eventually, fetch, running
from tiny_gguf import WORDS

WAVES, FINISHED_A_WAVE, CANCELLED_A_WAVE = 5, 84, 16
Tokens = dict[str, int]


def prompt(random_: random.Random) -> str:
    return " ".join(random_.choices(WORDS.split(), k=random_.randrange(1, 60)))


def chat(random_: random.Random, tokens: int) -> dict[str, object]:
    return {"max_tokens": tokens, "messages": [{"role": "user", "content": prompt(random_)}]}


KINDS: dict[str, Callable[[random.Random, int], dict[str, object]]] = {
    "/v1/chat/completions": chat,
    "/v1/messages": chat,
    "/v1/completions": lambda random_, tokens: {"prompt": prompt(random_), "max_tokens": tokens},
    "/completion": lambda random_, tokens: {"prompt": prompt(random_), "n_predict": tokens},
    "/v1/responses": lambda random_, tokens: {"input": prompt(random_), "max_output_tokens": tokens},
    "/v1/embeddings": lambda random_, _: {"input": [prompt(random_), prompt(random_)]},
}


def finished(url: str, seed: int) -> None:
    """One request of a random kind, read to its end."""
    random_ = random.Random(seed)
    route, body_of = random_.choice(list(KINDS.items()))
    body = body_of(random_, random_.randrange(1, 40))
    if route != "/v1/embeddings" and random_.random() < 0.5:
        body["stream"] = True
        if route in {"/v1/chat/completions", "/v1/completions"} and random_.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
    status, answer = fetch(url + route, TEAM_KEY, body)
    assert status == 200, answer


def cancelled(url: str, seed: int) -> None:
    """One stream whose reader leaves after its first bytes."""
    body = chat(random.Random(seed), ENDLESS) | {"stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", headers=bearer(TEAM_KEY), json=body, timeout=60) as answer:
        next(answer.iter_raw())


def counted(backend: LlamaServer) -> Tokens:
    own = backend.counters()
    return {
        "prompt": int(own["prompt_tokens_total"] + own["prompt_tokens_cached_total"]),
        "cached": int(own["prompt_tokens_cached_total"]),
        "completion": int(own["tokens_predicted_total"]),
    }


def difference(after: Tokens, before: Tokens) -> Tokens:
    return {name: after[name] - before[name] for name in after}


def logged(access_log: Path, outcome: str) -> tuple[int, Tokens]:
    """How many requests ended so, and the sums of their tokens, from the access log."""
    lines = [json.loads(line) for line in access_log.read_text().splitlines()]
    those = [line for line in lines if line["key"] == "team" and line["outcome"] == outcome]
    sums = {name: sum(line[f"{name}_tokens"] or 0 for line in those) for name in ("prompt", "cached", "completion")}
    return len(those), sums


@pytest.fixture
def own_gateway(backend: LlamaServer, tmp_path: Path):
    yield from running(Gateway(tmp_path, backend, LOG_FORMAT="json"))


def test_totals_equal_the_backends_own_for_500_mixed_requests(backend: LlamaServer, own_gateway: Gateway) -> None:
    """The cancelled ones come in waves of their own: llama-server counts a part of them, and does not tell which."""
    backend.all_free()
    apart = dict.fromkeys(("prompt", "cached", "completion"), 0)
    begun = counted(backend)
    with ThreadPoolExecutor(8) as pool:
        for wave in range(WAVES):
            list(
                pool.map(lambda seed: finished(own_gateway.url, seed), range(wave * 100, wave * 100 + FINISHED_A_WAVE))
            )
            before = counted(backend)
            list(
                pool.map(
                    lambda seed: cancelled(own_gateway.url, seed), range(wave * 100, wave * 100 + CANCELLED_A_WAVE)
                )
            )
            backend.all_free()
            apart = {name: apart[name] + value for name, value in difference(counted(backend), before).items()}
    wanted = {name: value - apart[name] for name, value in difference(counted(backend), begun).items()}

    log = own_gateway.access_log
    done = eventually(lambda: logged(log, "done"), lambda seen: seen[0] == WAVES * FINISHED_A_WAVE, 5)
    gone = eventually(lambda: logged(log, "cancelled"), lambda seen: seen[0] == WAVES * CANCELLED_A_WAVE, 5)
    assert done[1] == wanted
    assert gone[1]["prompt"] >= 0
    assert metric_totals(own_gateway.url) == {name: done[1][name] + gone[1][name] for name in done[1]}


def metric_totals(url: str) -> Tokens:
    _, page = fetch(f"{url}/metrics", OPERATOR_KEY)
    lines = [line.split() for line in page.decode().splitlines() if line.startswith("gateway_tokens_total{type=")]
    return {name.split('"')[1]: int(float(value)) for name, value in lines}
