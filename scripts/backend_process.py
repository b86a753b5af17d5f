"""One life of llama-server after another: started, its output kept, awaited until ready, watched until it ends."""

import asyncio
import logging
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic

import exit_words
import logs
from boot_log import BootLog, Lines
from config import Config
from probes import Activity, Address, ask
from processes import Child, Children
from watchdog import Silence, Stall, slots_patience_s

NAME = "llama-server"
LOADING_POLL_S = 0.1
LONGEST_TICK_S = 5.0
GRACE_S = 1.5
TAIL_LINES = 60
PIPE_BYTES = 1 << 20
READ_BYTES = 1 << 16
PROTECTED_PATH = "/props"
LEVELS = {"E": logging.ERROR, "W": logging.WARNING, "D": logging.DEBUG}
_LEVEL = re.compile(r"[0-9.]+ ([DIWE]) ")

log = logging.getLogger(__name__)
output_log = logging.getLogger(NAME)


def setup_output_log(fmt: str) -> None:
    """Let llama-server's lines come out in our own format, under its own name."""
    output_log.handlers[:] = [logs.LineHandler(NAME, fmt)]
    output_log.propagate = False


class Output:
    """llama-server's standard output and error, read here and nowhere between, so that its pid is its own."""

    def __init__(self, boot_log: BootLog) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._lines = Lines(self._take)
        self._boot_log = boot_log
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        asyncio.get_running_loop().add_reader(self._read_fd, self._read)

    def started(self, child: Child) -> None:
        """Leave the writing end to the child; what it wrote last is read before anyone hears of its exit."""
        os.close(self.write_fd)
        child.exited.add_done_callback(lambda _: self._finish())

    def abandon(self) -> None:
        os.close(self.write_fd)
        self._finish()

    def _take(self, line: str) -> None:
        self.tail.append(line)
        match = _LEVEL.match(line)
        output_log.log(LEVELS.get(match[1] if match else "", logging.INFO), "%s", line)

    def _read(self) -> bool:
        """Take what there is; tells whether there may be more."""
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

    def _finish(self) -> None:
        for _ in range(PIPE_BYTES // READ_BYTES):
            if not self._read():
                break
        self._lines.end()
        asyncio.get_running_loop().remove_reader(self._read_fd)
        os.close(self._read_fd)


class Backend:
    """llama-server as the supervisor sees it. `changed` is called when it starts to load and when it is ready."""

    def __init__(
        self,
        config: Config,
        children: Children,
        boot_log: BootLog,
        key: str,
        changed: Callable[[], None],
        activity: Callable[[], Awaitable[Activity | None]],
    ) -> None:
        self.child: Child | None = None
        self.ready = False
        self._config = config
        self._children = children
        self._boot_log = boot_log
        self._key = key
        self._changed = changed
        self._activity = activity
        self._address = Address(config.backend.host, config.backend.port)
        self._wedge_s = config.supervision.wedge_timeout_s
        self._health_s = config.timeouts.health_s

    async def live(self, argv: Sequence[str], env: Mapping[str, str]) -> str:
        """Live one life; return in words why it ended. Raises OSError where it cannot be executed."""
        oom_kills, output = exit_words.oom_kills(), Output(self._boot_log)
        try:
            child = self._children.spawn(NAME, argv, env, output=output.write_fd)
        except OSError:
            output.abandon()
            raise
        output.started(child)
        self.child = child
        log.info("%s started, pid %d", NAME, child.pid)
        self._changed()
        try:
            wrong = await self._watch(child)
        finally:
            self.ready = False
        if wrong:
            log.error("%s %s: stopping it", NAME, wrong)
            await self._children.stop(child, GRACE_S)
            return wrong
        return exit_words.describe(await child.end(), output.tail, exit_words.oom_kills() > oom_kills)

    # Each of these returns what is wrong, or nothing when the process has ended by itself

    async def _watch(self, child: Child) -> str:
        wrong = await self._await_ready(child)
        if wrong or not child.alive:
            return wrong
        self.ready = True
        self._changed()
        await self._check_key()
        return await self._keep_watch(child)

    async def _await_ready(self, child: Child) -> str:
        """Wait as long as the process lives; by the clock only where MODEL_LOAD_TIMEOUT says so."""
        started_s, limit_s = monotonic(), self._config.model.load_timeout_s
        while child.alive:
            answer = await ask(self._address, "/health", self._health_s)
            taken_s = monotonic() - started_s
            if answer and answer.status == 200:
                log.info("%s is ready after %.1f s", NAME, taken_s)
                return ""
            if limit_s and taken_s >= limit_s:
                return f"did not load within {limit_s:g} s (MODEL_LOAD_TIMEOUT)"
            await child.ended_within(LOADING_POLL_S)
        return ""

    async def _check_key(self) -> None:
        """Ask a route that is not public, without the key: only that tells whether the key is enforced."""
        answer = await ask(self._address, PROTECTED_PATH, self._health_s)
        if answer and answer.status == 200:
            log.error("%s answers without its key: whoever reaches its port gets past the gateway", NAME)
        elif answer and answer.status == 401:
            log.info("%s asks for its key, as it should", NAME)

    async def _keep_watch(self, child: Child) -> str:
        silence, stall = Silence(self._wedge_s, monotonic), Stall(self._wedge_s, monotonic)
        tick_s = min(LONGEST_TICK_S, self._wedge_s / 4)
        while not await child.ended_within(tick_s):
            if await ask(self._address, "/health", self._health_s):
                silence.heard()
            if silence.wedged():
                return f"is wedged: /health has not answered for {self._wedge_s:g} s (WEDGE_TIMEOUT)"
            if stall.possible() and stall.suspected(await self._activity()) and not await self._slots_answer():
                return f"is wedged: no byte for {self._wedge_s:g} s (WEDGE_TIMEOUT) and /slots does not answer"
        return ""

    async def _slots_answer(self) -> bool:
        patience_s = slots_patience_s(self._wedge_s, self._health_s)
        return await ask(self._address, "/slots", patience_s, self._key) is not None
