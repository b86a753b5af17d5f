"""A first try on one's own machine (`make run`): a local data folder, a first key, the address, a curl that works.

Chooses what the environment leaves open (DATA_DIR=./data, HOST=127.0.0.1, the mock where there is no model or no
llama-server), then becomes start.sh. A container does not come here: there, either is an error.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import keyfile
import llama
from config import Config, ConfigError, Model, load_config
from preflight import SETTINGS_WRONG, Ending, check_backend, claim_ports
from probes import ANYWHERE, Address, ask

HERE = Path(__file__).resolve().parent
FIRST_KEY_ID = "first"
POLL_S = 0.2
NO_MODEL = "No model is set (MODEL_PATH, MODEL_NAME, MODEL_URL, MODEL_HF)"
CHAT = '{"messages": [{"role": "user", "content": "Hello"}]}'


class Hopeless(Exception):
    """It cannot be started like this; the text is the one line that says why."""


def say(text: str) -> None:
    print(text, flush=True)


def local(environ: Mapping[str, str]) -> dict[str, str]:
    """Fill in where the environment does not say: this machine only, and a folder here."""
    chosen = {"HOST": "127.0.0.1", "DATA_DIR": str(Path("data").absolute())}
    return {**environ, **{name: value for name, value in chosen.items() if not environ.get(name)}}


def choose_backend(environ: Mapping[str, str], config: Config) -> dict[str, str]:
    """Add MOCK_BACKEND, and say why, where there is no model or no llama-server.

    Raises Ending where the mock was forbidden, or LLAMA_BIN is wrong, which is a mistake and no wish for it.
    """
    if not environ.get("MOCK_BACKEND") and (lacking := what_lacks(config.model)):
        say(f"{lacking}: the built-in mock answers in its place (MOCK_BACKEND=true).")
        return {**environ, "MOCK_BACKEND": "true"}
    if llama.is_set(config.model):
        try:
            check_backend(config)
        except Ending as ending:
            raise Ending(ending.status, f"{named_model(config.model)} is set, but {ending}") from None
    return dict(environ)


def what_lacks(model: Model) -> str:
    """Say what the real thing lacks; nothing where it lacks nothing, or where LLAMA_BIN says what it should be."""
    if not llama.is_set(model):
        return NO_MODEL
    if model.llama_bin:
        return ""
    try:
        llama.find_binary(model)
    except llama.NoBinary:
        return f"{named_model(model)} is set, but no llama-server was found (LLAMA_BIN, /app/llama-server, PATH)"
    return ""


def named_model(model: Model) -> str:
    """The setting that names the model, with its value; a MODEL_URL may be signed, and is not shown."""
    shown = {"MODEL_PATH": model.path, "MODEL_NAME": model.name, "MODEL_HF": model.hf}
    return next((f"{name}={value}" for name, value in shown.items() if value), "MODEL_URL")


def first_key(path: Path) -> str | None:
    """Make a key where there is none yet and show it, this once. Raises Hopeless."""
    if has_keys(path):
        return None
    argv = [sys.executable, str(HERE / "key_mgmt.py"), "--quiet", "--file", str(path), "generate"]
    done = subprocess.run([*argv, "--name", FIRST_KEY_ID], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Hopeless(done.stderr.strip())
    key = done.stdout.strip()
    say(f"A first key was made in {path} and is shown this once: {key}")
    return key


def has_keys(path: Path) -> bool:
    try:
        parsed = keyfile.parse(keyfile.read(path)[0])
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Hopeless(f"{path} cannot be read: {error.strerror}") from None
    # What is in a file that cannot be trusted is not ours to add to; the gateway complains.
    return bool(parsed.entries or parsed.distrust)


def invitation(config: Config, address: Address, key: str | None) -> str:
    """What to do next: the address, and a curl that works as it stands where the key was made just now."""
    host = ANYWHERE.get(address.host, address.host)
    scheme, unverified = ("https", " -k") if address.tls else ("http", "")
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{address.port}"
    mock = " (mock)" if config.supervision.mock_backend else ""
    lines = [f"Ready{mock}: {url} (OpenAI clients: {url}/v1). Ctrl-C ends it. Try:"]
    authorization = f" -H 'Authorization: Bearer {key or 'YOUR_KEY'}'" if config.auth.enabled else ""
    lines += [
        f"  curl{unverified} {url}/v1/chat/completions{authorization} -H 'Content-Type: application/json' -d '{CHAT}'"
    ]
    if config.auth.enabled and key is None:
        lines += [f"YOUR_KEY is in force already; for another: {make_another(config)}"]
    return "\n".join(lines)


def make_another(config: Config) -> str:
    return f"python3 {os.path.relpath(HERE / 'key_mgmt.py')} --file {config.auth.keys_file} generate --name NAME"


def announce(parent: int, address: Address, text: str) -> None:
    """Wait beside the boot until it is ready, then say so; nothing where it ends before."""
    while os.getppid() == parent:
        answer = asyncio.run(ask(address, "/health", 2.0))
        if answer and answer.status == 200:
            say(text)
            return
        time.sleep(POLL_S)


def beside(parent: int, address: Address, text: str) -> None:
    """Announce from a process of its own, which Ctrl-C ends without a word."""
    if os.fork():
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        announce(parent, address, text)
    finally:
        os._exit(0)


def prepare(environ: Mapping[str, str]) -> tuple[dict[str, str], Config, str | None]:
    """All that comes before the start. Raises ConfigError, Ending, Hopeless."""
    env = local(environ)
    config = load_config(env)
    env |= claim_ports(config)
    env.pop("GATEWAY_PORT", None)
    env = choose_backend(env, config)
    config = load_config(env)
    key = first_key(config.auth.keys_file) if config.auth.enabled else None
    return env, config, key


def main() -> int:
    try:
        env, config, key = prepare(os.environ)
    except ConfigError as error:
        print("\n".join(f"run: {complaint}" for complaint in error.complaints), file=sys.stderr)
        return SETTINGS_WRONG
    except (Ending, Hopeless) as error:
        print(f"run: {error}", file=sys.stderr)
        return error.status if isinstance(error, Ending) else SETTINGS_WRONG
    except KeyboardInterrupt:
        return 0
    address = Address(config.listen.host, int(env["PORT"]), config.listen.tls_cert_file is not None)
    beside(os.getpid(), address, invitation(config, address, key))
    start = str(HERE / "start.sh")
    os.execve(start, [start], env)


if __name__ == "__main__":
    sys.exit(main())
