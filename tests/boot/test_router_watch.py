"""router_watch.py: models are loaded at the start, watched each by itself, and ended alone if they are wedged."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest

from boot.probes import Activity, Address
from boot.router_client import ModelState, RouterClient
from boot.router_watch import RouterWatch, pids_by_port
from config.loader import load_config
from mock_backend import MockRouter, Settings

BUSY = Activity(active=1, queued=0, backend_silent_s=0, idle_s=0)
IDLE = Activity(active=0, queued=0, backend_silent_s=0, idle_s=9)
NOWHERE = Address("127.0.0.1", 9)


class ScriptedClient(RouterClient):
    """A router whose answers a test gives. `states` None: it does not answer; `deaf` models do not answer /slots."""

    def __init__(self) -> None:
        super().__init__(NOWHERE, "", 1)
        self.states: dict[str, ModelState] | None = {}
        self.refusal = ""
        self.deaf: set[str] = set()
        self.questions: list[str] = []

    async def models(self) -> Mapping[str, ModelState] | None:
        return self.states

    async def load(self, name: str) -> str:
        return self.refusal

    async def unload(self, name: str) -> str:
        self.states = {name: ModelState(name, "unloaded", exit_code=1)}
        return ""

    async def slots_respond(self, name: str, timeout_s: float) -> bool:
        self.questions.append(name)
        if name in self.deaf:
            await asyncio.sleep(timeout_s)
        return name not in self.deaf


class Case:
    """A RouterWatch over a client. `details` are those that it has reported."""

    def __init__(self, client: RouterClient, folder: Path, **settings: str) -> None:
        given = {"DATA_DIR": str(folder), "MODELS": "router", "WEDGE_TIMEOUT": "0.4", "HEALTH_TIMEOUT": "0.1"}
        self.details: list[str] = []
        self.activity: Activity | None = BUSY
        self.watch = RouterWatch(load_config({**given, **settings}), client, self._on_change, self._activity)

    def _on_change(self) -> None:
        self.details.append(self.watch.detail)

    async def _activity(self) -> Activity | None:
        return self.activity

    async def preload(self) -> str:
        return await self.watch.preload(lambda: True)

    async def look_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.watch.look(os.getpid())
            await asyncio.sleep(0.02)


def with_router(scenario: Callable[[MockRouter, RouterClient], Awaitable[None]], folder: Path, most: int = 2) -> None:
    """Run a scenario against the mock with the models `chat`, `embed` and `broken`."""

    async def run() -> None:
        for name in ("chat", "embed", "broken"):
            (folder / f"{name}.gguf").write_bytes(b"nonsense" if name == "broken" else b"GGUF")
        router = MockRouter(Settings(models_dir=str(folder), models_max=most, autoload=False))
        server = await router.start()
        async with server:
            port = server.sockets[0].getsockname()[1]
            await scenario(router, RouterClient(Address("127.0.0.1", port), "", 20))

    play(run())


def play(scenario: Awaitable[None]) -> None:
    async def run() -> None:
        await asyncio.wait_for(scenario, 60)

    asyncio.run(run())


# At the start


def test_models_are_loaded_one_after_the_other_by_name_or_alias(tmp_path: Path) -> None:
    async def scenario(router: MockRouter, client: RouterClient) -> None:
        settings = {"MODELS_PRELOAD": "embed,x", "MODEL_ALIASES": "x=chat", "MODELS_MAX": "2"}
        case = Case(client, tmp_path, **settings)
        assert await case.preload() == ""
        assert {name: model.status for name, model in router.table.models.items()} == {
            "chat": "loaded",
            "embed": "loaded",
            "broken": "unloaded",
        }
        assert case.details == ["the model embed is loading (1 of 2)", "the model chat is loading (2 of 2)"]
        assert case.watch.detail == ""

    with_router(scenario, tmp_path)


def test_a_model_that_fails_keeps_no_other_one_from_serving(tmp_path: Path) -> None:
    async def scenario(router: MockRouter, client: RouterClient) -> None:
        case = Case(client, tmp_path, MODELS_PRELOAD="broken,chat,gone", MODELS_MAX="3")
        assert await case.preload() == ""
        assert router.table.models["chat"].status == "loaded"
        assert case.watch.failures == {
            "broken": "ended with exit status 1; the log of llama-server may say why",
            "gone": "cannot be loaded: model is not found",
        }
        assert case.watch.detail == "; ".join(f"the model {name} {why}" for name, why in case.watch.failures.items())

    with_router(scenario, tmp_path, most=3)


def test_what_presets_load_is_waited_for(tmp_path: Path) -> None:
    async def scenario(router: MockRouter, client: RouterClient) -> None:
        router.table.load("embed")
        case = Case(client, tmp_path)
        assert await case.preload() == ""
        assert case.details == ["the model embed is loading (1 of 1)"]
        assert router.table.models["embed"].status == "loaded"

    with_router(scenario, tmp_path)


def test_a_load_has_a_limit(tmp_path: Path) -> None:
    client = ScriptedClient()
    client.states = {"chat": ModelState("chat", "loading")}
    case = Case(client, tmp_path, MODELS_PRELOAD="chat", MODEL_LOAD_TIMEOUT="0.2", WEDGE_TIMEOUT="60")
    play_preload(case, "")
    assert list(case.watch.failures) == ["chat"]


def test_a_router_that_tells_nothing_is_ended(tmp_path: Path) -> None:
    client = ScriptedClient()
    client.states = None
    play_preload(Case(client, tmp_path, MODELS_PRELOAD="chat"), "has not told of its models for 0.4 s (WEDGE_TIMEOUT)")


def test_a_router_that_ends_is_no_longer_waited_for(tmp_path: Path) -> None:
    client = ScriptedClient()
    client.states = {"chat": ModelState("chat", "loading")}
    case = Case(client, tmp_path, MODELS_PRELOAD="chat")

    async def run() -> None:
        assert await case.watch.preload(lambda: False) == ""
        case.watch.end()
        assert case.watch.detail == ""

    play(run())


def play_preload(case: Case, reason: str) -> None:
    async def run() -> None:
        assert await case.preload() == reason

    play(run())


# While it serves


@pytest.fixture
def children() -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """Two processes as a router starts them: one waits, one works in one thread. Their ports are 50001 and 50002."""
    waits = [sys.executable, "-c", "import time; time.sleep(600)", "--port", "50001", "--alias", "quiet"]
    works = [sys.executable, "-c", "while True: pass", "--port", "50002", "--alias", "stuck"]
    processes = {"quiet": subprocess.Popen(waits), "stuck": subprocess.Popen(works)}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def loaded(*names: str) -> dict[str, ModelState]:
    ports = {"quiet": 50001, "stuck": 50002}
    return {name: ModelState(name, "loaded", ports.get(name)) for name in names}


def test_children_are_found_by_their_ports(children: dict[str, "subprocess.Popen[bytes]"], tmp_path: Path) -> None:
    found: dict[int, int] = {}
    while not {50001, 50002} <= found.keys():  # the kernel's list may lack one while others begin or end
        found |= pids_by_port(os.getpid())
    assert (found[50001], found[50002]) == (children["quiet"].pid, children["stuck"].pid)
    assert pids_by_port(os.getpid(), tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "threads", "sign"),
    [("quiet", "1", "/slots has not answered for 0.4 s"), ("stuck", "2", "")],
)
def test_a_wedged_model_is_ended_alone(
    name: str, threads: str, sign: str, children: dict[str, "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    client = ScriptedClient()
    client.states, client.deaf = loaded("quiet", "stuck", "elsewhere"), {name}
    case = Case(client, tmp_path, THREADS=threads, NGL="0")
    play(case.look_until(lambda: children[name].poll() is not None))
    assert children[name].returncode == -signal.SIGKILL
    assert [process.poll() for process in children.values()].count(None) == 1
    case.watch.output.read_line(f"I srv run: instance name={name} exited with status 1")
    assert case.watch.failures[name].startswith(f"was wedged: {sign}")


def test_models_without_requests_and_models_that_sleep_are_not_asked(
    children: dict[str, "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    client = ScriptedClient()
    client.deaf = {"quiet", "stuck"}
    client.states = {**loaded("quiet"), "stuck": ModelState("stuck", "sleeping", 50002)}
    case = Case(client, tmp_path, THREADS="1")
    case.activity = IDLE

    async def run() -> None:
        for _ in range(5):
            await case.watch.look(os.getpid())
            await asyncio.sleep(0.12)
        assert client.questions == []
        case.activity, client.states = BUSY, None
        await case.watch.look(os.getpid())
        client.states = loaded("quiet")
        await case.look_until(lambda: bool(client.questions))
        case.watch.end()

    play(run())
    assert client.questions == ["quiet"]
    assert all(process.poll() is None for process in children.values())


def test_a_model_that_is_loaded_again_has_not_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = ScriptedClient()
    case = Case(client, tmp_path)

    async def run() -> None:
        client.states = {name: ModelState(name, "unloaded", exit_code=7) for name in ("a", "b")}
        await case.watch.look(os.getpid())
        await case.watch.look(os.getpid())
        assert case.watch.failures["a"].startswith("ended with exit status 7; ")
        client.states = {"a": ModelState("a", "loading")}
        await case.watch.look(os.getpid())
        assert case.watch.failures == {}

    with caplog.at_level(logging.ERROR):
        play(run())
    assert len(caplog.records) == 2
    assert case.details[-1] == ""


def test_a_load_that_was_ended_on_demand_has_not_failed(tmp_path: Path) -> None:
    client = ScriptedClient()
    client.states = {"a": ModelState("a", "unloaded", exit_code=1)}
    case = Case(client, tmp_path)
    for line in ("spawning server instance with name=a on port 1", "stopping model instance name=a"):
        case.watch.output.read_line(line)
    case.watch.output.read_line("instance name=a exited with status 1")
    play(case.watch.look(os.getpid()))
    assert (case.watch.failures, case.details) == ({}, [])
    case.watch.output.read_line("spawning server instance with name=a on port 2")
    play(case.watch.look(os.getpid()))
    assert list(case.watch.failures) == ["a"]


def test_a_check_ends_with_its_model(children: dict[str, "subprocess.Popen[bytes]"], tmp_path: Path) -> None:
    client = ScriptedClient()
    client.states, client.deaf = loaded("quiet"), {"quiet"}
    case = Case(client, tmp_path, THREADS="1")

    async def run() -> None:
        await case.look_until(lambda: bool(client.questions))
        client.states = {}
        await case.watch.look(os.getpid())
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) <= 2  # this one and the one that waits for it

    play(run())
    assert children["quiet"].poll() is None
