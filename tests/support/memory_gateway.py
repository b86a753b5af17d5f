"""The proxy room in memory: real requests and sessions over transports that a test writes, and doubles around them."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from hashlib import sha256
from typing import Any

from accounting.request_record import RequestRecord
from accounting.token_estimates import TokenEstimator
from auth import Caller, Keyring, RateLimiter
from backend.generation_watch import GenerationWatch, GivenUp
from backend.left_stream import LeftStream
from backend.readiness import LOADING, READY
from backend.slot_isolation import SlotIsolation
from backend.slots import Connection
from config.settings import CheapSettings, Limits
from policy.body_rules import BodyRules
from policy.cors import Cors
from policy.fair_queue import FairQueue, Ticket
from policy.memory_budget import MemoryBudget
from policy.prepared_request import LastHead, PreparedRequest, RequestCache
from policy.routes import Routes
from policy.suspects import Suspect, Suspects
from policy.token_limiter import TokenLimiter
from proxy.access import AccessControl
from proxy.body_scan import BodyScans
from proxy.cheap_routes import CheapRoutes
from proxy.endpoints import EndpointCall
from proxy.last_responses import LastResponses
from proxy.lifecycle import Lifecycle
from proxy.relay import UpstreamTimeouts
from proxy.request import Request
from proxy.request_services import RequestServices, RequestTimeouts
from proxy.response_info import DateField
from proxy.session import Sessions, SessionSettings
from proxy.token_quotas import TokenQuotas
from support.backend import HELLO, answer
from support.clock import Clock
from support.gateway import CHAT, KEY, OPERATOR_KEY, post
from support.heads import every_answer
from support.memory_transport import Connector, Link, MemoryTransport, MemoryWriter, end_of, memory_test, turns_until
from transport.client_protocol import ClientProtocol
from transport.pool import ConnectionPool

EPOCH = DateField(lambda: 0.0)
DATE = EPOCH.line
ALICE = Caller("alice", "infer", 100)
OLGA = Caller("olga", "operator", 100)


def prepare(raw: bytes, cors: tuple[str, ...] = (), *, ui: bool = False) -> PreparedRequest:
    """Return the prepared request for a head, of which more may follow."""
    head = raw.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    return RequestCache(Limits(), Routes(ui=ui), Cors(cors), b"Host: backend\r\n").find(head, LastHead())[0]


class Keys:
    """The keys in force: alice infers, olga operates."""

    def __init__(self, **changes: Any) -> None:
        """`changes` are fields of alice."""
        alice = replace(ALICE, **changes)
        self.keyring = Keyring({sha256(KEY).digest(): alice, sha256(OPERATOR_KEY).digest(): OLGA})


class Ledger:
    """Knows what alice has spent today and this month."""

    def __init__(self) -> None:
        self.spent = 0
        self.spent_in_month = 0

    def spent_today(self, key_id: str) -> int:
        return self.spent if key_id == "alice" else 0

    def spent_this_month(self, key_id: str) -> int:
        return self.spent_in_month if key_id == "alice" else 0

    def resets_in_s(self) -> float:
        return 1234.5

    def month_resets_in_s(self) -> float:
        return 100_000.0

    def next_day(self) -> str:
        return "2026-01-31"

    def next_month(self) -> str:
        return "2026-02-01"


class ScriptedReadiness:
    """The backend's state, as a test sets it. `pending` are the futures that wait for it to be ready.

    `news` is a state that the gateway finds if it looks, and `doubted` the state after a refused connection.
    """

    def __init__(self) -> None:
        self.state = READY
        self.detail = self.news = ""
        self.doubted = LOADING
        self.since_at = 0.0
        self.doubts = 0
        self.pending: list[asyncio.Future[None]] = []

    def when_ready(self) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pending.append(future)
        if self.state == READY:
            future.set_result(None)
        return future

    def has_news(self) -> bool:
        return bool(self.news)

    async def catch_up(self) -> None:
        self.state, self.news = self.news, ""

    def doubt(self) -> None:
        self.state = self.doubted
        self.doubts += 1

    def turn_ready(self) -> None:
        self.state = READY
        for future in self.pending:
            if not future.done():
                future.set_result(None)


class ScriptedEndpoints:
    """Answers 200 `own`, or does what a test says."""

    def __init__(self) -> None:
        self.calls: list[EndpointCall] = []
        self.act: Callable[[EndpointCall], Coroutine[Any, Any, None]] | None = None

    async def answer(self, call: EndpointCall) -> None:
        self.calls.append(call)
        if self.act is not None:
            await self.act(call)
        else:
            call.response.send(200, b"text/plain", b"own")


class Records(list[RequestRecord]):
    """In place of the recorder."""

    def record(self, record: RequestRecord) -> None:
        self.append(record)


class Releases(list[tuple[Ticket, bool]]):
    """In place of the slot reclaimer. `connections` are those of the requests, and `given_up` what is watched.

    `streams` are those whose clients have left.
    """

    context: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.connections: list[Connection | None] = []
        self.given_up: list[GivenUp] = []
        self.streams: list[LeftStream] = []

    def release(
        self,
        ticket: Ticket,
        *,
        streamed: bool,
        watch: GenerationWatch | None = None,
        stream: LeftStream | None = None,
        connection: Connection | None = None,
    ) -> None:
        self.append((ticket, streamed))
        self.connections.append(connection)
        if watch is not None:
            self.given_up.append(watch.request)
            watch.end()
        if stream is not None:
            self.streams.append(stream)
            stream.end()


# What every response to alice's key has, and a whole response.
RATES = b"x-ratelimit-limit-requests: 100\r\nx-ratelimit-remaining-requests: 99\r\nx-ratelimit-reset-requests: 1m0s\r\n"
WHOLE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 18\r\n"
    + DATE
    + every_answer(b"r-1")
    + RATES
    + b"\r\n"
    + HELLO
)
TIMEOUTS = RequestTimeouts(
    client_body_s=30,
    client_body_rate=0,
    queue_s=60,
    cold_start_s=120,
    duration_s=0,
    heartbeat_s=float("inf"),
    flush_s=300,
)
SETTINGS = SessionSettings(max_connections=4, header_s=10, keepalive_s=75, flush_s=300)


async def list_slot(target: bytes) -> tuple[int, bytes]:
    return 200, b"[{}]"


async def erase_or_complete(target: bytes, body: bytes) -> tuple[int, bytes]:
    return 200, b'{"n_erased": 0, "timings": {"cache_n": 0}}'


class MemoryGateway:
    """Requests and sessions with real parts, except for what knows the backend's state and keeps accounts."""

    def __init__(
        self,
        clock: Clock,
        *,
        slots: int = 2,
        queue_size: int = 8,
        alice: Any = None,
        isolates: bool = False,
        settings: SessionSettings = SETTINGS,
        scan_clock: Callable[[], float] = lambda: 0.0,
        **changes: Any,
    ) -> None:
        """`alice` are fields of the key's caller, `isolates`: each key has slots of its own, `changes` are timeouts.

        Bodies are read by `scan_clock`; by default at once.
        """
        self.link = Link(clock)
        self.backends = Connector()
        self.clients: list[ClientProtocol] = []  # without those of sessions
        self.records = Records()
        self.releases = Releases()
        self.readiness = ScriptedReadiness()
        self.endpoints = ScriptedEndpoints()
        self.lifecycle = Lifecycle()
        self.ledger = Ledger()
        self.memory = MemoryBudget(1000)
        self.queue = FairQueue(slots, queue_size, clock)
        self.limiter = RateLimiter(clock)
        self.pool = ConnectionPool(
            "backend", 8080, self.link.ticker, self.link.batcher, 65536, open_connection=self.backends
        )
        self.link.ticker.add_listener(self.pool.on_tick)
        keys: Any = Keys(**(alice or {}))
        quotas = TokenQuotas(self.ledger, TokenLimiter(clock), TokenEstimator(), lambda: None)  # type: ignore[arg-type]
        access = AccessControl(keys, self.limiter, quotas, enabled=True, admin_routes=False)
        parts: dict[str, Any] = {"readiness": self.readiness, "endpoints": self.endpoints, "reclaimer": self.releases}
        self.isolation = SlotIsolation(list_slot, erase_or_complete, clock, self.readiness.doubt)
        self.at_work: list[Suspect] = []
        self.suspects = Suspects(lambda model: self.at_work, clock)
        self.services = RequestServices(
            clock=clock,
            request_ids=iter(b"r-%d" % number for number in range(1, 1000)),
            lifecycle=self.lifecycle,
            date=EPOCH,
            access=access,
            quotas=quotas,
            limits=Limits(body_bytes=2000),
            timeouts=replace(TIMEOUTS, **changes),
            upstream_timeouts=UpstreamTimeouts(10, 600, 300),
            memory=self.memory,
            queue=self.queue,
            cheap_routes=CheapRoutes(CheapSettings(2, 600, 1500), queue_size, clock),
            pool=self.pool,
            isolation=self.isolation if isolates else None,
            reads_members=isolates,
            models=None,
            body_scans=BodyScans(scan_clock),
            body_rules=BodyRules(),
            suspects=self.suspects,
            suspects_lane=FairQueue(1, 0, clock),
            backend_lives=self.backends.lives,
            recorder=self.records,  # type: ignore[arg-type]
            last_responses=LastResponses(clock),
            **parts,
        )
        self.cache = RequestCache(self.services.limits, Routes(), Cors(()), b"Host: backend\r\n")
        self.sessions = Sessions(self.services, self.cache, settings, self.link.ticker, self.link.batcher)
        self.link.ticker.add_listener(self.sessions.on_tick)

    # --- Clients ---

    def serve(self, raw: bytes) -> "Served":
        """Serve one request on a new connection, without a session. A part of its body may have been received."""
        return self.prepare(raw).start()

    def prepare(self, raw: bytes) -> "Served":
        """Make the request only."""
        client = self.link.client(limits=self.services.limits, count_unread=self.memory.change_unread)
        self.clients.append(client)
        return Served(self, client, raw)

    def connect(self, transport: MemoryTransport | None = None, received: bytes = b"") -> MemoryTransport:
        """Open a session; return its client's end."""
        transport = transport or MemoryTransport()
        writer: Any = MemoryWriter(transport)
        self.sessions.open(writer, transport, received)
        return transport

    def fill_slots(self) -> None:
        """Let another key have all slots."""
        for _ in range(self.queue.slots):
            self.queue.acquire("bob")

    def expect_end(self, served: "Served", outcome: str, status: int) -> None:
        """Check that a request has ended like this, was recorded once, and holds nothing any more."""
        assert served.returned != []
        assert self.records == [served.record]
        assert (served.record.outcome, served.record.status) == (outcome, status)
        assert (self.memory.held_bytes, self.queue.queued) == (0, 0)

    def end(self) -> None:
        """Let all clients leave; then nothing is held for them."""
        for client in self.clients:
            client.hang_up()
        self.sessions.hang_up()
        assert (self.memory.held_bytes, self.queue.queued) == (0, 0)

    # --- The backend ---

    async def asked(self, connections: int = 1) -> MemoryTransport:
        """Return the backend's end of the newest connection, once there are so many and it has got a request."""
        transports = self.backends.transports
        await turns_until(
            lambda: self.link.batcher.flush() or (len(transports) == connections and transports[-1].written)
        )
        return transports[-1]

    async def die(self, *bodies: bytes) -> None:
        """Let the backend die while chats with these bodies are at work, which are answered all the same."""
        served = [self.serve(post(CHAT, body)) for body in bodies]
        await self.asked(len(self.backends.transports) + len(bodies))
        self.at_work = [each.request.suspect() for each in served]
        self.suspects.note_cut()
        self.suspects.note_down()
        for transport in self.backends.transports[-len(bodies) :]:
            transport.receive(answer(HELLO, b"200 OK", b"Connection: close"))

    async def keep_connection(self) -> MemoryTransport:
        """Put an idle connection into the pool; return the backend's end of it."""
        backend = await self.pool.connect()
        backend.deadline_s = float("inf")
        self.pool.release(backend, True)
        return end_of(backend)


class Served:
    """One request, its client, and what its handler returned."""

    def __init__(self, gateway: MemoryGateway, client: ClientProtocol, raw: bytes) -> None:
        self._gateway = gateway
        self.client = client
        self.transport = end_of(client)
        head, end, body = raw.partition(b"\r\n\r\n")
        if body:
            self.transport.receive(body)
        prepared, length = gateway.cache.find(head + end, LastHead())
        self.request = Request(gateway.services, client, prepared, length)
        self.returned: list[bool] = []
        self._written = b""
        gateway.link.ticker.add_listener(self._beat)

    def _beat(self, now_s: float) -> None:
        if not self.returned:
            self.request.beat(now_s)

    def start(self) -> "Served":
        self.client.run_handler(self.request.handle(), self.returned.append)
        return self

    @property
    def sent(self) -> bytes:
        """All that the client was sent."""
        self._written += self._gateway.link.sent(self.client)
        return self._written

    @property
    def status(self) -> int:
        """The status that the client was sent, 0 if there is none."""
        return int(self.sent[9:12] or 0)

    @property
    def code(self) -> str:
        """The code of the error that the client was sent."""
        return str(json.loads(self.sent.partition(b"\r\n\r\n")[2])["error"]["code"])

    @property
    def record(self) -> RequestRecord:
        return self.request.record


def in_memory(**settings: Any) -> Callable[..., Callable[..., None]]:
    """Make a test of a coroutine function whose first parameter is a new MemoryGateway(**settings).

    Afterwards all clients leave; then no memory is held and no request waits.
    """
    return memory_test(lambda clock: MemoryGateway(clock, **settings), MemoryGateway.end)
