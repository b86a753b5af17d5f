"""Health server, gateway and llama-server as one: started, watched, started again, drained and stopped, in order."""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from time import monotonic
from typing import Any

from boot import exit_status, gpu, llama_server
from boot.backend_process import GRACE_S as BACKEND_GRACE_S
from boot.backend_process import NAME as BACKEND
from boot.backend_process import BackendProcess, setup_output_log
from boot.boot_log import BootLog
from boot.preflight import API_KEYS, check_backend, check_tls, claim_ports, services_environment, without_api_keys
from boot.probes import Activity, Address, parse_activity, probe
from boot.processes import Child, Children
from boot.run_dir import RunDir
from boot.service_manager import Notifier, take_listener, without_manager
from boot.shutdown import (
    EXIT_MODEL_UNAVAILABLE,
    EXIT_NO_MODEL,
    EXIT_SERVICE,
    EXIT_SETTINGS,
    EXIT_STOPPED,
    Shutdown,
    StartupError,
    describe_remedy,
    exit_on_stop_signals,
    hopeless_argument,
    status_after,
)
from boot.state_publisher import StatePublisher
from boot.version import check_version
from boot.watchdog import IdleTimer, RestartPolicy
from config.loader import load_config
from config.settings import Config, ConfigError
from core import logs, signals
from core.health_token import health_token
from core.installation import command
from core.off_loop import finishes_within, run_off_loop
from core.state_file import DEAD, DRAINING, LOADING, READY, StateEntry, StateWriter

UP_POLL_S = 0.05
MAX_IDLE_INTERVAL_S = 5.0
# The gateway ends within this after its drain deadline. With both graces, docker's 10 s suffice for DRAIN_TIMEOUT=7.
DRAIN_MARGIN_S = 0.5
HEALTH_GRACE_S = 0.5
PREPARED_S = 0.5  # after a stop signal: what is prepared can then be removed again
CLOSED_S = 0.5

log = logging.getLogger(__name__)


@dataclass
class Service:
    """The gateway or the health server. `up`: it has responded since its last start. `draining`: it has reported so."""

    name: str
    argv: list[str]
    env: dict[str, str]
    address: Address
    path: str
    pass_fds: tuple[int, ...] = ()
    child: Child | None = None
    up: bool = False
    draining: bool = False


class Supervisor:
    """Starts, watches and stops everything. Create it inside the running loop."""

    def __init__(self, prepared: "Prepared", environ: Mapping[str, str], notifier: Notifier) -> None:
        config, ports, run_dir, boot_log = prepared.config, prepared.ports, prepared.run_dir, prepared.boot_log
        listener = prepared.listener
        state_path = config.supervision.state_file or run_dir.state_file
        env = services_environment(environ, config, ports, state_path)
        api_keys = {name: environ[name] for name in API_KEYS if name in environ}
        tls = config.listen.tls_cert_file is not None
        self._gateway = Service(
            "gateway",
            [*command("gateway"), *_listen_option(listener)],
            {**env, **api_keys, "BACKEND_API_KEY_FILE": str(run_dir.key_file)},
            Address(config.listen.host, int(ports["PORT"]), tls),
            "/ping",
            () if listener is None else (listener.fileno(),),
        )
        self._health = Service(
            "health server",
            command("health_server"),
            env,
            Address(config.listen.host, int(ports["PORT_HEALTH"])),
            "/",
        )
        self._config = config
        self._environ = without_api_keys(environ)
        self._run_dir = run_dir
        self._children = Children()
        self._boot_log = boot_log
        self._health_token = health_token(run_dir.key)
        self._backend = BackendProcess(config, self._children, boot_log, run_dir.key, self._publish, self._activity)
        self._notifier = notifier
        writer = StateWriter(state_path, lambda: datetime.now(timezone.utc))
        self._publisher = StatePublisher(writer, self._log_state)
        self._logged_state = ("", "")
        self._restarts = RestartPolicy(config.supervision.max_restarts, monotonic)
        self._exit_request: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._exit_reason = ""
        self._failures: dict[str, str] = {}
        self._loading_detail = "starting"
        self._model_finder: Child | None = None
        self._idle_hook: Child | None = None
        self._reload_pending = False
        self._on_terminal = os.isatty(0)

    async def run(self) -> int:
        """Serve until a reason to stop; return the exit status once no child is left. Raises StartupError."""
        self._install_signal_handlers()
        try:
            return await self._run()
        finally:
            signals.ignore(*signals.STOP, signal.SIGHUP, signal.SIGCHLD)

    async def _run(self) -> int:
        try:
            await self._publisher.check(self._current_entry())
        except OSError as error:
            message = f"STATE_FILE: {self._config.supervision.state_file} cannot be written: {error.strerror}"
            raise StartupError(EXIT_SETTINGS, message) from None
        background = [asyncio.ensure_future(self._publisher.run()), asyncio.ensure_future(self._feed_watchdog())]
        try:
            return await self._serve()
        finally:
            await self._stop_all()
            for task in background:
                task.cancel()
            await self._publisher.remove()

    async def _serve(self) -> int:
        services = [self._keep_up(self._health), self._keep_up(self._gateway)]
        work = [*services, self._serve_model(), self._watch_idle(), self._check_version(), self._report_gpu()]
        tasks = [asyncio.ensure_future(self._until_shutdown(each)) for each in work]
        try:
            return await asyncio.shield(self._exit_request)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1)

    async def _feed_watchdog(self) -> None:
        """Report that this loop runs, twice as often as systemd requires, to the end of the drain."""
        while self._notifier.watchdog_s:
            self._notifier.alive()
            await asyncio.sleep(self._notifier.watchdog_s / 2)

    async def _until_shutdown(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Shutdown as shutdown:
            self._request_exit(shutdown.status, str(shutdown))
        except Exception:
            log.exception("error: the supervisor failed")
            self._request_exit(1, "")

    def _request_exit(self, status: int, reason: str) -> None:
        """Record the first request to exit and log its reason; later requests change nothing."""
        if self._exit_request.done():
            return
        self._exit_request.set_result(status)
        self._exit_reason = reason or "stopping"
        if reason and status:
            log.error("error: %s", reason)
        elif reason:
            log.info("%s", reason)

    # The state file

    def _publish(self) -> None:
        self._publisher.publish(self._current_entry())

    def _log_state(self, entry: StateEntry) -> None:
        if entry[:2] != self._logged_state:
            self._logged_state = (entry.state, entry.detail)
            self._notifier.report(f"{entry.state}: {entry.detail}")
            # The reason for DEAD or DRAINING has its own log line.
            log.info("state %s%s", entry.state, f": {entry.detail}" if entry.state in (LOADING, READY) else "")

    def _current_entry(self) -> StateEntry:
        pid = self._backend.child.pid if self._backend.child and self._backend.child.alive else None
        failures = tuple(sorted(self._backend.model_failures.items()))
        return StateEntry(*self._current_state(), pid, self._backend.listener, failures)

    def _current_state(self) -> tuple[str, str]:
        """Return the state and the reason for it."""
        if self._exit_request.done():
            return DEAD if self._exit_request.result() else DRAINING, self._exit_reason
        if self._failures:
            return DEAD, "; ".join(self._failures.values())
        if self._gateway.draining:
            return DRAINING, "the gateway drains"
        if self._backend.ready and self._gateway.up:
            return READY, f"serving; {self._backend.detail}" if self._backend.detail else "serving"
        waits_for_gateway = "the gateway is starting" if self._backend.ready else ""
        return LOADING, waits_for_gateway or self._backend.detail or self._loading_detail

    def _clear_failure(self, name: str) -> None:
        self._failures.pop(name, None)
        self._publish()

    # Health server and gateway

    async def _keep_up(self, service: Service) -> None:
        """Start a service, and start it again whenever it ends, within MAX_RESTARTS."""
        responded = False
        while True:
            service.child = self._start(service)
            self._clear_failure(service.name)
            await self._await_up(service, service.child)
            responded = responded or service.up
            status = await service.child.wait()
            was_up = service.up
            service.up = service.draining = False
            if service is self._gateway and status == 0:
                raise Shutdown(EXIT_STOPPED, "the gateway has drained and ended: stopping everything")
            reason = f"the {service.name} {exit_status.describe(status)}"
            if not responded:
                exit_with = EXIT_SETTINGS if status == EXIT_SETTINGS else EXIT_SERVICE
                raise Shutdown(exit_with, f"{reason} before it answered: it cannot start")
            await self._back_off(service.name, reason, EXIT_SERVICE, was_ready=was_up)

    def _start(self, service: Service) -> Child:
        try:
            if service is self._gateway:
                return self._start_gateway(service)
            return self._children.spawn(service.name, service.argv, service.env, pass_fds=service.pass_fds)
        except OSError as error:
            message = f"the {service.name} cannot be started: {error.strerror}"
            raise Shutdown(EXIT_SERVICE, message) from None

    def _start_gateway(self, gateway: Service) -> Child:
        """Start the gateway with a socket for the report that it drains, which nothing else can send."""
        ours, its = socket.socketpair()
        with its:
            ours.setblocking(False)
            argv = [*gateway.argv, "--drain-socket", str(its.fileno())]
            child = self._children.spawn(gateway.name, argv, gateway.env, pass_fds=(*gateway.pass_fds, its.fileno()))
        asyncio.get_running_loop().add_reader(ours, self._on_drain_report, ours, child)
        return child

    def _on_drain_report(self, ours: socket.socket, child: Child) -> None:
        """Publish that the gateway drains on its own (POST /drain), before it closes its port; or it has ended."""
        with suppress(OSError):
            if ours.recv(16) and child is self._gateway.child and child.alive and not self._exit_request.done():
                self._gateway.draining = True
                log.info("the gateway drains on its own")
                self._publish()
                return
        asyncio.get_running_loop().remove_reader(ours)
        ours.close()

    async def _await_up(self, service: Service, child: Child) -> None:
        while child.alive:
            if await probe(service.address, service.path, self._config.timeouts.health_s):
                service.up = True
                if service is self._gateway:
                    self._notifier.ready()
                self._forward_reload(service)
                self._publish()
                return
            await child.exits_within(UP_POLL_S)

    async def _back_off(self, name: str, reason: str, exit_with: int, *, was_ready: bool) -> None:
        """Wait before the next start, with the state DEAD. Raises Shutdown after too many crashes."""
        blamed = name == BACKEND and await self._is_request_blamed()
        pause_s = self._restarts.pause_s(name, was_ready=was_ready, blamed=blamed)
        if blamed:
            self._loading_detail = f"restarting {BACKEND}"
        elif name != self._health.name:
            self._failures[name] = reason
        self._publish()
        if pause_s is None:
            limit = self._config.supervision.max_restarts
            raise Shutdown(exit_with, f"{reason}; giving up (MAX_RESTARTS={limit} {self._restarts.exceeded})")
        cause = " while it worked on requests, which the gateway holds back or repeats" if blamed else ""
        log.error("%s%s; starting it again in %g s", reason, cause, pause_s)
        await asyncio.sleep(pause_s)

    async def _is_request_blamed(self) -> bool:
        """Whether the gateway has seen llama-server die of a request. MAX_RESTARTS=0 ends at every crash."""
        activity = await self._activity() if self._config.supervision.max_restarts else None
        return activity is not None and activity.blamed

    async def _activity(self) -> Activity | None:
        health_s = self._config.timeouts.health_s
        return parse_activity(await probe(self._gateway.address, "/health", health_s, self._health_token))

    # Model and llama-server

    def _command(self, model_path: str | None) -> list[str]:
        run_dir = self._run_dir
        return llama_server.command(self._config, model_path, run_dir.key_file, run_dir.slots_folder)

    async def _serve_model(self) -> None:
        model_path = await self._find_model()
        argv = await run_off_loop(lambda: self._command(model_path))
        env = llama_server.environment(self._environ, self._config.model)
        if self._config.router.enabled:
            env = llama_server.router_environment(env, self._config, self._run_dir.key)
        while True:
            self._loading_detail = (
                "the model is loading" if not self._config.router.enabled else "the router is starting"
            )
            self._clear_failure(BACKEND)
            try:
                reason = await self._backend.run(argv, env)
            except OSError as error:
                status = llama_server.exec_error_status(error)
                raise Shutdown(status, llama_server.describe_exec_error(argv[0], error)) from None
            lines, extra_args = self._backend.last_lines, self._config.model.extra_args
            if not self._backend.was_ready and (hopeless := hopeless_argument(lines, extra_args)):
                raise Shutdown(EXIT_SETTINGS, hopeless)
            exit_with = status_after(self._backend.last_lines)
            await self._back_off(BACKEND, f"{BACKEND} {reason}", exit_with, was_ready=self._backend.was_ready)

    async def _check_version(self) -> None:
        """Log llama-server's version. Nothing waits for it."""
        if not self._config.supervision.mock_backend:
            binary = await run_off_loop(lambda: llama_server.find_binary(self._config.model))
            await check_version(self._children, binary, llama_server.environment(self._environ, self._config.model))

    async def _find_model(self) -> str | None:
        """Find or download the model in a process of its own; return its path, or None if llama-server needs none."""
        if self._config.supervision.mock_backend:
            log.warning("MOCK_BACKEND: the built-in mock answers in place of llama-server, no model is loaded")
            return None
        if self._config.model.hf:
            return None
        one = not self._config.router.enabled
        self._loading_detail = "finding or fetching the model" if one else "finding the models"
        self._publish()
        result = self._run_dir.model_file
        argv = [*command("supervisor"), "--find-model", str(result)]
        self._model_finder = self._children.spawn("model", argv, self._environ)
        status = await self._model_finder.wait()
        if status != 0:
            # With these two the process has logged the reason itself.
            if status in (EXIT_NO_MODEL, EXIT_MODEL_UNAVAILABLE):
                raise Shutdown(status)
            raise Shutdown(EXIT_MODEL_UNAVAILABLE, f"finding the model {exit_status.describe(status)}")
        found = json.loads(await run_off_loop(result.read_text))
        await self._check_vram(found["bytes"])
        return None if found["path"] is None else str(found["path"])

    async def _report_gpu(self) -> None:
        """Log one line about the GPUs. Nothing waits for it: nvidia-smi may take seconds, or hang."""
        if await run_off_loop(gpu.has_tool):
            self._spawn_gpu_check("--report-gpu")
        else:
            log.info("%s", gpu.NONE)

    async def _check_vram(self, model_bytes: int) -> None:
        """Compare the model with the GPUs' memory. Nothing waits for it either."""
        if self._config.model.ngl and await run_off_loop(gpu.has_tool):
            self._spawn_gpu_check("--check-vram", str(model_bytes))

    def _spawn_gpu_check(self, *option: str) -> None:
        with suppress(OSError):  # no process can be started now; the services report that themselves
            self._children.spawn("GPU check", [*command("supervisor"), *option], self._environ)

    # IDLE_STOP_SECONDS, for machines billed by the hour

    async def _watch_idle(self) -> None:
        limit_s = self._config.supervision.idle_stop_s
        interval_s = min(MAX_IDLE_INTERVAL_S, limit_s / 4)
        timer: IdleTimer | None = None
        while limit_s:
            await asyncio.sleep(interval_s)
            if not self._backend.ready:
                timer = None
            elif timer is None:
                timer = IdleTimer(limit_s, monotonic)
            elif timer.due and timer.expires(await self._activity()):
                self._on_idle(limit_s)

    def _on_idle(self, limit_s: float) -> None:
        command = self._config.supervision.on_idle
        if command is None:
            raise Shutdown(EXIT_STOPPED, f"no work for {limit_s:g} s (IDLE_STOP_SECONDS): stopping everything")
        if self._idle_hook and self._idle_hook.alive:
            log.warning("no work for %g s, but ON_IDLE is still running", limit_s)
            return
        log.info("no work for %g s (IDLE_STOP_SECONDS): running ON_IDLE", limit_s)
        argv = ["/bin/sh", "-c", command]
        self._idle_hook = self._children.spawn(
            "ON_IDLE", argv, self._environ, kill_group_on_exit=False, stray_signals=signal.SIG_DFL
        )
        self._idle_hook.exited.add_done_callback(_report_hook_failure)
        if timeout_s := self._config.supervision.on_idle_timeout_s:
            timer = asyncio.get_running_loop().call_later(timeout_s, _end_hook, self._idle_hook, timeout_s)
            self._idle_hook.exited.add_done_callback(lambda _: timer.cancel())

    # Signals

    def _install_signal_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        for number in signals.STOP:
            loop.add_signal_handler(number, self._on_stop_signal, number)
        loop.add_signal_handler(signal.SIGCHLD, self._children.reap)
        signals.on_hangup(loop, self._on_hangup)

    def _on_stop_signal(self, number: signal.Signals) -> None:
        if self._exit_request.done():
            log.warning("%s again: ending at once", number.name)
            self._children.kill_all()
        self._request_exit(EXIT_STOPPED, f"{number.name}: stopping everything")

    def _on_hangup(self) -> None:
        """Have the gateway reload, and open llama-server's log again; stop everything if our terminal was closed."""
        if self._on_terminal and _terminal_closed():
            self._request_exit(EXIT_STOPPED, "the terminal was closed: stopping everything")
        self._boot_log.reopen()
        self._reload_pending = True
        self._forward_reload(self._gateway)

    def _forward_reload(self, service: Service) -> None:
        """Send SIGHUP once the gateway responds: it ignores the signal until it has installed its handler."""
        if service is self._gateway and self._reload_pending and service.up and service.child:
            self._reload_pending = False
            service.child.signal(signal.SIGHUP)

    # The end

    async def _stop_all(self) -> None:
        """Stop in the order of the traffic: the gateway drains first, the health server answers probes to the last."""
        self._notifier.stopping()
        self._publish()
        await self._publisher.settle()
        for child in (self._model_finder, self._idle_hook):
            if child:
                child.kill()
        drain_s = self._config.supervision.drain_timeout_s
        await self._stop(self._gateway.child, drain_s + DRAIN_MARGIN_S)
        await self._stop(self._backend.child, BACKEND_GRACE_S)
        self._backend.remove_socket()
        await self._stop(self._health.child, HEALTH_GRACE_S)
        self._children.kill_all()
        await self._children.sweep()

    async def _stop(self, child: Child | None, grace_s: float) -> None:
        if child and child.alive:
            await self._children.stop(child, grace_s)


def _listen_option(listener: socket.socket | None) -> list[str]:
    return [] if listener is None else ["--listen-fd", str(listener.fileno())]


def _report_hook_failure(exited: "asyncio.Future[int]") -> None:
    if exited.result():
        log.warning("ON_IDLE %s", exit_status.describe(exited.result()))


def _end_hook(hook: Child, timeout_s: float) -> None:
    log.warning("ON_IDLE has run for %g s (ON_IDLE_TIMEOUT): ending it", timeout_s)
    hook.kill()


def _terminal_closed() -> bool:
    try:
        os.tcgetpgrp(0)
    except OSError:
        return True
    return False


# The whole life


@dataclass(frozen=True)
class Prepared:
    """What is there before anything runs. `listener` is the one that systemd has opened for the gateway."""

    config: Config
    ports: Mapping[str, str]
    run_dir: RunDir
    boot_log: BootLog
    reserved: ExitStack
    listener: socket.socket | None

    def close(self) -> None:
        self.reserved.close()
        self.run_dir.remove()
        self.boot_log.close()


def prepare(environ: Mapping[str, str]) -> Prepared:
    """Check settings and machine, and make what all need. It may block. Raises ConfigError or StartupError."""
    config = load_config(environ)
    logs.setup("supervisor", config.log.level, config.log.format)
    setup_output_log(config.log.format)
    check_backend(config)
    check_tls(config)
    with ExitStack() as stack:
        boot_log = BootLog(config.log.dir / config.log.name, config.log.instance_id, datetime.now(timezone.utc))
        stack.callback(boot_log.close)
        try:
            run_dir = RunDir(config.backend.api_key)
        except OSError as error:
            raise StartupError(EXIT_SETTINGS, f"the run directory cannot be created: {error}") from None
        stack.callback(run_dir.remove)
        reserved = stack.enter_context(ExitStack())
        listener = take_listener(environ, os.getpid(), config)
        if listener is not None:
            reserved.enter_context(listener)
        ports = claim_ports(config, reserved, listener)
        if "PORT_BACKEND" in ports:
            config = config._replace(backend=config.backend._replace(port=int(ports["PORT_BACKEND"])))
        stack.pop_all()
        return Prepared(config, ports, run_dir, boot_log, reserved, listener)


async def serve(environ: Mapping[str, str]) -> int:
    """Boot, serve, stop; return the exit status. Raises ConfigError or StartupError."""
    stopped = asyncio.Event()
    for number in signals.STOP:
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    signals.release_stops()
    preparing = run_off_loop(lambda: prepare(environ))
    stop = asyncio.ensure_future(stopped.wait())
    work: list[asyncio.Future[Any]] = [preparing, stop]
    await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not await finishes_within(preparing, PREPARED_S):
        return EXIT_STOPPED
    prepared = preparing.result()
    try:
        if stopped.is_set():
            return EXIT_STOPPED
        return await Supervisor(prepared, without_manager(environ), Notifier(environ, os.getpid())).run()
    finally:
        await finishes_within(run_off_loop(prepared.close), CLOSED_S)


def main() -> int:
    """Serve until a reason to stop; log it, and return the exit status."""
    signals.hold_stops()
    try:
        status = asyncio.run(serve(os.environ))
        if status:
            log.error("%s", describe_remedy(status))
        return status
    except ConfigError as error:
        # The event loop has put the default actions in place, which process 1 has not.
        exit_on_stop_signals()
        for complaint in error.complaints:
            print(f"supervisor: error: {complaint}", file=sys.stderr)
        print(f"supervisor: {describe_remedy(EXIT_SETTINGS)}", file=sys.stderr)
        return EXIT_SETTINGS
    except StartupError as error:
        log.error("error: %s", error)
        log.error("%s", describe_remedy(error.status))
        return error.status
    finally:
        signals.ignore(*signals.STOP)
        _release_stdout()


def _release_stdout() -> None:
    """Flush stdout; if its reader has gone, replace it, since Python would exit with status 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
