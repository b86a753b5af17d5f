"""Who is calling: the client's address behind a proxy, and keys in the environment, over a real llama-server."""

from collections.abc import Iterator

import httpx
import pytest
from stack import TEAM_KEY, Gateway, LlamaServer, bearer, eventually, running

OFFICE_KEY = "sk-e2e-office-0123456789abcdef"
CHAT = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "the cat"}]}


@pytest.fixture(scope="module")
def behind_proxy(backend: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that trusts a proxy on this machine, with one more key in its environment."""
    settings = {
        "TRUSTED_PROXIES": "127.0.0.1",
        "API_KEYS": f"office:{OFFICE_KEY}:1000 from=192.0.2.0/24,2001:db8::/32",
        "METRICS_AUTH_ENABLED": "",
    }
    yield from running(Gateway(tmp_path_factory.mktemp("behind"), backend, **settings))


def ask(gateway: Gateway, key: str, fields: dict[str, str]) -> int:
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=CHAT, headers=bearer(key) | fields).status_code


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"X-Forwarded-For": "198.51.100.7, 192.0.2.9"}, 200),
        ({"X-Forwarded-For": "[2001:db8::9]:4711"}, 200),
        ({"Forwarded": 'for=198.51.100.7, for="[2001:db8::9]:4711";proto=https'}, 200),
        ({"X-Forwarded-For": "192.0.2.9, 198.51.100.7"}, 401),
        ({"X-Forwarded-For": "198.51.100.7", "Forwarded": "for=192.0.2.9"}, 401),
        ({}, 401),
    ],
)
def test_a_key_works_for_clients_in_its_networks(behind_proxy: Gateway, fields: dict[str, str], status: int) -> None:
    assert ask(behind_proxy, OFFICE_KEY, fields) == status
    assert ask(behind_proxy, TEAM_KEY, fields) == 200


def test_the_access_log_names_the_client(behind_proxy: Gateway) -> None:
    assert ask(behind_proxy, OFFICE_KEY, {"X-Forwarded-For": "192.0.2.77"}) == 200
    eventually(behind_proxy.access_log.read_text, lambda text: " peer=192.0.2.77 " in text, 10)


def test_metrics_count_requests_only_for_keys(behind_proxy: Gateway) -> None:
    pages = [httpx.get(f"{behind_proxy.url}/metrics", headers=headers) for headers in ({}, bearer(TEAM_KEY))]
    assert [page.status_code for page in pages] == [200, 200]
    assert ["gateway_backend_up" in page.text for page in pages] == [True, True]
    assert ["gateway_tokens_total" in page.text for page in pages] == [False, True]
