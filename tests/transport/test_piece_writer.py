"""piece_writer.py: a large request is sent in order, as fast as the socket takes it, and not copied."""

import asyncio
import random
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support.memory_transport import HIGH_WATER_BYTES, LOST, MemoryTransport
from transport.piece_writer import PieceWriter


class Resuming(asyncio.Protocol):
    def __init__(self) -> None:
        self.writer: PieceWriter | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.writer = PieceWriter(transport)

    def resume_writing(self) -> None:
        assert self.writer is not None
        self.writer.resume_writing()


async def read_all(peer: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size and (data := await asyncio.get_running_loop().sock_recv(peer, 100_000)):
        received += data
    return bytes(received)


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[asyncio.Transport, PieceWriter, socket.socket]]:
    """Yield a connection: a transport, its writer, and the peer, which does not block."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport, protocol = await loop.create_connection(Resuming, *listener.getsockname())
        peer, _ = listener.accept()
    assert protocol.writer is not None
    with peer:
        peer.setblocking(False)
        yield transport, protocol.writer, peer
        transport.abort()


def test_pieces_arrive_in_order_and_are_not_copied() -> None:
    source = random.Random(0)
    sizes = [0, 1, 200_000, 0, 262_144, *[source.randrange(1, 300_000) for _ in range(120)], 3]
    pieces = [bytearray([number % 251]) * size for number, size in enumerate(sizes)]

    async def play() -> tuple[bytes, int]:
        async with connection() as (transport, writer, peer):
            tracemalloc.start()
            writer.write(pieces)
            allocated_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert transport.get_write_buffer_size() > 0
            received = await read_all(peer, sum(sizes))
            assert transport.get_write_buffer_size() == 0
        return received, allocated_bytes

    received, allocated_bytes = asyncio.run(play())
    assert received == b"".join(pieces)
    assert allocated_bytes < 2 * max(sizes) < sum(sizes) / 10


def test_more_pieces_than_the_kernel_takes_at_once_arrive_too() -> None:
    pieces = [b"%d," % number for number in range(3000)]

    async def play() -> bytes:
        async with connection() as (_, writer, peer):
            writer.write(pieces)
            return await read_all(peer, sum(map(len, pieces)))

    assert asyncio.run(play()) == b"".join(pieces)


def test_what_the_transport_has_comes_first_although_the_socket_would_take_more() -> None:
    before = b"x" * (16 << 20)

    async def play() -> bytes:
        async with connection() as (transport, writer, peer):
            transport.write(before)
            received = bytearray()
            while len(received) < 1 << 20:  # the loop has not seen yet that there is room again
                received += peer.recv(1 << 16)
            writer.write((b"one ", b"two"))
            return bytes(received) + await read_all(peer, len(before) + 7 - len(received))

    assert asyncio.run(play()) == before + b"one two"


def test_nothing_goes_to_the_descriptor_of_a_connection_that_is_closing() -> None:
    async def play() -> bytes:
        async with connection() as (transport, writer, peer):
            transport.abort()
            writer.write((b"late",))
            return await read_all(peer, 4)

    assert asyncio.run(play()) == b""


def test_the_transport_has_more_than_it_wants_as_long_as_pieces_are_left() -> None:
    transport = MemoryTransport()
    transport.stall()
    writer = PieceWriter(transport)
    transport.protocol.resume_writing = writer.resume_writing
    writer.write([b"x" * 40_000] * 3)
    assert transport.get_write_buffer_size() == 80_000 > HIGH_WATER_BYTES
    writer.resume_writing()
    assert transport.get_write_buffer_size() == 80_000


def test_pieces_follow_what_the_transport_has_to_write() -> None:
    transport = MemoryTransport()
    transport.stall()
    transport.write(b"before ")
    PieceWriter(transport).write((b"one ", memoryview(b"two")))
    assert transport.take() == b"before one two"


def test_pieces_for_a_closed_connection_are_dropped() -> None:
    transport = MemoryTransport()
    transport.stall()
    writer = PieceWriter(transport)
    writer.write([b"x" * 40_000] * 3)
    transport.lose()
    writer.close()
    transport.take()
    writer.resume_writing()
    writer.write([b"late"])
    assert (transport.state, transport.take()) == (LOST, b"")
