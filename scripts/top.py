#!/usr/bin/env python3
"""The board in a terminal: what a gateway does, once a second.

    python3 top.py --url http://127.0.0.1:8000 --key-file key.txt
    GATEWAY_API_KEY=… python3 top.py --once --json

An operator's key shows everything, any other key what is its own. The key comes from a file or from GATEWAY_API_KEY,
never from the command line, which every user of the machine can read. Keys: Tab shows another list, the arrows scroll
it, q quits. --once prints one moment and exits; with --json as one JSON object, for scripts.

Exit status: 0; 1 if there is no gateway, no board, or the key is refused; 2 for wrong usage; 130 after Ctrl-C.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python3 -P` leaves a script's own folder out

import argparse
import http.client
import json
import locale
import queue
import re
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from core.installation import add_version, shown
from proxy.board_view import KEY_COLUMNS, QUEUE_COLUMNS, REQUEST_COLUMNS, SLOT_COLUMNS

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
TIMEOUT_S = 10.0  # events come once a second
MOST_ROWS = 100
MOST_PAUSE_S = 30.0
LISTS = ("requests", "keys", "failures")
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.:-=+*#"

View = dict[str, Any]


class TopError(Exception):
    """The board cannot be shown. The message is for the user."""


# --- The stream ---


class BoardStream(NamedTuple):
    """An address and a key, empty if there is none."""

    url: str
    key: str

    def events(self) -> Iterator[View]:
        """Yield each event of the stream; the last one has a `reason`. Raises TopError, and OSError if it is cut."""
        connection = self._connect()
        try:
            headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
            connection.request("GET", urlsplit(self.url).path.rstrip("/") + "/ui/events", headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise refusal(response.status, response.read(), key_sent=bool(self.key))
            for line in response:
                if line.startswith(b"data: "):
                    yield dict(json.loads(line[6:]))
        except http.client.HTTPException as error:
            raise OSError(f"the stream is cut ({error!r})") from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, parts.port, timeout=TIMEOUT_S, context=context)
        return http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_S)


def refusal(status: int, body: bytes, *, key_sent: bool = True) -> TopError:
    """Return what a response that is no stream means."""
    if status == 401 and not key_sent:
        return TopError("the gateway needs a key: name a file with --key-file, or set GATEWAY_API_KEY")
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = ""
    if status == 401:
        return TopError(f"the gateway does not accept this key. {message}")
    if status == 404:
        return TopError("this gateway shows no board: it has UI=off, or it is older, or the URL is another server's")
    return TopError(f"the gateway refuses: status {status}. {message}".rstrip())


def merge(view: View, event: View) -> View:
    """Return what is known after an event."""
    merged = {**view, **event}
    more = merged.pop("more", [])
    merged["requests"] = (merged.get("requests", []) if "requests" in event else more + view.get("requests", []))[
        :MOST_ROWS
    ]
    return merged


def named(view: View) -> View:
    """Return a view with the names of its columns, for scripts."""

    def rows(names: Sequence[str], values: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(names, row, strict=False)) for row in values]

    limits = [
        {
            name: {"used": value[0], "limit": value[1]} if isinstance(value, list) else value
            for name, value in row.items()
        }
        for row in rows(KEY_COLUMNS, view["keys"]["rows"])
    ]
    return {
        **view,
        "slots": {**view["slots"], "rows": rows(SLOT_COLUMNS, view["slots"]["rows"])},
        "queue": {**view["queue"], "rows": rows(QUEUE_COLUMNS, view["queue"]["rows"])},
        "keys": {**view["keys"], "rows": limits},
        "requests": rows(REQUEST_COLUMNS, view["requests"]),
    }


# --- Text ---


def span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes // 1440} d"


def used(pair: Sequence[int | None]) -> str:
    return f"{pair[0]:,}" if pair[1] is None else f"{pair[0]:,} of {pair[1]:,}"


class Column(NamedTuple):
    """A column of a table. Those with the highest `rank` are left out first if there is no room."""

    title: str
    read: Callable[[Sequence[Any]], str]
    rank: int = 0
    right: bool = False


def table(given: Sequence[Column], rows: Sequence[Sequence[Any]], width: int) -> list[str]:
    """Return the lines of a table that is at most so wide, its titles first."""
    cells = [[column.title, *(column.read(row) for row in rows)] for column in given]
    widths = [max(map(len, each)) for each in cells]
    chosen = list(range(len(given)))
    while len(chosen) > 1 and sum(widths[each] + 2 for each in chosen) - 2 > width:
        chosen.remove(max(chosen, key=lambda each: (given[each].rank, each)))
    lines = []
    for number in range(len(rows) + 1):
        parts = [
            cells[each][number].rjust(widths[each]) if given[each].right else cells[each][number].ljust(widths[each])
            for each in chosen
        ]
        lines.append("  ".join(parts).rstrip()[:width])
    return lines


def sparkline(tokens: Sequence[float], width: int, blocks: str) -> str:
    """Return the tokens of the last steps as one line, the newest at its end."""
    if width < 1:
        return ""
    group = -(-len(tokens) // width)
    sums = [sum(tokens[max(end - group, 0) : end]) for end in range(len(tokens), 0, -group)][::-1]
    most = max(sums)
    return "".join(blocks[round((len(blocks) - 1) * value / most)] if most else blocks[0] for value in sums)


def header(view: View, width: int, blocks: str) -> list[str]:
    gateway, now, slots, queued = view["gateway"], view["now"], view["slots"], view["queue"]
    is_operator = gateway["role"] == "operator"
    models = ", ".join(model["name"] for model in gateway["models"] if model["name"])
    about = "operator" if is_operator else f"key {gateway['key']}"
    first = [gateway["state"].upper(), models, about, gateway["detail"], f"up {span(view['t'] - gateway['started'])}"]
    half, most = now["first_token_s"]
    busy = sum(row[5] for row in slots["rows"]) + slots["freeing"]
    numbers = [f"{now['tokens_per_s']:.1f} tokens/s", f"first token {span(half)} (95 %: {span(most)})"]
    if is_operator:
        numbers += [f"slots {busy} of {gateway['slots']}", f"waiting {queued['queued']}"]
    else:
        numbers += [f"at work {len(slots['rows'])}", f"waiting {queued['queued']}, before you {queued['before']}"]
    numbers.append(f"refused or failed {sum(view['failures'].values())}")
    series = [*view["series"]["tokens"], view["newest"]]
    plot = sparkline(series, min(width - 10, 90), blocks)
    return [*wrapped(first, width), *wrapped(numbers, width), f"15 min {plot} now" if plot else ""]


def wrapped(parts: Sequence[str], width: int) -> list[str]:
    """Join parts to lines that are at most so wide."""
    lines = [""]
    for part in filter(None, parts):
        joined = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(joined) <= width or not lines[-1]:
            lines[-1] = joined[:width]
        else:
            lines.append(part[:width])
    return lines


def at_work(view: View, width: int) -> list[str]:
    now = view["t"]

    def speed(row: Sequence[Any]) -> str:
        return f"{row[4] / (now - row[3]):.1f}/s" if row[4] and row[3] and now - row[3] > 0.5 else ""

    parts = (
        Column("KEY", lambda row: row[0]),
        Column("ROUTE", lambda row: row[1], 3),
        Column("FOR", lambda row: span(max(0.0, now - row[2])), 1, right=True),
        Column("TOKENS", lambda row: str(row[4]) if row[3] else "prompt", 2, right=True),
        Column("SPEED", speed, 4, right=True),
    )
    return ["At work", *table(parts, view["slots"]["rows"], width)] if view["slots"]["rows"] else []


def waiting(view: View, width: int) -> list[str]:
    parts = (
        Column("PLACE", lambda row: str(row[0]), right=True),
        Column("KEY", lambda row: row[1]),
        Column("ROUTE", lambda row: row[2], 3),
        Column("WAITS", lambda row: span(max(0.0, view["t"] - row[3])) if row[3] else "", 1, right=True),
    )
    return ["Queue", *table(parts, view["queue"]["rows"], width)] if view["queue"]["rows"] else []


def listed(view: View, name: str, width: int) -> list[str]:
    """Return one of the LISTS, its titles first."""
    if name == "requests":
        return table(_REQUEST_COLUMNS, view["requests"], width)
    if name == "keys":
        return table(_KEY_COLUMNS, view["keys"]["rows"], width)
    failures = sorted(view["failures"].items(), key=lambda item: -item[1])
    parts = (Column("REFUSALS AND ERRORS", lambda row: row[0]), Column("NUMBER", lambda row: str(row[1]), right=True))
    return table(parts, failures, width)


_REQUEST_COLUMNS = (
    Column("ENDED", lambda row: time.strftime("%H:%M:%S", time.localtime(row[0])), 1),
    Column("KEY", lambda row: row[2]),
    Column("ROUTE", lambda row: row[3], 6),
    Column("RESULT", lambda row: row[5] if row[5] == "done" else f"{row[5]} ({row[4]})"),
    Column("QUEUE", lambda row: span(row[6]) if row[6] else "", 5, right=True),
    Column("FIRST", lambda row: span(row[7]) if row[7] else "", 4, right=True),
    Column("IN ALL", lambda row: span(row[8]), 2, right=True),
    Column("PROMPT", lambda row: str(row[9] or ""), 7, right=True),
    Column("TOKENS", lambda row: str(row[10] or ""), 3, right=True),
)
_KEY_COLUMNS = (
    Column("KEY", lambda row: row[0]),
    Column("TOKENS TODAY", lambda row: used(row[3]), 1, right=True),
    Column("THIS MONTH", lambda row: used(row[4]), 4, right=True),
    Column("REQUESTS/MIN", lambda row: used(row[1]), 2, right=True),
    Column("TOKENS/MIN", lambda row: used(row[2]), 3, right=True),
    Column("AT ONCE", lambda row: str(row[5] or "-"), 5, right=True),
)


def screen(view: View, name: str, skip: int, width: int, height: int, blocks: str) -> list[tuple[str, bool]]:
    """Return the lines of a screen of this size, and whether each is a heading. `skip` rows of the list are above."""
    lines = [(line, False) for line in header(view, width, blocks)]
    for part in (at_work(view, width), waiting(view, width)):
        if part:
            lines += [("", False), *((line, number < 2) for number, line in enumerate(part))]
    room = max(4, height - len(lines) - 2)
    titles, *rows = listed(view, name, width)
    tabs = " ".join(each.upper() if each == name else each for each in LISTS)
    lines = lines[: max(0, height - room - 1)]
    shown = rows[skip : skip + room - 2]
    lines += [("", False), (f"{tabs} (Tab)"[:width], True), (titles, True), *((row, False) for row in shown)]
    return lines[:height]


def text(view: View, width: int, blocks: str) -> str:
    """Return one moment as text."""
    parts = [header(view, width, blocks), at_work(view, width), waiting(view, width)]
    parts += [[name.capitalize(), *listed(view, name, width)] for name in LISTS if view[name]]
    return "\n\n".join("\n".join(part) for part in parts if part)


# --- The program ---


class Reader(threading.Thread):
    """Reads the stream, and opens it again after a cut. What happens goes into `items`: events, messages, an end.

    `wanted` is cleared while the stream is paused.
    """

    def __init__(self, gateway: BoardStream) -> None:
        super().__init__(daemon=True)
        self.items: queue.Queue[View | str | TopError] = queue.Queue()
        self.wanted = threading.Event()
        self.wanted.set()
        self.gateway = gateway

    def run(self) -> None:
        pause_s = 1.0
        while True:
            self.wanted.wait()
            try:
                for event in self.gateway.events():
                    pause_s = 1.0
                    if "reason" in event:
                        self._end(str(event["reason"]))
                    else:
                        self.items.put(event)
                continue_s = 0.2
            except TopError as error:
                self.items.put(error)
                return
            except (OSError, ValueError) as error:
                self.items.put(f"no connection ({error}); trying again")
                continue_s, pause_s = pause_s, min(2 * pause_s, MOST_PAUSE_S)
            time.sleep(continue_s)

    def _end(self, reason: str) -> None:
        if reason == "idle":
            self.wanted.clear()
            self.items.put("paused: nothing was asked for ten minutes; press c to continue")
        elif reason == "draining":
            self.items.put("the gateway is stopping")


def show(gateway: BoardStream, blocks: str) -> None:
    """Show the board until q is pressed. Raises TopError."""
    try:
        import curses  # noqa: PLC0415 - some installations of Python have none, and --once needs none
    except ImportError:
        raise TopError("this Python has no curses: use --once") from None
    reader = Reader(gateway)
    reader.start()
    try:
        curses.wrapper(lambda window: Display(window, curses, reader, blocks).run())
    except curses.error as error:
        raise TopError(f"this terminal cannot show it ({error}): use --once") from None


class Display:
    """The screen: draws what the reader has found out, and takes keys."""

    def __init__(self, window: Any, curses: Any, reader: Reader, blocks: str) -> None:
        self._window = window
        self._curses = curses
        self._reader = reader
        self._blocks = blocks
        self._view: View = {}
        self._message = f"connecting to {reader.gateway.url}"
        self._list = 0
        self._skip = 0

    def run(self) -> None:
        with suppress(self._curses.error):
            self._curses.curs_set(0)
        self._window.timeout(200)
        while True:
            self._take_items()
            self._draw()
            if not self._take_key(self._window.getch()):
                return

    def _take_items(self) -> None:
        with suppress(queue.Empty):
            while True:
                item = self._reader.items.get_nowait()
                if isinstance(item, TopError):
                    raise item
                if isinstance(item, str):
                    self._message = item
                else:
                    self._view, self._message = merge(self._view, item), ""

    def _take_key(self, key: int) -> bool:
        """Do what a key is for; return whether to go on."""
        curses = self._curses
        height = self._window.getmaxyx()[0]
        steps = {curses.KEY_DOWN: 1, curses.KEY_UP: -1, curses.KEY_NPAGE: height // 2, curses.KEY_PPAGE: -height // 2}
        if key in (ord("q"), ord("Q")):
            return False
        if key == ord("\t"):
            self._list, self._skip = (self._list + 1) % len(LISTS), 0
        elif key == ord("c"):
            self._reader.wanted.set()
        elif key in steps and self._view:
            most = len(listed(self._view, LISTS[self._list], 80)) - 2
            self._skip = max(0, min(self._skip + steps[key], most))
        return True

    def _draw(self) -> None:
        height, width = self._window.getmaxyx()
        lines: list[tuple[str, bool]] = [(self._message[:width], True)] if self._message else []
        if self._view:
            lines += screen(self._view, LISTS[self._list], self._skip, width - 1, height - len(lines), self._blocks)
        self._window.erase()
        for row, (line, is_heading) in enumerate(lines[:height]):
            with suppress(self._curses.error):  # the last cell of a window cannot be written
                self._window.addnstr(row, 0, line, width, self._curses.A_BOLD if is_heading else 0)
        self._window.refresh()


def once(gateway: BoardStream) -> View:
    """Return one moment. The second event has the pace. Raises TopError."""
    view: View = {}
    try:
        for number, event in enumerate(gateway.events()):
            if "reason" not in event:
                view = merge(view, event)
            if number == 1:
                break
    except (OSError, ValueError) as error:
        if not view:
            raise TopError(f"no gateway at {gateway.url}: {getattr(error, 'strerror', None) or error}") from error
    if not view:
        raise TopError("the gateway has ended the stream at once: it is stopping")
    return view


def read_key(path: Path | None, environ: Mapping[str, str]) -> str:
    """Return the key of a file or of GATEWAY_API_KEY; empty if there is none. Raises TopError."""
    key = environ.get("GATEWAY_API_KEY", "")
    if path is not None:
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise TopError(f"--key-file {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from error
        if not key:
            raise TopError(f"--key-file {path}: it is empty")
    if key and not re.fullmatch(r"[!-~]+", key):
        raise TopError("the key is not one line of visible ASCII characters")
    return key


def url_of(given: str) -> str:
    """Return the URL of a gateway as an option's value. Raises ArgumentTypeError."""
    parts = urlsplit(given)
    try:
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right:
        raise argparse.ArgumentTypeError(f"{given!r} is not like http://HOST:PORT")
    return given.rstrip("/")


def main(argv: Sequence[str] | None = None) -> int:
    program = shown("top")
    description = __doc__.replace("top.py", program)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=program, description=description, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--url", type=url_of, default="http://127.0.0.1:8000", help="the gateway (%(default)s)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="a file with the key; else GATEWAY_API_KEY")
    parser.add_argument("--once", action="store_true", help="print one moment and exit")
    parser.add_argument("--json", action="store_true", help="with --once: as one JSON object")
    add_version(parser)
    arguments = parser.parse_args(argv)
    if arguments.json and not arguments.once:
        parser.error("--json needs --once")
    locale.setlocale(locale.LC_ALL, "")
    blocks = BLOCKS if "utf" in (sys.stdout.encoding or "").lower() else PLAIN_BLOCKS
    try:
        gateway = BoardStream(arguments.url, read_key(arguments.key_file, os.environ))
        if not arguments.once:
            if not (sys.stdin.isatty() and sys.stdout.isatty()):
                raise TopError("this is no terminal: use --once")
            show(gateway, blocks)
        elif arguments.json:
            print(json.dumps(named(once(gateway))), flush=True)
        else:
            print(text(once(gateway), shutil.get_terminal_size((160, 24))[0], blocks), flush=True)
    except TopError as error:
        print(f"top: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:  # such as a pipe that is read no further; the interpreter would write again at its end
        print(f"top: error: stdout: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
