"""A first start on this machine (`make run`): a local data folder, a first key, the address, a curl command that works.

It sets what the environment leaves open: DATA_DIR=./data, HOST=127.0.0.1, LOG_LEVEL=warning, and the mock if there is
no model or no llama-server. Then it execs start.sh, or the supervisor of the .pyz file. A container does not use it:
there, a missing model or llama-server is an error.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python3 -P` leaves a script's own folder out

import keyfile
from boot import llama_server
from boot.model_errors import ModelError
from boot.preflight import check_backend, claim_ports
from boot.probes import LOOPBACK_OF, Address, probe
from boot.router_models import find_models
from boot.shutdown import EXIT_SETTINGS, EXIT_STOPPED, StartupError
from config.loader import load_config
from config.settings import Config, ConfigError, ModelSettings
from core.installation import ROOT, add_version, command, is_one_file, shown

FIRST_KEY_ID = "first"
TRIAL_KEY_ID = "trial"
POLL_S = 0.2
PROBE_TIMEOUT_S = 2.0
NO_MODEL = "No model is set (MODEL_PATH, MODEL_NAME, MODEL_URL, MODEL_HF)"
HELP_MODEL = "For a model: MODEL_HF=ggml-org/gemma-3-1b-it-GGUF {run}    (llama-server downloads it from Hugging Face)"
HELP_BINARY = (
    "For a llama-server: https://github.com/ggml-org/llama.cpp/releases; put it on the PATH, or set LLAMA_BIN."
)
MESSAGES = [{"role": "user", "content": "Hello"}]


def say(text: str) -> None:
    print(text, flush=True)


def with_local_defaults(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment; what is not set of these: this machine only, ./data, and no log lines but warnings."""
    defaults = {"HOST": "127.0.0.1", "DATA_DIR": str(Path("data").absolute()), "LOG_LEVEL": "warning"}
    return {**environ, **{name: value for name, value in defaults.items() if not environ.get(name)}}


def choose_backend(environ: Mapping[str, str], config: Config) -> dict[str, str]:
    """Return the environment; if there is no model or no llama-server, with MOCK_BACKEND, and print the reason.

    With MODELS=router the start itself says what is missing.

    Raises StartupError if MOCK_BACKEND=false excludes the mock, or if LLAMA_BIN is wrong.
    """
    if config.router.enabled:
        return dict(environ)
    if not environ.get("MOCK_BACKEND") and (missing := what_is_missing(config.model)):
        say(f"{missing}: the built-in mock answers in its place (MOCK_BACKEND=true).")
        return {**environ, "MOCK_BACKEND": "true"}
    if llama_server.has_model(config.model):
        try:
            check_backend(config)
        except StartupError as error:
            raise StartupError(error.status, f"{model_setting(config.model)} is set, but {error}") from None
    return dict(environ)


def is_mock_our_choice(environ: Mapping[str, str], config: Config) -> bool:
    """Return whether the mock answers although the environment does not ask for it."""
    return config.supervision.mock_backend and not environ.get("MOCK_BACKEND")


def what_is_missing(model: ModelSettings) -> str:
    """Return why the mock must be used; "" if a model is set and llama-server found, or if LLAMA_BIN names one."""
    if not llama_server.has_model(model):
        return NO_MODEL
    if model.llama_bin:
        return ""
    try:
        llama_server.find_binary(model)
    except llama_server.BinaryNotFound:
        return f"{model_setting(model)} is set, but no llama-server was found (LLAMA_BIN, /app/llama-server, PATH)"
    return ""


def how_to_get_what_is_missing(model: ModelSettings) -> list[str]:
    """Return a line for the model and one for llama-server, if they are missing."""
    lines = [] if llama_server.has_model(model) else [HELP_MODEL.format(run=run_command())]
    try:
        llama_server.find_binary(model)
    except llama_server.BinaryNotFound:
        lines.append(HELP_BINARY)
    return lines


def run_command() -> str:
    """Return the command that the user has probably given to start this program."""
    if is_one_file():
        return shlex.join(["python3", os.path.relpath(ROOT), "run"])
    if (ROOT.parent / "Makefile").exists():
        return "make run"
    return f"{os.path.relpath(ROOT / 'start.sh')} --quickstart"  # a release has no Makefile


def model_setting(model: ModelSettings) -> str:
    """Return the setting that names the model, with its value unless it is MODEL_URL, which may contain a signature."""
    shown = {"MODEL_PATH": model.path, "MODEL_NAME": model.name, "MODEL_HF": model.hf}
    return next((f"{name}={value}" for name, value in shown.items() if value), "MODEL_URL")


def create_first_key(path: Path) -> str | None:
    """If the keys file has no key, create one, print it and return it. Raises StartupError."""
    if has_keys(path):
        return None
    key = key_management(path, "generate", "--name", FIRST_KEY_ID)
    say(f"A first key was created in {path} and is shown this once: {key}")
    return key


def create_trial_key(path: Path) -> str | None:
    """Return a new key that is valid for a day, and replaces the last such key. Raises StartupError.

    Nothing is added to a file whose first key is not from this program.
    """
    ids = key_ids(path)
    if FIRST_KEY_ID not in ids:
        return None
    verb = "rotate" if TRIAL_KEY_ID in ids else "generate"
    key = key_management(path, verb, "--name", TRIAL_KEY_ID, "--expires", "24h")
    say(f"The key named {TRIAL_KEY_ID} in {path} is new, and valid for 24 hours: {key}")
    return key


def key_management(path: Path, *arguments: str) -> str:
    """Run key_mgmt.py for the file; return the key that it prints. Raises StartupError."""
    argv = [*command("key_mgmt"), "--quiet", "--file", str(path), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StartupError(EXIT_SETTINGS, done.stderr.strip())
    return done.stdout.strip()


def read_keys(path: Path) -> keyfile.ParsedFile | None:
    """Return the contents of the keys file, None if there is none. Raises StartupError if it cannot be read."""
    try:
        return keyfile.parse(keyfile.read(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StartupError(EXIT_SETTINGS, f"{path} cannot be read: {error.strerror}") from None


def has_keys(path: Path) -> bool:
    """Return whether the keys file has a key, or cannot be trusted. Raises StartupError if it cannot be read."""
    parsed = read_keys(path)
    # Nothing is added to a file that cannot be trusted; the gateway reports it.
    return bool(parsed and (parsed.entries or parsed.error))


def key_ids(path: Path) -> set[str]:
    """Return the ids of the keys; none for a file that cannot be trusted. Raises StartupError if it cannot be read."""
    parsed = read_keys(path)
    return {entry.key_id for entry in parsed.entries} if parsed and not parsed.error else set()


def model_to_name(config: Config, environ: Mapping[str, str]) -> str:
    """Return the model that a request must name; "" if it need not, or if the start will report what is wrong."""
    router = config.router
    if not router.enabled or router.default_model:
        return ""
    if router.preload:
        return router.preload[0]
    try:
        models = find_models(config, environ).models
    except (ModelError, OSError):
        return ""
    return next((model.name for model in models if model.at_start), models[0].name if models else "")


def instructions(config: Config, address: Address, key: str | None, model: str = "") -> str:
    """Return what to do next: the address and a curl command, with the key if it has just been created."""
    host = LOOPBACK_OF.get(address.host, address.host)
    scheme, unverified = ("https", " -k") if address.tls else ("http", "")
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{address.port}"
    mock = " (mock)" if config.supervision.mock_backend else ""
    lines = [f"Ready{mock}: {url} (OpenAI clients: {url}/v1). Ctrl-C ends it. Try:"]
    authorization = f" -H 'Authorization: Bearer {key or 'YOUR_KEY'}'" if config.auth.enabled else ""
    body = shlex.quote(json.dumps({"model": model, "messages": MESSAGES} if model else {"messages": MESSAGES}))
    lines += [
        f"  curl{unverified} {url}/v1/chat/completions{authorization} -H 'Content-Type: application/json' -d {body}"
    ]
    if config.auth.enabled and key is None:
        lines += [f"YOUR_KEY is a key that exists already; to create another: {key_command(config)}"]
    return "\n".join(lines)


def key_command(config: Config) -> str:
    program = ["python3", *(os.path.relpath(part) if os.sep in part else part for part in command("key_mgmt")[1:])]
    return f"{shlex.join([*program, '--file', str(config.auth.keys_file)])} generate --name NAME"


def announce(parent: int, address: Address, text: str) -> None:
    """Wait until the gateway is ready and print the text; return without it if the parent process ends first."""
    while os.getppid() == parent:
        response = asyncio.run(probe(address, "/health", PROBE_TIMEOUT_S))
        if response and response.status == 200:
            say(text)
            return
        time.sleep(POLL_S)


def announce_in_background(parent: int, address: Address, text: str) -> None:
    """Announce from a forked process, which Ctrl-C ends without output."""
    if os.fork():
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        announce(parent, address, text)
    finally:
        os._exit(0)


def prepare(environ: Mapping[str, str]) -> tuple[dict[str, str], Config, str | None]:
    """Return the environment for the start, its settings, and the key that was created, if any.

    Raises ConfigError and StartupError.
    """
    env = with_local_defaults(environ)
    config = load_config(env)
    with ExitStack() as reserved:
        env |= claim_ports(config, reserved)
    env.pop("GATEWAY_PORT", None)
    env = choose_backend(env, config)
    config = load_config(env)
    needs_key = config.auth.enabled and not config.auth.api_keys
    return env, config, create_key(config.auth.keys_file) if needs_key else None


def create_key(path: Path) -> str | None:
    """Return a key for the command that is printed, if one may be added to the file. Raises StartupError."""
    return create_first_key(path) or create_trial_key(path)


def main(argv: Sequence[str] | None = None) -> int:
    description = "Start on this machine with a local data folder, a first key and, without a model, the mock."
    parser = argparse.ArgumentParser(prog=shown("quickstart"), description=description, allow_abbrev=False)
    add_version(parser)
    parser.parse_args(argv)
    try:
        env, config, key = prepare(os.environ)
    except ConfigError as error:
        print("\n".join(f"run: error: {complaint}" for complaint in error.complaints), file=sys.stderr)
        return EXIT_SETTINGS
    except StartupError as error:
        print(f"run: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return EXIT_STOPPED
    address = Address(config.listen.host, int(env["PORT"]), config.listen.tls_cert_file is not None)
    hints = how_to_get_what_is_missing(config.model) if is_mock_our_choice(os.environ, config) else []
    text = instructions(config, address, key, model_to_name(config, env))
    announce_in_background(os.getpid(), address, "\n".join([*hints, text]))
    start = command("supervisor") if is_one_file() else [str(ROOT / "start.sh")]
    os.execve(start[0], start, env)


if __name__ == "__main__":
    sys.exit(main())
