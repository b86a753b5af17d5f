"""llama-server's wire surface without a model: for a first try, for tests, for measuring a gateway.

    python3 mock_backend.py --host 127.0.0.1 --port 8080 [any further flag of llama-server]

Heeded: --host, --port (0 takes a free one), -np/--parallel, -m, -a/--alias, --api-key, --api-key-file (and
LLAMA_API_KEY), --sse-ping-interval. Every other flag is taken and ignored. The knobs come by environment:

    MOCK_TOKENS_PER_SECOND  50    tokens a second and slot; 0 = as fast as they can be sent
    MOCK_TOKENS             48    length of an answer whose request names none
    MOCK_SLOTS              -np   slots; 4 where neither is given
    MOCK_PROMPT_MS          50    milliseconds from the slot's start to the first token
    MOCK_CACHED_TOKENS      0     how many tokens of each prompt count as cached
    MOCK_LOAD_SECONDS       0     how long everything answers 503 "Loading model"
    MOCK_BIND_SECONDS       0     how long the port stays unbound, as while llama-server downloads a model
    MOCK_POLL_MS            1000  how often it looks whether the client has left, as llama-server does

A prompt counts one token a byte and one for the start; an answer one token a word, each an event of its own when
streamed. The same request gets the same words. The parser trusts its peer, as a server on a public address must not;
there is no template engine, and tools, images and `n` are ignored.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from http import HTTPStatus
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

from mock_wire import (
    CHEAP,
    COMPUTING,
    GENERATING,
    PAGES,
    PUBLIC,
    WIRE,
    Body,
    Generation,
    Json,
    Refusal,
    Route,
    asked_length,
    bad_request,
    fill,
    parse_wire,
    to_events,
    to_json,
)

KEEPALIVE_S = 5.0
REQUESTS_PER_CONNECTION = 100
JSON_TYPE = "application/json; charset=utf-8"
EVENT_STREAM = ("X-Accel-Buffering: no", "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
MALFORMED = b"HTTP/1.1 400 Bad Request\r\nServer: llama.cpp\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
TOTALS = ("prompt_tokens", "prompt_tokens_cached", "prompt_seconds", "tokens_predicted", "tokens_predicted_seconds")


# Settings


@dataclass(frozen=True)
class Settings:
    """The flags that are heeded, then the knobs by their own names."""

    host: str = "127.0.0.1"
    port: int = 0
    model: str = "mock"
    keys: frozenset[str] = frozenset()
    ping_s: float = 30.0
    slots: int = 4
    tokens_per_second: float = 50.0
    tokens: int = 48
    prompt_ms: float = 50.0
    cached_tokens: int = 0
    load_seconds: float = 0.0
    bind_seconds: float = 0.0
    poll_ms: float = 1000.0


def load_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Read the flags and the knobs. Raises ValueError where a number is none, OSError for the key file."""

    def flag(default: str, *names: str) -> str:
        values = [value for name, value in pairwise(argv) if name in names]
        return values[-1] if values else default

    keys = flag(environ.get("LLAMA_API_KEY", ""), "--api-key").split(",")
    if path := flag("", "--api-key-file"):
        keys += Path(path).read_text("utf-8").splitlines()
    knobs: dict[str, Json] = {"slots": max(1, int(flag("4", "-np", "--parallel")))}
    for name, default in list(asdict(Settings()).items())[5:]:
        if value := environ.get(f"MOCK_{name.upper()}"):
            knobs[name] = type(default)(value)
    return Settings(
        flag("127.0.0.1", "--host"),
        int(flag("8080", "--port")),
        flag(os.path.basename(flag("mock", "-m", "--model")), "-a", "--alias"),
        frozenset(key.strip() for key in keys if key.strip() and not key.startswith("#")),
        float(flag("30", "--sse-ping-interval")),
        **knobs,
    )


# Reading and writing HTTP


class Exchange:
    """One request, and what goes out for it."""

    def __init__(self, writer: asyncio.StreamWriter, head: str, *, last: bool) -> None:
        """Parse the head. Raises ValueError for what is not HTTP."""
        line, *rest = head.split("\r\n")[:-2]
        self.method, target, version = line.split(" ")
        self.path = target.partition("?")[0]
        self.fields = {name.lower(): value.strip() for name, value in (pair.split(":", 1) for pair in rest)}
        wish = self.fields.get("connection", "").lower()
        self.closes = last or wish == "close" or (version == "HTTP/1.0" and wish != "keep-alive")
        self.body = b""
        self.writer = writer

    async def read_body(self, reader: asyncio.StreamReader) -> None:
        if self.fields.get("expect", "").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" not in self.fields.get("transfer-encoding", ""):
            self.body = await reader.readexactly(int(self.fields.get("content-length", "0")))
            return
        while chunk_bytes := int(await reader.readline(), 16):
            self.body += (await reader.readexactly(chunk_bytes + 2))[:-2]
        while (await reader.readline()).strip():
            pass

    def json(self) -> dict[str, Json]:
        try:
            body = json.loads(self.body)
        except ValueError as error:
            raise bad_request(f"[json.exception.parse_error.101] {error}") from None
        return body if isinstance(body, dict) else {}

    async def send(self, payload: str, status: int = 200, kind: str = JSON_TYPE) -> None:
        """Send a whole answer."""
        self.closes = self.closes or status >= 400
        body = payload.encode()
        await self.write_head(status, f"Content-Type: {kind}", f"Content-Length: {len(body)}")
        await self.write(b"" if self.method == "HEAD" else body)

    async def send_chunk(self, payload: bytes) -> None:
        """Send one chunk; the empty one is the last."""
        await self.write(b"%x\r\n%b\r\n" % (len(payload), payload))

    async def write_head(self, status: int, *kinds: str) -> None:
        origin = f"Access-Control-Allow-Origin: {self.fields.get('origin', '')}"
        connection = "Connection: close" if self.closes else "Keep-Alive: timeout=5, max=100"
        lines = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Server: llama.cpp", origin, *kinds, connection)
        await self.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def write(self, payload: bytes) -> None:
        # Only a generation that outlives its client still writes once the connection is gone.
        if not self.writer.is_closing():
            self.writer.write(payload)
            with suppress(ConnectionError):
                await self.writer.drain()


# The server


class MockBackend:
    """Refuses as llama-server's middleware does, lets in as many as there are slots, and answers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.wire = parse_wire(WIRE)
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self.busy: set[int] = set()
        self.deferred = 0
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(settings.slots):
            self._free.put_nowait(slot)
        self._serial = 0
        self._ready_s = time.monotonic() + settings.load_seconds

    async def start(self) -> asyncio.Server:
        """Listen; port 0 takes a free one, which the server's own socket tells."""
        return await asyncio.start_server(self._serve, self.settings.host, self.settings.port)

    # One connection…

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for served in count(1):
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), KEEPALIVE_S)
                exchange = Exchange(writer, head.decode("latin-1"), last=served == REQUESTS_PER_CONNECTION)
                await exchange.read_body(reader)
                if not await self._stayed(exchange, reader) or exchange.closes:
                    break
        except (ValueError, asyncio.LimitOverrunError):
            writer.write(MALFORMED)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            pass
        except asyncio.CancelledError:
            pass  # Nobody but the end of the program cancels this; streams would print it as an error.
        finally:
            writer.close()

    async def _stayed(self, exchange: Exchange, reader: asyncio.StreamReader) -> bool:
        """Answer, and tell whether the client stayed for it: a half-closed connection counts as left."""
        work = asyncio.ensure_future(self._answer(exchange))
        try:
            while not (await asyncio.wait({work}, timeout=self.settings.poll_ms / 1000))[0]:
                left = reader.at_eof() or exchange.writer.is_closing()
                if left and "x-conversation-id" not in exchange.fields:
                    return False
            work.result()
            return True
        finally:
            work.cancel()

    # …one request…

    async def _answer(self, exchange: Exchange) -> None:
        try:
            self._admit(exchange)
            if exchange.method == "POST":
                await self._post(exchange, exchange.path)
            elif exchange.method == "OPTIONS":
                await exchange.send("", kind="text/html")
            else:
                await self._get(exchange, exchange.path)
        except Refusal as refusal:
            status, kind, message = refusal.args
            await exchange.send(to_json({"error": {"message": message, "type": kind, "code": status}}), status)

    def _admit(self, exchange: Exchange) -> None:
        """Loading is told before the key is looked at; X-Api-Key counts only where Authorization is absent."""
        if exchange.method == "OPTIONS":
            return
        if time.monotonic() < self._ready_s:
            raise Refusal(503, "unavailable_error", "Loading model")
        offered = exchange.fields.get("authorization", exchange.fields.get("x-api-key", "")).removeprefix("Bearer ")
        if self.settings.keys and offered not in self.settings.keys and exchange.path not in PUBLIC:
            raise Refusal(401, "authentication_error", "Invalid API Key")

    async def _get(self, exchange: Exchange, path: str) -> None:
        if exchange.method not in ("GET", "HEAD"):
            raise Refusal(404, "not_found_error", "File Not Found")
        if path == "/metrics":
            await exchange.send(self._metrics(), kind="text/plain; version=0.0.4")
        elif path == "/slots":
            about = {"n_ctx": 16384, "speculative": False}
            slots = range(self.settings.slots)
            await exchange.send(to_json([{"id": slot, **about, "is_processing": slot in self.busy} for slot in slots]))
        elif path in PAGES:
            facts = SimpleNamespace(model=self.settings.model, slots=self.settings.slots, created=int(time.time()))
            await exchange.send(fill(self.wire[PAGES[path]]["whole"][0], facts))
        else:
            raise Refusal(404, "not_found_error", "File Not Found")

    def _metrics(self) -> str:
        row = "# HELP llamacpp:{0} {0}\n# TYPE llamacpp:{0} {1}\nllamacpp:{0} {2:.9g}\n"
        rows = [row.format(f"{name}_total", "counter", self.totals[name]) for name in TOTALS]
        rows.append(row.format("requests_processing", "gauge", len(self.busy)))
        rows.append(row.format("requests_deferred", "gauge", self.deferred))
        return "".join(rows)

    async def _post(self, exchange: Exchange, path: str) -> None:
        if path in GENERATING:
            await self._generate(exchange, GENERATING[path])
        elif path in COMPUTING:
            answer = COMPUTING[path](exchange.json())
            async with self._slot():
                self.totals["prompt_tokens"] += answer["usage"]["prompt_tokens"] if "usage" in answer else 0
                await asyncio.sleep(self.settings.prompt_ms / 1000)
                await exchange.send(to_json(answer))
        elif path in CHEAP:
            await exchange.send(to_json(CHEAP[path](exchange.json())))
        else:
            raise Refusal(404, "not_found_error", "File Not Found")

    # …one generation

    async def _generate(self, exchange: Exchange, route: Route) -> None:
        body, asked = exchange.json(), asked_length(exchange.json())
        self._serial += 1
        made = Generation(
            route.prompt_of(body),
            self.settings.model,
            self._serial,
            limit=asked or self.settings.tokens,
            reason=route.cut if asked else route.finished,
            cached=self.settings.cached_tokens,
        )
        async with self._slot() as made.slot:
            try:
                if body.get("stream"):
                    await self._stream(exchange, made, route.answer, body)
                else:
                    async for _ in self._words(made):
                        pass
                    await exchange.send(fill(self.wire[route.answer]["whole"][0], made))
            finally:
                self._count(made)

    async def _stream(self, exchange: Exchange, made: Generation, answer: str, body: Body) -> None:
        """Send the head as soon as the slot is taken, each word as it is made."""
        wire = self.wire[answer]
        deltas = wire.get("timed", wire["delta"]) if body.get("timings_per_token") else wire["delta"]
        await exchange.write_head(200, *EVENT_STREAM)
        async for paused in self._words(made):
            if paused:
                await exchange.send_chunk(b":\n\n")
                continue
            templates = [*(wire.get("opening", []) if made.made == 1 else []), *deltas]
            await exchange.send_chunk(to_events(templates, made))
        options = body.get("stream_options")
        asked = isinstance(options, dict) and options.get("include_usage")
        await exchange.send_chunk(to_events(wire.get("usage" if asked else "closing", wire["closing"]), made))
        if "end" in wire:
            await exchange.send_chunk(to_events(wire["end"], made))
        await exchange.send_chunk(b"")
        # llama-server closes after every stream, whatever Keep-Alive its head has promised.
        exchange.closes = True

    async def _words(self, made: Generation) -> AsyncIterator[bool]:
        """Make one word after the other, each when it is due; yield True where a ping is due instead."""
        rate = self.settings.tokens_per_second
        made.started_s = time.monotonic()
        begin_s = made.started_s + self.settings.prompt_ms / 1000
        for index in range(made.limit):
            due_s = begin_s + (index / rate if rate else 0.0)
            while (pause_s := due_s - time.monotonic()) > self.settings.ping_s > 0:
                await asyncio.sleep(self.settings.ping_s)
                yield True
            await asyncio.sleep(max(0.0, pause_s))
            made.next_word()
            yield False

    def _count(self, made: Generation) -> None:
        """Count what was done, to whatever end it came."""
        if made.words:
            self.totals["prompt_tokens"] += made.fresh
            self.totals["prompt_tokens_cached"] += made.cached
            self.totals["prompt_seconds"] += made.prompt_s
            self.totals["tokens_predicted"] += made.made
            self.totals["tokens_predicted_seconds"] += made.last_s - made.first_s

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[int]:
        """Take a slot in turn; whoever waits hears nothing meanwhile."""
        self.deferred += 1
        try:
            slot = await self._free.get()
        finally:
            self.deferred -= 1
        self.busy.add(slot)
        try:
            yield slot
        finally:
            self.busy.discard(slot)
            self._free.put_nowait(slot)


# The program


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, which cut every stream as they do with llama-server."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if settings.bind_seconds > 0:
        print(f"mock_backend: unbound for {settings.bind_seconds:g} s", file=sys.stderr, flush=True)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), settings.bind_seconds)
            return
    server = await MockBackend(settings).start()
    host, port = server.sockets[0].getsockname()[:2]
    print(f"mock_backend: listening on http://{host}:{port}", file=sys.stderr, flush=True)
    await stop.wait()


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        settings = load_settings(argv, environ)
        asyncio.run(serve(settings))
    except (OSError, ValueError) as error:
        print(f"mock_backend: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
