"""What the backend tells about its slots: how many there are, and when one that was cancelled has been let go."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from admission import Ticket
from errors import GatewayError
from waiting import end_tasks

Fetch = Callable[[bytes], Awaitable[tuple[int, bytes]]]

_LET_GO_S = 6.0
# llama-server sees that a stream's reader has left at its next token. A reader of a whole answer it misses only after a
# second in which nobody got a result, and an answer to GET /slots is one: asked more often, it would never look.
_STREAM_STEP_S = 0.2
_STEP_S = 1.2
_MOST_SLOTS = 4096


async def total_slots(fetch: Fetch) -> int:
    """GET /props says `total_slots`; 1 where it does not."""
    value = await _fetch_json(fetch, b"/props")
    slots = value.get("total_slots") if isinstance(value, dict) else None
    return slots if type(slots) is int and 0 < slots <= _MOST_SLOTS else 1


async def busy_slots(fetch: Fetch) -> int | None:
    """How many slots GET /slots shows at work; None where it does not tell."""
    value = await _fetch_json(fetch, b"/slots")
    if not isinstance(value, list) or not all(isinstance(slot, dict) for slot in value):
        return None
    return sum(slot.get("is_processing") is True for slot in value)


async def _fetch_json(fetch: Fetch, target: bytes) -> Any:
    try:
        status, body = await fetch(target)
        return json.loads(body) if status == 200 else None
    except (GatewayError, ValueError, RecursionError):
        return None


class LettingGo:
    """Slots whose requests were cancelled: they count as taken until the backend has stopped working on them.

    `relaying` tells how many requests the backend is wanted to work on; a busy slot beyond these is one that it has not
    let go. Where /slots does not tell, a slot is free once the connection is closed.
    """

    def __init__(self, fetch: Fetch, relaying: Callable[[], int]) -> None:
        self._fetch = fetch
        self._relaying = relaying
        self._held: list[Ticket] = []
        self._task: asyncio.Task[None] | None = None
        self._tells = True
        self._patient = False  # one of the cancelled requests did not stream

    def forget(self) -> None:
        """A new backend may tell what the old one did not."""
        self._tells = True

    def release(self, ticket: Ticket, *, streamed: bool) -> None:
        """Release the slot of a cancelled request as soon as the backend has let go of it."""
        if not self._tells:
            ticket.release()
            return
        self._held.append(ticket)
        self._patient = self._patient or not streamed
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        waited_s = 0.0
        try:
            while self._held and waited_s < _LET_GO_S:
                step_s = _STEP_S if self._patient else _STREAM_STEP_S
                await asyncio.sleep(step_s)
                waited_s += step_s
                busy = await busy_slots(self._fetch)
                if busy is None:
                    self._tells = False
                    return
                orphans = max(0, busy - self._relaying())
                while len(self._held) > orphans:
                    self._held.pop(0).release()
        finally:
            self._patient = False
            self._release_all()

    def _release_all(self) -> None:
        while self._held:
            self._held.pop().release()

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        self._release_all()  # a task that never ran has not done so
