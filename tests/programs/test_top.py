"""top.py: the board in a terminal, what it prints for scripts, and what it says if there is nothing to show."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import top
from support.clock import PATIENCE_S
from support.paths import SCRIPTS
from support.ports import free_port
from support.together import ENVIRON, aside

KEY = "sk-olga-0123456789abcdef"
CHAT = "/v1/chat/completions"
LIMITS = [[8, 100], [0, None], [300, 50000], [300, None]]
FIRST: dict[str, Any] = {
    "t": 1000.0,
    "gateway": {
        "role": "operator",
        "state": "ready",
        "since": 900,
        "detail": "",
        "models": [{"name": "tiny", "state": "ready"}],
        "version": "1.2.3",
        "started": 400,
        "slots": 2,
        "active": 2,
        "connections": 5,
        "viewers": 1,
    },
    "now": {"tokens_per_s": 0.0, "first_token_s": [0.25, 1.5]},
    "slots": {"rows": [["alice", CHAT, 990.0, 991.0, 90, 1], ["bob", "/completion", 999.0, 0, 0, 1]], "freeing": 0},
    "queue": {"rows": [[1, "carol", CHAT, 995.0, 1]], "queued": 1},
    "series": {"step_s": 5, "end": 1005, "tokens": [0] * 177 + [10, 20]},
    "newest": 80,
    "failures": {"queue_full": 3, "invalid_api_key": 7},
    "keys": {"rows": [["alice", *LIMITS, 2], ["bob", *LIMITS, None]], "of": 2},
    "requests": [[989.0, "req-2", "bob", CHAT, 503, "queue_full", 0, 0, 0.001, 0, 0]],
}
SECOND = {
    "t": 1001.0,
    "now": {"tokens_per_s": 31.5, "first_token_s": [0.25, 1.5]},
    "more": [[1000.5, "req-3", "alice", CHAT, 200, "done", 0.5, 0.75, 9.5, 12, 120]],
}
OWN = {
    **FIRST,
    "gateway": {**FIRST["gateway"], "role": "infer", "key": "alice"},
    "queue": {"rows": [], "queued": 0, "before": 4},
}


class Answer(BaseHTTPRequestHandler):
    """Answers the stream with the server's script, and keeps what was asked."""

    server: "StubGateway"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization", "")))
        status, events = self.server.status, self.server.events
        self.send_response(status)
        self.end_headers()
        if status != 200:
            self.wfile.write(json.dumps({"error": {"message": "The reason."}}).encode())
            return
        for event in events:
            name = "event: end\n" if "reason" in event else ""
            self.wfile.write(f"{name}data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.server.finish.wait(PATIENCE_S if self.server.stays else 0)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class StubGateway(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status = 200
        self.events: list[dict[str, Any]] = [FIRST, SECOND]
        self.asked: list[tuple[str, str]] = []
        self.finish = threading.Event()
        self.stays = True


@pytest.fixture
def stub() -> Iterator[StubGateway]:
    with StubGateway() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
        thread.start()
        yield server
        server.finish.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_API_KEY", KEY)


# --- For scripts ---


def test_one_moment_as_json_has_names(stub: StubGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert top.main(["--url", stub.url, "--once", "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert view["now"]["tokens_per_s"] == 31.5
    assert view["slots"]["rows"][0] == {
        "key": "alice",
        "route": CHAT,
        "since": 990.0,
        "first_byte": 991.0,
        "tokens": 90,
        "slots": 1,
    }
    assert view["queue"]["rows"][0]["place"] == 1
    assert view["keys"]["rows"][0]["tokens_per_day"] == {"used": 300, "limit": 50000}
    assert [row["id"] for row in view["requests"]] == ["req-3", "req-2"]
    assert stub.asked == [("/ui/events", f"Bearer {KEY}")]


def test_a_pipe_that_is_read_no_further_is_a_sentence(stub: StubGateway) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(SCRIPTS / "top.py"), "--url", stub.url, "--once"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "top: error: stdout: Broken pipe\n")


def test_one_moment_as_text(stub: StubGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert top.main(["--url", stub.url, "--once"]) == 0
    output = capsys.readouterr().out
    for part in ("READY · tiny · operator", "31.5 tokens/s", "slots 2 of 2", "waiting 1", "carol", "300 of 50,000"):
        assert part in output
    assert re.search(r"done +500 ms +750 ms +9\.5 s +12 +120\n", output)
    assert "queue_full (503)" in output


def test_another_key_sees_how_many_wait_before_it(stub: StubGateway, capsys: pytest.CaptureFixture[str]) -> None:
    stub.events = [OWN, SECOND]
    assert top.main(["--url", stub.url, "--once"]) == 0
    assert "key alice" in (output := capsys.readouterr().out)
    assert "before you 4" in output


def test_the_key_comes_from_a_file(stub: StubGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "key.txt"
    file.write_text("sk-from-file\n")
    assert top.main(["--url", f"{stub.url}/below/", "--key-file", str(file), "--once"]) == 0
    assert stub.asked == [("/below/ui/events", "Bearer sk-from-file")]


def test_without_a_key_none_is_sent(stub: StubGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWAY_API_KEY")
    assert top.main(["--url", stub.url, "--once"]) == 0
    assert stub.asked == [("/ui/events", "")]


def test_a_stream_that_ends_after_one_event_is_shown(stub: StubGateway, capsys: pytest.CaptureFixture[str]) -> None:
    stub.events, stub.stays = [FIRST], False
    assert top.main(["--url", stub.url, "--once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["t"] == 1000.0


# --- What can go wrong ---


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the gateway does not accept this key. The reason."),
        (404, "this gateway shows no board: it has UI=off, or it is older, or the URL is another server's"),
        (503, "the gateway refuses: status 503. The reason."),
    ],
)
def test_a_refusal_is_explained(
    stub: StubGateway, capsys: pytest.CaptureFixture[str], status: int, message: str
) -> None:
    stub.status = status
    assert top.main(["--url", stub.url, "--once"]) == 1
    assert capsys.readouterr() == ("", f"top: error: {message}\n")


def test_a_missing_key_is_explained(
    stub: StubGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GATEWAY_API_KEY")
    stub.status = 401
    assert top.main(["--url", stub.url, "--once"]) == 1
    message = "the gateway needs a key: name a file with --key-file, or set GATEWAY_API_KEY"
    assert capsys.readouterr() == ("", f"top: error: {message}\n")


def test_an_answer_of_another_server_is_explained() -> None:
    assert str(top.refusal(500, b"<html>")) == "the gateway refuses: status 500."


def test_no_gateway_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert top.main(["--url", url, "--once"]) == 1
    assert capsys.readouterr().err == f"top: error: no gateway at {url}: Connection refused\n"


def test_a_gateway_that_stops_is_explained(stub: StubGateway, capsys: pytest.CaptureFixture[str]) -> None:
    stub.events, stub.stays = [{"reason": "draining"}], False
    assert top.main(["--url", stub.url, "--once"]) == 1
    assert "it is stopping" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "No such file or directory"),
        (b"", "it is empty"),
        (b"\xff", "it is not text"),
        (b"two\nlines", "not one line of visible ASCII"),
    ],
)
def test_a_file_without_a_key_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: bytes | None, message: str
) -> None:
    file = tmp_path / "key.txt"
    if contents is not None:
        file.write_bytes(contents)
    assert top.main(["--key-file", str(file), "--once"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--json"], ["--url", "localhost:8000"], ["--url", "http://"], ["--url", "http://a:x"], ["--key", "sk-1"]]
)
def test_wrong_usage_is_explained(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        top.main(argv)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_without_a_terminal_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert top.main([]) == 1
    assert capsys.readouterr().err == "top: error: this is no terminal: use --once\n"


# --- Its text ---

VIEW = top.merge(FIRST, SECOND)


@pytest.mark.parametrize("name", top.LISTS)
@pytest.mark.parametrize("view", [VIEW, top.merge(OWN, SECOND)], ids=["operator", "own"])
@pytest.mark.parametrize(("width", "height"), [(200, 60), (80, 24), (40, 10), (20, 5), (1, 1)])
def test_a_screen_fits(view: dict[str, Any], name: str, width: int, height: int) -> None:
    lines = top.screen(view, name, 0, width, height, top.BLOCKS)
    assert len(lines) <= height
    assert all(len(line) <= max(width, 16) for line, _ in lines)


def test_a_narrow_table_leaves_out_what_matters_least() -> None:
    wide = top.listed(VIEW, "requests", 200)[0]
    narrow = top.listed(VIEW, "requests", 34)[0]
    assert "PROMPT" in wide
    assert narrow.split() == ["ENDED", "KEY", "RESULT"]


def test_a_list_scrolls() -> None:
    rows = [[1000.0 - each, f"req-{each}", "alice", CHAT, 200, "done", 0, 0.1, 1.0, 1, each] for each in range(50)]
    view = {**VIEW, "requests": rows}
    first = "\n".join(line for line, _ in top.screen(view, "requests", 0, 120, 30, top.BLOCKS))
    later = "\n".join(line for line, _ in top.screen(view, "requests", 20, 120, 30, top.BLOCKS))
    assert re.search(r" 1\.0 s +1 +3\n", first)
    assert not re.search(r" 1\.0 s +1 +3\n", later)
    assert re.search(r" 1\.0 s +1 +21\n", later)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0204, "20 ms"),
        (1.26, "1.3 s"),
        (12.4, "12 s"),
        (75, "1 min"),
        (7300, "2 h 1 min"),
        (400_000, "4 d"),
    ],
)
def test_spans_are_short(seconds: float | None, text: str) -> None:
    assert top.span(seconds) == text


def test_a_plot_has_the_width_that_there_is() -> None:
    assert top.sparkline([0, 0, 1, 8], 4, "01234567") == "0017"
    assert top.sparkline([0, 0, 1, 8], 2, "01234567") == "07"
    assert top.sparkline([0, 0], 5, "01234567") == "00"
    assert top.sparkline([1], 0, "01234567") == ""


def test_a_new_first_event_replaces_the_list_of_requests() -> None:
    assert [row[1] for row in VIEW["requests"]] == ["req-3", "req-2"]
    assert top.merge(VIEW, FIRST)["requests"] == FIRST["requests"]


# --- In a terminal ---


class Terminal:
    """top.py in a terminal of its own."""

    def __init__(self, master: int, process: "subprocess.Popen[bytes]") -> None:
        self._master = master
        self.process = process
        self.output = ""

    def until(self, pattern: str) -> None:
        """Read until what was written since the last call has the pattern."""
        give_up_s = time.monotonic() + PATIENCE_S
        seen = ""
        while not re.search(pattern, seen):
            assert time.monotonic() < give_up_s, f"{pattern} is not in {seen!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    data = os.read(self._master, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it has ended: {self.output!r}") from None
                self.output += data
                seen += re.sub(r"\x1b[\[(][0-9;?]*[A-Za-z]", " ", data)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def end(self) -> int:
        """Read the rest; return the exit status."""
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                break
            if not data:
                break
            self.output += data.decode(errors="replace")
        return self.process.wait(PATIENCE_S)


@contextmanager
def terminal(url: str, width: int = 100, height: int = 30, **environ: str) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    process = subprocess.Popen(
        # What is started in the background of a shell ignores SIGINT, and so would this.
        ["env", "--default-signal=INT", sys.executable, SCRIPTS / "top.py", "--url", url],
        env={**ENVIRON, "GATEWAY_API_KEY": KEY, "TERM": "xterm", "LC_ALL": "C.UTF-8", **environ},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)


@aside
def test_the_screen_shows_the_board_and_takes_keys(tmp_path: Path) -> None:
    with served() as stub, terminal(stub.url) as screen:
        # In any order: what the first event has shown already is not written again.
        screen.until(r"(?s)(?=.*31\.5 tokens/s)(?=.*carol)(?=.*REQUESTS keys failures)")
        screen.press("\t")
        screen.until("KEYS")
        screen.press("\t")
        screen.until("FAILURES[\\s\\S]*invalid_api_key")
        screen.resize(38, 12)
        screen.until("READY")
        screen.press("\x1b[B\x1b[Aq")
        assert screen.end() == 0
        assert "Traceback" not in screen.output


@aside
def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    with served() as stub, terminal(stub.url) as screen:
        screen.until("READY")
        screen.process.send_signal(signal.SIGINT)  # as the terminal does at Ctrl-C
        assert screen.end() == 130
        assert "Traceback" not in screen.output


@aside
def test_a_refused_key_ends_it_with_a_sentence(tmp_path: Path) -> None:
    with served(status=401) as stub, terminal(stub.url) as screen:
        assert screen.end() == 1
        assert "top: error: the gateway does not accept this key. The reason." in screen.output


@aside
def test_an_unknown_terminal_is_explained(tmp_path: Path) -> None:
    with served() as stub, terminal(stub.url, TERM="no-such-terminal") as screen:
        assert screen.end() == 1
        assert "use --once" in screen.output


@aside
def test_a_pause_is_shown_and_ended_by_a_key(tmp_path: Path) -> None:
    with served(events=[FIRST, {"reason": "idle"}], stays=False) as stub, terminal(stub.url) as screen:
        screen.until("press c to continue")
        stub.events, stub.stays = [FIRST, SECOND], True
        screen.press("c")
        screen.until(r"31\.5 tokens/s")
        assert len(stub.asked) == 2


@aside
def test_a_lost_gateway_is_looked_for_again(tmp_path: Path) -> None:
    with served(events=[FIRST, {"reason": "draining"}], stays=False) as stub, terminal(stub.url) as screen:
        screen.until("the gateway is stopping")
        stub.events, stub.stays = [FIRST, SECOND], True
        screen.until(r"31\.5 tokens/s")


@contextmanager
def served(**changes: Any) -> Iterator[StubGateway]:
    with StubGateway() as server:
        for name, value in changes.items():
            setattr(server, name, value)
        thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
        thread.start()
        yield server
        server.finish.set()
        server.shutdown()
        thread.join()
