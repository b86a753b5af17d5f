"""The boot and its end: health server and gateway at once, then the model, then llama-server; watched, then drained.

PID 1 of the container, which start.sh execs. Exit status: 0 asked to stop, 2 settings, 3 no model, 4 llama-server given
up, 5 a service cannot start. It reads no request and relays nothing.

    python3 supervisor.py                 serve
    python3 supervisor.py --debug-shell   tell by exit status 0 that DEBUG_SHELL is on
"""

import argparse
import asyncio
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

import exit_words
import llama
import logs
import signals
from backend_process import GRACE_S as BACKEND_GRACE_S
from backend_process import NAME as BACKEND
from backend_process import Backend, setup_output_log
from boot_log import BootLog
from config import Config, ConfigError, load_config
from preflight import (
    BACKEND_GIVEN_UP,
    NO_MODEL,
    SERVICE_GIVEN_UP,
    SETTINGS_WRONG,
    STOPPED,
    Ending,
    check_backend,
    check_tls,
    claim_ports,
    services_environment,
)
from probes import Activity, Address, ask, parse_activity
from processes import Child, Children
from run_dir import RunDir, StateFile
from watchdog import Idle, Restarts

HERE = Path(__file__).resolve().parent
UP_POLL_S = 0.05
LONGEST_IDLE_TICK_S = 5.0
# What the gateway needs past its own deadline to say so; with the two graces docker's 10 s suffice for DRAIN_TIMEOUT=7.
DRAIN_MARGIN_S = 0.5
HEALTH_GRACE_S = 0.5

log = logging.getLogger(__name__)


@dataclass
class Service:
    """The gateway or the health server; `up` once it has answered since its last start, `draining` once it said so."""

    name: str
    argv: list[str]
    env: dict[str, str]
    address: Address
    path: str
    child: Child | None = None
    up: bool = False
    draining: bool = False


class Supervisor:
    """Make it inside the running loop; `run` returns the exit status, with every child gone."""

    def __init__(self, config: Config, environ: Mapping[str, str], run_dir: RunDir, boot_log: BootLog) -> None:
        ports = claim_ports(config)
        state_path = config.supervision.state_file or run_dir.state_file
        env = services_environment(environ, config, ports, state_path)
        key = run_dir.write_key(config.backend.api_key)
        tls = config.listen.tls_cert_file is not None
        self._gateway = Service(
            "gateway",
            [sys.executable, str(HERE / "gateway.py"), "--parent", str(os.getpid())],
            {**env, "BACKEND_API_KEY_FILE": str(run_dir.key_file)},
            Address(config.listen.host, int(ports["PORT"]), tls),
            "/ping",
        )
        self._health = Service(
            "health server",
            [sys.executable, str(HERE / "health_server.py")],
            env,
            Address(config.listen.host, int(ports["PORT_HEALTH"])),
            "/",
        )
        self._config = config
        self._environ = environ
        self._run_dir = run_dir
        self._children = Children()
        self._backend = Backend(config, self._children, boot_log, key, self._publish, self._activity)
        self._state = StateFile(state_path, lambda: datetime.now(timezone.utc))
        self._restarts = Restarts(config.supervision.max_restarts, monotonic)
        self._wish: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._dead: dict[str, str] = {}
        self._loading = "starting"
        self._last_words = ""
        self._model: Child | None = None
        self._hook: Child | None = None
        self._hup_held = False
        self._on_terminal = os.isatty(0)

    async def run(self) -> int:
        self._listen_to_signals()
        try:
            return await self._run()
        finally:
            signals.ignore(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)

    async def _run(self) -> int:
        try:
            self._publish()
        except OSError as error:
            words = f"STATE_FILE: {self._config.supervision.state_file} cannot be written: {error.strerror}"
            raise Ending(SETTINGS_WRONG, words) from None
        work = [self._keep(self._health), self._keep(self._gateway), self._serve_model(), self._watch_idle()]
        tasks = [asyncio.ensure_future(self._until_ending(each)) for each in work]
        try:
            return await asyncio.shield(self._wish)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1)
            await self._stop_all()
            self._state.remove()

    async def _until_ending(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Ending as ending:
            self._end(ending.status, str(ending))
        except Exception:
            log.exception("the supervisor failed")
            self._end(1, "")

    def _end(self, status: int, words: str) -> None:
        """Note the first wish to end; later ones change nothing."""
        if self._wish.done():
            return
        self._wish.set_result(status)
        self._last_words = words or "stopping"
        if words:
            log.log(logging.ERROR if status else logging.INFO, "%s", words)

    # What the others are told

    def _publish(self) -> None:
        state, detail = self._judge()
        pid = self._backend.child.pid if self._backend.child and self._backend.child.alive else None
        if self._state.tell(state, detail, pid):
            # Why it is dead or draining is a log line of its own.
            log.info("state %s%s", state, f": {detail}" if state in ("loading", "ready") else "")

    def _judge(self) -> tuple[str, str]:
        if self._wish.done():
            return "dead" if self._wish.result() else "draining", self._last_words
        if self._dead:
            return "dead", "; ".join(self._dead.values())
        if self._gateway.draining:
            return "draining", "the gateway drains"
        if self._backend.ready and self._gateway.up:
            return "ready", "serving"
        return "loading", "the gateway is starting" if self._backend.ready else self._loading

    def _load(self, words: str) -> None:
        self._loading = words
        self._publish()

    # Health server and gateway

    async def _keep(self, service: Service) -> None:
        """Start a service again whenever it ends, within MAX_RESTARTS."""
        answered = False
        while True:
            service.child = self._start(service)
            self._revive(service.name)
            await self._await_up(service, service.child)
            answered = answered or service.up
            status = await service.child.end()
            service.up = service.draining = False
            if service is self._gateway and status == 0:
                raise Ending(STOPPED, "the gateway has drained and ended: stopping everything")
            words = f"the {service.name} {exit_words.plainly(status)}"
            if not answered:
                kind = SETTINGS_WRONG if status == SETTINGS_WRONG else SERVICE_GIVEN_UP
                raise Ending(kind, f"{words} before it answered: it cannot start")
            await self._back_off(service.name, words, SERVICE_GIVEN_UP)

    def _start(self, service: Service) -> Child:
        try:
            return self._children.spawn(service.name, service.argv, service.env)
        except OSError as error:
            words = f"the {service.name} cannot be started: {error.strerror}"
            raise Ending(SERVICE_GIVEN_UP, words) from None

    async def _await_up(self, service: Service, child: Child) -> None:
        while child.alive:
            if await ask(service.address, service.path, self._config.timeouts.health_s):
                service.up = True
                self._forward_held_hup(service)
                self._publish()
                return
            await child.ended_within(UP_POLL_S)

    async def _back_off(self, name: str, words: str, given_up: int) -> None:
        """Wait before the next start, the state being dead meanwhile. Raises Ending where it was one crash too many."""
        pause_s = self._restarts.pause_s(name)
        if name != self._health.name:
            self._dead[name] = words
        self._publish()
        if pause_s is None:
            limit = self._config.supervision.max_restarts
            raise Ending(given_up, f"{words}; giving up (MAX_RESTARTS={limit} within 10 minutes)")
        log.error("%s; starting it again in %g s", words, pause_s)
        await asyncio.sleep(pause_s)

    def _revive(self, name: str) -> None:
        self._dead.pop(name, None)
        self._publish()

    async def _activity(self) -> Activity | None:
        return parse_activity(await ask(self._gateway.address, "/health", self._config.timeouts.health_s))

    # Model and llama-server

    async def _serve_model(self) -> None:
        model_path = await self._find_model()
        argv = llama.command(self._config, model_path, self._run_dir.key_file)
        env = llama.environment(self._environ, self._config.model)
        while True:
            self._loading = "the model is loading"
            self._revive(BACKEND)
            try:
                words = await self._backend.live(argv, env)
            except OSError as error:
                words = f"{BACKEND} cannot be executed ({argv[0]}): {_exec_words(error)}"
                raise Ending(BACKEND_GIVEN_UP, words) from None
            await self._back_off(BACKEND, f"{BACKEND} {words}", BACKEND_GIVEN_UP)

    async def _find_model(self) -> str | None:
        """Have the model found or fetched by a process of its own; None where llama-server needs no file of ours."""
        if self._config.supervision.mock_backend:
            log.warning("MOCK_BACKEND: the built-in mock answers in llama-server's place, no model is loaded")
            return None
        if self._config.model.hf:
            return None
        self._load("finding or fetching the model")
        result = self._run_dir.model_file
        argv = [sys.executable, str(HERE / "model_files.py"), str(result)]
        self._model = self._children.spawn("model", argv, self._environ)
        status = await self._model.end()
        if status != 0:
            # The process has said why itself, unless it was killed.
            words = "" if status == NO_MODEL else f"finding the model {exit_words.plainly(status)}"
            raise Ending(NO_MODEL, words)
        return str(json.loads(result.read_text())["path"])

    # Machines billed by the hour

    async def _watch_idle(self) -> None:
        limit_s = self._config.supervision.idle_stop_s
        tick_s = min(LONGEST_IDLE_TICK_S, limit_s / 4)
        idle: Idle | None = None
        while limit_s:
            await asyncio.sleep(tick_s)
            if not self._backend.ready:
                idle = None
            elif idle is None:
                idle = Idle(limit_s, monotonic)
            elif idle.possible() and idle.due(await self._activity()):
                self._be_idle(limit_s)

    def _be_idle(self, limit_s: float) -> None:
        command = self._config.supervision.on_idle
        if command is None:
            raise Ending(STOPPED, f"no work for {limit_s:g} s (IDLE_STOP_SECONDS): stopping everything")
        if self._hook and self._hook.alive:
            log.warning("no work for %g s, but ON_IDLE is still running", limit_s)
            return
        log.info("no work for %g s (IDLE_STOP_SECONDS): running ON_IDLE", limit_s)
        argv = ["/bin/sh", "-c", command]
        self._hook = self._children.spawn("ON_IDLE", argv, self._environ, ends_family=False)
        self._hook.exited.add_done_callback(_tell_hook_failure)

    # Signals and the end

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        loop.add_signal_handler(signal.SIGUSR1, self._gateway_drains)
        loop.add_signal_handler(signal.SIGCHLD, self._children.reap)

    def _asked_to_stop(self, number: signal.Signals) -> None:
        if self._wish.done():
            log.warning("%s again: ending at once", number.name)
            self._children.kill_all()
        self._end(STOPPED, f"{number.name}: stopping everything")

    def _hang_up(self) -> None:
        """Have the gateway reload; but a terminal that is gone means that whoever sat there wants nothing any more."""
        if self._on_terminal and _terminal_gone():
            self._end(STOPPED, "the terminal is gone: stopping everything")
        self._hup_held = True
        self._forward_held_hup(self._gateway)

    def _gateway_drains(self) -> None:
        """An operator has asked the gateway itself (POST /drain): the probes hear of it before its port is closed."""
        if self._gateway.child and self._gateway.child.alive and not self._wish.done():
            self._gateway.draining = True
            log.info("the gateway drains, by no signal from here")
            self._publish()

    def _forward_held_hup(self, service: Service) -> None:
        """A gateway that has not yet installed its handler would die of the signal, so it waits until it answers."""
        if service is self._gateway and self._hup_held and service.up and service.child:
            self._hup_held = False
            service.child.signal(signal.SIGHUP)

    async def _stop_all(self) -> None:
        """In the order of the traffic: who accepts requests first, who answers the probes last."""
        self._publish()
        for child in (self._model, self._hook):
            if child:
                child.kill()
        drain_s = self._config.supervision.drain_timeout_s
        await self._stop(self._gateway.child, drain_s + DRAIN_MARGIN_S)
        await self._stop(self._backend.child, BACKEND_GRACE_S)
        await self._stop(self._health.child, HEALTH_GRACE_S)
        self._children.kill_all()
        await self._children.sweep()

    async def _stop(self, child: Child | None, grace_s: float) -> None:
        if child and child.alive:
            await self._children.stop(child, grace_s)


def _tell_hook_failure(exited: "asyncio.Future[int]") -> None:
    if exited.result():
        log.warning("ON_IDLE %s", exit_words.plainly(exited.result()))


def _terminal_gone() -> bool:
    try:
        os.tcgetpgrp(0)
    except OSError:
        return True
    return False


def _exec_words(error: OSError) -> str:
    wrong_machine = error.errno == errno.ENOEXEC
    return "it is not a program for this machine" if wrong_machine else str(error.strerror)


# The program


async def serve(config: Config, environ: Mapping[str, str]) -> int:
    """Boot, serve, stop. Raises Ending for what is refused before anything runs."""
    check_backend(config)
    check_tls(config)
    with ExitStack() as made:
        try:
            boot_log = BootLog(config.log.dir / config.log.name, config.log.instance_id, datetime.now(timezone.utc))
        except OSError as error:
            words = f"LOG_DIR: {error.filename} cannot be written: {error.strerror} (is DATA_DIR a folder that may be?)"
            raise Ending(SETTINGS_WRONG, words) from None
        made.callback(boot_log.close)
        try:
            run_dir = RunDir()
        except OSError as error:
            raise Ending(SETTINGS_WRONG, f"the run directory cannot be made: {error}") from None
        made.callback(run_dir.remove)
        return await Supervisor(config, environ, run_dir, boot_log).run()


def _parser() -> argparse.ArgumentParser:
    words = "Start, watch and stop everything; the settings come by environment (docs/CONFIGURATION.md)."
    parser = argparse.ArgumentParser(description=words, allow_abbrev=False)
    words = "start nothing, and tell by exit status 0 that DEBUG_SHELL is on"
    parser.add_argument("--debug-shell", action="store_true", help=words)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    if _parser().parse_args(argv).debug_shell:
        return 0 if _wants_shell(os.environ) else 1
    try:
        config = load_config(os.environ)
    except ConfigError as error:
        for complaint in error.complaints:
            print(f"supervisor: {complaint}", file=sys.stderr)
        return SETTINGS_WRONG
    logs.setup("supervisor", config.log.level, config.log.format)
    setup_output_log(config.log.format)
    try:
        return asyncio.run(serve(config, os.environ))
    except Ending as ending:
        log.error("%s", ending)
        return ending.status
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _let_go_of_stdout()


def _let_go_of_stdout() -> None:
    """Python would turn an output that nobody takes any more (a closed pipe or terminal) into exit status 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Asked to stop before anything runs."""
    sys.exit(STOPPED)


def _wants_shell(environ: Mapping[str, str]) -> bool:
    """Read DEBUG_SHELL alone, so that a shell is to be had where other settings are wrong."""
    try:
        return load_config({"DEBUG_SHELL": environ.get("DEBUG_SHELL", "")}).supervision.debug_shell
    except ConfigError:
        return False


if __name__ == "__main__":
    sys.exit(main())
