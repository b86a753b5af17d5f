"""body_reader.py: a chunked body in slices, one per turn of the loop; what follows it; how it ends early."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from config.settings import Limits
from core.errors import BAD_REQUEST, MEMORY_FULL, GatewayError, PeerGone
from http1.bodies import RequestBody, encode_chunk
from transport.body_reader import BodyReader

CODED = encode_chunk(b"0123456789") * 20_000 + b"0\r\n\r\n"
PAYLOAD = b"0123456789" * 20_000


class Reading:
    """A reader, and what it has done."""

    def __init__(self, length: int | None = None, most: int = 1 << 30) -> None:
        self.body = RequestBody(length, Limits())
        self.calls: list[str] = []
        self.counted = 0
        self._most = most
        self.reader = BodyReader(
            self.body, self._count, lambda: self.calls.append("pause"), lambda: self.calls.append("resume")
        )

    def _count(self, payload_bytes: int) -> None:
        self.counted += payload_bytes
        if self.counted > self._most:
            raise GatewayError(MEMORY_FULL)

    async def turns(self) -> int:
        """How many turns of the loop pass until the body is over."""
        turns = 0
        while not self.reader.waiter.done:
            turns += 1
            await asyncio.sleep(0)
        return turns

    @property
    def payload(self) -> bytes:
        return b"".join(self.body.pieces)


def in_loop(play: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def test() -> None:
        asyncio.run(play())  # type: ignore[arg-type]

    test.__name__, test.__doc__ = getattr(play, "__name__", "test"), play.__doc__
    return test


@in_loop
async def test_a_large_read_is_taken_in_slices_with_the_loop_between() -> None:
    reading = Reading()
    reading.reader.receive(CODED + b"more")
    assert reading.calls == ["pause"]
    assert 0 < reading.counted < 32768
    assert reading.reader.has_pending
    assert await reading.turns() >= len(CODED) // 32768
    assert (reading.payload, reading.counted) == (PAYLOAD, len(PAYLOAD))
    assert reading.calls == ["pause", "resume"]
    assert reading.reader.trailing_data == b"more"
    assert not reading.reader.has_pending


@in_loop
async def test_what_comes_although_reading_is_paused_follows_in_order() -> None:
    reading = Reading()
    for at in range(0, len(CODED), 50_000):
        reading.reader.receive(CODED[at : at + 50_000])
    reading.reader.receive(b"more")
    await reading.turns()
    reading.reader.receive(b" and more")
    assert (reading.payload, reading.reader.trailing_data) == (PAYLOAD, b"more and more")


@in_loop
async def test_a_body_that_ends_within_its_last_slices_keeps_all_that_follows() -> None:
    reading = Reading()
    coded = encode_chunk(b"x" * 40_000) + b"0\r\n\r\n"
    after = b"GET / HTTP/1.1\r\n\r\n" * 10_000
    reading.reader.receive(coded + after)
    await reading.turns()
    assert (reading.payload, reading.reader.trailing_data) == (b"x" * 40_000, after)


@in_loop
async def test_small_reads_and_sized_bodies_need_no_slices() -> None:
    small, sized = Reading(), Reading(length=len(PAYLOAD))
    for at in range(0, len(CODED), 32768):
        small.reader.receive(CODED[at : at + 32768])
    sized.reader.receive(PAYLOAD + b"more")
    for reading in (small, sized):
        assert reading.reader.waiter.done
        assert (reading.payload, reading.calls) == (PAYLOAD, [])
    assert sized.reader.trailing_data == b"more"


@in_loop
async def test_an_error_ends_it_within_its_slice() -> None:
    wrong, too_much = Reading(), Reading(most=50_000)
    wrong.reader.receive(CODED[:100_000] + b"x" + CODED)
    too_much.reader.receive(CODED)
    for reading, kind in ((wrong, BAD_REQUEST), (too_much, MEMORY_FULL)):
        await reading.turns()
        with pytest.raises(GatewayError) as caught:
            reading.reader.waiter.result()
        assert caught.value.kind is kind
        assert reading.calls == ["pause"]
    assert too_much.counted < 100_000


@in_loop
async def test_nothing_is_read_once_the_wait_has_ended() -> None:
    reading = Reading()
    reading.reader.receive(CODED)
    reading.reader.waiter.set_exception(PeerGone())
    before = reading.counted
    for _ in range(20):
        await asyncio.sleep(0)
    assert reading.counted == before
