"""What can be refused before anything runs: a taken port, no model set, no llama-server; and the services' settings."""

import errno
import os
import socket
import ssl
from collections.abc import Mapping
from contextlib import ExitStack

import llama
from config import Config

STOPPED, SETTINGS_WRONG, NO_MODEL, BACKEND_GIVEN_UP, SERVICE_GIVEN_UP = 0, 2, 3, 4, 5


class Ending(Exception):
    """Everything is to stop with this exit status; the text, if any, is the one message that says why."""

    def __init__(self, status: int, words: str = "") -> None:
        super().__init__(words)
        self.status = status


def claim_ports(config: Config) -> dict[str, str]:
    """Make sure that all three ports are free; return them as settings, with a number where 0 asks for any.

    Raises Ending. The ports are let go again, so this is a clear message early and no guarantee.
    """
    wanted = {
        "PORT": (config.listen.host, config.listen.port),
        "PORT_HEALTH": (config.listen.host, config.listen.port_health),
        "PORT_BACKEND": (config.backend.host, config.backend.port),
    }
    with ExitStack() as held:
        return {name: str(_claim(held, name, host, port)) for name, (host, port) in wanted.items()}


def _claim(held: ExitStack, name: str, host: str, port: int) -> int:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = held.enter_context(socket.socket(family, kind))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        # Only a second listen tells that the port is taken by one that has SO_REUSEADDR too.
        sock.listen(1)
        return int(sock.getsockname()[1])
    except OSError as error:
        reason = "it is taken (is this running already?)" if error.errno == errno.EADDRINUSE else error.strerror
        raise Ending(SERVICE_GIVEN_UP, f"{name}: cannot listen on {host} port {port}: {reason}") from None


def check_backend(config: Config) -> None:
    """Refuse at once what no waiting will mend: no model set, no llama-server. Raises Ending."""
    if config.supervision.mock_backend:
        return
    if not llama.is_set(config.model):
        raise Ending(NO_MODEL, llama.NO_MODEL)
    try:
        llama.find_binary(config.model)
    except llama.NoBinary as error:
        raise Ending(SETTINGS_WRONG if config.model.llama_bin else BACKEND_GIVEN_UP, str(error)) from None


def check_tls(config: Config) -> None:
    """Refuse a certificate that the gateway could not load. Raises Ending."""
    cert, key = config.listen.tls_cert_file, config.listen.tls_key_file
    if cert is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ValueError) as error:
        no_pem = f"no certificate chain and its key in PEM form ({error})"
        reason = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else no_pem
        words = f"TLS_CERT_FILE, TLS_KEY_FILE: {cert} and {key} cannot be loaded: {reason}"
        raise Ending(SETTINGS_WRONG, words) from None


def services_environment(
    environ: Mapping[str, str], config: Config, ports: Mapping[str, str], state_file: os.PathLike[str]
) -> dict[str, str]:
    """What gateway and health server are given: the same settings, without choices that they might make differently.

    The backend's key is taken out: its file is the gateway's alone.
    """
    kept = {name: value for name, value in environ.items() if name not in ("BACKEND_API_KEY", "BACKEND_API_KEY_FILE")}
    if "GATEWAY_PORT" in kept:
        # The old name warns, and must not contradict.
        kept["GATEWAY_PORT"] = ports["PORT"]
    return {**kept, **ports, "DATA_DIR": str(config.data_dir), "STATE_FILE": os.fspath(state_file)}
