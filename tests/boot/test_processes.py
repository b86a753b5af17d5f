"""Child processes: their exits, their process groups, their end; all collected in one place."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from boot.processes import PR_SET_CHILD_SUBREAPER, Child, Children, Prctl, find_prctl
from support.boot import PATIENCE_S, waitpid_of_this_thread
from support.paths import SCRIPTS

ENV = {"PATH": os.environ["PATH"]}
# The child kills its parent between the fork and its request to die with it.
PARENT_DIES_EARLY = """
import asyncio, os, signal, sys
sys.path.insert(0, sys.argv[1])
from boot.processes import PR_SET_PDEATHSIG, Children

def prctl(option, value):
    if option == PR_SET_PDEATHSIG:
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            pass

async def main():
    Children(lambda: prctl).spawn("sh", ["sh", "-c", "echo the child runs"], dict(os.environ))

asyncio.run(main())
"""


def with_children(
    scenario: Callable[[Children], Awaitable[None]], find_prctl: Callable[[], Prctl | None] = find_prctl
) -> None:
    async def run() -> None:
        children = Children(find_prctl, waitpid_of_this_thread)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, children.reap)
        try:
            await scenario(children)
        finally:
            children.kill_all()
            await children.sweep()
            loop.remove_signal_handler(signal.SIGCHLD)
            if prctl := find_prctl():
                prctl(PR_SET_CHILD_SUBREAPER, 0)

    asyncio.run(run())


def sh(children: Children, script: str) -> Child:
    return children.spawn("sh", ["sh", "-c", script], ENV)


@pytest.mark.parametrize("prctl", [find_prctl, lambda: None])
def test_a_child_gets_its_stack_limit(tmp_path: Path, prctl: Callable[[], Prctl | None]) -> None:
    limit = 64 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]

    async def scenario(children: Children) -> None:
        script = f"ulimit -s > {tmp_path}/limit"
        await children.spawn("sh", ["sh", "-c", script], ENV, stack_limit=limit).wait()

    with_children(scenario, prctl)
    assert (tmp_path / "limit").read_text() == "65536\n"


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9), ("kill -4 $$", -4)])
def test_an_exit_is_reported_with_its_status_or_signal(script: str, status: int) -> None:
    async def scenario(children: Children) -> None:
        child = sh(children, script)
        assert await child.wait() == status
        assert not child.alive
        child.signal(signal.SIGTERM)
        assert await child.exits_within(0)

    with_children(scenario)


def test_a_cancelled_waiter_does_not_disturb_the_others() -> None:
    async def scenario(children: Children) -> None:
        child = sh(children, "exec sleep 600")
        waiter = asyncio.ensure_future(child.wait())
        assert not await child.exits_within(0)
        waiter.cancel()
        await asyncio.wait([waiter])
        assert child.alive
        await children.stop(child, 20)
        assert child.exited.result() == -signal.SIGTERM

    with_children(scenario)


def test_a_child_that_ignores_sigterm_is_killed() -> None:
    async def scenario(children: Children) -> None:
        read_fd, write_fd = os.pipe()
        child = children.spawn("sh", ["sh", "-c", "trap '' TERM; echo up; sleep 600"], ENV, output=write_fd)
        os.close(write_fd)
        assert os.read(read_fd, 10) == b"up\n"
        os.close(read_fd)
        await children.stop(child, 0.05, 20)
        assert child.exited.result() == -signal.SIGKILL

    with_children(scenario)


@pytest.mark.parametrize("kill_group", [True, False])
def test_the_process_group_is_killed_at_exit_if_requested(kill_group: bool) -> None:
    async def scenario(children: Children) -> None:
        read_fd, write_fd = os.pipe()
        argv = ["sh", "-c", "sleep 600 & echo $!"]
        child = children.spawn("sh", argv, ENV, output=write_fd, kill_group_on_exit=kill_group)
        os.close(write_fd)
        await child.wait()
        grandchild = int(os.read(read_fd, 20))
        if not kill_group:
            os.kill(grandchild, 0)
            children.kill_all()
            await children.sweep()
        # The end of the pipe proves that no process holds it.
        assert os.read(read_fd, 1) == b""
        os.close(read_fd)

    with_children(scenario)


def test_a_child_has_its_own_session() -> None:
    async def scenario(children: Children) -> None:
        child = sh(children, "exec sleep 600")
        assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
        assert os.getsid(child.pid) == child.pid

    with_children(scenario)


def test_a_program_that_cannot_be_executed_is_an_os_error() -> None:
    async def scenario(children: Children) -> None:
        with pytest.raises(FileNotFoundError):
            children.spawn("none", ["/none"], ENV)

    with_children(scenario)


def test_orphans_are_swept() -> None:
    async def scenario(children: Children) -> None:
        read_fd, write_fd = os.pipe()
        child = children.spawn("sh", ["sh", "-c", "setsid sleep 600 &"], ENV, output=write_fd)
        os.close(write_fd)
        assert await child.wait() == 0
        await children.sweep()
        assert os.read(read_fd, 1) == b""
        os.close(read_fd)

    with_children(scenario)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_a_child_whose_parent_dies_before_its_request_to_die_with_it_ends_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT_DIES_EARLY, str(SCRIPTS)], capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, b"", b"")


def test_a_system_without_prctl_has_children_too() -> None:
    async def scenario(children: Children) -> None:
        assert await sh(children, "exit 7").wait() == 7

    with_children(scenario, lambda: None)
