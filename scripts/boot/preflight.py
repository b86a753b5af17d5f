"""Checks before anything runs: ports, model, llama-server's binary, TLS files; and the services' environment."""

import errno
import logging
import os
import socket
import ssl
import stat
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from boot import llama_server
from boot.model_errors import NO_MODEL_MESSAGE
from boot.shutdown import EXIT_NO_MODEL, EXIT_SERVICE, EXIT_SETTINGS, StartupError
from config.converters import is_service_link
from config.settings import SETTINGS, Config
from core.listener import is_socket_path

API_KEYS = ("API_KEYS", "API_KEYS_FILE")
_CAN_RESERVE = sys.platform == "linux"
_DEFAULTS = {setting.name: setting.default for setting in SETTINGS}

log = logging.getLogger(__name__)


def claim_ports(config: Config, reserved: ExitStack, listener: socket.socket | None = None) -> dict[str, str]:
    """Bind all three ports once; return them as settings, with a free port's number in place of 0. Raises StartupError.

    PORT_HEALTH and PORT_BACKEND get a free port, too, if they are at their default and it is in use.

    A given port is released before the return: this only finds out early if it is in use. A port that the kernel has
    chosen stays reserved until `reserved` is closed: it is bound, so that no other program is assigned it, but a server
    that sets SO_REUSEADDR can listen on it. Only Linux allows that; elsewhere it is released, too. If BACKEND_HOST is a
    Unix socket, its path is checked in place of PORT_BACKEND. If systemd has opened `listener`, PORT is that socket's.
    """
    wanted = {
        "PORT": (config.listen.host, config.listen.port),
        "PORT_HEALTH": (config.listen.host, config.listen.port_health),
    }
    ports = {}
    if listener is not None:
        ports["PORT"] = str(listener.getsockname()[1])
        del wanted["PORT"]
    if is_socket_path(config.backend.host):
        check_socket(Path(config.backend.host))
    else:
        wanted["PORT_BACKEND"] = (config.backend.host, config.backend.port)
    movable = config.at_default & {"PORT_HEALTH", "PORT_BACKEND"}
    with ExitStack() as released:
        chosen = reserved if _CAN_RESERVE else released
        for name, (host, port) in wanted.items():
            try:
                claimed = _claim(released if port else chosen, name, host, port)
            except PortInUse:
                if name not in movable:
                    raise
                claimed = _claim(chosen, name, host, 0)
            if name in movable and str(claimed) != _DEFAULTS[name]:
                log.warning("%s is not set, and its default %s is taken: it is %d", name, _DEFAULTS[name], claimed)
            ports[name] = str(claimed)
        return ports


class PortInUse(StartupError):
    """Another program listens on a port."""


def _claim(sockets: ExitStack, name: str, host: str, port: int) -> int:
    """Bind a port until `sockets` is closed; return its number. Raises StartupError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = sockets.enter_context(socket.socket(family, kind))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        if port != 0:  # if the other listener has SO_REUSEADDR too, bind succeeds and only listen fails
            sock.listen(1)
        return int(sock.getsockname()[1])
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        reason = "it is already in use (is this running already?)" if in_use else error.strerror
        if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            name = "BACKEND_HOST" if name == "PORT_BACKEND" else "HOST"
            reason = f"this machine has no such address ({error.strerror})"
        message = f"{name}: cannot listen on {host} port {port}: {reason}"
        raise (PortInUse if in_use else StartupError)(EXIT_SERVICE, message) from None


def check_socket(path: Path) -> None:
    """Check that only this user can make a socket at the path, and that it is not in use. Raises StartupError."""
    folder = path.parent
    try:
        found = folder.stat()
    except OSError as error:
        raise StartupError(EXIT_SETTINGS, f"BACKEND_HOST: the folder {folder}: {error.strerror}") from None
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        message = (
            f"BACKEND_HOST: other users can write to the folder {folder}: use one that only this user can write to"
        )
        raise StartupError(EXIT_SETTINGS, message)
    if path.exists() and not path.is_socket():
        raise StartupError(EXIT_SETTINGS, f"BACKEND_HOST: {path} exists and is not a socket")
    if reason := _why_not_listen(os.fspath(path)):
        raise StartupError(EXIT_SERVICE, f"BACKEND_HOST: cannot listen on {path}: {reason}")


def _why_not_listen(path: str) -> str:
    """Return why no Unix socket can be made at a path, or "". A socket that no process uses is removed."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            if sock.connect_ex(path) == 0:
                return "it is already in use (is this running already?)"
        with suppress(FileNotFoundError):
            os.unlink(path)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
        os.unlink(path)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_backend(config: Config) -> None:
    """Check that a model is set and that there is a llama-server. Raises StartupError."""
    if config.supervision.mock_backend:
        return
    if not (config.router.enabled or llama_server.has_model(config.model)):
        raise StartupError(EXIT_NO_MODEL, NO_MODEL_MESSAGE)
    try:
        llama_server.find_binary(config.model)
    except llama_server.BinaryNotFound as error:
        raise StartupError(EXIT_SETTINGS, str(error)) from None


def _unreadable(cert: Path, key: Path | None) -> str:
    """Return the first of these files that cannot be read, or both."""
    paths = [path for path in (cert, key) if path is not None]
    return next((str(path) for path in paths if not os.access(path, os.R_OK)), " and ".join(map(str, paths)))


def check_tls(config: Config) -> None:
    """Check that the certificate and its key can be loaded. Raises StartupError."""
    cert, key = config.listen.tls_cert_file, config.listen.tls_key_file
    if cert is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ValueError) as error:
        not_pem = f"not a certificate chain and its key in PEM form ({error})"
        reason = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else not_pem
        message = f"TLS_CERT_FILE, TLS_KEY_FILE: {_unreadable(cert, key)} cannot be loaded: {reason}"
        raise StartupError(EXIT_SETTINGS, message) from None


def without_api_keys(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for processes other than the gateway: without API_KEYS, which only the gateway needs."""
    return {name: value for name, value in environ.items() if name not in API_KEYS}


def services_environment(
    environ: Mapping[str, str], config: Config, ports: Mapping[str, str], state_file: os.PathLike[str]
) -> dict[str, str]:
    """Return the environment of gateway and health server: our own, with ports, data folder and state file fixed.

    All keys are left out: only the gateway gets them, the backend's as a file.
    """
    left_out = ("BACKEND_API_KEY", "BACKEND_API_KEY_FILE", *API_KEYS)
    kept = {name: value for name, value in environ.items() if name not in left_out}
    if "GATEWAY_PORT" in kept and not is_service_link(kept["GATEWAY_PORT"]):
        # The alias stays, so that the gateway warns of it, but it must not contradict PORT.
        kept["GATEWAY_PORT"] = ports["PORT"]
    return {**kept, **ports, "DATA_DIR": str(config.data_dir), "STATE_FILE": os.fspath(state_file)}
