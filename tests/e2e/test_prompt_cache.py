"""What one key learns of another key's prompt from the real llama-server: all with `shared`, nothing with `private`."""

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from stack import Gateway, LlamaServer, bearer, eventually, fetch, running

ALICE, BOB = "sk-alice-0123456789abcdef", "sk-bob-0123456789abcdef"
KEYS = f"alice:{ALICE}:1000000\nbob:{BOB}:1000000\n"
HEAD, SECRET = "Meeting notes, confidential: the new salary of the director is ", "83506"
SLOTS = 4
WITHIN_S = 60.0
CHAT, COMPLETIONS, NATIVE, MESSAGES = "/v1/chat/completions", "/v1/completions", "/completion", "/v1/messages"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"


class IsolatingServer(LlamaServer):
    """llama-server as the supervisor starts it with private caches."""

    def command(self) -> list[str]:
        folder = self.log.parent / "slots"
        folder.mkdir(exist_ok=True)
        return [*super().command(), "--slot-save-path", str(folder), "--cache-ram", "0", "--no-kv-unified"]


def gateway_before(folder: Path, backend: LlamaServer, mode: str) -> Gateway:
    keys_file = folder / "keys.txt"
    keys_file.write_text(KEYS)
    return Gateway(folder, backend, AUTH_KEYS_FILE=str(keys_file), PROMPT_CACHE=mode)


@pytest.fixture(scope="module")
def isolating(llama_bin: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatingServer]:
    server = IsolatingServer(tmp_path_factory.mktemp("isolating"), llama_bin, model, SLOTS)
    server.start()
    yield server
    server.end(15)


@pytest.fixture(scope="module")
def private(isolating: IsolatingServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    yield from running(gateway_before(tmp_path_factory.mktemp("private"), isolating, "private"))


@pytest.fixture(scope="module")
def shared(isolating: IsolatingServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    yield from running(gateway_before(tmp_path_factory.mktemp("shared"), isolating, "shared"))


def body_of(path: str, prompt: str) -> dict[str, object]:
    if path in (CHAT, MESSAGES):
        return {"messages": [{"role": "user", "content": prompt}], "max_tokens": 1}
    if path in (RESPONSES, EMBEDDINGS):
        return {"input": prompt, "max_output_tokens": 16}
    return {"prompt": prompt, "max_tokens": 1, "n_predict": 1}


def ask(gateway: Gateway, key: str, path: str, body: dict[str, object]) -> int:
    """Return how many tokens of the prompt were found, by the largest number that the answer reports."""
    answer = httpx.post(gateway.url + path, headers=bearer(key), json=body, timeout=WITHIN_S)
    assert answer.status_code == 200, answer.text
    report = answer.json()
    usage = report.get("usage") or {}
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    numbers = (
        details.get("cached_tokens"),
        usage.get("cache_read_input_tokens"),
        report.get("timings", {}).get("cache_n"),
    )
    return max(number or 0 for number in numbers)


def digits_found(gateway: Gateway, path: str, left_by: str) -> int:
    """How many digits bob reads out of the prompt that alice sends on the route `left_by`."""
    known = ""
    for _ in SECRET:
        found = {}
        for digit in "0123456789":
            ask(gateway, ALICE, left_by, body_of(left_by, HEAD + SECRET + " from May on."))
            found[digit] = ask(gateway, BOB, path, body_of(path, HEAD + known + digit + "~~~"))
        best = [digit for digit, number in found.items() if number == max(found.values())]
        if len(best) != 1:
            break
        known += best[0]
    return len(known) if SECRET.startswith(known) else 0


def test_a_key_reads_another_keys_prompt_from_a_shared_cache(shared: Gateway) -> None:
    assert digits_found(shared, COMPLETIONS, COMPLETIONS) == len(SECRET)


@pytest.mark.parametrize("left_by", [CHAT, COMPLETIONS, NATIVE, MESSAGES, RESPONSES, EMBEDDINGS])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, NATIVE, MESSAGES, RESPONSES])
def test_a_key_reads_nothing_from_a_private_cache(private: Gateway, path: str, left_by: str) -> None:
    assert digits_found(private, path, left_by) == 0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, NATIVE, MESSAGES, RESPONSES])
def test_a_key_finds_its_own_prompt(private: Gateway, path: str) -> None:
    body = body_of(path, HEAD + path)
    ask(private, ALICE, path, body)
    assert ask(private, ALICE, path, body) > len(HEAD) / 2


def wander(gateway: Gateway, key: str, seed: int) -> None:
    """Send 100 requests; some clients leave."""
    dice = random.Random(seed)
    for _ in range(100):
        path = dice.choice([CHAT, COMPLETIONS, NATIVE, MESSAGES, RESPONSES, EMBEDDINGS])
        body = body_of(path, HEAD + SECRET + " and" * dice.randrange(20))
        if path in (CHAT, COMPLETIONS) and dice.random() < 0.3:
            body["n"] = dice.randrange(2, 4)
        elif path == COMPLETIONS and dice.random() < 0.3:
            body["prompt"] = [body["prompt"], "x"]
        leaves = path != EMBEDDINGS and dice.random() < 0.2
        if leaves:
            body |= {"max_tokens": 500, "n_predict": 500, "max_output_tokens": 500, "stream": dice.random() < 0.5}
        try:
            httpx.post(gateway.url + path, headers=bearer(key), json=body, timeout=0.05 if leaves else WITHIN_S)
        except httpx.HTTPError:
            continue


def test_a_key_reads_nothing_after_much_else_and_a_crash(isolating: IsolatingServer, private: Gateway) -> None:
    def wandering() -> None:
        threads = [threading.Thread(target=wander, args=(private, key, seed)) for seed, key in enumerate((ALICE, BOB))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    wandering()
    isolating.end(9)
    isolating.start()
    eventually(lambda: b'"state": "ready"' in fetch(f"{private.url}/health")[1], bool, WITHIN_S)
    wandering()
    for path in (COMPLETIONS, MESSAGES):
        assert digits_found(private, path, COMPLETIONS) == 0


def test_no_slot_shares_its_memory(isolating: IsolatingServer) -> None:
    """Else the long text of one key would push another's out, or end its request."""
    slots = json.loads(fetch(f"{isolating.url}/slots", isolating.key)[1])
    assert [slot["n_ctx"] for slot in slots] == [isolating.slot_context] * SLOTS


class UnreadyGateway(Gateway):
    """A gateway that is not expected to serve."""

    def is_ready(self) -> bool:
        return fetch(f"{self.url}/health")[0] > 0


def test_nothing_is_served_without_the_arguments(backend: LlamaServer, tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.txt"
    keys_file.write_text(KEYS)
    gateway = UnreadyGateway(tmp_path, backend, AUTH_KEYS_FILE=str(keys_file), PROMPT_CACHE="private")
    for _ in running(gateway):
        report = eventually(lambda: fetch(f"{gateway.url}/health")[1], lambda report: b'"dead"' in report, WITHIN_S)
        assert b"PROMPT_CACHE=private: llama-server" in report
        assert fetch(gateway.url + COMPLETIONS, ALICE, {"prompt": "x"})[0] == 503
