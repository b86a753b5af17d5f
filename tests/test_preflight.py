"""What is refused before anything runs, and what the services are given."""

import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

import config
from config import Config
from preflight import Ending, check_backend, check_tls, claim_ports, services_environment


def configured(**settings: str) -> Config:
    ports = {"PORT": "0", "PORT_HEALTH": "0", "PORT_BACKEND": "0", "HOST": "127.0.0.1"}
    given = {"DATA_DIR": "/d", **ports, "PORT_BACKEND": str(free_port()), **settings}
    return config.load_config(given)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def refusal(settings: Mapping[str, str]) -> tuple[int, str]:
    cfg = configured(**settings)
    try:
        check_backend(cfg)
        check_tls(cfg)
        claim_ports(cfg)
    except Ending as ending:
        return ending.status, str(ending)
    return 0, ""


def test_free_ports_are_told_by_number() -> None:
    ports = claim_ports(configured())
    assert list(ports) == ["PORT", "PORT_HEALTH", "PORT_BACKEND"]
    assert "0" not in ports.values()
    assert len(set(ports.values())) == 3


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "::1", "::"])
def test_a_port_that_is_let_go_can_be_claimed_again(host: str) -> None:
    ports = claim_ports(configured(HOST=host))
    assert claim_ports(configured(HOST=host, **ports)) == ports


@pytest.mark.parametrize("name", ["PORT", "PORT_HEALTH", "PORT_BACKEND"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_named(name: str, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        settings = {"MOCK_BACKEND": "true", name: port, "BACKEND_HOST" if name == "PORT_BACKEND" else "HOST": host}
        status, words = refusal(settings)
    assert (status, words) == (
        5,
        f"{name}: cannot listen on {host} port {port}: it is taken (is this running already?)",
    )


def test_an_address_of_another_machine_is_named() -> None:
    status, words = refusal({"MOCK_BACKEND": "true", "HOST": "192.0.2.1"})
    assert status == 5
    assert words.startswith("PORT: cannot listen on 192.0.2.1 port 0: ")


def test_no_model_and_no_binary_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal({})[0] == 3
    assert refusal({"MODEL_PATH": "/m", "LLAMA_BIN": "/none"}) == (2, "LLAMA_BIN: /none is not an executable file")
    assert refusal({"MODEL_PATH": "/m"})[0] == 4


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file or directory"), (b"no certificate", "in PEM form")]
)
def test_a_certificate_that_cannot_be_loaded_is_told(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "pem"
    if content:
        path.write_bytes(content)
    status, words = refusal({"MOCK_BACKEND": "true", "TLS_CERT_FILE": str(path), "TLS_KEY_FILE": str(path)})
    assert status == 2
    assert words.startswith(f"TLS_CERT_FILE, TLS_KEY_FILE: {path} and {path} cannot be loaded: ")
    assert reason in words


def test_the_services_get_the_same_settings_but_not_the_key() -> None:
    environ = {"BACKEND_API_KEY": "x", "BACKEND_API_KEY_FILE": "y", "KEEP": "z", "PORT": "0", "GATEWAY_PORT": "0"}
    assert services_environment(environ, configured(), {"PORT": "7"}, Path("/run/state")) == {
        "KEEP": "z",
        "PORT": "7",
        "GATEWAY_PORT": "7",
        "DATA_DIR": "/d",
        "STATE_FILE": "/run/state",
    }
    assert "GATEWAY_PORT" not in services_environment({}, configured(), {"PORT": "7"}, Path("/s"))
