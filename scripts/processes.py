"""Child processes as PID 1 must keep them: none outlives the supervisor, no zombie stays, every exit is told.

All of it happens on the event loop's thread. Nobody else may wait for children here (no asyncio subprocess, no
`Popen.wait`), since every exit is collected in one place, strangers' included.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LAST_SWEEPS = 50
Prctl = Callable[[int, int], object]


def _find_prctl() -> Prctl | None:
    """Look prctl up before any fork: a child of a fork must not load libraries."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return lambda option, value: prctl(option, value, 0, 0, 0)


class Child:
    """A running process. `exited` gets its exit status, negative for a signal; it is never an exception."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", ends_family: bool) -> None:
        self.name = name
        self._ends_family = ends_family
        self.pid = process.pid
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._process = process

    @property
    def alive(self) -> bool:
        return not self.exited.done()

    def signal(self, number: int) -> None:
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and what it has started itself, which shares its process group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def end(self) -> int:
        """Wait for the exit status; a waiter that is cancelled takes nothing from the others."""
        return await asyncio.shield(self.exited)

    async def ended_within(self, seconds: float) -> bool:
        await asyncio.wait([self.exited], timeout=seconds)
        return not self.alive

    def ended(self, status: int) -> None:
        self._process.returncode = status
        if self._ends_family:
            self.kill()
        self.exited.set_result(status)


class Children:
    """The supervisor's children. Make one inside the running loop; `reap` belongs to SIGCHLD."""

    def __init__(self) -> None:
        self._by_pid: dict[int, Child] = {}
        self._prctl = _find_prctl()
        if self._prctl:
            self._prctl(PR_SET_CHILD_SUBREAPER, 1)

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        output: int | None = None,
        ends_family: bool = True,
    ) -> Child:
        """Start a process in a session of its own, so that a terminal's Ctrl-C reaches the supervisor alone.

        `output` takes both its standard output and error. With `ends_family`, what it has started ends with it. Raises
        OSError where it cannot be executed.
        """
        # The program that runs is argv[0] itself, without a shell or a tee between: its pid is the child's own.
        process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=self._die_with_parent(os.getpid()),  # noqa: PLW1509 - there are no threads here
        )
        child = Child(name, process, ends_family)
        self._by_pid[child.pid] = child
        return child

    def _die_with_parent(self, parent: int) -> Callable[[], None] | None:
        prctl = self._prctl
        if prctl is None:
            return None

        def run() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        return run

    def reap(self) -> None:
        """Collect every exit there is: children, and what they left behind."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                child = self._by_pid.pop(pid, None)
                if child:
                    child.ended(os.waitstatus_to_exitcode(status))

    async def stop(self, child: Child, grace_s: float) -> int:
        """Ask a child to end, and after `grace_s` make it; return its exit status."""
        child.signal(signal.SIGTERM)
        done, _ = await asyncio.wait([child.exited], timeout=grace_s)
        if not done:
            child.kill()
        return await child.end()

    def kill_all(self) -> None:
        for child in list(self._by_pid.values()):
            child.kill()

    async def sweep(self) -> None:
        """Kill whatever is left of children and their orphans; bounded, as one in the kernel's hands may stay."""
        for _ in range(LAST_SWEEPS):
            left = _children_of_this_process()
            for pid in left:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            if not left:
                return
            await asyncio.sleep(0.01)


def _children_of_this_process() -> list[int]:
    """The kernel's list; empty where the system has none."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []
