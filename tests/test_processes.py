"""Children: their exits, their families, their end; collected in one place."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import pytest

from processes import Child, Children

ENV = {"PATH": os.environ["PATH"]}


def with_children(play: Callable[[Children], Awaitable[None]]) -> None:
    async def run() -> None:
        children = Children()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, children.reap)
        try:
            await play(children)
        finally:
            children.kill_all()
            await children.sweep()
            loop.remove_signal_handler(signal.SIGCHLD)

    asyncio.run(run())


def sh(children: Children, script: str, **how: bool) -> Child:
    return children.spawn("sh", ["sh", "-c", script], ENV, **how)


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9), ("kill -4 $$", -4)])
def test_an_exit_is_told_as_it_was(script: str, status: int) -> None:
    async def play(children: Children) -> None:
        child = sh(children, script)
        assert await child.end() == status
        assert not child.alive
        child.signal(signal.SIGTERM)
        assert await child.ended_within(0)

    with_children(play)


def test_a_cancelled_waiter_takes_the_exit_from_nobody() -> None:
    async def play(children: Children) -> None:
        child = sh(children, "exec sleep 600")
        waiter = asyncio.ensure_future(child.end())
        assert not await child.ended_within(0)
        waiter.cancel()
        await asyncio.wait([waiter])
        assert child.alive
        assert await children.stop(child, 20) == -signal.SIGTERM

    with_children(play)


def test_what_ignores_sigterm_is_killed() -> None:
    async def play(children: Children) -> None:
        read_fd, write_fd = os.pipe()
        child = children.spawn("sh", ["sh", "-c", "trap '' TERM; echo up; sleep 600"], ENV, output=write_fd)
        os.close(write_fd)
        assert os.read(read_fd, 10) == b"up\n"
        os.close(read_fd)
        assert await children.stop(child, 0.05) == -signal.SIGKILL

    with_children(play)


@pytest.mark.parametrize("ends_family", [True, False])
def test_a_family_ends_with_its_head_if_it_shall(ends_family: bool) -> None:
    async def play(children: Children) -> None:
        read_fd, write_fd = os.pipe()
        child = children.spawn("sh", ["sh", "-c", "sleep 600 & echo $!"], ENV, output=write_fd, ends_family=ends_family)
        os.close(write_fd)
        await child.end()
        grandchild = int(os.read(read_fd, 20))
        if not ends_family:
            os.kill(grandchild, 0)
            children.kill_all()
            await children.sweep()
        # The pipe's end is the proof that nobody holds it any more.
        assert os.read(read_fd, 1) == b""
        os.close(read_fd)

    with_children(play)


def test_a_session_of_its_own_keeps_ctrl_c_out() -> None:
    async def play(children: Children) -> None:
        child = sh(children, "exec sleep 600")
        assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
        assert os.getsid(child.pid) == child.pid

    with_children(play)


def test_what_cannot_be_executed_is_an_os_error() -> None:
    async def play(children: Children) -> None:
        with pytest.raises(FileNotFoundError):
            children.spawn("none", ["/none"], ENV)

    with_children(play)


def test_orphans_are_swept() -> None:
    async def play(children: Children) -> None:
        read_fd, write_fd = os.pipe()
        child = children.spawn("sh", ["sh", "-c", "setsid sleep 600 &"], ENV, output=write_fd)
        os.close(write_fd)
        assert await child.end() == 0
        await children.sweep()
        assert os.read(read_fd, 1) == b""
        os.close(read_fd)

    with_children(play)


def test_a_child_whose_parent_died_before_it_could_ask_ends_itself() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("Linux only")
    ask = Children.__new__(Children)
    ask._prctl = lambda option, value: None
    prepare = ask._die_with_parent(os.getpid() + 1)
    assert prepare is not None
    pid = os.fork()
    if pid == 0:
        prepare()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_a_system_without_prctl_has_no_such_call() -> None:
    ask = Children.__new__(Children)
    ask._prctl = None
    assert ask._die_with_parent(1) is None
