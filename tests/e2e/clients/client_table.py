"""The clients: how each is started on one question to the gateway, and how its answer and its error are read."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PROMPT = "the cat is on the moon"
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
NOWHERE = "http://127.0.0.1:9"  # discard: whatever is not for the gateway fails at once
LAST_LINES, LINE_CHARS = 3, 300
# What agents say of a model that they do not know, and of the machine.
NOISE = ("warning:", "WARNING:", "Claude Code doesn't recognize the model", "[claude-code:unrecognized_model]", ">")
PYTHON_PACKAGES = ("openai", "anthropic", "langchain-openai", "pydantic-ai-slim", "litellm")


class Tools(NamedTuple):
    """How the programs start, by name; and the folder of js_client.mjs, from which Node finds the packages."""

    programs: dict[str, list[str]]
    scripts: Path


class Run(NamedTuple):
    """One run of a client: the gateway that it calls, its key, a folder of its own, and what it asks."""

    url: str
    key: str
    folder: Path
    mode: str
    prompt: str


class Command(NamedTuple):
    arguments: list[str]
    environment: dict[str, str]


class Shown(NamedTuple):
    """What the user of a client gets to see: the answer's text, and an error, empty if there was none."""

    text: str
    error: str


class Client(NamedTuple):
    name: str
    title: str
    route: str
    program: str
    command: Callable[[Tools, Run], Command]
    read: Callable[[int, str, str], Shown]
    is_agent: bool = False  # it has its own prompt and tools, and always streams


def environment(run: Run, **more: str) -> dict[str, str]:
    """An environment that leads nowhere except to the gateway; HOME is the run's own folder."""
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NOWHERE)
    own = {"PATH": os.environ["PATH"], "HOME": str(run.folder), "LANG": "C.UTF-8", "NO_PROXY": "127.0.0.1"}
    return own | proxies | {"no_proxy": "127.0.0.1"} | more


# Libraries


def library_environment(run: Run) -> dict[str, str]:
    about = {"GATEWAY_URL": run.url, "GATEWAY_KEY": run.key, "PROMPT": run.prompt}
    return environment(run, **about, LITELLM_LOCAL_MODEL_COST_MAP="True", PYTHONDONTWRITEBYTECODE="1")


def library_command(program: str, driver: str, name: str) -> Callable[[Tools, Run], Command]:
    def command(tools: Tools, run: Run) -> Command:
        path = (tools.scripts if program == "node" else HERE / "drivers") / driver
        return Command([*tools.programs[program], str(path), name, run.mode], library_environment(run))

    return command


def read_library(status: int, stdout: str, stderr: str) -> Shown:
    """Read what the drivers print. A driver that fails otherwise is a fault of the test."""
    lines = [line for line in stdout.splitlines() if line.startswith("{")]
    assert status == 0, stderr[-2000:]
    assert lines, stderr[-2000:]
    return Shown(**json.loads(lines[-1]))


# Command-line agents


def last_words(*outputs: str) -> str:
    """The last lines of a program's output, in one line, without colours and without repetitions."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "\n".join(outputs))
    lines = list(dict.fromkeys(line.strip()[:LINE_CHARS] for line in plain.splitlines() if line.strip()))
    return " / ".join([line for line in lines if not line.startswith(NOISE)][-LAST_LINES:])


def read_agent(status: int, stdout: str, stderr: str) -> Shown:
    return Shown("", f"exit status {status}: {last_words(stderr, stdout)}") if status else Shown(stdout, "")


CODEX_CONFIG = """\
model = "tiny"
model_provider = "gateway"
check_for_update_on_startup = false

[analytics]
enabled = false

[model_providers.gateway]
name = "gateway"
base_url = "{url}/v1"
env_key = "GATEWAY_KEY"
wire_api = "responses"
"""


def codex(tools: Tools, run: Run) -> Command:
    home = run.folder / "codex"
    home.mkdir()
    (home / "config.toml").write_text(CODEX_CONFIG.format(url=run.url))
    arguments = [*tools.programs["codex"], "exec", "--skip-git-repo-check", "--sandbox", "read-only", run.prompt]
    return Command(arguments, environment(run, CODEX_HOME=str(home), GATEWAY_KEY=run.key))


def claude_code(tools: Tools, run: Run) -> Command:
    quiet = dict.fromkeys(("DISABLE_TELEMETRY", "DISABLE_ERROR_REPORTING", "DISABLE_AUTOUPDATER"), "1")
    settings = {
        "ANTHROPIC_BASE_URL": run.url,
        "ANTHROPIC_API_KEY": run.key,
        "CLAUDE_CONFIG_DIR": str(run.folder / "claude"),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    arguments = [*tools.programs["claude"], "-p", run.prompt, "--model", "tiny"]
    return Command(arguments, environment(run, **settings, **quiet))


def opencode(tools: Tools, run: Run) -> Command:
    # This adapter is a part of opencode's binary: any other would be fetched from npm.
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{run.url}/v1", "apiKey": run.key},
        "models": {"tiny": {"name": "tiny"}},
    }
    config = {"autoupdate": False, "share": "disabled", "model": "gateway/tiny", "provider": {"gateway": provider}}
    names = ("MODELS_FETCH", "AUTOUPDATE", "LSP_DOWNLOAD", "DEFAULT_PLUGINS")
    off = {f"OPENCODE_DISABLE_{name}": "1" for name in names}
    arguments = [*tools.programs["opencode"], "run", "--title", "cell", run.prompt]
    return Command(arguments, environment(run, OPENCODE_CONFIG_CONTENT=json.dumps(config), **off))


# curl


def curl_command(tools: Tools, run: Run) -> Command:
    messages = [{"role": "user", "content": run.prompt}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 12, "stream": run.mode == "stream"}
    options = ["--silent", "--show-error", "--no-buffer", "--fail-with-body"]
    fields = ["--header", f"Authorization: Bearer {run.key}", "--header", "Content-Type: application/json"]
    arguments = [*tools.programs["curl"], *options, *fields, "--data", json.dumps(body), run.url + CHAT]
    return Command(arguments, environment(run))


def read_curl(status: int, stdout: str, stderr: str) -> Shown:
    """The body that curl has printed, read as a person would: the deltas, and an error event if there is one."""
    events = [line.removeprefix("data: ") for line in stdout.splitlines() if line.startswith(("data: {", "{"))]
    bodies = [body for event in events if (body := parsed(event)) is not None]
    failed = status != 0 or any("error" in body for body in bodies)
    choices = [choice for body in bodies for choice in body.get("choices", [])]
    text = "".join(choice.get("delta", choice.get("message", {})).get("content") or "" for choice in choices)
    errors = [line for line in stdout.splitlines() if "error" in line]
    return Shown(text, f"exit status {status}: {last_words(stderr, *errors)}" if failed else "")


def parsed(event: str) -> dict[str, list[dict[str, dict[str, str]]]] | None:
    try:
        return json.loads(event)  # type: ignore[no-any-return]
    except ValueError:  # cut
        return None


def python(name: str, title: str, route: str) -> Client:
    return Client(
        f"py-{name}", title, route, "python", library_command("python", "python_client.py", name), read_library
    )


def javascript(name: str, title: str, route: str) -> Client:
    return Client(f"js-{name}", title, route, "node", library_command("node", "js_client.mjs", name), read_library)


CLIENTS = (
    python("openai-chat", "openai (Python), chat", CHAT),
    javascript("openai-chat", "openai (JS), chat", CHAT),
    python("langchain-chat", "LangChain, chat", CHAT),
    python("pydantic-ai-chat", "pydantic-ai, chat", CHAT),
    python("litellm-chat", "LiteLLM, chat", CHAT),
    javascript("ai-sdk-chat", "Vercel AI SDK, chat", CHAT),
    Client("opencode", "opencode", CHAT, "opencode", opencode, read_agent, True),
    Client("curl", "curl, chat", CHAT, "curl", curl_command, read_curl),
    python("openai-responses", "openai (Python), responses", RESPONSES),
    javascript("openai-responses", "openai (JS), responses", RESPONSES),
    python("langchain-responses", "LangChain, responses", RESPONSES),
    python("pydantic-ai-responses", "pydantic-ai, responses", RESPONSES),
    python("litellm-responses", "LiteLLM, responses", RESPONSES),
    javascript("ai-sdk-responses", "Vercel AI SDK, responses", RESPONSES),
    Client("codex", "Codex CLI", RESPONSES, "codex", codex, read_agent, True),
    python("anthropic", "anthropic (Python)", MESSAGES),
    javascript("anthropic", "@anthropic-ai/sdk (JS)", MESSAGES),
    python("litellm-messages", "LiteLLM, messages", MESSAGES),
    Client("claude-code", "Claude Code", MESSAGES, "claude", claude_code, read_agent, True),
)


# What is installed


def find_programs(packages: Path | None) -> dict[str, list[str]]:
    """The programs that are there; `packages` contains node_modules/, None if npm could not be used.

    The agents' binaries lie in packages for this machine, and start without the scripts that npm would run.
    """
    programs = {"python": [sys.executable]} | ({"curl": ["curl"]} if shutil.which("curl") else {})
    if packages is None:
        return programs
    modules = packages / "node_modules"
    node = next(modules.glob("node-*/bin/node"), None) or shutil.which("node")
    if node is not None:
        programs |= {"node": [str(node)], "codex": [str(node), str(modules / "@openai/codex/bin/codex.js")]}
    binaries = {"claude": "@anthropic-ai/claude-code-*/claude", "opencode": "opencode-*/bin/opencode"}
    found = {name: next(modules.glob(pattern), None) for name, pattern in binaries.items()}
    return programs | {name: [str(path)] for name, path in found.items() if path is not None}


def starts(program: list[str], folder: Path) -> str:
    """Why a program does not start, empty if it does."""
    run = Run("", "", folder, "", "")
    try:
        done = subprocess.run(
            [*program, "--version"], env=environment(run), capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.decode(errors="replace").strip()[-LINE_CHARS:]


def make_tools(packages: Path | None, folder: Path) -> tuple[Tools, dict[str, str]]:
    """Prepare what is installed. Also returns why the other programs are missing, by name."""
    programs = find_programs(packages)
    reasons = {client.program: "it is not installed" for client in CLIENTS if client.program not in programs}
    reasons |= {name: reason for name, program in programs.items() if (reason := starts(program, folder))}
    if packages is not None:
        (folder / "node_modules").symlink_to(packages / "node_modules")
    shutil.copy(HERE / "drivers" / "js_client.mjs", folder)
    return Tools(programs, folder), reasons


def versions() -> str:
    """The versions of all clients, in one line."""
    packages = [importlib.metadata.distribution(name) for name in PYTHON_PACKAGES]
    found = [f"{each.metadata['Name']} {each.version}" for each in packages]
    pinned = json.loads((HERE / "package.json").read_text())
    pins = pinned["dependencies"] | pinned["optionalDependencies"]
    return f"PyPI: {', '.join(found)}. npm: {', '.join(map(' '.join, pins.items()))}."
