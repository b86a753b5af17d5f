"""The gateway counts the same tokens as llama-server itself."""

import json
import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from stack import ENDLESS, OPERATOR_KEY, TEAM_KEY, Gateway, LlamaServer, bearer, eventually, fetch, running
from tiny_gguf import WORDS

WAVES, FINISHED_PER_WAVE, CANCELLED_PER_WAVE = 5, 84, 16
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
    """Send one request of a random kind, and read the response to its end."""
    random_ = random.Random(seed)
    route, body_of = random_.choice(list(KINDS.items()))
    body = body_of(random_, random_.randrange(1, 40))
    if route != "/v1/embeddings" and random_.random() < 0.5:
        body["stream"] = True
        if route in {"/v1/chat/completions", "/v1/completions"} and random_.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
    status, answer = fetch(url + route, TEAM_KEY, body)
    assert status == 200, answer


def several(url: str, seed: int) -> None:
    """Send one request with several answers, each of which has its report: a stream, or a list."""
    random_ = random.Random(seed)
    tokens = random_.randrange(1, 40)
    prompts = [prompt(random_) for _ in range(random_.randrange(2, 4))]
    route, body = random_.choice(
        [
            ("/v1/chat/completions", chat(random_, tokens) | {"n": random_.randrange(2, 4), "stream": True}),
            ("/v1/completions", {"prompt": prompts, "max_tokens": tokens, "stream": True}),
            (
                "/v1/responses",
                {"input": prompts[0], "max_output_tokens": tokens, "n": 2, "stream": random_.random() < 0.5},
            ),
            ("/completion", {"prompt": prompts, "n_predict": tokens, "stream": random_.random() < 0.5}),
        ]
    )
    status, answer = fetch(url + route, TEAM_KEY, body)
    assert status == 200, answer


def cancelled(url: str, seed: int) -> None:
    """Send one request for a stream, and leave after its first bytes."""
    body = chat(random.Random(seed), ENDLESS) | {"stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", headers=bearer(TEAM_KEY), json=body, timeout=60) as answer:
        next(answer.iter_raw())


def counted(backend: LlamaServer) -> Tokens:
    metrics = backend.counters()
    return {
        "prompt": int(metrics["prompt_tokens_total"] + metrics["prompt_tokens_cached_total"]),
        "cached": int(metrics["prompt_tokens_cached_total"]),
        "completion": int(metrics["tokens_predicted_total"]),
    }


def difference(after: Tokens, before: Tokens) -> Tokens:
    return {name: after[name] - before[name] for name in after}


def logged(access_log: Path, outcome: str) -> tuple[int, Tokens]:
    """Return the number of requests with this outcome, and the sums of their tokens, from the access log."""
    lines = [json.loads(line) for line in access_log.read_text().splitlines()]
    those = [line for line in lines if line["key"] == "team" and line["outcome"] == outcome]
    sums = {name: sum(line[f"{name}_tokens"] or 0 for line in those) for name in ("prompt", "cached", "completion")}
    return len(those), sums


@pytest.fixture
def own_gateway(backend: LlamaServer, tmp_path: Path):
    yield from running(Gateway(tmp_path, backend, LOG_FORMAT="json"))


def test_the_totals_of_500_mixed_requests_equal_the_backends(backend: LlamaServer, own_gateway: Gateway) -> None:
    """Cancelled requests come in separate waves, because llama-server counts an unknown part of their tokens."""
    backend.all_free()
    of_cancelled = dict.fromkeys(("prompt", "cached", "completion"), 0)
    begun = counted(backend)
    with ThreadPoolExecutor(8) as pool:
        for wave in range(WAVES):
            seeds = range(wave * 100, wave * 100 + FINISHED_PER_WAVE)
            list(pool.map(lambda seed: (several if seed % 4 == 0 else finished)(own_gateway.url, seed), seeds))
            before = counted(backend)
            list(pool.map(lambda seed: cancelled(own_gateway.url, seed), seeds[:CANCELLED_PER_WAVE]))
            backend.all_free()
            added = difference(counted(backend), before)
            of_cancelled = {name: of_cancelled[name] + value for name, value in added.items()}
    wanted = {name: value - of_cancelled[name] for name, value in difference(counted(backend), begun).items()}

    log = own_gateway.access_log
    done = eventually(lambda: logged(log, "done"), lambda seen: seen[0] == WAVES * FINISHED_PER_WAVE, 30)
    gone = eventually(lambda: logged(log, "cancelled"), lambda seen: seen[0] == WAVES * CANCELLED_PER_WAVE, 30)
    assert done[1] == wanted
    assert gone[1]["prompt"] >= 0
    assert metric_totals(own_gateway.url) == {name: done[1][name] + gone[1][name] for name in done[1]}


def metric_totals(url: str) -> Tokens:
    _, page = fetch(f"{url}/metrics", OPERATOR_KEY)
    lines = [line.split() for line in page.decode().splitlines() if line.startswith("gateway_tokens_total{type=")]
    return {name.split('"')[1]: int(float(value)) for name, value in lines}


# --- Whole responses with several choices ---

STOPPED = {"stop": ["moon", "stone"], "temperature": 1.5}
WHOLE: dict[str, tuple[str, dict[str, object]]] = {
    "choices that the limit ends": ("/v1/chat/completions", {"n": 3, "max_tokens": 60}),
    "choices that end before": ("/v1/chat/completions", {"n": 4, "max_tokens": 400, **STOPPED}),
    "long choices": ("/v1/chat/completions", {"n": 3, "max_tokens": 700}),
    "prompts": ("/v1/completions", {"prompt": ["the moon", "a cat", "one river"], "max_tokens": 50}),
    "prompts with choices": ("/v1/completions", {"prompt": ["the moon", "a cat"], "n": 2, "max_tokens": 50}),
    "without reports": ("/completion", {"prompt": "the moon", "n_predict": 200, "response_fields": ["content"]}),
    "ids alone": (
        "/completion",
        {"prompt": "the moon", "n_predict": 200, "response_fields": ["tokens"], "return_tokens": True},
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_responses_are_charged_no_less_than_generated_and_at_most_a_quarter_above(
    backend: LlamaServer, own_gateway: Gateway, name: str
) -> None:
    """Over several requests: a few tokens of random text differ more in their size than that."""
    route, body = WHOLE[name]
    if route.endswith("chat/completions"):
        body = body | {"messages": [{"role": "user", "content": "the moon"}]}
    # The estimator learns from this one.
    assert fetch(own_gateway.url + "/completion", TEAM_KEY, {"prompt": "a stone", "n_predict": 300})[0] == 200
    backend.all_free()
    before, charged = counted(backend), metric_totals(own_gateway.url)
    for _ in range(6):
        status, answer = fetch(own_gateway.url + route, TEAM_KEY, body)
        assert status == 200, answer
    generated = difference(counted(backend), before)["completion"]
    counts = difference(metric_totals(own_gateway.url), charged)["completion"]
    assert generated <= counts <= 1.25 * generated


# --- Whole responses whose clients leave before them ---

LEFT: dict[str, tuple[list[dict[str, object]], bool]] = {  # the requests, and whether what is charged is no estimate
    "one": ([{}], True),
    "prompts": ([{"prompt": ["the moon", "a cat on a stone"]}], True),
    "choices": ([{"n": 3}], False),
    "several at once": ([{"prompt": "a cat"}, {"prompt": "the moon"}, {"prompt": "one river"}], False),
}


class DeepServer(LlamaServer):
    """llama-server whose slots do not fill before it notices that a client has left."""

    slot_context = 1 << 15


@pytest.fixture(scope="module")
def deep_backend(tmp_path_factory: pytest.TempPathFactory, llama_bin: str, model: Path):
    yield from running(DeepServer(tmp_path_factory.mktemp("deep"), llama_bin, model, slots=4))


def sent(url: str, body: dict[str, object]) -> socket.socket:
    """Send a request for a whole response, and return the connection."""
    address = urlsplit(url)
    request = httpx.Request("POST", f"{url}/v1/completions", headers=bearer(TEAM_KEY), json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection = socket.create_connection((address.hostname, address.port), 10)
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    return connection


def wait_for_cancelled(access_log: Path, number: int) -> Tokens:
    """Return the tokens of all cancelled requests once there are so many."""
    return eventually(lambda: logged(access_log, "cancelled"), lambda seen: seen[0] == number, 60)[1]


@pytest.mark.parametrize("name", LEFT)
def test_who_leaves_before_a_whole_response_is_charged_what_was_generated(
    deep_backend: LlamaServer, tmp_path: Path, name: str
) -> None:
    bodies, is_exact = LEFT[name]
    asked = {"prompt": "the moon", "max_tokens": 30_000, "ignore_eos": True}
    before, times = counted(deep_backend), 3
    for gateway in running(Gateway(tmp_path, deep_backend, LOG_FORMAT="json")):
        for number in range(1, times + 1):
            connections = [sent(gateway.url, asked | body) for body in bodies]
            eventually(deep_backend.busy, lambda busy: busy >= len(bodies), 10)
            for connection in connections:
                connection.close()
            charged = wait_for_cancelled(gateway.access_log, number * len(bodies))
        deep_backend.all_free()
    generated = difference(counted(deep_backend), before)["completion"]
    assert generated <= charged["completion"] <= (1 if is_exact else 1.25) * generated


HALF_A_CHARACTER = 200  # a token of the tiny model: the first byte of two


def until_free(url: str, backend: LlamaServer) -> None:
    """Wait until no slot is busy. Until then as many are counted at least."""

    def active() -> int:
        return int(json.loads(fetch(f"{url}/health")[1])["active"])

    def look() -> int:
        before, busy = active(), backend.busy()
        assert busy <= max(before, active())
        return busy

    eventually(look, lambda busy: busy == 0, 120)
    eventually(active, lambda number: number == 0, 30)


def test_a_stream_that_shows_nothing_keeps_its_slot_when_its_client_has_left(
    deep_backend: LlamaServer, tmp_path: Path
) -> None:
    """Half a character makes no event, so llama-server writes nothing and does not notice at its next token."""
    body = {
        "prompt": "a",
        "n_predict": 4000,
        "ignore_eos": True,
        "stream": True,
        "logit_bias": [[HALF_A_CHARACTER, 100]],
    }
    deep_backend.all_free()
    for gateway in running(Gateway(tmp_path, deep_backend)):
        url = f"{gateway.url}/completion"
        with httpx.stream("POST", url, headers=bearer(TEAM_KEY), json=body, timeout=30) as answer:
            assert answer.status_code == 200, answer.read()
            eventually(deep_backend.busy, lambda busy: busy == 1, 30)
        until_free(gateway.url, deep_backend)


# --- The limit of a key ---

CAPPED_KEY = "sk-e2e-capped-0123456789abcdef"
CAP = 7
WITHOUT_LIMIT: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "the moon"}]},
    "/v1/completions": {"prompt": "the moon"},
    "/completion": {"prompt": "the moon", "n_predict": -1},
    "/v1/messages": {"messages": [{"role": "user", "content": "the moon"}], "n_predict": 3},
    "/v1/responses": {"input": "the moon", "max_output_tokens": None},
}


def test_the_limit_of_a_key_holds_on_every_route(backend: LlamaServer, tmp_path: Path) -> None:
    keys_file = tmp_path / "capped.txt"
    keys_file.write_text(f"capped:{CAPPED_KEY}:1000000 max_tokens={CAP}\n")
    for gateway in running(Gateway(tmp_path, backend, AUTH_KEYS_FILE=str(keys_file))):
        for route, body in WITHOUT_LIMIT.items():
            backend.all_free()
            before = counted(backend)
            status, answer = fetch(gateway.url + route, CAPPED_KEY, body)
            assert status == 200, answer
            assert difference(counted(backend), before)["completion"] == CAP, route
            status, answer = fetch(gateway.url + route, CAPPED_KEY, body | {"max_tokens": CAP + 1, "n_predict": None})
            assert (status, b"at most 7 are allowed" in answer) == (400, True), route
            assert difference(counted(backend), before)["completion"] == CAP, route
