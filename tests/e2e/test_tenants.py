"""What one key can do to a real llama-server: what ends or blocks it is refused, and a death hurts the culprit only."""

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from stack import OPERATOR_KEY, TEAM_KEY, LlamaServer, bearer, eventually, fetch, running
from test_supervised import Service

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"prompt": "x", "max_tokens": 4}
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}
DEEP = b'{"messages":[{"role":"user","content":"x","x":' + b"[" * 500_000 + b"]" * 500_000 + b"}]}"
TRIGGER = [{"type": 2, "value": "([\\s\\S]+)+\\1ZZZZ"}]
REFUSED: dict[str, tuple[str, object]] = {
    "deep, without a slot": ("/apply-template", DEEP),
    "deep, chat": (CHAT, DEEP),
    "deep prompt": (COMPLETIONS, b'{"prompt":' + b"[" * 400_000 + b"]" * 400_000 + b"}"),
    "parentheses": (COMPLETIONS, {**PROMPT, "grammar": "root ::= " + "(" * 9000 + '"a"' + ")" * 9000}),
    "schema": (COMPLETIONS, {**PROMPT, "json_schema": json.loads('{"type":"array","items":' * 800 + "{}" + "}" * 800)}),
    "trigger": (COMPLETIONS, {**PROMPT, "grammar": 'root ::= "a"', "grammar_lazy": True, "grammar_triggers": TRIGGER}),
    "repeat_last_n": (COMPLETIONS, {**PROMPT, "repeat_last_n": 400_000_000}),
    "breakers": (COMPLETIONS, {**PROMPT, "dry_sequence_breakers": [str(n) for n in range(20_000)]}),
    "samplers": (COMPLETIONS, {**PROMPT, "samplers": ["dry"] * 100_000}),
    "n_probs": (COMPLETIONS, {**PROMPT, "n_probs": 100_000}),
    "chat_parser": (COMPLETIONS, {**PROMPT, "chat_parser": "[["}),
    "media": (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}),
}  # fmt: skip
# What clients send, on both sides of the gateway.
PASSED: dict[str, tuple[str, object]] = {
    "grammar": (COMPLETIONS, {**PROMPT, "grammar": 'root ::= ("a" | "b")*'}),
    "schema": (COMPLETIONS, {**PROMPT, "json_schema": {"type": "object", "properties": {"n": {"type": "integer"}}}}),
    "samplers and stops": (COMPLETIONS, {**PROMPT, "samplers": ["top_k", "temperature"], "stop": ["zz"] * 8}),
    "probabilities": (COMPLETIONS, {**PROMPT, "n_probs": 20, "logit_bias": [[5, -1]], "repeat_last_n": 64}),
    "nothing": (COMPLETIONS, {**PROMPT, "grammar_triggers": [], "grammar": "", "id_slot": -1, "n_keep": 2}),
}


def ask(url: str, path: str, body: object, key: str = TEAM_KEY) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **bearer(key)})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code), error.read()


@pytest.mark.parametrize("case", REFUSED)
def test_a_body_that_harms_the_others_is_refused(url: str, backend: LlamaServer, case: str) -> None:
    status, body = ask(url, *REFUSED[case])
    assert status == 400
    assert json.loads(body)["error"]["code"] in ("member_not_allowed", "body_too_deep")
    assert backend.process is not None
    assert backend.process.poll() is None


@pytest.mark.parametrize("case", PASSED)
def test_what_clients_send_passes(url: str, case: str) -> None:
    status, body = ask(url, *PASSED[case])
    assert status == 200, body


@pytest.fixture(scope="module")
def service(llama_bin: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    yield from running(Service(tmp_path_factory.mktemp("tenants"), llama_bin, model, MAX_RESTARTS="1"))


def is_working(service: Service) -> bool:
    status, body = fetch(f"{service.url}/slots", OPERATOR_KEY)
    return status == 200 and any(slot["is_processing"] for slot in json.loads(body))


def test_the_others_go_on_and_what_was_at_work_is_held_back(service: Service) -> None:
    """More deaths than MAX_RESTARTS; here a signal kills llama-server."""
    for number in range(3):
        service.await_ready()
        assert service.ask(COMPLETIONS, PROMPT)[0] == 200
        pid = service.backend_pid
        assert pid is not None
        body = {"prompt": f"{number} once upon", "max_tokens": 1_000_000, "ignore_eos": True}
        with ThreadPoolExecutor(1) as threads:
            bad = threads.submit(ask, service.url, COMPLETIONS, body, OPERATOR_KEY)
            eventually(lambda: is_working(service), bool, 20)
            os.kill(pid, signal.SIGKILL)
            assert json.loads(bad.result()[1])["error"]["code"] == "request_held_back"
        status, answer = service.ask(COMPLETIONS, PROMPT)
        assert status == 200, answer
        assert ask(service.url, COMPLETIONS, body, OPERATOR_KEY)[0] == (502 if number < 2 else 429)
