"""pool.py: connections to the backend are opened, kept, taken again and ended."""

import errno
from collections.abc import Callable

import pytest

from core.errors import BACKEND_UNAVAILABLE, GatewayError
from core.listener import UNREPORTED
from support.clock import Clock
from support.memory_transport import ABORTED, OPEN, Connector, Link, MemoryTransport, end_of, memory_test
from transport.backend_protocol import BackendProtocol
from transport.pool import ConnectionPool

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Pool:
    """A pool, and the backend's end of its connections."""

    def __init__(self, clock: Clock) -> None:
        self.link = Link(clock)
        self.connector = Connector()
        self.pool = ConnectionPool(
            "backend", 8080, self.link.ticker, self.link.batcher, 65536, open_connection=self.connector
        )
        self.link.ticker.add_listener(self.pool.on_tick)

    async def used(self) -> BackendProtocol:
        """Return a new connection that has carried a request."""
        backend = await self.pool.connect()
        self.use(backend)
        return backend

    def use(self, backend: BackendProtocol) -> None:
        backend.send_request(b"GET / HTTP/1.1\r\n\r\n")
        self.link.batcher.flush()
        end_of(backend).receive(HEAD)

    async def kept(self, count: int) -> list[BackendProtocol]:
        """Return idle connections, in the order in which they were released."""
        backends = [await self.used() for _ in range(count)]
        for backend in backends:
            self.pool.release(backend, True)
        return backends


in_memory = memory_test(Pool)


# --- Connecting ---


@in_memory
async def test_a_connection_is_opened_to_the_backend_and_is_not_idle(pool: Pool) -> None:
    backend = await pool.pool.connect()
    assert pool.connector.asked == [("backend", 8080)]
    assert (len(pool.pool), pool.pool.idle_count, backend.ended) == (1, 0, False)


@in_memory
async def test_a_backend_that_does_not_accept_is_unavailable(pool: Pool) -> None:
    pool.connector.error = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    with pytest.raises(GatewayError, match=r"^The backend does not accept connections\.$") as error:
        await pool.pool.connect()
    assert error.value.kind is BACKEND_UNAVAILABLE
    assert len(pool.pool) == 0


@in_memory
async def test_a_connection_that_the_backend_closed_meanwhile_is_unavailable(pool: Pool) -> None:
    pool.connector.at_eof = True
    with pytest.raises(GatewayError, match=r"^The backend closed a new connection\.$") as error:
        await pool.pool.connect()
    assert error.value.kind is BACKEND_UNAVAILABLE
    assert pool.connector.transports[0].state == ABORTED
    pool.connector.transports[0].lose()
    assert len(pool.pool) == 0


@pytest.mark.parametrize(("listener", "accepted"), [(UNREPORTED, True), (None, False)])
@in_memory
async def test_only_the_backends_own_listener_gets_anything(pool: Pool, listener: int | None, accepted: bool) -> None:
    own = ConnectionPool("backend", 8080, pool.link.ticker, pool.link.batcher, 65536, lambda: listener, pool.connector)
    if accepted:
        assert not (await own.connect()).ended
        return
    with pytest.raises(GatewayError, match=r"^Another process listens at the backend's address\.$") as error:
        await own.connect()
    assert error.value.kind is BACKEND_UNAVAILABLE
    assert (pool.connector.transports[0].state, len(own)) == (ABORTED, 0)


@in_memory
async def test_a_connection_whose_request_has_left_meanwhile_is_closed(pool: Pool) -> None:
    backend = await pool.pool.connect()
    pool.link.advance(3.25)
    assert end_of(backend).state == OPEN
    pool.link.advance(0.25)
    assert end_of(backend).state == ABORTED


@in_memory
async def test_a_connection_that_is_used_may_take_its_time(pool: Pool) -> None:
    backend = await pool.pool.connect()
    backend.send_request(b"GET / HTTP/1.1\r\n\r\n")
    pool.link.advance(1000)
    assert end_of(backend).state == OPEN


@in_memory
async def test_all_connections_report_to_one_activity(pool: Pool) -> None:
    await pool.used()
    assert pool.pool.last_activity.seen


# --- Taking one ---


@in_memory
async def test_an_empty_pool_has_none(pool: Pool) -> None:
    assert pool.pool.acquire() is None


@in_memory
async def test_a_connection_in_use_is_not_handed_out(pool: Pool) -> None:
    await pool.pool.connect()
    assert pool.pool.acquire() is None


@in_memory
async def test_the_last_used_connection_is_taken_first(pool: Pool) -> None:
    first, second, third = await pool.kept(3)
    assert pool.pool.idle_count == 3
    assert [pool.pool.acquire() for _ in range(4)] == [third, second, first, None]
    assert pool.pool.idle_count == 0


@in_memory
async def test_a_connection_that_comes_back_is_the_last_used_one(pool: Pool) -> None:
    first, second = await pool.kept(2)
    assert pool.pool.acquire() is second
    assert pool.pool.acquire() is first
    pool.use(second)
    pool.pool.release(second, True)
    pool.use(first)
    pool.pool.release(first, True)
    assert pool.pool.acquire() is first


@in_memory
async def test_new_connections_do_not_hide_the_idle_ones(pool: Pool) -> None:
    (kept,) = await pool.kept(1)
    await pool.pool.connect()
    assert pool.pool.acquire() is kept


@in_memory
async def test_a_connection_that_has_ended_is_passed_over(pool: Pool) -> None:
    first, second = await pool.kept(2)
    second.eof_received()  # asyncio reports the loss in its next iteration
    assert pool.pool.idle_count == 1
    assert pool.pool.acquire() is first


@in_memory
async def test_a_lost_connection_is_forgotten(pool: Pool) -> None:
    (kept,) = await pool.kept(1)
    end_of(kept).receive_eof()
    assert len(pool.pool) == 0
    assert pool.pool.acquire() is None


# --- Giving it back ---


def no_change(transport: MemoryTransport) -> None:
    pass


@pytest.mark.parametrize(
    ("reusable", "before", "state"),
    [
        (True, no_change, OPEN),
        (False, no_change, ABORTED),
        (True, lambda transport: transport.protocol.eof_received(), ABORTED),
    ],
    ids=["whole", "cut", "ended"],
)
@in_memory
async def test_only_a_connection_that_can_carry_another_request_is_kept(
    pool: Pool, reusable: bool, before: Callable[[MemoryTransport], None], state: str
) -> None:
    backend = await pool.used()
    before(end_of(backend))
    pool.pool.release(backend, reusable)
    assert end_of(backend).state == state
    assert pool.pool.idle_count == (state == OPEN)


@in_memory
async def test_a_connection_with_unsent_bytes_is_not_kept(pool: Pool) -> None:
    """The backend has answered before it took the whole request: the rest of that would precede the next one."""
    backend = await pool.pool.connect()
    end_of(backend).stall()
    pool.use(backend)
    pool.pool.release(backend, True)
    assert end_of(backend).state == ABORTED


@pytest.mark.parametrize(("idle_s", "state"), [(3.25, OPEN), (3.5, ABORTED)])
@in_memory
async def test_an_idle_connection_is_closed_before_the_backend_does(pool: Pool, idle_s: float, state: str) -> None:
    (kept,) = await pool.kept(1)
    pool.link.advance(idle_s)
    assert end_of(kept).state == state


@in_memory
async def test_bytes_on_an_idle_connection_end_it(pool: Pool) -> None:
    (kept,) = await pool.kept(1)
    end_of(kept).receive(b"x")
    assert end_of(kept).state == ABORTED
    assert pool.pool.acquire() is None


@in_memory
async def test_closing_the_idle_ones_leaves_those_in_use(pool: Pool) -> None:
    busy = await pool.pool.connect()
    kept = await pool.kept(2)
    pool.pool.close_idle()
    assert [end_of(backend).state for backend in [busy, *kept]] == [OPEN, ABORTED, ABORTED]
    assert pool.pool.acquire() is None
