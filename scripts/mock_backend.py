"""A mock of llama-server's HTTP API without a model: for a first start, for tests, for measuring a gateway.

    python3 mock_backend.py --host 127.0.0.1 --port 8080 [any other flag of llama-server]

Flags with an effect: --host, --port (0 takes a free port), -np/--parallel, -m, -a/--alias, --api-key, --api-key-file
(and LLAMA_API_KEY), --sse-ping-interval, --slot-save-path (slots can be emptied). With --models-dir or --models-preset
(and no -m) it is a router of several models, all in this process: --models-max, --no-models-autoload. A model whose
file does not begin with GGUF fails to load; a file need not exist. All other flags are accepted and ignored.
Environment variables:

    MOCK_TOKENS_PER_SECOND  50    tokens per second and slot; 0 = as fast as possible
    MOCK_TOKENS             48    tokens of an answer if the request gives no maximum
    MOCK_SLOTS              -np   number of slots; 4 if neither is given
    MOCK_PROMPT_MS          50    milliseconds from the start in a slot to the first token
    MOCK_CACHED_TOKENS      0     tokens of each prompt that count as cached
    MOCK_LOAD_SECONDS       0     for this long every answer is 503 "Loading model"; as a router: the time of each load
    MOCK_BIND_SECONDS       0     for this long the port is not bound, as while llama-server downloads a model
    MOCK_POLL_MS            1000  interval at which it checks whether the client has disconnected, as llama-server does

A prompt counts one token per byte and one for the start. An answer counts one token per word; in a stream each token is
one event. The same request gets the same text. The HTTP parser trusts its peer: do not use it on a public address.
There is no template engine; tools, images and `n` are ignored.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python3 -P` leaves a script's own folder out

from core import signals

if __name__ == "__main__":
    signals.ignore(*signals.STRAY)

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar
from urllib.parse import parse_qs

from core.installation import shown, version_line
from mock.endpoints import GENERATING, PAGES, PUBLIC, WITH_SLOT, WITHOUT_SLOT, GenerationEndpoint
from mock.generation import Generation
from mock.model_table import LOADING, UNLOADED, MockModel, ModelTable, find_models
from mock.request_bodies import ApiError, Body, bad_request, max_tokens
from mock.templates import TEMPLATES, Json, fill, parse_templates, to_events, to_json

Number = TypeVar("Number", int, float)

KEEPALIVE_S = 5.0
REQUESTS_PER_CONNECTION = 100
JSON_TYPE = "application/json; charset=utf-8"
EVENT_STREAM = ("X-Accel-Buffering: no", "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
MALFORMED = b"HTTP/1.1 400 Bad Request\r\nServer: llama.cpp\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
PROXY_ERROR = "proxy error: Failed to read connection"
TOTALS = ("prompt_tokens", "prompt_tokens_cached", "prompt_seconds", "tokens_predicted", "tokens_predicted_seconds")


# Settings


@dataclass(frozen=True)
class Settings:
    """The flags that have an effect, then the MOCK_ variables by their own names."""

    host: str = "127.0.0.1"
    port: int = 0
    model: str = "mock"
    keys: frozenset[str] = frozenset()
    ping_s: float = 30.0
    empties_slots: bool = False
    models_dir: str = ""
    models_preset: str = ""
    models_max: int = 4
    autoload: bool = True
    slots: int = 4
    tokens_per_second: float = 50.0
    tokens: int = 48
    prompt_ms: float = 50.0
    cached_tokens: int = 0
    load_seconds: float = 0.0
    bind_seconds: float = 0.0
    poll_ms: float = 1000.0


def load_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Read flags and environment. Raises ValueError for an invalid number, OSError for the key file."""

    def flag(default: str, *names: str) -> str:
        values = [value for name, value in pairwise(argv) if name in names]
        return values[-1] if values else default

    keys = flag(environ.get("LLAMA_API_KEY", ""), "--api-key").split(",")
    if path := flag("", "--api-key-file"):
        keys += Path(path).read_text("utf-8").splitlines()
    variables: dict[str, Json] = {"slots": max(1, number("--parallel", flag("4", "-np", "--parallel"), int))}
    for name, default in list(asdict(Settings()).items())[10:]:
        variable = f"MOCK_{name.upper()}"
        if value := environ.get(variable):
            variables[name] = number(variable, value, type(default))
    return Settings(
        flag("127.0.0.1", "--host"),
        number("--port", flag("8080", "--port"), int),
        flag(os.path.basename(flag("mock", "-m", "--model")), "-a", "--alias"),
        frozenset(key.strip() for key in keys if key.strip() and not key.startswith("#")),
        number("--sse-ping-interval", flag("30", "--sse-ping-interval"), float),
        bool(flag("", "--slot-save-path")),
        flag("", "--models-dir") if not flag("", "-m", "--model") else "",
        flag("", "--models-preset") if not flag("", "-m", "--model") else "",
        number("--models-max", flag("4", "--models-max"), int),
        "--no-models-autoload" not in argv,
        **variables,
    )


def number(name: str, text: str, kind: type[Number]) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a number") from None


# Reading and writing HTTP


class HttpRequest:
    """One request, and the methods that answer it."""

    def __init__(self, writer: asyncio.StreamWriter, head: str, *, last: bool) -> None:
        """Parse the head. last closes the connection after the answer. Raises ValueError if it is not HTTP."""
        line, *rest = head.split("\r\n")[:-2]
        self.method, target, version = line.split(" ")
        self.path, _, query = target.partition("?")
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        self.head_sent = False
        self.fields = {name.lower(): value.strip() for name, value in (pair.split(":", 1) for pair in rest)}
        connection = self.fields.get("connection", "").lower()
        self.closes = last or connection == "close" or (version == "HTTP/1.0" and connection != "keep-alive")
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

    async def send(self, payload: str, status: int = 200, content_type: str = JSON_TYPE) -> None:
        """Send a complete answer."""
        self.closes = self.closes or status >= 400
        body = payload.encode()
        await self.write_head(status, f"Content-Type: {content_type}", f"Content-Length: {len(body)}")
        await self.write(b"" if self.method == "HEAD" else body)

    async def send_chunk(self, payload: bytes) -> None:
        """Send one chunk. An empty chunk is the last."""
        await self.write(b"%x\r\n%b\r\n" % (len(payload), payload))

    async def write_head(self, status: int, *more_lines: str) -> None:
        origin = f"Access-Control-Allow-Origin: {self.fields.get('origin', '')}"
        connection = "Connection: close" if self.closes else "Keep-Alive: timeout=5, max=100"
        lines = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Server: llama.cpp", origin, *more_lines, connection)
        self.head_sent = True
        await self.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def write(self, payload: bytes) -> None:
        # A generation with an X-Conversation-Id continues after its client has disconnected.
        if not self.writer.is_closing():
            self.writer.write(payload)
            with suppress(ConnectionError):
                await self.writer.drain()


# The server


class MockBackend:
    """Checks requests as llama-server's middleware does, runs as many as there are slots, and answers them.

    `totals` are the counters of /metrics, `busy` the slots in use, `deferred` the requests that wait for a slot.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.templates = parse_templates(TEMPLATES)
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self.busy: set[int] = set()
        self.deferred = 0
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(settings.slots):
            self._free.put_nowait(slot)
        self._serial = 0
        self._ready_s = time.monotonic() + settings.load_seconds

    async def start(self) -> asyncio.Server:
        """Listen. With port 0 the sockets of the returned server have the port. A host that ends in .sock is a path."""
        if self.settings.host.endswith(".sock"):
            return await asyncio.start_unix_server(self.serve_connection, self.settings.host)
        return await asyncio.start_server(self.serve_connection, self.settings.host, self.settings.port)

    # One connection…

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for served in count(1):
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), KEEPALIVE_S)
                request = HttpRequest(writer, head.decode("latin-1"), last=served == REQUESTS_PER_CONNECTION)
                await request.read_body(reader)
                if not await self._answer_while_connected(request, reader) or request.closes:
                    break
        except (ValueError, asyncio.LimitOverrunError):
            writer.write(MALFORMED)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            pass
        except asyncio.CancelledError:
            pass  # Only the end of the program cancels this. asyncio would log it as an error.
        finally:
            writer.close()

    async def _answer_while_connected(self, request: HttpRequest, reader: asyncio.StreamReader) -> bool:
        """Answer, and return whether the answer was completed. It is cancelled if the client disconnects.

        A half-closed connection counts as disconnected.
        """
        task = asyncio.ensure_future(self.answer(request))
        try:
            while not (await asyncio.wait({task}, timeout=self.settings.poll_ms / 1000))[0]:
                disconnected = reader.at_eof() or request.writer.is_closing()
                if disconnected and "x-conversation-id" not in request.fields:
                    return False
            task.result()
            return True
        finally:
            task.cancel()

    # …one request…

    async def answer(self, request: HttpRequest) -> None:
        try:
            self._check(request)
            await self.respond(request)
        except ApiError as error:
            status, kind, message = error.args
            await request.send(to_json({"error": {"message": message, "type": kind, "code": status}}), status)

    async def respond(self, request: HttpRequest) -> None:
        """Answer a request that has passed the checks. Raises ApiError."""
        if request.method == "POST":
            await self._post(request, request.path)
        elif request.method == "OPTIONS":
            await request.send("", content_type="text/html")
        else:
            await self._get(request, request.path)

    def _check(self, request: HttpRequest) -> None:
        """Raise ApiError while loading or if the key is wrong. X-Api-Key counts only without an Authorization field."""
        if request.method == "OPTIONS":
            return
        if time.monotonic() < self._ready_s:
            raise ApiError(503, "unavailable_error", "Loading model")
        key = request.fields.get("authorization", request.fields.get("x-api-key", "")).removeprefix("Bearer ")
        if self.settings.keys and key not in self.settings.keys and request.path not in PUBLIC:
            raise ApiError(401, "authentication_error", "Invalid API Key")

    async def _get(self, request: HttpRequest, path: str) -> None:
        if request.method not in ("GET", "HEAD"):
            raise ApiError(404, "not_found_error", "File Not Found")
        if path == "/metrics":
            await request.send(self._metrics(), content_type="text/plain; version=0.0.4")
        elif path == "/slots":
            about = {"n_ctx": 16384, "speculative": False}
            slots = range(self.settings.slots)
            await request.send(to_json([{"id": slot, **about, "is_processing": slot in self.busy} for slot in slots]))
        elif path in PAGES:
            facts = SimpleNamespace(model=self.settings.model, slots=self.settings.slots, created=int(time.time()))
            await request.send(fill(self.templates[PAGES[path]]["whole"][0], facts))
        else:
            raise ApiError(404, "not_found_error", "File Not Found")

    def _metrics(self) -> str:
        row = "# HELP llamacpp:{0} {0}\n# TYPE llamacpp:{0} {1}\nllamacpp:{0} {2:.9g}\n"
        rows = [row.format(f"{name}_total", "counter", self.totals[name]) for name in TOTALS]
        rows.append(row.format("requests_processing", "gauge", len(self.busy)))
        rows.append(row.format("requests_deferred", "gauge", self.deferred))
        return "".join(rows)

    async def _post(self, request: HttpRequest, path: str) -> None:
        if path in GENERATING:
            await self._generate(request, GENERATING[path])
        elif path in WITH_SLOT:
            answer = WITH_SLOT[path](request.json())
            async with self._slot():
                self.totals["prompt_tokens"] += answer["usage"]["prompt_tokens"] if "usage" in answer else 0
                await asyncio.sleep(self.settings.prompt_ms / 1000)
                await request.send(to_json(answer))
        elif self.settings.empties_slots and path.startswith("/slots/"):
            await request.send(to_json({"id_slot": 0, "n_erased": 0}))  # it keeps no prompts
        elif path in WITHOUT_SLOT:
            await request.send(to_json(WITHOUT_SLOT[path](request.json())))
        else:
            raise ApiError(404, "not_found_error", "File Not Found")

    # …one generation

    async def _generate(self, request: HttpRequest, endpoint: GenerationEndpoint) -> None:
        body = request.json()
        requested = max_tokens(body)
        self._serial += 1
        generation = Generation(
            endpoint.prompt_of(body),
            self.settings.model,
            self._serial,
            max_tokens=requested or self.settings.tokens,
            finish_reason=endpoint.truncated if requested else endpoint.finished,
            cached_tokens=self.settings.cached_tokens,
        )
        async with self._slot() as generation.slot:
            try:
                if body.get("stream"):
                    await self._stream(request, generation, endpoint.answer, body)
                else:
                    async for _ in self._words(generation):
                        pass
                    await request.send(fill(self.templates[endpoint.answer]["whole"][0], generation))
            finally:
                self._count(generation)

    async def _stream(self, request: HttpRequest, generation: Generation, answer: str, body: Body) -> None:
        """Send the head as soon as the request has a slot, and each word when it is generated."""
        parts = self.templates[answer]
        delta = parts.get("timed", parts["delta"]) if body.get("timings_per_token") else parts["delta"]
        await request.write_head(200, *EVENT_STREAM)
        async for is_ping in self._words(generation):
            if is_ping:
                await request.send_chunk(b":\n\n")
                continue
            opening = parts.get("opening", []) if generation.completion_tokens == 1 else []
            await request.send_chunk(to_events([*opening, *delta], generation))
        options = body.get("stream_options")
        with_usage = isinstance(options, dict) and options.get("include_usage")
        closing = parts.get("usage" if with_usage else "closing", parts["closing"])
        await request.send_chunk(to_events(closing, generation))
        if "end" in parts:
            await request.send_chunk(to_events(parts["end"], generation))
        await request.send_chunk(b"")
        # llama-server closes after every stream, despite the Keep-Alive field of its head.
        request.closes = True

    async def _words(self, generation: Generation) -> AsyncIterator[bool]:
        """Generate each word when it is due. Yields False for a word and True for a ping."""
        rate = self.settings.tokens_per_second
        generation.started_s = time.monotonic()
        first_due_s = generation.started_s + self.settings.prompt_ms / 1000
        for index in range(generation.max_tokens):
            due_s = first_due_s + (index / rate if rate else 0.0)
            while (pause_s := due_s - time.monotonic()) > self.settings.ping_s > 0:
                await asyncio.sleep(self.settings.ping_s)
                yield True
            await asyncio.sleep(max(0.0, pause_s))
            generation.next_word()
            yield False

    def _count(self, generation: Generation) -> None:
        """Add a generation to the totals, also if it was cancelled."""
        if generation.words:
            self.totals["prompt_tokens"] += generation.uncached_tokens
            self.totals["prompt_tokens_cached"] += generation.cached_tokens
            self.totals["prompt_seconds"] += generation.prompt_s
            self.totals["tokens_predicted"] += generation.completion_tokens
            self.totals["tokens_predicted_seconds"] += generation.last_s - generation.first_s

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[int]:
        """Wait for a slot, first come first served, and hold it. Nothing is sent to a waiting client."""
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


class MockRouter(MockBackend):
    """The mock with several models, each a MockBackend that does not listen. `table` has their states."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(replace(settings, load_seconds=0.0))
        models = find_models(settings.models_dir, settings.models_preset)
        self.table = ModelTable(models, settings.models_max, settings.load_seconds)
        self._backends = {name: MockBackend(self._settings_of(model)) for name, model in models.items()}

    def _settings_of(self, model: MockModel) -> Settings:
        given = model.options.get("parallel") or model.options.get("np")
        slots = number(f"parallel of {model.name}", given, int) if given else self.settings.slots
        return replace(self.settings, model=model.name, slots=slots)

    async def start(self) -> asyncio.Server:
        self.table.load_at_start()
        return await super().start()

    async def _get(self, request: HttpRequest, path: str) -> None:
        name = request.query.get("model", "")
        if path in ("/models", "/v1/models"):
            rows = [model.describe() for _, model in sorted(self.table.models.items())]
            await request.send(to_json({"data": rows, "object": "list"}))
        elif path == "/models/sse":
            await self._send_events(request)
        elif path == "/props" and not name:
            about = {"role": "router", "max_instances": self.settings.models_max, "build_info": "mock"}
            await request.send(to_json({**about, "models_autoload": self.settings.autoload}))
        elif path in (*PAGES, "/slots", "/metrics") and path not in PUBLIC:
            await self._pass(request, name)
        else:
            await super()._get(request, path)

    async def _post(self, request: HttpRequest, path: str) -> None:
        given = request.json().get("model")
        name = given if isinstance(given, str) else ""
        if path in ("/models/load", "/models/unload"):
            (self.table.load if path == "/models/load" else self.table.unload)(name)
            await request.send(to_json({"success": True}))
        elif path in (*GENERATING, *WITH_SLOT, *WITHOUT_SLOT) or path.startswith("/slots/"):
            await self._pass(request, name)
        else:
            await super()._post(request, path)

    async def _pass(self, request: HttpRequest, name: str) -> None:
        """Have a model answer. If it ends meanwhile, so does the answer, as llama-server's router ends it."""
        autoload = request.query.get("autoload", str(self.settings.autoload).lower()) in ("true", "1")
        model = await self.table.require(name, autoload=autoload)
        try:
            with self.table.in_use(model):
                if model.status == LOADING:
                    raise ApiError(503, "unavailable_error", "Loading model")
                await self._backends[model.name].respond(request)
        except asyncio.CancelledError:
            if model.status != UNLOADED:
                raise
            await self._send_end(request)

    async def _send_end(self, request: HttpRequest) -> None:
        request.closes = True
        if request.head_sent:
            await request.send_chunk(PROXY_ERROR.encode())
            await request.send_chunk(b"")
        else:
            await request.send(PROXY_ERROR, 500, "text/plain")

    async def _send_events(self, request: HttpRequest) -> None:
        """Stream each change until the client disconnects."""
        with self.table.events() as changes:
            await request.write_head(200, *EVENT_STREAM)
            while True:
                await request.send_chunk(f"data: {to_json(await changes.get())}\n\n".encode())


# The program


def backend_of(settings: Settings) -> MockBackend:
    """Return a router if there are models to choose from. Raises OSError and ValueError if they cannot be read."""
    return MockRouter(settings) if settings.models_dir or settings.models_preset else MockBackend(settings)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Streams are then cut, as by llama-server."""
    stop = asyncio.Event()
    for number in signals.STOP:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if settings.bind_seconds > 0:
        print(f"mock_backend: port not bound for {settings.bind_seconds:g} s", file=sys.stderr, flush=True)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), settings.bind_seconds)
            return
    server = await backend_of(settings).start()
    name = server.sockets[0].getsockname()
    place = name if isinstance(name, str) else f"http://{name[0]}:{name[1]}"
    print(f"mock_backend: listening on {place}", file=sys.stderr, flush=True)
    await stop.wait()


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if "--version" in argv:
        print("version: 11434 (mock_backend)", version_line(shown("mock_backend")), sep="\n")
        return 0
    try:
        settings = load_settings(argv, environ)
        asyncio.run(serve(settings))
    except (OSError, ValueError) as error:
        print(f"mock_backend: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
