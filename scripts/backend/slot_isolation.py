"""Slots in which a request finds nothing of another key (PROMPT_CACHE=private): leases, and the check of the backend.

A slot that holds text of another key is emptied before a request is sent to it. Leases are granted in order.
"""

import asyncio
import json
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from backend.fetch import PageTooLong
from backend.slots import Fetch, UnfitBackend, listed_slots, reported_slots
from core.errors import BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, GatewayError
from policy.prefix_digests import Digests
from policy.slot_table import Slot, SlotTable

# Sends a POST request with a JSON body to the backend and returns status and body. May raise GatewayError.
Post = Callable[[bytes, bytes], Awaitable[tuple[int, bytes]]]

_RECHECK_S = 5.0
_PROBE_BYTES = 24  # at least 16 tokens
_SEEN_TOKENS = 8  # more than two such texts have in common by chance
_NO_COMPLETIONS = (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.NOT_IMPLEMENTED)
_CONCERNS = "PROMPT_CACHE=private"


class SlotLease:
    """What lets one request of a key be sent: a slot of its own, or without `digests` any slot, as the backend chooses.

    `slot` is the slot of a pinned request once `acquire` has returned; None for a floating one.
    """

    __slots__ = (
        "_emptying",
        "_generation",
        "_isolation",
        "_pinned",
        "_state",
        "digests",
        "owner",
        "ready",
    )

    def __init__(self, isolation: "SlotIsolation", owner: str, digests: Digests | None) -> None:
        self._isolation = isolation
        self.owner = owner
        self.digests = digests
        self.ready: asyncio.Future[None] | None = None
        self._state = _NEW
        self._pinned: Slot | None = None
        self._emptying: list[Slot] = []
        self._generation = 0

    @property
    def slot(self) -> int | None:
        return None if self._pinned is None else self._pinned.number

    @property
    def is_valid(self) -> bool:
        """Whether the request may be sent: the lease was acquired from the backend's current process."""
        return self._state is _HELD and not self.is_outdated

    @property
    def is_outdated(self) -> bool:
        """Whether the backend may have been started again since the lease began."""
        return self._generation != self._isolation.table.generation

    async def acquire(self) -> None:
        """Wait until the request may be sent. Raises GatewayError if a slot cannot be emptied.

        The lease is not valid if the backend has ended meanwhile.
        """
        isolation = self._isolation
        self._state = _WAITING
        self.ready = asyncio.get_running_loop().create_future()
        isolation.enqueue(self)
        await self.ready
        if self._state is _RELEASED:
            return
        for slot in tuple(self._emptying):
            await isolation.empty(slot)
        self._end_emptying()
        self._claim()
        isolation.grant()

    def start(self) -> None:
        """Take the slots; `acquire` goes on."""
        table = self._isolation.table
        self._state, self._generation = _EMPTYING, table.generation
        if self.digests is None:
            self._emptying = table.occupy_foreign(self.owner)
        else:
            self._pinned = table.occupy(self.owner, self.digests)
            self._emptying = [self._pinned] if self._pinned.is_foreign(self.owner) else []
        assert self.ready is not None
        self.ready.set_result(None)

    def interrupt(self) -> None:
        """The backend may be ending: `acquire` waits no longer."""
        assert self.ready is not None
        self._state = _RELEASED
        if not self.ready.done():  # its client may have left in this moment
            self.ready.set_result(None)

    def _end_emptying(self) -> None:
        for slot in self._emptying:
            if slot is not self._pinned:
                slot.holder = None
        self._emptying = []

    def _claim(self) -> None:
        table = self._isolation.table
        self._state = _HELD
        if not self.is_valid:  # another process has come meanwhile, of whose slots nothing is known
            return
        if self._pinned is not None:
            table.claim(self._pinned, self.owner, self.digests or ())
        else:
            table.claim_all(self.owner)

    def release(self) -> None:
        """The backend does not work on the request any more. Has no effect when called again."""
        state, self._state = self._state, _RELEASED
        if state is _WAITING:
            self._isolation.dequeue(self)
        elif state in (_EMPTYING, _HELD):
            self._free()

    def _free(self) -> None:
        self._end_emptying()
        if self._pinned is not None:
            self._pinned.holder = None
        else:
            self._isolation.table.end_floating()
        self._isolation.grant()


_NEW, _WAITING, _EMPTYING, _HELD, _RELEASED = range(5)


class SlotIsolation:
    """The slots of the backend, and the requests that wait for one. `handovers` counts slots that changed hands.

    `clock` returns monotonic seconds.
    """

    def __init__(self, fetch: Fetch, post: Post, clock: Callable[[], float], on_gone: Callable[[], None]) -> None:
        """`on_gone` is called if the backend does not accept a connection, or ends one."""
        self._on_gone = on_gone
        self.table = SlotTable()
        self.clock = clock
        self.handovers = 0
        self._fetch = fetch
        self._post = post
        self._waiting: deque[SlotLease] = deque()
        self._failed_s: float | None = None  # when the last check found the backend unfit, and what it found
        self._failure = ""
        self._is_checked = False
        self._is_paused = True  # until it is known what the backend has

    def lease(self, owner: str, digests: Digests | None) -> SlotLease:
        """Return a lease for a request; None for `digests` if the backend will choose its slot."""
        return SlotLease(self, owner, digests)

    def enqueue(self, lease: SlotLease) -> None:
        self._waiting.append(lease)
        self.grant()

    def dequeue(self, lease: SlotLease) -> None:
        self._waiting.remove(lease)
        self.grant()

    def grant(self) -> None:
        """Let as many of the next requests start as may."""
        while (
            not self._is_paused
            and self._waiting
            and self.table.may_start(self._waiting[0].owner, floating=self._waiting[0].digests is None)
        ):
            self._waiting.popleft().start()

    async def empty(self, slot: Slot) -> None:
        """Empty a slot. Raises GatewayError if the backend does not, and then nothing is known of the slot."""
        had_owner, generation = slot.owner is not None, self.table.generation
        slot.forget()
        await self._erase(slot.number)
        if generation == self.table.generation:
            slot.clear()
        self.handovers += had_owner

    async def _erase(self, number: int) -> None:
        try:
            status, body = await self._post(b"/slots/%d?action=erase" % number, b"{}")
        except GatewayError as error:
            if error.kind is BACKEND_UNAVAILABLE:
                self._on_gone()
            raise
        if status != 200 or b"n_erased" not in body:
            reason = f"The backend does not empty its slots ({_CONCERNS})."
            raise GatewayError(BACKEND_UNAVAILABLE, reason)

    # --- The backend's process ---

    def pause(self) -> None:
        """The backend may be ending: let nothing start before `prepare` has seen the next process."""
        self._is_paused = True
        self.table.generation += 1
        waiting, self._waiting = self._waiting, deque()
        for lease in waiting:
            lease.interrupt()

    async def prepare(self, limit_s: float) -> int:
        """The backend may be another process: forget what its slots hold, and check it; return how many it has.

        Raises UnfitBackend if it cannot keep the promise, GatewayError if it does not respond within `limit_s`.
        """
        try:
            return await asyncio.wait_for(self._prepare(), limit_s)
        except asyncio.TimeoutError:
            raise GatewayError(BACKEND_TIMEOUT) from None

    async def _prepare(self) -> int:
        """Check the backend, but one that was found unfit only now and then."""
        if self._failed_s is not None and self.clock() < self._failed_s + _RECHECK_S:
            raise UnfitBackend(self._failure)
        try:
            total = await self._list()
            self.table.reset(total)
            # While requests of before are at work the check of before counts: only what is idle can be emptied.
            if not (self._is_checked and (self.table.busy or self.table.floating)):
                await self._check()
                if await self._list() != total:  # another process answered in between
                    raise GatewayError(BACKEND_UNAVAILABLE)
        except UnfitBackend as error:
            self._failed_s, self._failure = self.clock(), str(error)
            raise
        self._failed_s, self._failure, self._is_checked = None, "", True
        self._is_paused = False
        self.grant()
        return total

    async def _list(self) -> int:
        """Return how many slots there are."""
        try:
            with suppress(PageTooLong):  # the list has text of requests in it, which the check replaces
                return await listed_slots(self._fetch)
            return await reported_slots(self._fetch)
        except ValueError:
            raise UnfitBackend(f"{_CONCERNS}: llama-server does not list its slots; start it with --slots") from None

    async def _check(self) -> None:
        """Find out whether slots can be emptied, and whether prompts outlive that."""
        await self._empty_all()
        probe = secrets.token_hex(_PROBE_BYTES)
        if await self._cached_tokens(probe) is None:
            return  # it serves embeddings only, which use no cache of prompts besides the slots
        for _ in range(len(self.table) + 1):  # so that the probe has to leave its slot
            await self._cached_tokens(secrets.token_hex(_PROBE_BYTES))
        await self._empty_all()
        if (await self._cached_tokens(probe) or 0) > _SEEN_TOKENS:
            raise UnfitBackend(
                f"{_CONCERNS}: llama-server keeps prompts outside its slots, where keys would share them;"
                " start it with --cache-ram 0"
            )
        await self._empty_all()

    async def _empty_all(self) -> None:
        for number in range(len(self.table)):
            status, body = await self._post(b"/slots/%d?action=erase" % number, b"{}")
            if status == HTTPStatus.SERVICE_UNAVAILABLE:
                raise GatewayError(BACKEND_UNAVAILABLE)
            if status != 200 or b"n_erased" not in body:
                raise UnfitBackend(
                    f"{_CONCERNS}: llama-server does not empty its slots (status {status});"
                    " start it with --slot-save-path and without --no-slots"
                )

    async def _cached_tokens(self, prompt: str) -> int | None:
        """Return how much of a prompt the backend had in a cache; None if it does not complete prompts.

        The backend chooses the slot, as it would for a request that cannot be pinned to one.
        """
        body = json.dumps({"prompt": prompt, "n_predict": 1, "cache_prompt": True}).encode()
        status, answer = await self._post(b"/completion", body)
        if status in _NO_COMPLETIONS:
            return None
        if status != 200:  # it may be ending, or loading
            raise GatewayError(BACKEND_UNAVAILABLE)
        try:
            timings: Any = json.loads(answer)["timings"]
            return int(timings["cache_n"])
        except (ValueError, LookupError, TypeError):
            raise UnfitBackend(f"{_CONCERNS}: llama-server does not report what it found in its cache") from None
