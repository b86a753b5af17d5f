"""The shipped HAProxy configuration over real workers, and clients that record the outcome of each request."""

import hashlib
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection, IncompleteRead
from pathlib import Path

from support.boot import PATIENCE_S, Boot
from support.ports import free_ports

SHIPPED = Path(__file__).resolve().parent.parent.parent / "deploy" / "haproxy" / "haproxy.cfg"
FREE_KEY = "sk-free-0123456789abcdef"
LOOSE_KEY = "sk-loose-0123456789abcdef"
EXACT_KEY = "sk-exact-0123456789abcdef"
RATE = 12
KEYS_FILE = f"free:{FREE_KEY}:1000000\nloose:{LOOSE_KEY}:{RATE}\nexact:{EXACT_KEY}:{RATE}\n"
MOCK = {
    "TRUSTED_PROXIES": "127.0.0.1",
    "METRICS_AUTH_ENABLED": "false",
    "MOCK_BACKEND": "true",
    "MOCK_TOKENS_PER_SECOND": "200",
    "MOCK_PROMPT_MS": "20",
    "PARALLEL": "4",
}
# HAProxy drops a line of a log to a file descriptor or a syslog socket rather than wait. It loses none in its memory.
RING = """
ring lines
    format raw
    maxlen 4096
    size 16777216
"""
LOG_LINE = re.compile(r" clients~ (\w+)/(\S+) \S+ (-?\d+) \d+ \S+ \S+ (\S{4}) \S+ \S+ \{(.*?)\} ")


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Wait until it holds. Asserts that it does in time."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, f"never: {what}"
        time.sleep(0.01)


@dataclass(frozen=True)
class Response:
    """What a client received: `whole` unless the body was cut, status 0 if there was no response at all."""

    id: str
    status: int
    worker: str
    body: bytes
    whole: bool
    started_s: float

    @property
    def done(self) -> bool:
        return self.status == 200 and self.whole


@dataclass(frozen=True)
class Logged:
    """HAProxy's log line of one request. `ending` is its termination state (S…: the worker's side ended it)."""

    backend: str
    worker: str
    status: int
    ending: str


class Proxy:
    """HAProxy with the shipped configuration, its addresses and paths replaced."""

    def __init__(self, folder: Path, workers: Sequence[Boot]) -> None:
        self.folder = folder
        self.port, self._spare_port, numbers_port = free_ports(3)
        self._output = folder / "haproxy.out"
        self._make_certificate()
        digest = hashlib.sha256(EXACT_KEY.encode()).hexdigest()
        (folder / "exact_keys.lst").write_text(f"# of the one key\n{digest}\n")
        text = _replace(SHIPPED.read_text(), "log /dev/log local0", "log ring@lines len 4096 format raw local0")
        text = _replace(text, "maxconn 20000", "maxconn 200")
        text = re.sub(r"    (chroot|user|group) .*\n", "", text)
        text = _replace(text, "/run/haproxy/admin.sock", f"{folder}/admin.sock")
        text = _replace(text, "bind :443", f"bind 127.0.0.1:{self.port}")
        text = _replace(text, "/etc/haproxy/certs/", f"{folder}/certs/")
        text = _replace(text, "/etc/haproxy/exact_keys.lst", f"{folder}/exact_keys.lst")
        text = _replace(text, "127.0.0.1:8404", f"127.0.0.1:{numbers_port}")
        self.config = folder / "haproxy.cfg"
        self.config.write_text(self._point_to(workers, text) + RING)

    def _make_certificate(self) -> None:
        (self.folder / "certs").mkdir()
        self.certificate = self.folder / "certs" / "site.pem"
        key = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            f"{self.certificate}.key",
        ]
        name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
        argv = ["openssl", "req", "-x509", *key, *name, "-out", str(self.certificate)]
        subprocess.run(argv, check=True, capture_output=True)

    def _point_to(self, workers: Sequence[Boot], text: str) -> str:
        """Give each server line the ports of its worker. Without a worker, its port refuses connections."""
        backend = ""

        def point(match: "re.Match[str]") -> str:
            nonlocal backend
            if match[1]:
                backend = match[1]
                return match[0]
            number = int(match[2])
            env = workers[number - 1].env if number <= len(workers) else {}
            port, health = env.get("PORT", self._spare_port), env.get("PORT_HEALTH", self._spare_port)
            check = {"least": f" port {health}", "loading": f" port {port}", "exact": ""}[backend]
            return f"server w{number} 127.0.0.1:{port}{check}"

        return re.sub(r"(?m)^backend (\w+)|server w(\d) 10\.0\.0\.\d:8000", point, text)

    def check(self) -> subprocess.CompletedProcess[str]:
        argv = ["haproxy", "-c", "-f", str(self.config)]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        with self._output.open("wb") as output:
            process = subprocess.Popen(["haproxy", "-db", "-f", str(self.config)], stdout=output, stderr=output)
        try:
            eventually(lambda: self._listens(process), "HAProxy listens")
            yield self
        finally:
            process.terminate()
            process.wait(PATIENCE_S)

    def _listens(self, process: "subprocess.Popen[bytes]") -> bool:
        assert process.poll() is None, self._output.read_text()
        return (self.folder / "admin.sock").exists()

    def order(self, command: str) -> str:
        """Send a command to the admin socket; return the response."""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(PATIENCE_S)
            admin.connect(str(self.folder / "admin.sock"))
            admin.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: admin.recv(65536), b"")).decode()

    def up(self, backend: str) -> set[str]:
        """Return the workers that are up for a backend."""
        return {row[1] for row in self._servers(backend) if row[17] == "UP"}

    def sessions(self, backend: str, worker: str) -> int:
        (row,) = [row for row in self._servers(backend) if row[1] == worker]
        return int(row[4])

    def _servers(self, backend: str) -> list[list[str]]:
        rows = [line.split(",") for line in self.order("show stat").splitlines()]
        return [row for row in rows if row[0] == backend and row[1] != "BACKEND"]

    def logged(self, wanted: int) -> dict[str, Logged]:
        """Wait for so many log lines of requests with an id; return all by id."""
        found: dict[str, Logged] = {}

        def read() -> bool:
            matches = LOG_LINE.finditer(self.order("show events lines"))
            found.update({m[5]: Logged(m[1], m[2], int(m[3]), m[4]) for m in matches})
            return len(found) >= wanted

        eventually(read, f"{wanted} lines in HAProxy's log")
        return found

    def line(self, id: str) -> Logged:
        """Wait for the log line of one request; return it."""
        eventually(lambda: id in self.logged(0), f"a line on {id}")
        return self.logged(0)[id]

    # Clients

    def connect(self, source: str = "127.0.0.1") -> HTTPSConnection:
        """Return a connection for a client with this address."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        address = (source, 0)
        return HTTPSConnection("127.0.0.1", self.port, timeout=PATIENCE_S, context=context, source_address=address)

    def request(
        self, id: str, key: str = FREE_KEY, tokens: int = 16, *, stream: bool = False, field: str = "Authorization"
    ) -> Response:
        """Send one chat request on a new connection."""
        secret = f"Bearer {key}" if field == "Authorization" else key
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": stream}
        fields = {field: secret, "Content-Type": "application/json", "X-Request-Id": id}
        started_s = time.monotonic()
        connection = self.connect()
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), fields)
            response = connection.getresponse()
            worker = response.getheader("X-Worker", "")
            try:
                return Response(id, response.status, worker, response.read(), True, started_s)
            except (IncompleteRead, OSError) as cut:
                return Response(id, response.status, worker, getattr(cut, "partial", b""), False, started_s)
        except (OSError, HTTPException):
            return Response(id, 0, "", b"", False, started_s)
        finally:
            connection.close()

    def together(self, count: int, key: str = FREE_KEY, tokens: int = 16) -> list[Response]:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda number: self.request(f"one-{key}-{number}", key, tokens), range(count)))

    @contextmanager
    def load(self, clients: int, each: int) -> Iterator["Load"]:
        """Run clients that send `each` requests one after the other, every second one a stream."""
        load = Load(self, clients, each)
        with ThreadPoolExecutor(clients) as pool:
            work = [pool.submit(load.ask, client) for client in range(clients)]
            yield load
        for future in work:
            future.result()


class Load:
    def __init__(self, proxy: Proxy, clients: int, each: int) -> None:
        self._proxy, self._each = proxy, each
        self._news = threading.Condition()
        self.answers: list[Response] = []
        self.total = clients * each

    def ask(self, client: int) -> None:
        for number in range(self._each):
            answer = self._proxy.request(f"load-{client}-{number}", stream=number % 2 == 0)
            with self._news:
                self.answers.append(answer)
                self._news.notify_all()

    def await_answers(self, count: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self.answers) >= count, PATIENCE_S)


def _replace(text: str, old: str, new: str) -> str:
    assert old in text, f"{old} is not in the shipped configuration"
    return text.replace(old, new)


@contextmanager
def cluster(folder: Path, workers: int = 3, **settings: str) -> Iterator[tuple[Proxy, list[Boot]]]:
    """Start workers with start.sh, and HAProxy in front of them. All workers are up, unless settings make them load."""
    with ExitStack() as stack:
        boots = []
        for number in range(1, workers + 1):
            home = folder / f"w{number}"
            (home / "data").mkdir(parents=True)
            (home / "data" / "api_keys.txt").write_text(KEYS_FILE)
            boot = Boot(home, {**MOCK, **settings}, by_shell=True)
            boots.append(stack.enter_context(boot))
        for boot in boots:
            boot.await_line("gateway: version" if settings else "gateway: the backend is ready")
        proxy = stack.enter_context(Proxy(folder, boots).running())
        yield proxy, boots
