#!/usr/bin/env python3
"""Make the pictures of the pages again, with a headless Chromium: `make screenshots`.

    python3 docs/screenshots.py                 the board: wide, dark, on a phone
    python3 docs/screenshots.py --benchmark     the benchmark's report, too: it is measured for 75 s

The board is the real page, fed by the gateway's own code with an afternoon that was made up from a fixed seed, so the
pictures have the same contents each time. Exit status 3: npm or Chromium is not available.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT / "tests" / "e2e")]

from chromium import Chromium, Tab

from accounting.request_history import EndedRequest, KeyHistory
from accounting.request_record import Outcome
from core.errors import INVALID_API_KEY, QUEUE_FULL, RATE_LIMIT_EXCEEDED, Kind
from core.installation import version
from proxy.board_view import BoardState, CurrentRequest, key_view, operator_view
from proxy.board_viewers import Feed
from proxy.own_page import board_page

IMAGES = ROOT / "docs" / "images"
MOST_BYTES = 150 << 10
CANNOT = 3
NOW_S = 4002.5  # by the records' clock
EPOCH_S = 1_795_960_800.0 - NOW_S  # 2026-11-29, 14:00 UTC
SLOTS = 4
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
KEYS = {"alice": 5, "bob": 3, "ci": 2, "support-bot": 4}
LIMITS = {"alice": 2_000_000, "bob": 1_000_000, "ci": None, "support-bot": 900_000}


class Afternoon:
    """An hour of requests to four slots, made up from a seed."""

    def __init__(self) -> None:
        self._random = random.Random(20261129)
        self.all = KeyHistory()
        self.own = {key_id: KeyHistory() for key_id in KEYS}
        self.tokens = dict.fromkeys(KEYS, 0)
        free_s = [0.0] * SLOTS
        rows = []
        at_s = 0.0
        while at_s < NOW_S:
            busy = 0.35 + 0.65 * abs((at_s / 420) % 2 - 1)
            at_s += self._random.expovariate(0.95 * busy)
            slot = min(range(SLOTS), key=free_s.__getitem__)
            row = self._request(len(rows), at_s, max(at_s, free_s[slot]))
            free_s[slot] = max(free_s[slot], row.ended_s)
            rows.append(row)
        for row in sorted(rows, key=lambda row: row.ended_s):
            if row.ended_s < NOW_S:
                self._add(row)

    def _request(self, number: int, at_s: float, begins_s: float) -> EndedRequest:
        key_id = self._random.choices(list(KEYS), list(KEYS.values()))[0]
        label = MESSAGES if key_id == "bob" else CHAT
        prompt, completion = self._random.randint(40, 1900), self._random.randint(30, 420)
        first_s = begins_s + 0.08 + prompt / 4000
        ended_s = first_s + completion / self._random.uniform(52, 60)
        request = (f"req-7c1d5e0a92bf-{number}".encode(), key_id, label)
        chance = self._random.random()
        if chance < 0.012:
            return self._refused(request, at_s, RATE_LIMIT_EXCEEDED if key_id == "ci" else QUEUE_FULL)
        if chance < 0.04:
            completion //= 3
            ended_s = first_s + completion / 56
            times = (at_s, at_s, begins_s, first_s, ended_s)
            return EndedRequest(*request, 200, Outcome.CANCELLED, None, *times, prompt, completion)
        return EndedRequest(
            *request, 200, Outcome.DONE, None, at_s, at_s, begins_s, first_s, ended_s, prompt, completion
        )

    def _refused(self, request: tuple[bytes, str, str], at_s: float, kind: Kind) -> EndedRequest:
        return EndedRequest(*request, kind.status, Outcome.REFUSED, kind, at_s, 0.0, 0.0, 0.0, at_s + 0.001, 0, 0)

    def _add(self, row: EndedRequest) -> None:
        for history in (self.all, self.own[row.key_id]):
            history.add([row], row.ended_s, plain=False)
        self.tokens[row.key_id] += row.prompt + row.completion

    def state(self) -> BoardState:
        """Return the moment that the pictures show."""
        running = [
            CurrentRequest("support-bot", CHAT, NOW_S - 7.4, NOW_S - 7.1, 405),
            CurrentRequest("bob", MESSAGES, NOW_S - 4.9, NOW_S - 4.6, 262),
            CurrentRequest("alice", CHAT, NOW_S - 2.3, NOW_S - 2.1, 121),
            CurrentRequest("ci", CHAT, NOW_S - 0.3),
        ]
        waiting = [
            CurrentRequest("alice", CHAT, NOW_S - 1.9),
            CurrentRequest("support-bot", CHAT, NOW_S - 1.2),
            CurrentRequest("support-bot", CHAT, NOW_S - 0.6),
        ]
        return BoardState(
            now_s=NOW_S,
            epoch_s=EPOCH_S,
            state="ready",
            since_at=EPOCH_S + NOW_S - 3980,
            detail="",
            models=(("Qwen3-30B-A3B-Q4_K_M", "ready"),),
            version=version(),
            started_at=EPOCH_S + NOW_S - 4002,
            slots=SLOTS,
            active=SLOTS,
            connections=11,
            viewers=2,
            order=[(request.key_id, 1) for request in waiting],
            running=running,
            waiting=waiting,
            speeds={"": 208.4, "alice": 57.6},
        )

    def limits(self, *key_ids: str) -> dict[str, object]:
        rows: list[list[object]] = []
        for key_id in key_ids:
            used = self.tokens[key_id]
            minute = sum(row.started_s > NOW_S - 60 for row in self.own[key_id].rows)
            month = [used * 9 + 31_244, None]
            rows.append([key_id, [minute, 100], [0, None], [used, LIMITS[key_id]], month, {"ci": 1}.get(key_id)])
        return {"rows": rows, "of": len(rows)}

    def for_operator(self) -> bytes:
        for _ in range(23):
            self.all.failures[INVALID_API_KEY.code] += 1
        return whole({**operator_view(self.state(), self.all), "keys": self.limits(*KEYS)}, self.all)

    def for_alice(self) -> bytes:
        own = self.own["alice"]
        return whole({**key_view(self.state(), own, "alice"), "keys": self.limits("alice")}, own)


def whole(sections: dict[str, Any], history: KeyHistory) -> bytes:
    """Return the first event of a stream."""
    feed = Feed()
    feed.update(EPOCH_S + NOW_S, EPOCH_S, sections, history)
    return feed.whole()


class Board(BaseHTTPRequestHandler):
    """Serves the page and its stream, of which there is one event for each key."""

    events: ClassVar[dict[str, bytes]] = {}
    page = board_page(needs_key=True)
    seen = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/ui":
            for name, value in self.page.fields:
                self.send_header(name.decode(), value.decode())
            self.end_headers()
            self.wfile.write(self.page.content)
        else:
            self.end_headers()
            self.wfile.write(self.events[self.headers["Authorization"]])
            self.wfile.flush()
            self.seen.wait(60)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def board() -> Iterator[str]:
    """Serve the board until the block ends. Yields its address."""
    afternoon = Afternoon()
    Board.events = {"Bearer operator": afternoon.for_operator(), "Bearer alice": afternoon.for_alice()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Board)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/ui"
    finally:
        Board.seen.set()
        server.shutdown()
        server.server_close()


def picture(tab: Tab, name: str) -> None:
    path = IMAGES / name
    tab.screenshot(path)
    size = path.stat().st_size
    print(f"docs/images/{name}: {size >> 10} KiB")
    if size > MOST_BYTES:
        raise SystemExit(f"docs/images/{name} is larger than {MOST_BYTES >> 10} KiB: make it smaller")


def board_pictures(chromium: Chromium) -> None:
    with board() as url:
        for name, key, width, height, dark in (
            ("board.png", "operator", 1200, 960, False),
            ("board-dark.png", "operator", 900, 720, True),
            ("board-phone.png", "alice", 390, 800, False),
        ):
            tab = chromium.open_tab(url, width, height, dark=dark)
            tab.call("Emulation.setTimezoneOverride", timezoneId="UTC")
            tab.wait_for("!document.getElementById('keyform').hidden")
            tab.type(key)
            tab.press("Enter")
            tab.wait_for("document.querySelector('#requests td')")
            tab.evaluate("document.activeElement.blur()")
            picture(tab, name)
            tab.close()


def benchmark_picture(chromium: Chromium, folder: Path) -> None:
    report = folder / "report.html"
    subprocess.run([sys.executable, ROOT / "bench" / "run.py", "--html", report], check=True)
    tab = chromium.open_tab(report.as_uri(), 1100, 1100)
    tab.wait_for("document.querySelector('svg')")
    picture(tab, "benchmark.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", action="store_true", help="measure, and make the picture of the report, too")
    options = parser.parse_args(argv)
    found = subprocess.run([ROOT / "tests" / "e2e" / "get_browser.sh"], stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        return found.returncode
    with tempfile.TemporaryDirectory() as folder, Chromium(found.stdout.split()[0], Path(folder)) as chromium:
        board_pictures(chromium)
        if options.benchmark:
            benchmark_picture(chromium, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
