"""llama-server as a process: started, its output logged, polled until ready, watched until it ends.

It is ready only while it listens itself, refuses requests without its key and accepts its key: any local user can take
a port that is free for a moment, and would get prompts and the key.
"""

import asyncio
import logging
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from time import monotonic

from boot import exit_status
from boot.boot_log import BootLog, LineSplitter
from boot.probes import Activity, Address, probe
from boot.processes import Child, Children
from boot.router_client import RouterClient
from boot.router_watch import RouterWatch
from boot.stack_limit import find_limit
from boot.stuck_loop import StuckLoop
from boot.watchdog import SilenceTimer, StallDetector, slots_timeout_s
from config.settings import Config
from core import logs
from core.listener import UNREPORTED, find_listener, is_socket_path

NAME = "llama-server"
LOADING_POLL_S = 0.1
MAX_WATCH_INTERVAL_S = 2.0
GRACE_S = 1.5
WEDGED = "is wedged"
KILLED_S = 30.0  # to release all of its memory
TAIL_LINES = 60
PIPE_BYTES = 1 << 20
READ_BYTES = 1 << 16
PROTECTED_PATH = "/props"
# One response may come from a process that dies before its listener is looked for, but not so many.
MANY_FOREIGN_RESPONSES = 3
LEVELS = {"E": logging.ERROR, "W": logging.WARNING, "D": logging.DEBUG}
_CHILD = re.compile(r"\[ *[0-9]+\] ")  # how a router's line of a model begins, which explains no end of the router
_LEVEL = re.compile(r"(?:\[ *[0-9]+\] )?[0-9.]+ ([DIWE]) ")

log = logging.getLogger(__name__)
output_log = logging.getLogger(NAME)


def setup_output_log(fmt: str) -> None:
    """Log llama-server's lines in our own format (LOG_FORMAT), with its name as the process."""
    logs.setup_child(NAME, fmt)


class Output:
    """A pipe for llama-server's standard output and error. What arrives goes to the boot log and to our own log."""

    def __init__(self, boot_log: BootLog, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._lines = LineSplitter(self._log_line)
        self._boot_log = boot_log
        self._is_finished = False
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        asyncio.get_running_loop().add_reader(self._read_fd, self._read)

    def attach(self, child: Child) -> None:
        """Leave the writing end to the child."""
        os.close(self.write_fd)
        child.exited.add_done_callback(lambda _: self.finish())

    def close(self) -> None:
        """Close both ends: there is no child."""
        os.close(self.write_fd)
        self.finish()

    def _log_line(self, line: str) -> None:
        if not _CHILD.match(line):
            self.tail.append(line)
        match = _LEVEL.match(line)
        output_log.log(LEVELS.get(match[1] if match else "", logging.INFO), "%s", line)
        self._on_line(line)

    def _read(self) -> bool:
        """Read what is there; return whether there may be more."""
        try:
            data = os.read(self._read_fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(self._read_fd)
            return False
        self._boot_log.write(data)
        self._lines.feed(data)
        return True

    def finish(self) -> None:
        """Read the last output of a process that has ended, unless that has been done."""
        if self._is_finished:
            return
        self._is_finished = True
        # Bounded: a process that llama-server has started may still hold the pipe and write.
        for _ in range(PIPE_BYTES // READ_BYTES):
            if not self._read():
                break
        self._lines.close()
        asyncio.get_running_loop().remove_reader(self._read_fd)
        os.close(self._read_fd)


class BackendProcess:
    """llama-server: `child` is the process that was started last, `ready` is true while it can serve.

    `was_ready`: the last process has been ready. `last_lines`: what it printed last.

    `listener` is the identity of its listener (see core.listener), None while it is not ready. `on_change` is called
    when a process has started and when it is ready. `activity` returns the gateway's load. `clock` returns monotonic
    seconds.
    """

    def __init__(
        self,
        config: Config,
        children: Children,
        boot_log: BootLog,
        key: str,
        on_change: Callable[[], None],
        activity: Callable[[], Awaitable[Activity | None]],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.child: Child | None = None
        self.was_ready = False
        self.last_lines: deque[str] = deque()
        self.listener: int | None = None
        self._own_listener: int | None = None  # it listens with its key, but a router may not be ready yet
        self._foreign_responses = 0
        self._config = config
        self._children = children
        self._boot_log = boot_log
        self._key = key
        self._on_change = on_change
        self._activity = activity
        self._clock = clock
        self._address = Address(config.backend.host, config.backend.port)
        self._wedge_s = config.supervision.wedge_timeout_s
        self._health_s = config.timeouts.health_s
        self._client = RouterClient(self._address, key, self._health_s)
        self._router = RouterWatch(config, self._client, on_change, activity) if config.router.enabled else None

    @property
    def ready(self) -> bool:
        return self.listener is not None

    @property
    def detail(self) -> str:
        """Return what an operator should know of a router's models, or ""."""
        return self._router.detail if self._router else ""

    @property
    def model_failures(self) -> Mapping[str, str]:
        """Return why each model of a router that has failed is not loaded, by its name."""
        return self._router.failures if self._router else {}

    async def run(self, argv: Sequence[str], env: Mapping[str, str]) -> str:
        """Run the process until it ends or must be stopped; return the reason, as a sentence without its subject.

        Raises OSError if it cannot be executed.
        """
        self.remove_socket()
        oom_kills, output = exit_status.oom_kills(), Output(self._boot_log, self._read_line)
        try:
            child = self._children.spawn(NAME, argv, env, output=output.write_fd, stack_limit=find_limit())
        except OSError:
            output.close()
            raise
        output.attach(child)
        self.child, self.was_ready, self.last_lines = child, False, output.tail
        log.info("%s started, pid %d", NAME, child.pid)
        self._on_change()
        try:
            reason = await self._watch(child)
        finally:
            self.listener = self._own_listener = None
            if self._router:
                self._router.end()
        if reason:
            log.error("%s %s: stopping it", NAME, reason)
            # While a wedged process ended in order, it would seem to accept connections still.
            await self._children.stop(child, 0 if reason.startswith(WEDGED) else GRACE_S, KILLED_S)
            return reason
        status = await child.wait()
        output.finish()  # its callback may be due only after this
        return exit_status.explain(status, output.tail, exit_status.oom_kills() > oom_kills)

    def _read_line(self, line: str) -> None:
        if self._router:
            self._router.output.read_line(line)

    def remove_socket(self) -> None:
        """Remove the Unix socket that a process has left: llama-server does not, and cannot listen at it again."""
        if is_socket_path(self._address.host):
            with suppress(OSError):
                os.unlink(self._address.host)

    # Each of these returns the reason to stop the process, or "" if the process has ended

    async def _watch(self, child: Child) -> str:
        reason = await self._await_ready(child)
        if not reason and child.alive and self._router:
            self._client.listener = self._own_listener
            self.last_lines.clear()  # the router has looked into all files, also into those that nobody loads
            reason = await self._router.preload(lambda: child.alive)
        if reason or not child.alive:
            return reason
        self.listener, self.was_ready = self._own_listener, True
        self._on_change()
        return await self._watch_health(child)

    async def _await_ready(self, child: Child) -> str:
        """Wait for as long as the process lives, and set `listener`; only MODEL_LOAD_TIMEOUT sets a limit."""
        started_s, limit_s = self._clock(), self._config.model.load_timeout_s
        self._foreign_responses = 0
        while child.alive:
            reason = await self._check_ready(child.pid)
            elapsed_s = self._clock() - started_s
            if reason == "":
                log.info("%s is ready after %.1f s", NAME, elapsed_s)
                log.info("%s requires its key", NAME)
                self._warn_if_unverified()
            if reason is not None:
                return reason
            if limit_s and elapsed_s >= limit_s:
                return f"did not load within {limit_s:g} s (MODEL_LOAD_TIMEOUT)"
            await child.exits_within(LOADING_POLL_S)
        return ""

    async def _check_ready(self, pid: int) -> str | None:
        """Return "" and set `listener` if the process can serve; None if it cannot yet; else the reason to stop it."""
        response = await probe(self._address, "/health", self._health_s)
        if response is None or response.status != 200:
            return None
        listener = find_listener(self._address.host, self._address.port, pid)
        if listener is None:
            self._count_foreign_response()
            return None
        reason = await self._check_key(listener)
        if reason == "":
            self._own_listener = listener
        return reason

    def _warn_if_unverified(self) -> None:
        if self._own_listener == UNREPORTED and not is_socket_path(self._address.host):
            log.warning(
                "this system does not report which process listens on a port: use a Unix socket for %s (BACKEND_HOST)",
                NAME,
            )

    def _count_foreign_response(self) -> None:
        self._foreign_responses += 1
        if self._foreign_responses == MANY_FOREIGN_RESPONSES:
            log.error("another process listens at the address of %s (PORT_BACKEND, BACKEND_HOST)", NAME)

    async def _check_key(self, listener: int) -> str | None:
        """Return "" if a protected route (/health is public) refuses requests without the key and accepts the key.

        None: there was no such response yet.
        """
        without = await probe(self._address, PROTECTED_PATH, self._health_s, listener=listener)
        if without is None or without.status >= 500:
            return None
        if without.status != 401:
            return "answers without its key: clients that reach its port bypass the gateway"
        response = await probe(self._address, PROTECTED_PATH, self._health_s, self._key, listener=listener)
        if response is None or response.status >= 500:
            return None
        return "refuses its own key" if response.status in (401, 403) else ""

    async def _watch_health(self, child: Child) -> str:
        silence, stall = SilenceTimer(self._wedge_s, self._clock), StallDetector(self._wedge_s, self._clock)
        interval_s = min(MAX_WATCH_INTERVAL_S, self._wedge_s / 4)
        loop = StuckLoop(self._config, child.pid, lambda: child.alive, self._slots_respond_within, self._activity)
        while not await child.exits_within(interval_s):
            if self._router is None and loop.is_suspect() and (reason := await loop.find()):
                return f"{WEDGED}: {reason}"
            if await probe(self._address, "/health", self._health_s, listener=self.listener):
                silence.reset()
            if silence.expired:
                return f"{WEDGED}: /health has not answered for {self._wedge_s:g} s (WEDGE_TIMEOUT)"
            if self._router is not None:
                await self._router.look(child.pid)
            elif stall.due and stall.suspects(await self._activity()) and not await self._slots_respond():
                return f"{WEDGED}: no byte for {self._wedge_s:g} s (WEDGE_TIMEOUT) and /slots does not answer"
        return ""

    async def _slots_respond_within(self, timeout_s: float) -> bool:
        return await probe(self._address, "/slots", timeout_s, self._key, listener=self.listener) is not None

    async def _slots_respond(self) -> bool:
        return await self._slots_respond_within(slots_timeout_s(self._wedge_s, self._health_s))
