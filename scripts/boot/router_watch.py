"""The models of a running router: loaded at the start, each watched by itself, and why one is not there.

A model is a process of its own. One that dies or is wedged is not the end of the router: the others go on, and the
gateway has it loaded again when a request needs it.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from boot.model_output import ModelOutput
from boot.router_client import ModelState, RouterClient
from boot.stuck_loop import GetActivity, StuckLoop
from boot.watchdog import SilenceTimer, slots_timeout_s
from config.settings import Config

POLL_S = 0.1
_PROC = Path("/proc")

log = logging.getLogger(__name__)


@dataclass
class WatchedModel:
    """A model's process while it runs. `check` is the look at its /slots that runs."""

    name: str
    pid: int
    silence: SilenceTimer
    loop: StuckLoop
    check: "asyncio.Task[None] | None" = None


class RouterWatch:
    """Loads and watches the models. `failures` has the reason for each model that has ended by itself, by name.

    `detail` says what an operator should know of them: which one loads at the start, then the failures. `on_change` is
    called when it has changed.
    """

    def __init__(
        self, config: Config, client: RouterClient, on_change: Callable[[], None], activity: GetActivity
    ) -> None:
        self.failures: dict[str, str] = {}
        self.output = ModelOutput(self._note_failure)
        self._config = config
        self._client = client
        self._on_change = on_change
        self._activity = activity
        self._loading = ""
        self._running: dict[str, WatchedModel] = {}
        self._wedge_s = config.supervision.wedge_timeout_s
        self._next_question_s = 0.0

    @property
    def detail(self) -> str:
        if self._loading:
            return self._loading
        return "; ".join(f"the model {name} {reason}" for name, reason in sorted(self.failures.items()))

    def _note_failure(self, name: str, reason: str) -> None:
        log.error("the model %s %s", name, reason)
        self.failures[name] = reason
        self._on_change()

    def end(self) -> None:
        """Forget all models: the router has ended."""
        for model in self._running.values():
            _cancel(model)
        self._running.clear()
        self.failures.clear()
        self._loading = ""

    # At the start

    async def preload(self, alive: Callable[[], bool]) -> str:
        """Load MODELS_PRELOAD, one after the other, and wait for what presets load; return why the router must end.

        A model that fails to load keeps no other one from serving.
        """
        router = self._config.router
        names = list(dict.fromkeys(router.aliases.get(name, name) for name in router.preload))
        starting = await self._client.models() or {}
        names += [name for name, state in starting.items() if state.running and name not in names]
        for number, name in enumerate(names, 1):
            self._loading = f"the model {name} is loading ({number} of {len(names)})"
            self._on_change()
            if reason := await self._load(name, alive):
                return reason
        self._loading = ""
        return ""

    async def _load(self, name: str, alive: Callable[[], bool]) -> str:
        started_s, limit_s = monotonic(), self._config.model.load_timeout_s
        silence = SilenceTimer(self._wedge_s, monotonic)
        refused = "" if self._is_running(await self._client.models(), name) else await self._client.load(name)
        if refused:
            self._note_failure(name, f"cannot be loaded: {refused}")
            return ""
        while alive():
            models, elapsed_s = await self._client.models(), monotonic() - started_s
            if models is not None:
                silence.reset()
                state = models.get(name)
                if state is None or state.status in ("loaded", "sleeping"):
                    log.info("the model %s is loaded after %.1f s", name, elapsed_s)
                    return ""
                if not state.running:
                    self._note_unexplained(state)
                    return ""
            if silence.expired:
                return f"has not told of its models for {self._wedge_s:g} s (WEDGE_TIMEOUT)"
            if limit_s and elapsed_s >= limit_s:
                self.output.expect_end(name, f"did not load within {limit_s:g} s (MODEL_LOAD_TIMEOUT)")
                await self._client.unload(name)
                limit_s = 0.0
            await asyncio.sleep(POLL_S)
        return ""

    @staticmethod
    def _is_running(models: Mapping[str, ModelState] | None, name: str) -> bool:
        return models is not None and name in models and models[name].running

    def _note_unexplained(self, state: ModelState) -> None:
        """Note a failure of which the output has said nothing, for example since it is turned off.

        An end that was asked for is listed as failed, too, if llama-server had to kill a process that was loading.
        """
        if state.name not in self.failures and not self.output.has_read_end(state.name):
            status = "" if state.exit_code is None else f" with exit status {state.exit_code}"
            self._note_failure(state.name, f"ended{status}; the log of llama-server may say why")

    # While it serves

    async def look(self, router_pid: int) -> None:
        """Look once which models run, and begin to ask those that may be wedged. Call it every few seconds.

        A model that sleeps is not asked: it would wake up.
        """
        models = await self._client.models()
        if models is None:
            return  # the caller notices a router that does not answer
        self._forget_failures(models)
        ports = {state.name: state.port for state in models.values() if state.status == "loaded" and state.port}
        known = {name: each.pid for name, each in self._running.items() if _port_of(each.pid) == ports.get(name)}
        # The kernel's list may lack one that is there: those that are known are not looked up.
        pids = pids_by_port(router_pid) if ports.keys() - known.keys() else {}
        loaded = {**{name: pids[port] for name, port in ports.items() if port in pids}, **known}
        for name in [name for name, each in self._running.items() if loaded.get(name) != each.pid]:
            _cancel(self._running.pop(name))
        for name, pid in loaded.items():
            if name not in self._running:
                self._running[name] = self._watch(name, pid)
        await self._ask_suspects()

    def _forget_failures(self, models: Mapping[str, ModelState]) -> None:
        healed = [name for name in self.failures if self._is_running(models, name) or name not in models]
        for name in healed:
            del self.failures[name]
        for state in models.values():
            if state.exit_code is not None and not state.running:
                self._note_unexplained(state)
        if healed:
            self._on_change()

    def _watch(self, name: str, pid: int) -> WatchedModel:
        def alive() -> bool:
            return name in self._running and self._running[name].pid == pid

        async def slots_respond(timeout_s: float) -> bool:
            return await self._client.slots_respond(name, timeout_s)

        loop = StuckLoop(self._config, pid, alive, slots_respond, self._activity)
        return WatchedModel(name, pid, SilenceTimer(self._wedge_s, monotonic), loop)

    async def _ask_suspects(self) -> None:
        """Begin to look at models with a thread that works alone; and at all while requests run, but seldom.

        Each answer of /slots delays the moment at which llama-server notices that a client has left.
        """
        idle = [each for each in self._running.values() if each.check is None or each.check.done()]
        for each in idle:
            if each.loop.is_suspect():
                each.check = asyncio.ensure_future(self._check_stuck(each))
        if monotonic() < self._next_question_s or not self._running:
            return
        self._next_question_s = monotonic() + self._wedge_s / 4
        activity = await self._activity()
        for each in idle:
            if activity is None or not activity.active:
                each.silence.reset()
            elif each.check is None or each.check.done():
                each.check = asyncio.ensure_future(self._check_silent(each))

    async def _check_stuck(self, model: WatchedModel) -> None:
        if reason := await model.loop.find():
            self._end_wedged(model, reason)

    async def _check_silent(self, model: WatchedModel) -> None:
        timeout_s = slots_timeout_s(self._wedge_s, self._config.timeouts.health_s)
        if await self._client.slots_respond(model.name, timeout_s):
            model.silence.reset()
        elif model.silence.expired:
            self._end_wedged(model, f"/slots has not answered for {self._wedge_s:g} s (WEDGE_TIMEOUT)")

    def _end_wedged(self, model: WatchedModel, reason: str) -> None:
        """Kill the process of one model. The router notices its end, and the other models go on."""
        log.error("the model %s is wedged: %s; ending it alone", model.name, reason)
        self.output.expect_end(model.name, f"was wedged: {reason}")
        with suppress(ProcessLookupError):
            os.kill(model.pid, signal.SIGKILL)


def _cancel(model: WatchedModel) -> None:
    if model.check:
        model.check.cancel()


def pids_by_port(router_pid: int, proc: Path = _PROC) -> dict[int, int]:
    """Return the pids of a router's children by the ports at which they listen."""
    ports = {pid: _port_of(pid, proc) for pid in _children(router_pid, proc)}
    return {port: pid for pid, port in ports.items() if port}


def _port_of(pid: int, proc: Path = _PROC) -> int | None:
    """Return the port in the command line of a process; None if there is none, or if it has ended."""
    with suppress(OSError, ValueError, IndexError):
        arguments = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
        return int(arguments[arguments.index(b"--port") + 1])
    return None


def _children(pid: int, proc: Path) -> list[int]:
    """Return the children that any thread of a process has started; none if the kernel has no such list."""
    children: list[int] = []
    with suppress(OSError):
        for task in (proc / str(pid) / "task").iterdir():
            with suppress(OSError):  # a thread may have ended
                children += map(int, (task / "children").read_text().split())
    return children
