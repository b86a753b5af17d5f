"""A backend that answers in llama-server's wire format, or breaks off: for what a real server does not do on demand."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from mock.endpoints import GENERATING, GenerationEndpoint
from mock.generation import Generation
from mock.templates import TEMPLATES, fill, parse_templates, to_events
from support.backend import LAST_CHUNK, STREAM_HEAD, Backend, Call, Step, answer, chunk, close, reset, send, stall

T = TypeVar("T")
Choose = Callable[[Call], tuple[Step, ...]]

TEXT = "one two three four five six seven eight"
WORDS = TEXT.split()
CUT_AFTER = 3
PARSED = parse_templates(TEMPLATES)


class LoopThread:
    """An event loop in a thread of its own, for backends that several threads start and stop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def call(self, function: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(function)

    def close(self) -> None:
        self.call(self.loop.stop)
        self._thread.join()
        self.loop.close()


@contextmanager
def scripted(loop: LoopThread, choose: Choose) -> Iterator[Backend]:
    async def start() -> Backend:
        backend = Backend(choose=choose)
        await backend.listen()
        return backend

    backend = loop.run(start())
    try:
        yield backend
    finally:
        loop.run(backend.stop())


def route_of(call: Call) -> GenerationEndpoint:
    return GENERATING[call.target.partition(b"?")[0].decode()]


def streams(call: Call) -> bool:
    return json.loads(call.body).get("stream") is True


def generation(route: GenerationEndpoint, words: list[str]) -> Generation:
    """An answer of these words, as far as it has come."""
    made = Generation("", "tiny", 1, len(WORDS), route.finished)
    made.words = [word if position == 0 else f" {word}" for position, word in enumerate(words)]
    return made


def delta(route: GenerationEndpoint, position: int) -> bytes:
    """The events that a word brings; the first one brings the stream's opening, too."""
    wire = PARSED[route.answer]
    opening = wire.get("opening", []) if position == 0 else []
    return to_events([*opening, *wire["delta"]], generation(route, WORDS[: position + 1]))


def closing(route: GenerationEndpoint) -> bytes:
    wire = PARSED[route.answer]
    return to_events([*wire.get("usage", wire["closing"]), *wire.get("end", [])], generation(route, WORDS))


def whole(call: Call) -> bytes:
    route = route_of(call)
    return answer(fill(PARSED[route.answer]["whole"][0], generation(route, WORDS)).encode())


def answers(call: Call) -> tuple[Step, ...]:
    """TEXT, streamed or whole."""
    if not streams(call):
        return (send(whole(call)),)
    route = route_of(call)
    deltas = [send(chunk(delta(route, position))) for position in range(len(WORDS))]
    return (send(STREAM_HEAD), *deltas, send(chunk(closing(route)) + LAST_CHUNK))


def breaks_off(call: Call) -> tuple[Step, ...]:
    """CUT_AFTER words and then the end of the connection, as when llama-server is killed between two events."""
    if not streams(call):
        return (send(whole(call)[:-20]), close())
    route = route_of(call)
    return (send(STREAM_HEAD), *(send(chunk(delta(route, position))) for position in range(CUT_AFTER)), close())


def breaks_off_inside(call: Call) -> tuple[Step, ...]:
    """The same, in the middle of an event."""
    if not streams(call):
        return breaks_off(call)
    *before, _ = breaks_off(call)
    return (*before, send(chunk(delta(route_of(call), CUT_AFTER))[:-20]), reset())


def held_until(event: asyncio.Event, call: Call) -> tuple[Step, ...]:
    """The first word, and the rest of the answer once the event is set."""
    head, first, *rest = answers(call)
    return (head, first, stall(event), *rest)


def once(choose: Choose) -> Choose:
    """Do it with the first request, and answer the others."""
    left = [choose]

    def chosen(call: Call) -> tuple[Step, ...]:
        return (left.pop() if left else answers)(call)

    return chosen
