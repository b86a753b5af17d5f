"""What a start would refuse, found out without a start: `start.sh --check`, `gateway.py --check-config`.

It starts nothing, and writes only what the start would write, too: the record that a model file has been verified.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TextIO

from auth import KeyStore
from boot import llama_server, model_files, router_models
from boot.model_errors import ModelError
from boot.preflight import check_backend, check_tls, claim_ports
from boot.run_dir import PARENTS
from boot.shutdown import EXIT_NO_MODEL, EXIT_SETTINGS, StartupError
from config.loader import check_config, load_config
from config.settings import Config
from config.tenants import shared_cache_warning

VERSION_TIMEOUT_S = 15.0  # some programs look for GPUs first


def check_start(environ: Mapping[str, str], out: TextIO, *, gateway_alone: bool = False) -> int:
    """Print the settings, then everything for which a start would end; return the exit status that it would have.

    `gateway_alone`: if no setting names a model or a llama-server, only the gateway's own start is checked.
    """
    status = check_config(environ, out)
    if status:
        return status
    config = load_config(environ)
    supervised = not gateway_alone or _names_backend(config)
    out.writelines(f"warning: {warning}\n" for warning in _warnings(config, supervised=supervised))
    checks = _all_checks(config, environ) if supervised else (check_tls,)
    failures = [_failure(check, config) for check in checks]
    problems = [failure for failure in failures if failure]
    out.writelines(f"error: {problem}\n" for problem in problems)
    if not problems:
        out.write("Nothing else would keep it from starting.\n")
        return 0
    out.write(f"A start would end with status {problems[0].status}.\n")
    return problems[0].status


def _warnings(config: Config, *, supervised: bool) -> Iterator[str]:
    if config.auth.enabled:
        store = KeyStore(config.auth.keys_file, config.auth.max_requests_per_minute, config.auth.api_keys or ())
        read = store.reload()
        failure = "; ".join(filter(None, (read.reason, "" if read.keys else read.remedy)))
        yield from (f"keys: {each}" for each in (*read.complaints, failure) if each)
        yield from filter(None, [shared_cache_warning(config, {caller.key_id for caller in store.keyring})])
    if config.router.enabled and config.supervision.mock_backend:
        yield "MOCK_BACKEND: the mock's models are not checked (MODELS_DIR, MODELS_PRESET, MODELS_PRELOAD)"
    if supervised:
        yield from filter(None, [log_folder_warning(config)])


def _names_backend(config: Config) -> bool:
    """A gateway may stand alone in front of a router, too: MODELS=router names no models by itself."""
    router, at_default = config.router, config.at_default
    named = router.preset or "MODELS_DIR" not in at_default if router.enabled else llama_server.has_model(config.model)
    return bool(named or config.model.llama_bin or config.supervision.mock_backend)


Check = Callable[[Config], None]


def _all_checks(config: Config, environ: Mapping[str, str]) -> tuple[Check, ...]:
    """Return the checks in the order of a start, whose first failure decides its status."""
    model: tuple[Check, ...] = ()
    if config.router.enabled and not config.supervision.mock_backend:
        model = (partial(check_models, environ=environ),)
    elif llama_server.has_model(config.model) and not (config.model.hf or config.supervision.mock_backend):
        model = (check_download_folder, check_model)
    return (
        check_backend,
        check_tls,
        check_run_folder,
        check_ports,
        check_state_file,
        *model,
        partial(check_binary, environ=environ),
    )


def _failure(check: Check, config: Config) -> StartupError | None:
    try:
        check(config)
    except StartupError as error:
        return error
    return None


def log_folder_warning(config: Config) -> str | None:
    """Return why the folder of the boot logs cannot be written, which keeps nothing from starting; None if it can."""
    folder = config.log.dir / config.log.name
    reason = _why_not_writable(folder)
    return f"the log of llama-server cannot be kept in {folder} (LOG_DIR, DATA_DIR): {reason}" if reason else None


def check_run_folder(config: Config) -> None:
    """Check that there is a place for the run directory. Raises StartupError."""
    if all(map(_why_not_writable, PARENTS)):
        names = ", ".join(map(str, PARENTS))
        raise StartupError(EXIT_SETTINGS, f"the run directory cannot be created: none of {names} can be written")


def check_state_file(config: Config) -> None:
    """Check the folder of STATE_FILE, if that is set. Raises StartupError."""
    path = config.supervision.state_file
    if path and (reason := _why_not_writable(path.parent)):
        raise StartupError(EXIT_SETTINGS, f"STATE_FILE: {path} cannot be written: {reason}")


def _why_not_writable(folder: Path) -> str:
    """Return why no file can be made in a folder, or in the first of its parents that exists; "" if it can."""
    path = folder.absolute()
    existing = next(each for each in (path, *path.parents) if os.path.lexists(each))
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def check_ports(config: Config) -> None:
    """Check that all ports are free. Raises StartupError."""
    with ExitStack() as reserved:
        claim_ports(config, reserved)


def check_download_folder(config: Config) -> None:
    """Check the folder for a model that would be downloaded. Raises StartupError."""
    try:
        folder = model_files.folder(config.model)
    except ModelError:
        return  # check_model reports it
    if folder and (reason := _why_not_writable(folder)):
        raise StartupError(EXIT_NO_MODEL, f"{folder} cannot be written: {reason}")


def check_model(config: Config) -> None:
    """Check the model's file; if there is none yet, what its URL sends. Raises StartupError."""
    try:
        model_files.check(config.model)
    except ModelError as error:
        raise StartupError(error.exit_status, str(error)) from None
    except OSError as error:
        raise StartupError(EXIT_NO_MODEL, f"the model cannot be read: {error.strerror}") from None


def check_models(config: Config, environ: Mapping[str, str]) -> None:
    """Check the models of MODELS_DIR and MODELS_PRESET. Raises StartupError."""
    try:
        router_models.find_models(config, environ)
    except ModelError as error:
        raise StartupError(error.exit_status, str(error)) from None


def check_binary(config: Config, environ: Mapping[str, str]) -> None:
    """Check that llama-server runs on this machine: it is asked for its version. Raises StartupError."""
    if config.supervision.mock_backend:
        return
    try:
        binary = llama_server.find_binary(config.model)
    except llama_server.BinaryNotFound:
        return  # check_backend reports it
    env = llama_server.environment(environ, config.model)
    try:
        subprocess.run([binary, "--version"], env=env, capture_output=True, check=False, timeout=VERSION_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return
    except OSError as error:
        status = llama_server.exec_error_status(error)
        raise StartupError(status, llama_server.describe_exec_error(binary, error)) from None
