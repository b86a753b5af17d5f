"""Client connections: each one's requests, one after the other, and the one collection that holds them all."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from operator import attrgetter

from accounting.request_record import Stage
from backend.generation_watch import AtWork
from core.errors import TOO_MANY_CONNECTIONS, GatewayError, PeerGone
from core.summed_log import SummedLog
from http1.forwarded import NO_PROXIES, TrustedProxies
from policy.prepared_request import LastHead, RequestCache
from policy.routes import Role
from policy.suspects import Suspect
from proxy.request import Request
from proxy.request_services import RequestServices
from transport.client_protocol import ClientProtocol
from transport.tcp import tcp_state
from transport.ticker import Ticker
from transport.write_batching import WriteBatcher

_MAX_PUBLIC_ONLY = 16
_MAX_LINGERING = 128  # within the spare file descriptors of core.fd_limit
_DRAIN_LINGER_S = 2.0  # once the gateway drains
_REACHABLE_CHECK_S = 10.0
_GAVE_WAY = "MAX_CONNECTIONS: closed %d connections that were idle or had shown no valid key, to accept new ones"


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """`header_s` and `keepalive_s` bound the wait for a head, `flush_s` how long a client may take its last bytes."""

    max_connections: int
    header_s: float
    keepalive_s: float
    flush_s: float


# What a client's connection is doing: it waits for a head; it is served; its last bytes are on their way.
IDLE, SERVING, CLOSING = "idle", "serving", "closing"


class DrainWaiter:
    """Calls back when a client has taken what was written, or takes nothing for too long."""

    __slots__ = ("_on_drained", "_on_stalled")

    def __init__(self, on_drained: Callable[[], None], on_stalled: Callable[[], None]) -> None:
        self._on_drained = on_drained
        self._on_stalled = on_stalled

    def set_result(self, value: object) -> None:
        self._on_drained()

    def set_exception(self, error: Exception) -> None:
        self._on_stalled()


class ClientSession:
    """One client's connection: it reads heads and hands each to a Request.

    `public_only` marks a connection beyond MAX_CONNECTIONS: it may use public routes only. `serial` is smaller for a
    session that has been idle for longer, or has been closing for longer.
    """

    __slots__ = ("_last_head", "_sessions", "client", "gave_way", "public_only", "request", "serial", "state")

    def __init__(self, sessions: "Sessions", client: ClientProtocol, *, public_only: bool) -> None:
        self._sessions = sessions
        self.client = client
        self.public_only = public_only
        self._last_head = LastHead()
        self.gave_way = False  # it ends to make room for a new one
        self.request: Request | None = None
        self.state = IDLE
        self.serial = 0

    @property
    def is_quiet(self) -> bool:
        """Whether it is idle, and its client has sent nothing more and has taken all that was written."""
        client = self.client
        is_idle = self.state is IDLE and not client.has_unread
        return is_idle and not client.transport.get_write_buffer_size()

    def begin(self) -> None:
        """Wait for the first head."""
        self._expect_head(self._sessions.settings.header_s)

    def _expect_head(self, idle_s: float) -> None:
        """Wait for the next head, `idle_s` for its first byte."""
        self.state = IDLE
        self.serial = next(self._sessions.serials)
        self.client.expect_head(self, idle_s, self._sessions.settings.header_s)

    def _expect_next_head(self) -> None:
        self._expect_head(self._sessions.settings.keepalive_s)

    def set_result(self, head: bytes) -> None:
        """Serve the request with this head."""
        self.state = SERVING
        sessions, client = self._sessions, self.client
        try:
            prepared, length = sessions.request_cache.find(head, self._last_head)
        except GatewayError as error:
            self.refuse(error, head)
            return
        request = self.request = Request(sessions.services, client, prepared, length)
        if self.public_only and prepared.route.kind.role is not Role.PUBLIC:
            request.forbid(GatewayError(TOO_MANY_CONNECTIONS))
        client.run_handler(request.handle(), self._end_request)

    def set_exception(self, error: Exception) -> None:
        """End the connection: the next head is wrong or late, or the client has left."""
        if isinstance(error, GatewayError):
            self.refuse(error, self.client.partial_head)
            return
        self._end_between_requests()
        if self.client.ended:
            self.client.abort()
        else:  # it may still be taking its last response
            self.client.close(unread=False, flush_s=self._sessions.settings.flush_s)

    def _end_request(self, keep_alive: bool) -> None:
        """Wait for the next request, if the connection can carry another."""
        request, self.request = self.request, None
        if not keep_alive:
            if request is not None:
                self._close(request)
        elif self.client.write_paused:  # it must take what it got before it gets more
            waiter = DrainWaiter(self._expect_next_head, self._give_up)
            self.client.expect_drain(waiter, self._sessions.settings.flush_s)
        else:
            self._expect_head(self._sessions.settings.keepalive_s)

    def refuse(self, error: GatewayError, head: bytes = b"") -> None:
        """Send an error for what never became a request, though its head may be known, and end the connection."""
        request = self._stillborn_request(head)
        request.refuse(error)
        request.finish()
        self._close(request)

    def _close(self, request: Request) -> None:
        """End the connection after the last response."""
        self.state = CLOSING
        self.serial = next(self._sessions.serials)
        request.close()
        if self.client.lingers:
            self._sessions.limit_lingering(self.client)

    def give_way(self) -> None:
        """End the connection to make room for a new one. A request that has begun is answered with 503."""
        self.gave_way = True
        begun = self.state is SERVING or (self.state is IDLE and self.client.has_unread)
        self.client.cancel_wait(GatewayError(TOO_MANY_CONNECTIONS) if begun else PeerGone())
        answered = begun and not self.client.transport.get_write_buffer_size()
        if not answered and not self.client.authenticated:
            self.client.abort()  # a client without a valid key must not delay the end

    def _stillborn_request(self, head: bytes = b"") -> Request:
        sessions = self._sessions
        fallback = sessions.request_cache.fallback(head)
        return Request(sessions.services, self.client, fallback, None, Stage.READING_HEAD)

    def _give_up(self) -> None:
        """End the connection: the client has sent another request, but takes nothing of its last response."""
        self._end_between_requests()
        self.client.abort()

    def _end_between_requests(self) -> None:
        self.state = CLOSING
        if self.client.has_unread:
            request = self._stillborn_request()
            request.cancel()
            request.finish()


class Sessions:
    """Every client connection, from accept to its last byte."""

    def __init__(
        self,
        services: RequestServices,
        request_cache: RequestCache,
        settings: SessionSettings,
        ticker: Ticker,
        batcher: WriteBatcher,
        proxies: TrustedProxies = NO_PROXIES,
    ) -> None:
        self._proxies = proxies
        self.services = services
        self.request_cache = request_cache
        self.settings = settings
        self._ticker = ticker
        self._batcher = batcher
        self._sessions: dict[ClientSession, None] = {}  # the oldest first
        self.serials = count()
        self._gave_way = SummedLog(_GAVE_WAY)
        self._check_reachable_s = 0.0
        self._on_empty: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[ClientSession]:
        return iter(tuple(self._sessions))

    # --- Numbers that are read on demand ---

    @property
    def open_count(self) -> int:
        """Connections that are idle or served."""
        return sum(session.state is not CLOSING for session in self._sessions)

    @property
    def backend_slots(self) -> int:
        """Slots in which the backend works on requests whose clients still want them."""
        return sum(session.request.backend_slots for session in self._sessions if session.request is not None)

    def at_work(self, model: str | None = None) -> list[AtWork]:
        """The requests on which the backend works, or one model of it."""
        requests = [session.request for session in self._sessions if session.request is not None]
        return [
            AtWork(
                request.record.left_queue_s,
                request.backend_slots,
                request.stage is Stage.AWAITING_RESPONSE,
                request.unanswered_bytes,
                request.stream_events,
                request.record.key_id,
                request.record.first_byte_s,
                request.is_unread,
            )
            for request in requests
            if request.backend_slots and model in (None, request.record.model)
        ]

    def unanswered_bytes(self) -> int:
        """Return the size of all bodies that the backend works on and has not begun to answer."""
        return sum(session.request.unanswered_bytes for session in self._sessions if session.request is not None)

    def suspects(self, model: str | None = None) -> Iterator[Suspect]:
        """The requests that the backend, or one model of it, works on."""
        for session in self._sessions:
            request = session.request
            if request is not None and request.is_at_work and model in (None, request.record.model):
                yield request.suspect()

    # --- Opening and closing ---

    def open(self, writer: asyncio.StreamWriter, transport: asyncio.Transport, received: bytes = b"") -> None:
        """Serve a new connection; `received` has been read from it already."""
        count_unread = self.services.memory.change_unread
        client = ClientProtocol(writer, transport, self._ticker, self._batcher, self.services.limits, count_unread)
        client.is_proxy = self._proxies.trusts(client.peer)
        public_only = self._is_full() and not self._evict(public_only=False)
        fits = not public_only or self._has_room_for_public() or self._evict(public_only=True)
        session = ClientSession(self, client, public_only=public_only)
        self._sessions[session] = None
        client.on_lost = lambda: self._forget(session)
        if fits:
            session.begin()
        else:
            session.refuse(GatewayError(TOO_MANY_CONNECTIONS))
        if received:
            client.data_received(received)

    def _places(self, *, public_only: bool) -> Iterator[ClientSession]:
        """Yield the sessions that occupy a place, the oldest first. Those that linger have a limit of their own."""
        for session in self._sessions:
            if session.public_only is public_only and not session.gave_way and not session.client.lingers:
                yield session

    def _is_full(self) -> bool:
        most = self.settings.max_connections
        return len(self._sessions) >= most and sum(1 for _ in self._places(public_only=False)) >= most

    def _has_room_for_public(self) -> bool:
        return sum(1 for _ in self._places(public_only=True)) < _MAX_PUBLIC_ONLY

    def _evict(self, *, public_only: bool) -> bool:
        """End the connection that can best be spared; return whether there was one.

        It is the one that has been idle longest. If none is idle, it is the oldest whose client has shown no valid key:
        such connections cost nothing, so any number of them may come.
        """
        idle, stranger = None, None
        for session in self._places(public_only=public_only):
            if session.is_quiet:
                if idle is None or session.serial < idle.serial:
                    idle = session
            elif stranger is None and not session.client.authenticated:
                stranger = session
        chosen = idle or stranger
        if chosen is None:
            return False
        self._gave_way.add()
        chosen.give_way()
        return True

    def limit_lingering(self, client: ClientProtocol) -> None:
        """A client begins to linger: if too many do, end the one that has for longest. A drain waits for none."""
        if self.services.lifecycle.draining:
            client.shorten_linger(_DRAIN_LINGER_S)
        lingering = [session for session in self._sessions if session.client.lingers]
        if len(lingering) > _MAX_LINGERING:
            min(lingering, key=attrgetter("serial")).client.abort()

    def _forget(self, session: ClientSession) -> None:
        self._sessions.pop(session, None)
        if self._on_empty is not None and not self._sessions and not self._on_empty.done():
            self._on_empty.set_result(None)

    def on_tick(self, now_s: float) -> None:
        for session in tuple(self._sessions):
            session.client.check_time(now_s)
            if session.request is not None:
                session.request.beat(now_s)
        self._gave_way.on_tick(now_s)
        if now_s >= self._check_reachable_s:
            self._check_reachable_s = now_s + _REACHABLE_CHECK_S
            self._hang_up_unreachable()

    def _hang_up_unreachable(self) -> None:
        """End the connections whose clients are gone without a FIN while they were sent something."""
        for session in tuple(self._sessions):
            client = session.client
            if not client.transport.is_closing() and tcp_state(client.transport).peer_is_unreachable:
                client.hang_up()

    # --- The end ---

    def cancel_waits(self, error: GatewayError, stage: str | None = None) -> None:
        """End the wait of each session with `error`; with a stage, only of the requests in it."""
        for session in tuple(self._sessions):
            if session.state is not CLOSING and (stage is None or _stage_of(session) is stage):
                session.client.cancel_wait(error)

    def close_idle(self) -> None:
        """End the connections that have sent nothing of a next request, and in a moment those that linger."""
        for session in tuple(self._sessions):
            if session.state is IDLE and not session.client.has_unread:
                session.client.cancel_wait(PeerGone())
            elif session.client.lingers:
                session.client.shorten_linger(_DRAIN_LINGER_S)

    async def wait_empty(self) -> None:
        """Wait until the last connection is closed."""
        if self._sessions:
            self._on_empty = asyncio.get_running_loop().create_future()
            await self._on_empty

    def hang_up(self) -> None:
        self._gave_way.flush()
        for session in tuple(self._sessions):
            session.client.hang_up()


def _stage_of(session: ClientSession) -> str | None:
    return None if session.request is None else session.request.stage
