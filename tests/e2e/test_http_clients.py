"""httpx and curl: pooled and reused connections, and the parts of HTTP/1.1 that they use."""

import asyncio
import json
import subprocess

import httpx
import pytest
from stack import OPERATOR_KEY, TEAM_KEY, bearer

CHAT = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "the cat"}]}


class Connects:
    """Counts the TCP connections that an httpx client opens."""

    def __init__(self) -> None:
        self.count = 0

    def trace(self, name: str, _: object) -> None:
        self.count += name == "connection.connect_tcp.started"

    async def atrace(self, name: str, _: object) -> None:
        self.trace(name, _)


def test_one_connection_carries_all_requests_of_a_client(url: str) -> None:
    connects = Connects()
    options = {"headers": bearer(TEAM_KEY), "extensions": {"trace": connects.trace}}
    with httpx.Client(base_url=url, timeout=30) as client:
        for _ in range(5):
            assert client.post("/v1/chat/completions", json=CHAT, **options).status_code == 200
            assert client.get("/v1/models", **options).status_code == 200
            assert client.get("/ping", **options).status_code == 200
            with client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}, **options) as answer:
                assert answer.read().endswith(b"data: [DONE]\n\n")
    assert connects.count == 1


def test_refusals_keep_the_connection(url: str) -> None:
    connects = Connects()
    extensions = {"trace": connects.trace}
    with httpx.Client(base_url=url, timeout=30) as client:
        assert client.get("/v1/models", extensions=extensions).status_code == 401
        assert (
            client.get("/v1/models", headers=bearer("sk-nobody-0123456789abcdef"), extensions=extensions).status_code
            == 401
        )
        assert client.get("/nowhere", headers=bearer(TEAM_KEY), extensions=extensions).status_code == 404
        assert client.get("/slots", headers=bearer(TEAM_KEY), extensions=extensions).status_code == 403
        assert client.put("/v1/models", headers=bearer(TEAM_KEY), extensions=extensions).status_code == 405
        assert client.get("/v1/models", headers=bearer(TEAM_KEY), extensions=extensions).status_code == 200
    assert connects.count == 1


def test_a_refusal_of_the_backend_keeps_the_clients_connection(url: str) -> None:
    """llama-server closes the connection after every status from 400 on."""
    connects = Connects()
    options = {"headers": bearer(TEAM_KEY), "extensions": {"trace": connects.trace}}
    with httpx.Client(base_url=url, timeout=30) as client:
        statuses = [
            client.post("/v1/chat/completions", json=body, **options).status_code for body in ({}, CHAT, {}, CHAT)
        ]
    assert [status >= 400 for status in statuses] == [True, False, True, False]
    assert connects.count == 1


def test_a_small_pool_serves_many_concurrent_requests(url: str) -> None:
    connects = Connects()

    async def main() -> list[int]:
        limits = httpx.Limits(max_connections=6, max_keepalive_connections=6)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, headers=bearer(TEAM_KEY)) as client:
            extensions = {"trace": connects.atrace}
            options = [client.post("/v1/chat/completions", json=CHAT, extensions=extensions) for _ in range(60)]
            return [answer.status_code for answer in await asyncio.gather(*options)]

    assert asyncio.run(main()) == [200] * 60
    assert connects.count <= 6


def test_an_operator_may_read_what_a_team_key_may_not(url: str) -> None:
    with httpx.Client(base_url=url, headers=bearer(OPERATOR_KEY), timeout=30) as client:
        assert len(client.get("/slots").json()) == 4
        assert client.get("/props").json()["total_slots"] == 4


def test_tokenize_and_detokenize(url: str) -> None:
    with httpx.Client(base_url=url, headers=bearer(TEAM_KEY), timeout=30) as client:
        tokens = client.post("/tokenize", json={"content": "the cat"}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": tokens}).json()["content"].strip() == "the cat"


def test_public_routes_need_no_key(url: str) -> None:
    with httpx.Client(base_url=url, timeout=30) as client:
        assert client.get("/ping?probe=1").status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200
        head = client.head("/health")
    assert (head.status_code, head.content) == (200, b"")


def test_a_key_is_accepted_in_each_field(url: str) -> None:
    offers = [
        {"Authorization": f"Bearer {TEAM_KEY}"},
        {"Authorization": TEAM_KEY},
        {"x-api-key": TEAM_KEY},
        {"api-key": TEAM_KEY},
    ]
    with httpx.Client(base_url=url, timeout=30) as client:
        assert [client.get("/v1/models", headers=offer).status_code for offer in offers] == [200] * 4


def curl(*arguments: str, body: str | None = None) -> str:
    command = ["curl", "--silent", "--show-error", "--max-time", "30", "--expect100-timeout", "30", *arguments]
    return subprocess.run(command, input=body, capture_output=True, text=True, check=True).stdout


def key(secret: str = TEAM_KEY) -> tuple[str, str]:
    return "--header", f"Authorization: Bearer {secret}"


JSON = ("--header", "Content-Type: application/json")


def test_curl_reuses_its_connection(url: str) -> None:
    written = ("--output", "/dev/null", "--write-out", "%{http_code} %{num_connects} ")
    chat = [*key(), *JSON, "--data", json.dumps(CHAT), f"{url}/v1/chat/completions", *written]
    assert curl(*chat, "--next", *chat, "--next", *key(), f"{url}/v1/models", *written) == "200 1 200 0 200 0 "


def test_curl_streams(url: str) -> None:
    body = json.dumps(CHAT | {"stream": True})
    output = curl("--no-buffer", *key(), *JSON, "--data", body, f"{url}/v1/chat/completions")
    assert output.endswith("data: [DONE]\n\n")
    assert all(event.startswith("data: ") for event in output.split("\n\n")[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_curl_with_http_1_0_gets_plain_bytes_and_a_close(url: str, stream: bool) -> None:
    body = json.dumps(CHAT | {"stream": stream})
    output = curl("--http1.0", "--include", *key(), *JSON, "--data", body, f"{url}/v1/chat/completions")
    head, _, payload = output.replace("\r\n", "\n").partition("\n\n")
    assert "transfer-encoding" not in head.lower()
    assert payload.startswith("data: {" if stream else "{")
    assert payload.endswith("data: [DONE]\n\n" if stream else "}")


def test_curl_expects_100_continue(url: str) -> None:
    padding = json.dumps(CHAT | {"user": "x" * 2_000_000})
    output = curl(
        "--include",
        "--header",
        "Expect: 100-continue",
        *key(),
        *JSON,
        "--data",
        "@-",
        f"{url}/v1/chat/completions",
        body=padding,
    )
    assert output.startswith("HTTP/1.1 100 Continue")
    assert "HTTP/1.1 200 " in output


def test_curl_is_refused_before_it_sends_a_body(url: str) -> None:
    padding = json.dumps(CHAT | {"user": "x" * 2_000_000})
    options = ("--header", "Expect: 100-continue", *key("sk-nobody-0123456789abcdef"), *JSON, "--data", "@-")
    written = ("--output", "/dev/null", "--write-out", "%{http_code} %{size_upload}")
    assert curl(*options, f"{url}/v1/chat/completions", *written, body=padding) == "401 0"


def test_curl_sends_a_chunked_body(url: str) -> None:
    chunked = ("--header", "Transfer-Encoding: chunked", "--data", "@-")
    output = curl(*chunked, *key(), *JSON, f"{url}/v1/chat/completions", body=json.dumps(CHAT))
    assert json.loads(output)["usage"]["completion_tokens"] == 4


def test_curl_sends_a_head_request(url: str) -> None:
    output = curl("--head", f"{url}/ping")
    assert output.startswith("HTTP/1.1 200 ")
