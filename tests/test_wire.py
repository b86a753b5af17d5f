"""What is sent when: a quiet turn of the loop at once, a busy one at its end, and all of it in order."""

import asyncio

from support.clock import Clock
from wire import Outbox


class Recording(asyncio.Transport):
    """A transport that keeps what it is given."""

    def __init__(self, written: list[bytes]) -> None:
        super().__init__()
        self._written = written

    def write(self, data: bytes) -> None:
        self._written.append(data)


def test_the_first_write_after_a_silence_goes_at_once_and_those_behind_it_together() -> None:
    async def play() -> None:
        written: list[bytes] = []
        one, other = Recording(written), Recording(written)
        clock = Clock()
        outbox = Outbox(clock)
        outbox.put(one, b"1")
        assert written == [b"1"]
        outbox.put(other, b"2")
        outbox.put(one, b"3")
        assert written == [b"1"]
        await asyncio.sleep(0)
        assert written == [b"1", b"2", b"3"]
        clock.advance(1)
        outbox.put(other, b"4")
        assert written[3:] == [b"4"]

    asyncio.run(play())


def test_who_closes_sends_what_is_waiting_first() -> None:
    async def play() -> None:
        written: list[bytes] = []
        outbox = Outbox()
        for data in (b"1", b"2", b"3"):
            outbox.put(Recording(written), data)
        outbox.flush()
        assert written == [b"1", b"2", b"3"]
        await asyncio.sleep(0)
        assert written == [b"1", b"2", b"3"]

    asyncio.run(play())
