"""Child processes, managed as PID 1 must: none outlives the supervisor, none stays a zombie, every exit is reported.

All of it runs on the event loop's thread. Nothing else in the process may wait for children (no asyncio subprocess, no
`Popen.wait`): every exit, also that of an adopted orphan, is collected in one place.
"""

import asyncio
import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from core import signals

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_SWEEPS = 50
KILLED_S = 0.5
Prctl = Callable[[int, int], object]
Waitpid = Callable[[int, int], tuple[int, int]]

log = logging.getLogger(__name__)


def find_prctl() -> Prctl | None:
    """Return prctl(2), or None if the system has none. Call it before any fork: a child must not load libraries."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return lambda option, value: prctl(option, value, 0, 0, 0)


class Child:
    """A child process. `exited` gets its exit status (negative: a signal), never an exception."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", kill_group_on_exit: bool) -> None:
        self.name = name
        self.pid = process.pid
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._process = process
        self._kill_group_on_exit = kill_group_on_exit

    @property
    def alive(self) -> bool:
        return not self.exited.done()

    def signal(self, number: int) -> None:
        """Send a signal to the process if it is alive."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process group: the process, and the processes that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for the exit status. Cancelling one waiter does not disturb the others."""
        return await asyncio.shield(self.exited)

    async def exits_within(self, seconds: float) -> bool:
        """Wait for the exit, at most so long; return whether the process has exited."""
        await asyncio.wait([self.exited], timeout=seconds)
        return not self.alive

    def set_exited(self, status: int) -> None:
        """Note the exit status that `Children.reap` has collected."""
        self._process.returncode = status
        if self._kill_group_on_exit:
            self.kill()
        self.exited.set_result(status)


class Children:
    """The supervisor's children. Create it inside the running loop, and call `reap` at each SIGCHLD.

    `find_prctl` and `waitpid` are parameters for tests.
    """

    def __init__(self, find_prctl: Callable[[], Prctl | None] = find_prctl, waitpid: Waitpid = os.waitpid) -> None:
        self._by_pid: dict[int, Child] = {}
        self._waitpid = waitpid
        self._prctl = find_prctl()
        if self._prctl:
            self._prctl(PR_SET_CHILD_SUBREAPER, 1)

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        output: int | None = None,
        pass_fds: Sequence[int] = (),
        kill_group_on_exit: bool = True,
        stack_limit: tuple[int, int] | None = None,
        stray_signals: int = signal.SIG_IGN,
    ) -> Child:
        """Start a process in its own session, so that a terminal's Ctrl-C reaches the supervisor alone.

        `output` is the file descriptor for its standard output and error. The process inherits `pass_fds`.
        `kill_group_on_exit`: when it exits, kill the processes that it has started. `stray_signals`: how it begins to
        treat `signals.STRAY`; one that is ignored cannot end it before it has installed its handlers. `stack_limit` is
        its soft and hard RLIMIT_STACK; None: as ours. Raises OSError if it cannot be executed.
        """
        # argv[0] runs directly, without a shell or a tee in between, so the child's pid is the program's.
        process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds,
            start_new_session=True,
            preexec_fn=self._before_exec(os.getpid(), stray_signals, stack_limit),  # noqa: PLW1509 - it takes no lock
        )
        child = Child(name, process, kill_group_on_exit)
        self._by_pid[child.pid] = child
        return child

    def _before_exec(self, parent: int, stray_signals: int, stack_limit: tuple[int, int] | None) -> Callable[[], None]:
        prctl = self._prctl

        def run() -> None:
            for number in signals.STRAY:
                signal.signal(number, stray_signals)
            if stack_limit is not None:
                resource.setrlimit(resource.RLIMIT_STACK, stack_limit)
            if prctl is not None:
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                # The parent may have died before the call.
                if os.getppid() != parent:
                    os._exit(1)

        return run

    def reap(self) -> None:
        """Collect the exit of every process that has ended: children and adopted orphans."""
        with suppress(ChildProcessError):
            while True:
                pid, status = self._waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                child = self._by_pid.pop(pid, None)
                if child:
                    child.set_exited(os.waitstatus_to_exitcode(status))

    async def stop(self, child: Child, grace_s: float, killed_s: float = KILLED_S) -> None:
        """Send SIGTERM, and SIGKILL if the child is alive after `grace_s`, at once if that is 0.

        Then wait at most `killed_s`.
        """
        if grace_s:
            child.signal(signal.SIGTERM)
            if await child.exits_within(grace_s):
                return
        child.kill()
        if not await child.exits_within(killed_s):
            log.error("the %s was killed, but does not end: the kernel waits for a volume or a driver", child.name)

    def kill_all(self) -> None:
        """Kill all children and their process groups."""
        for child in list(self._by_pid.values()):
            child.kill()

    async def sweep(self) -> None:
        """Kill and collect all remaining children and orphans; give up on one that is in an uninterruptible wait."""
        for _ in range(MAX_SWEEPS):
            pids = _child_pids()
            for pid in pids:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            if not pids:
                return
            await asyncio.sleep(0.01)


def _child_pids() -> list[int]:
    """Return the pids of this process's children; none if the kernel has no such list."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []
