"""Reads the bodies of requests for their members, a little in each turn of the loop, while others are served."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from http1.form_fields import FormReader
from http1.json_members import MemberReader, Members
from http1.media_urls import MediaUrls
from http1.member_screen import OVERLAP_BYTES, MemberScreen
from policy.slot_demand import MEMBERS
from transport.waiter import Waiter

_TURN_S = 0.001
_AT_ONCE_S = 2 * _TURN_S
_SCREENED_BYTES = 32 << 10  # in one step


class BodyScan:
    """The search in one body, whose pieces may still be coming.

    `waiter` gets the members once the body is complete and read; None if the screen has cleared it.
    """

    __slots__ = (
        "_at",
        "_brackets",
        "_index",
        "_is_complete",
        "_last",
        "_max_depth",
        "_media",
        "_pieces",
        "_reader",
        "_screen",
        "is_queued",
        "key_id",
        "waiter",
    )

    def __init__(
        self,
        pieces: Sequence[bytes | bytearray],
        screen: MemberScreen | None,
        *,
        is_complete: bool,
        max_depth: int | None = None,
        boundary: bytes = b"",
        key_id: str = "",
    ) -> None:
        """Without a screen every body is read. `pieces` may get longer until the body is complete.

        A body that is nested deeper than `max_depth` is not read to its end. `boundary` separates the parts of a form;
        without one the body is JSON, if anything. `key_id` is of the key that sent it: those without one share their
        turns.
        """
        self._pieces = pieces
        self._screen = screen
        self._max_depth = max_depth
        self._reader = FormReader(MEMBERS, boundary) if boundary else MemberReader(MEMBERS, max_depth)
        self._media = MediaUrls()
        self._brackets = 0  # in what was screened
        self._is_complete = is_complete
        self._index = self._at = 0  # what comes next
        self._last = b""  # the end of what was screened
        self.key_id = key_id
        self.is_queued = False
        self.waiter: Waiter[Members | None] = Waiter()

    def complete(self) -> None:
        """All pieces have come."""
        self._is_complete = True

    def cancel(self) -> None:
        """Let go of the body. The waiter gets no result."""
        self._pieces, self._reader, self._screen = (), MemberReader(MEMBERS), None
        self._is_complete = False

    def step(self) -> bool:
        """Read on a little; return whether there is more to read now."""
        if self._screen is not None:
            data = self._next(_SCREENED_BYTES)
            if data:
                self._look_at(data, self._screen)
                return True
        else:
            if self._reader.step() or self._media.step():
                return True
            data = self._next(_SCREENED_BYTES)
            if data:
                self._reader.feed(data)
                self._media.feed(data)
                return True
        if self._is_complete:
            self.waiter.set_result(self._result() if self._screen is None else None)
        return False

    def _result(self) -> Members:
        return self._reader.end()._replace(urls=self._media.found, has_more_urls=self._media.has_more)

    def _next(self, limit: int) -> bytes:
        """Take the next bytes that have come, of one piece, at most `limit`."""
        while self._index < len(self._pieces):
            piece = self._pieces[self._index]
            start, self._at = self._at, min(len(piece), self._at + limit)
            if start < self._at:
                return bytes(piece[start : self._at])
            if self._index + 1 == len(self._pieces):  # it may still grow
                break
            self._index, self._at = self._index + 1, 0
        return b""

    def _look_at(self, data: bytes, screen: MemberScreen) -> None:
        """Screen the next bytes; if they may have one of the members, read the body from its start."""
        found = screen.brackets(data)
        self._brackets += found or 0
        too_many = self._brackets > screen.most_brackets
        if found is None or too_many or (self._last and screen.may_have(self._last + data[:OVERLAP_BYTES])):
            self._screen = None
            self._index = self._at = 0
        else:
            self._last = (self._last + data[-OVERLAP_BYTES:])[-OVERLAP_BYTES:]


class BodyScans:
    """All bodies that are being read: they take turns, and together a bounded time in each turn of the loop.

    The next step goes to the key whose steps have taken the least time. So each key gets an equal share of the time,
    however many bodies it has, and however long their steps take. The bodies of one key are read round robin.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` returns seconds, exact to microseconds."""
        self._clock = clock
        self._scans: dict[str, deque[BodyScan]] = {}  # by key, those that have more to read
        self._used_s: dict[str, float] = {}  # by key, what its steps took since there was last nothing to read
        self._least_used_s = 0.0  # what the key of the last step had used before it
        self._is_scheduled = False
        self._turn_ends_s = 0.0

    def read_on(self, scan: BodyScan) -> None:
        """Read more of a body, at once if this turn has time left; the rest in later turns."""
        if not scan.is_queued:
            self._enqueue(scan)
        if self._is_scheduled:
            self._take_steps()
        else:
            self._begin_turn()

    def read_now(self, scan: BodyScan) -> Members | None:
        """Read all of a body that is complete; None if that takes longer than two turns."""
        scan.step()  # it takes the first bytes, and reads none of them
        ends_s = self._clock() + _AT_ONCE_S
        while scan.step():
            if self._clock() > ends_s:
                return None
        return scan.waiter.result()

    def _begin_turn(self) -> None:
        self._turn_ends_s = self._clock() + _TURN_S
        self._is_scheduled = bool(self._scans)
        if self._scans:
            asyncio.get_running_loop().call_soon(self._begin_turn)
            self._take_steps()
        else:
            self._used_s.clear()

    def _take_steps(self) -> None:
        now_s = self._clock()
        while self._scans and now_s < self._turn_ends_s:
            scan, began_s = self._dequeue(), now_s
            has_more = scan.step()
            now_s = self._clock()
            self._used_s[scan.key_id] += now_s - began_s
            if has_more:
                self._enqueue(scan)

    def _enqueue(self, scan: BodyScan) -> None:
        """Put a body behind the others of its key.

        A key that had none has no credit for the time before, and what it has used above its share still counts.
        """
        scan.is_queued = True
        key_id = scan.key_id
        if key_id not in self._scans:
            self._scans[key_id] = deque()
            self._used_s[key_id] = max(self._used_s.get(key_id, 0.0), self._least_used_s)
        self._scans[key_id].append(scan)

    def _dequeue(self) -> BodyScan:
        """Return the next body. Of keys that have used the same time, the one that has waited longest is next."""
        key_id = min(self._scans, key=self._used_s.__getitem__)
        self._least_used_s = self._used_s[key_id]
        scans = self._scans.pop(key_id)
        scan = scans.popleft()
        scan.is_queued = False
        if scans:
            self._scans[key_id] = scans
        return scan
