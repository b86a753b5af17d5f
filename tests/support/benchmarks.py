"""Targets for the benchmark's client, and results for its reports.

The targets listen on a thread of their own, because the benchmark runs its own event loop.
"""

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bench.client import Sample
from bench.stats import Result, Run, overheads, summarize
from mock_backend import MockBackend, Settings
from support.boot import PATIENCE_S

QUICK = {"tokens_per_second": 0.0, "prompt_ms": 0.0, "poll_ms": 20.0}

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def served(handler: Handler) -> Iterator[str]:
    """Serve connections with the handler until the block ends. Yields the URL."""
    listening = threading.Event()
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = []

    async def serve() -> None:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        stop = asyncio.Event()
        started.append((asyncio.get_running_loop(), stop, server.sockets[0].getsockname()[1]))
        listening.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert listening.wait(PATIENCE_S)
    loop, stop, port = started[0]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@contextmanager
def mock(**settings: Any) -> Iterator[str]:
    """Serve a mock backend with these settings. Yields the URL."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await backend.serve_connection(reader, writer)

    backend = MockBackend(Settings(**{**QUICK, **settings}))
    with served(handler) as url:
        yield url


def scripted(*answers: bytes) -> Handler:
    """Return a handler that answers each request with the next bytes and closes after the last."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            writer.write(answer)
        writer.close()

    return handler


def make_run(
    target: str, number: int, first_s: float, *, tokens: int | None = 10, error: str = "", concurrency: int = 1
) -> Run:
    """Return a run of two equal samples."""
    sample = Sample(
        error, total_s=first_s * 10, first_s=first_s, gaps_s=(0.01, 0.03), tokens=tokens, predicted_per_second=40.0
    )
    return Run("chat", concurrency, number, target, 2.0, (sample, sample))


def make_result(*, both: bool = True, error: str = "", facts: dict[str, object] | None = None) -> Result:
    """Return a result of two rounds at two concurrencies, of both targets or of the direct one alone."""
    runs = []
    for concurrency in (1, 4):
        for number in (1, 2):
            runs.append(make_run("direct", number, 0.1, error=error, concurrency=concurrency))
            if both:
                runs.append(make_run("gateway", number, 0.102, error=error, concurrency=concurrency))
    found = facts or {"model": "tiny"}
    return Result(found, tuple(runs), tuple(summarize(runs)), tuple(overheads(runs)), ("a note",))
