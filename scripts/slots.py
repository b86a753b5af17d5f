"""What the backend tells about its slots: how many there are, and when one that was cancelled has been let go."""

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from admission import Ticket
from errors import BACKEND_MALFORMED, GatewayError
from waiting import end_tasks

Fetch = Callable[[bytes], Awaitable[tuple[int, bytes]]]

_LET_GO_S = 5.0
# llama-server sees that a stream's reader has left at its next token. A reader of a whole answer it misses only after a
# second in which nobody got a result, and an answer to GET /slots is one: asked more often, it would never look.
_STREAM_STEP_S = 0.2
_STEP_S = 1.2
_MOST_SLOTS = 4096


async def total_slots(fetch: Fetch) -> int:
    """GET /props says `total_slots`; 1 where it does not."""
    try:
        value = await _fetch_json(fetch, b"/props")
    except (GatewayError, ValueError):
        value = None
    slots = value.get("total_slots") if isinstance(value, dict) else None
    return slots if type(slots) is int and 0 < slots <= _MOST_SLOTS else 1


async def busy_slots(fetch: Fetch) -> int:
    """How many slots GET /slots shows at work. Raises GatewayError where no answer comes now, ValueError where it does
    not tell."""
    value = await _fetch_json(fetch, b"/slots")
    if not isinstance(value, list) or not all(isinstance(slot, dict) for slot in value):
        raise ValueError("these are no slots")
    return sum(slot.get("is_processing") is True for slot in value)


async def _fetch_json(fetch: Fetch, target: bytes) -> Any:
    try:
        status, body = await fetch(target)
        if status == 200:
            return json.loads(body)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except GatewayError as error:
        if error.kind is not BACKEND_MALFORMED:
            raise
    raise ValueError("no page of that kind")


class Held(NamedTuple):
    """A cancelled request's ticket, and since when, by the loop's clock."""

    ticket: Ticket
    since_s: float


class LettingGo:
    """Slots whose requests were cancelled: they count as taken until the backend has stopped working on them.

    `relaying` tells how many requests the backend is wanted to work on; a busy slot beyond these is one that it has not
    let go. Where /slots does not tell, a slot is free once the connection is closed; where no answer comes, since the
    backend is busy, it is asked again. None is held for longer than `let_go_s`.
    """

    def __init__(self, fetch: Fetch, relaying: Callable[[], int], let_go_s: float = _LET_GO_S) -> None:
        self._fetch = fetch
        self._relaying = relaying
        self._let_go_s = let_go_s
        self._held: deque[Held] = deque()
        self._task: asyncio.Task[None] | None = None
        self._tells = True
        self._patient = False  # one of the cancelled requests did not stream

    def __len__(self) -> int:
        return len(self._held)

    def forget(self) -> None:
        """A new backend may tell what the old one did not."""
        self._tells = True

    def release(self, ticket: Ticket, *, streamed: bool) -> None:
        """Release the slot of a cancelled request as soon as the backend has let go of it."""
        if not self._tells:
            ticket.release()
            return
        loop = asyncio.get_running_loop()
        self._held.append(Held(ticket, loop.time()))
        self._patient = self._patient or not streamed
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._watch())

    async def _watch(self) -> None:
        clock = asyncio.get_running_loop().time
        try:
            while self._held:
                left_s = self._held[0].since_s + self._let_go_s - clock()
                await asyncio.sleep(min(_STEP_S if self._patient else _STREAM_STEP_S, left_s))
                orphans = await self._orphans()
                overdue_s = clock() - self._let_go_s
                while self._held and (len(self._held) > orphans or self._held[0].since_s <= overdue_s):
                    self._held.popleft().ticket.release()
        finally:
            self._patient = False
            self._release_all()

    async def _orphans(self) -> int:
        """How many slots work on what nobody wants any more: as far as anybody knows, all that are held."""
        try:
            busy = await busy_slots(self._fetch)
        except GatewayError:
            return len(self._held)
        except ValueError:
            self._tells = False
            return 0
        return max(0, busy - self._relaying())

    def _release_all(self) -> None:
        while self._held:
            self._held.popleft().ticket.release()

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        self._release_all()  # a task that never ran has not done so
