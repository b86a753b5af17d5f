"""Several models behind one queue: a real llama-server as a router, with three models, and clients in bursts."""

import json
import os
import random
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import openai
import pytest
from stack import ENDLESS, Gateway, RouterServer, bearer, eventually, running

CHAT, CODE, EMBED = MODELS = ("chat", "code", "embed")
SLOTS = 4
KEYS = {name: f"sk-e2e-{name}-0123456789abcdef" for name in ("alice", "bob", "carol", "dave", "embedder", "ops")}
KEYS_FILE = "".join(
    f"{name}:{key}:1000000{options}\n"
    for (name, key), options in zip(
        KEYS.items(), ("", "", "", "", " models=embed*,chat", " role=operator"), strict=True
    )
)
# In each burst so many requests: one key asks for far more than its share.
BURST = {"alice": 22, "bob": 6, "carol": 6, "dave": 6}
BURSTS = 5
BURST_SLOTS = 1  # so that a share that is not fair would be seen
SEED = 18


@pytest.fixture(scope="module")
def models(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        shutil.copy(model, folder / f"{name}.gguf")
    return folder


@dataclass
class Stack:
    router: RouterServer
    gateway: Gateway

    def loads(self) -> dict[str, float]:
        """Return the loads that the gateway has counted, by model and result."""
        page = httpx.get(f"{self.gateway.url}/metrics", headers=bearer(KEYS["ops"]), timeout=60).text
        lines = [line for line in page.splitlines() if line.startswith("gateway_model_loads_total{")]
        return {name.split("{")[1].rstrip("}"): float(value) for name, value in map(str.split, lines)}

    def health(self) -> dict[str, object]:
        health: dict[str, object] = httpx.get(
            f"{self.gateway.url}/health", headers=bearer(KEYS["ops"]), timeout=60
        ).json()
        return health

    def lines(self, count: int) -> list[dict[str, object]]:
        """Return the access lines of requests for models, once there are so many of them."""

        def read() -> list[dict[str, object]]:
            lines = [json.loads(line) for line in self.gateway.access_log.read_text().splitlines()]
            return [line for line in lines if line["model"] != "-"]

        return eventually(read, lambda lines: len(lines) >= count, 30)


@contextmanager
def stack(
    folder: Path, llama_bin: str, models: Path, most: int, slots: int = SLOTS, **settings: str
) -> Iterator[Stack]:
    router = RouterServer(folder, llama_bin, models, slots, most=most)
    keys_file = folder / "keys.txt"
    keys_file.write_text(KEYS_FILE)
    router.start()
    try:
        own = {"MODELS": "router", "MODELS_MAX": str(most), "AUTH_KEYS_FILE": str(keys_file), "LOG_FORMAT": "json"}
        for gateway in running(Gateway(folder, router, **own | settings)):
            yield Stack(router, gateway)
    finally:
        router.end(signal.SIGTERM)


def ask(url: str, key: str, model: str, max_tokens: int = 8, client: httpx.Client | None = None) -> int:
    """Ask for an answer of so many tokens; return its status, 0 if none came."""
    body = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": "the cat"}]}
    post = httpx.post if client is None else client.post
    try:
        answer = post(f"{url}/v1/chat/completions", json=body, headers=bearer(key), timeout=120)
    except httpx.HTTPError:
        return 0
    if answer.status_code == 200:
        assert answer.json()["usage"]["completion_tokens"] == max_tokens
    else:
        print(answer.text)
    return answer.status_code


def bursts() -> list[list[tuple[str, str]]]:
    """Return bursts of requests, as pairs of a key's name and a model, all models in each burst."""
    rng = random.Random(SEED)
    result = []
    for _ in range(BURSTS):
        burst = [(name, rng.choice(MODELS)) for name, number in BURST.items() for _ in range(number)]
        rng.shuffle(burst)
        assert {model for _, model in burst} == set(MODELS)
        result.append(burst)
    return result


def send_bursts(url: str, key_of: dict[str, str]) -> Counter[int]:
    """Send each burst at once, the next one when all of the last are answered; return how often each status came."""
    statuses: Counter[int] = Counter()
    # One client for all, whose threads wait for each other: else the requests of a burst would not come together.
    limits = httpx.Limits(max_connections=None)
    with ThreadPoolExecutor(sum(BURST.values())) as pool, httpx.Client(limits=limits) as client:
        for burst in bursts():
            together = threading.Barrier(len(burst))

            def send(request: tuple[str, str], together: threading.Barrier = together) -> int:
                together.wait()
                return ask(url, key_of[request[0]], request[1], 64, client)

            statuses.update(pool.map(send, burst))
    return statuses


def test_bursts_over_three_models_of_which_one_fits(llama_bin: str, models: Path, tmp_path: Path) -> None:
    """200 requests of four keys: none is lost or cut, there are as few swaps as possible, and the keys get fair shares.

    In each burst the model that is loaded comes first, so a burst needs two loads, and the first one three.
    """
    least = 3 + 2 * (BURSTS - 1)
    with stack(tmp_path, llama_bin, models, 1, slots=BURST_SLOTS, MODEL_SWITCH_AFTER="600") as served:
        statuses = send_bursts(served.gateway.url, KEYS)
        assert statuses == {200: BURSTS * sum(BURST.values())}
        loads = served.router.loads()
        assert sum(served.loads().values()) == loads
        assert loads <= 1.2 * least
        lines = served.lines(statuses[200])
    assert Counter(line["key"] for line in lines) == {name: BURSTS * number for name, number in BURST.items()}
    size = sum(BURST.values())
    for burst in range(BURSTS):
        check_shares(lines[burst * size : (burst + 1) * size])
    direct = RouterServer(tmp_path, llama_bin, models, BURST_SLOTS, most=1, autoload=True)
    direct.start()
    try:
        statuses_direct = send_bursts(direct.url, dict.fromkeys(KEYS, direct.key))
        loads_direct = direct.loads()
    finally:
        direct.end(signal.SIGTERM)
    print(f"loads: least {least}, gateway {loads}, direct {loads_direct} with {dict(statuses_direct)}")


def check_shares(lines: list[dict[str, object]]) -> None:
    """Check that in one burst, for each model, the key with most requests did not delay those of the others."""
    for model in MODELS:
        keys = [str(line["key"]) for line in lines if line["model"] == model]
        others = [keys.count(name) for name in BURST if name != "alice"]
        last = max((at for at, key in enumerate(keys) if key != "alice"), default=-1)
        # The slots may have been given to it before the others came, and as many may have ended out of order.
        assert keys[: last + 1].count("alice") <= max(others) + 2 * BURST_SLOTS


def test_a_chat_and_an_embedding_model_side_by_side(llama_bin: str, models: Path, tmp_path: Path) -> None:
    """With room for both there is never a swap, and embeddings are answered while all chats' slots are taken."""
    with stack(tmp_path, llama_bin, models, 2) as served:
        url = served.gateway.url
        body = {"model": CHAT, "max_tokens": ENDLESS, "stream": True, "messages": [{"role": "user", "content": "a"}]}
        ended = threading.Event()
        begun = threading.Semaphore(0)

        def hold_slot() -> None:
            with (
                httpx.Client(timeout=60) as client,
                client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=bearer(KEYS["alice"])) as answer,
            ):
                for _ in answer.iter_raw():
                    begun.release()
                    if ended.is_set():
                        return

        with ThreadPoolExecutor(SLOTS + 3) as pool:
            chats = [pool.submit(hold_slot) for _ in range(SLOTS + 2)]
            try:
                eventually(
                    lambda: (served.health()["active"], served.health()["queued"]), lambda n: n == (SLOTS, 2), 30
                )
                for number in range(40):
                    reply = httpx.post(
                        f"{url}/v1/embeddings",
                        json={"model": EMBED, "input": f"text {number}"},
                        headers=bearer(KEYS["embedder"]),
                        timeout=60,
                    )
                    assert reply.status_code == 200
                assert (served.health()["active"], served.health()["queued"]) == (SLOTS, 2)
            finally:
                ended.set()
            for chat in chats:
                chat.result()
        assert served.loads() == {'model="chat",result="ok"': 1.0, 'model="embed",result="ok"': 1.0}
        assert served.router.loads() == 2
        lines = [line for line in served.lines(40) if line["model"] == EMBED]
        assert len(lines) == 40
        # No chat ends: one that waited for a slot would not be answered. A busy machine may stop the process meanwhile.
        assert median(line["queue_ms"] for line in lines[1:]) == 0


def read_stream(url: str, key: str, model: str, max_tokens: int, begun: threading.Semaphore) -> tuple[bool, bool]:
    """Read a stream; return whether its last event came, and whether its connection was cut."""
    messages = [{"role": "user", "content": "the cat"}]
    body = {"model": model, "max_tokens": max_tokens, "stream": True, "messages": messages}
    text, was_cut = b"", False
    try:
        with (
            httpx.Client(timeout=120) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=bearer(key)) as answer,
        ):
            for data in answer.iter_raw():
                if not text:
                    begun.release()
                text += data
    except httpx.HTTPError:
        was_cut = True
    return text.endswith(b"data: [DONE]\n\n"), was_cut


def test_the_death_of_one_model_cuts_no_stream_of_another(llama_bin: str, models: Path, tmp_path: Path) -> None:
    """Kill -9 in the middle of 16 streams of two models: eight are cut visibly, eight are whole, waiting ones go on."""
    with stack(tmp_path, llama_bin, models, 2, slots=8) as served:
        url, begun = served.gateway.url, threading.Semaphore(0)
        with ThreadPoolExecutor(20) as pool:
            # Both are loaded before a stream begins, and no chat ends by itself: its slots are taken until the kill.
            assert [ask(url, KEYS["dave"], model) for model in (CHAT, CODE)] == [200, 200]
            chats = [pool.submit(read_stream, url, KEYS["alice"], CHAT, ENDLESS, begun) for _ in range(8)]
            codes = [pool.submit(read_stream, url, KEYS["bob"], CODE, 1500, begun) for _ in range(8)]
            for _ in range(16):
                assert begun.acquire(timeout=60)
            waiting = [pool.submit(ask, url, KEYS["carol"], CHAT) for _ in range(2)]
            eventually(lambda: served.health()["queued"], lambda queued: queued == 2, 30)
            os.kill(served.router.child_of(CHAT), signal.SIGKILL)
            assert [chat.result() for chat in chats] == [(False, True)] * 8
            assert [code.result() for code in codes] == [(True, False)] * 8
            assert [answer.result() for answer in waiting] == [200, 200]
        assert served.loads()['model="chat",result="ok"'] == 2.0
        assert served.loads()['model="code",result="ok"'] == 1.0


@pytest.fixture(scope="module")
def shared(llama_bin: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    settings = {"MODEL_ALIASES": "gpt-4o=chat", "ADMIN_ROUTES": "true"}
    with stack(tmp_path_factory.mktemp("shared"), llama_bin, models, 1, **settings) as served:
        yield served


def client_of(served: Stack, name: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.gateway.url}/v1", api_key=KEYS[name], max_retries=0, timeout=60)


def test_the_openai_client_lists_and_uses_two_models_with_two_keys(shared: Stack) -> None:
    with client_of(shared, "alice") as alice, client_of(shared, "embedder") as embedder:
        assert [model.id for model in alice.models.list()] == list(MODELS)
        assert [model.id for model in embedder.models.list()] == [CHAT, EMBED]
        question = [{"role": "user", "content": "the cat"}]
        answer = alice.chat.completions.create(model=CODE, messages=question, max_tokens=4)
        assert answer.model == CODE
        assert alice.chat.completions.create(model="gpt-4o", messages=question, max_tokens=4).model == CHAT
        with alice.chat.completions.create(model="gpt-4o", messages=question, max_tokens=4, stream=True) as stream:
            assert len(list(stream)) > 1
        assert embedder.embeddings.create(model=EMBED, input="the cat").model == EMBED
        with pytest.raises(openai.PermissionDeniedError) as forbidden:
            embedder.chat.completions.create(model=CODE, messages=question)
        assert forbidden.value.code == "model_not_allowed"
        assert "chat, embed" in str(forbidden.value)
        with pytest.raises(openai.NotFoundError) as unknown:
            alice.chat.completions.create(model="gpt-5", messages=question)
        assert unknown.value.code == "model_not_found"
        loaded = {model.id: model.status["value"] for model in alice.models.list()}
        assert loaded == {CHAT: "unloaded", CODE: "unloaded", EMBED: "loaded"}
        contexts = {model.id: model.context_length for model in alice.models.list()}
        assert contexts == dict.fromkeys(MODELS, 1024)


def test_what_a_key_sees_of_models_says_nothing_of_the_machine(shared: Stack) -> None:
    pages = [
        httpx.get(f"{shared.gateway.url}{path}", headers=bearer(KEYS[name])).text
        for path in ("/v1/models", "/models")
        for name in ("alice", "embedder")
    ]
    assert all(mark not in page for page in pages for mark in ("gguf", "--", "args", "preset", "/"))
    assert "gguf" in httpx.get(f"{shared.gateway.url}/models", headers=bearer(KEYS["ops"])).text


def test_a_transcription_form_without_a_model_gets_the_default(llama_bin: str, models: Path, tmp_path: Path) -> None:
    """The model has no audio input: that it says so shows that it got the request."""
    with stack(tmp_path, llama_bin, models, 1, DEFAULT_MODEL=CHAT) as served:
        files = {"file": ("a.wav", b"RIFF", "audio/wav")}
        url, headers = f"{served.gateway.url}/v1/audio/transcriptions", bearer(KEYS["alice"])
        forms = ({}, {"model": CODE})
        answers = [httpx.post(url, files=files, data=data, headers=headers, timeout=60) for data in forms]
        assert ["audio" in answer.json()["error"]["message"] for answer in answers] == [True, True], answers[0].text
        assert [line["model"] for line in served.lines(2)] == [CHAT, CODE]


def test_an_operator_loads_and_unloads(shared: Stack) -> None:
    url, headers = shared.gateway.url, bearer(KEYS["ops"])
    for model in MODELS:
        answer = httpx.post(f"{url}/models/unload", json={"model": model}, headers=headers, timeout=60)
        assert answer.status_code in (200, 400)
    eventually(lambda: shared.health()["models"], lambda states: set(states.values()) == {"unloaded"}, 30)
    assert httpx.post(f"{url}/models/load", json={"model": CODE}, headers=headers, timeout=60).status_code == 200
    eventually(lambda: shared.health()["models"], lambda states: states[CODE] == "loaded", 30)
    assert httpx.post(f"{url}/models/load", json={"model": CODE}, headers=bearer(KEYS["alice"])).status_code == 403
    assert ask(url, KEYS["alice"], CODE) == 200
    assert httpx.get(f"{url}/props?model={CODE}", headers=headers).json()["total_slots"] == SLOTS
    assert httpx.get(f"{url}/props?model=none", headers=headers).json()["error"]["code"] == "model_not_found"
