"""piece_writer.py: a large request is sent in order, as fast as the socket takes it, and not copied."""

import asyncio
import random
import socket
import tracemalloc

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


async def read_all(listener: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    peer, _ = await loop.sock_accept(listener)
    received = bytearray()
    with peer:
        while len(received) < size and (data := await loop.sock_recv(peer, 100_000)):
            received += data
    return bytes(received)


def test_pieces_arrive_in_order_and_are_not_copied() -> None:
    source = random.Random(0)
    sizes = [0, 1, 200_000, 0, 262_144, *[source.randrange(1, 300_000) for _ in range(120)], 3]
    pieces = [bytearray([number % 251]) * size for number, size in enumerate(sizes)]

    async def play() -> tuple[bytes, int]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            loop = asyncio.get_running_loop()
            transport, protocol = await loop.create_connection(Resuming, *listener.getsockname())
            assert protocol.writer is not None
            tracemalloc.start()
            protocol.writer.write(pieces)
            allocated_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert transport.get_write_buffer_size() > 0
            received = await read_all(listener, sum(sizes))
            assert transport.get_write_buffer_size() == 0
            transport.abort()
        return received, allocated_bytes

    received, allocated_bytes = asyncio.run(play())
    assert received == b"".join(pieces)
    assert allocated_bytes < 2 * max(sizes) < sum(sizes) / 10


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
