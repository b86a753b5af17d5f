"""The checks before anything runs, and the environment of the services."""

import os
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from boot.preflight import check_backend, check_tls, claim_ports, services_environment, without_api_keys
from boot.shutdown import StartupError
from config.loader import load_config
from config.settings import Config
from support.ports import free_port


def configured(**settings: str) -> Config:
    ports = {"PORT": "0", "PORT_HEALTH": "0", "PORT_BACKEND": str(free_port()), "HOST": "127.0.0.1"}
    return load_config({"DATA_DIR": "/d", **ports, **settings})


def check(config: Config) -> None:
    check_backend(config)
    check_tls(config)
    with ExitStack() as reserved:
        claim_ports(config, reserved)


def refusal(settings: Mapping[str, str]) -> tuple[int, str]:
    """Return the exit status and the message with which a start is refused."""
    config = configured(**settings)
    with pytest.raises(StartupError) as caught:
        check(config)
    return caught.value.status, str(caught.value)


def test_port_0_becomes_the_number_of_a_free_port() -> None:
    with ExitStack() as reserved:
        ports = claim_ports(configured(), reserved)
    assert list(ports) == ["PORT", "PORT_HEALTH", "PORT_BACKEND"]
    assert "0" not in ports.values()
    assert len(set(ports.values())) == 3


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "::1", "::"])
def test_claimed_ports_are_released(host: str) -> None:
    with ExitStack() as reserved:
        ports = claim_ports(configured(HOST=host), reserved)
    with ExitStack() as reserved:
        assert claim_ports(configured(HOST=host, **ports), reserved) == ports


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reserve a port")
@pytest.mark.parametrize("name", ["PORT", "PORT_HEALTH"])
def test_a_chosen_port_is_reserved_and_a_service_can_listen_on_it(name: str) -> None:
    with ExitStack() as reserved, socket.socket() as other:
        address = ("127.0.0.1", int(claim_ports(configured(), reserved)[name]))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        with pytest.raises(OSError, match="in use"):
            other.bind(address)
        with socket.create_server(address), socket.create_connection(address):
            pass


@pytest.mark.parametrize("name", ["PORT", "PORT_HEALTH", "PORT_BACKEND"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_named(name: str, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        settings = {"MOCK_BACKEND": "true", name: port, "BACKEND_HOST" if name == "PORT_BACKEND" else "HOST": host}
        status, message = refusal(settings)
    reason = "it is already in use (is this running already?)"
    assert (status, message) == (5, f"{name}: cannot listen on {host} port {port}: {reason}")


@pytest.mark.parametrize("name", ["PORT_HEALTH", "PORT_BACKEND"])
def test_a_port_in_use_that_is_not_set_gives_way(name: str, caplog: pytest.LogCaptureFixture) -> None:
    default = {"PORT_HEALTH": 8001, "PORT_BACKEND": 8080}[name]
    with ExitStack() as held:
        with suppress(OSError):  # the port may be in use by a program of this machine: that is the same case
            held.enter_context(socket.create_server(("127.0.0.1", default)))
        settings = {"PORT": "0", "PORT_HEALTH": "0", "PORT_BACKEND": str(free_port()), "HOST": "127.0.0.1", name: ""}
        port = claim_ports(load_config({"DATA_DIR": "/d", **settings}), held)[name]
    assert int(port) not in (0, default)
    assert caplog.messages == [f"{name} is not set, and its default {default} is taken: it is {port}"]


def test_a_socket_is_checked_in_place_of_the_backends_port(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    path = tmp_path / "b.sock"
    config = configured(BACKEND_HOST=str(path))
    with ExitStack() as reserved:
        assert list(claim_ports(config, reserved)) == ["PORT", "PORT_HEALTH"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        check(configured(MOCK_BACKEND="true", BACKEND_HOST=str(path)))  # the socket of a process that was killed
        assert not path.exists()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        reason = "it is already in use (is this running already?)"
        expected = (5, f"BACKEND_HOST: cannot listen on {path}: {reason}")
        assert refusal({"MOCK_BACKEND": "true", "BACKEND_HOST": str(path)}) == expected


def test_a_socket_that_cannot_be_made_or_can_be_made_by_others_is_refused(tmp_path: Path) -> None:
    folder, file = tmp_path / "shared", tmp_path / "file.sock"
    folder.mkdir()
    tmp_path.chmod(0o700)
    file.touch()
    cases = {
        folder / "b.sock": f"other users can write to the folder {folder}: use one that only this user can write to",
        tmp_path / "none" / "b.sock": f"the folder {tmp_path / 'none'}: No such file or directory",
        file: f"{file} exists and is not a socket",
    }
    for mode in (0o770, 0o707, 0o1777):
        folder.chmod(mode)
        for path, message in cases.items():
            expected = (2, f"BACKEND_HOST: {message}")
            assert refusal({"MOCK_BACKEND": "true", "BACKEND_HOST": str(path)}) == expected


@pytest.mark.skipif(not Path("/proc").exists(), reason="a folder in which nobody can make anything")
def test_a_socket_that_the_folder_does_not_take_is_refused() -> None:
    status, message = refusal({"MOCK_BACKEND": "true", "BACKEND_HOST": "/proc/b.sock"})
    assert status == 5
    assert message.startswith("BACKEND_HOST: cannot listen on /proc/b.sock: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_socket_in_another_users_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    status, message = refusal({"MOCK_BACKEND": "true", "BACKEND_HOST": str(folder / "b.sock")})
    assert status == 2
    assert "other users can write" in message


def test_an_address_of_another_machine_is_named() -> None:
    status, message = refusal({"MOCK_BACKEND": "true", "HOST": "192.0.2.1"})
    assert status == 5
    assert message.startswith("HOST: cannot listen on 192.0.2.1 port 0: this machine has no such address (")
    status, message = refusal({"MOCK_BACKEND": "true", "HOST": "host.invalid"})
    assert status == 5
    assert message.startswith("HOST: cannot listen on host.invalid port 0: this machine has no such address (")


def test_no_model_and_no_binary_have_different_statuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal({})[0] == 3
    assert refusal({"MODELS": "router"})[0] == 2
    assert refusal({"MODEL_PATH": "/m", "LLAMA_BIN": "/none"}) == (2, "LLAMA_BIN: /none is not an executable file")
    status, message = refusal({"MODEL_PATH": "/m"})
    assert (status, message.partition(":")[0]) == (2, "llama-server is neither /app/llama-server nor on the PATH")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "{path} cannot be loaded: No such file or directory"), (b"no certificate", "{path} and {path} cannot be")],
)
def test_a_certificate_that_cannot_be_loaded_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "pem"
    if content:
        path.write_bytes(content)
    status, message = refusal({"MOCK_BACKEND": "true", "TLS_CERT_FILE": str(path), "TLS_KEY_FILE": str(path)})
    assert status == 2
    assert message.startswith("TLS_CERT_FILE, TLS_KEY_FILE: " + reason.format(path=path))
    assert ("in PEM form" in message) == bool(content)


def test_the_services_get_our_environment_without_the_key() -> None:
    environ = {"BACKEND_API_KEY": "x", "BACKEND_API_KEY_FILE": "y", "KEEP": "z", "PORT": "0", "GATEWAY_PORT": "0"}
    environ |= {"API_KEYS": "a:b", "API_KEYS_FILE": "c"}
    assert without_api_keys(environ).keys() == environ.keys() - {"API_KEYS", "API_KEYS_FILE"}
    assert services_environment(environ, configured(), {"PORT": "7"}, Path("/run/state")) == {
        "KEEP": "z",
        "PORT": "7",
        "GATEWAY_PORT": "7",
        "DATA_DIR": "/d",
        "STATE_FILE": "/run/state",
    }
    link = {"GATEWAY_PORT": "tcp://10.96.0.1:8000"}
    assert services_environment(link, configured(), {"PORT": "7"}, Path("/s")).items() >= link.items()
    assert "GATEWAY_PORT" not in services_environment({}, configured(), {"PORT": "7"}, Path("/s"))
