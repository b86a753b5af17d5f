"""One cell of the matrix: a client in a situation, run and judged. And the table of all that were run."""

import os
import re
import signal
import subprocess
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from client_table import CLIENTS, Client, Command, Run, Shown, Tools
from known import ATTEMPTS, EXPECTED, OWN_WORDS
from situations import SITUATIONS, CellGateway, Setup, Situation

Name = tuple[str, str]
START_S = 45.0  # the time until a client's first request has ended, on a machine that is busy
LOOK_S = 0.1
BY_NAME: dict[Name, tuple[Client, Situation]] = {
    (client.name, situation.name): (client, situation)
    for situation in SITUATIONS
    for client in CLIENTS
    if not (client.is_agent and situation.mode == "whole")
}


@dataclass(frozen=True)
class Cell:
    """What a client did: `status` is its exit status, None if it had to be ended. `requests` are HTTP statuses."""

    client: Client
    situation: Situation
    status: int | None
    seconds: float
    requests: tuple[int, ...]
    shown: Shown
    expected_text: str

    @property
    def name(self) -> Name:
        return self.client.name, self.situation.name

    def problems(self) -> list[str]:
        """What is wrong with it, in sentences; empty if nothing is."""
        found = []
        if not self.requests:
            found.append("No request of it reached the gateway.")
        elif self.status is None:
            found.append(f"It still ran {self.situation.seconds:.0f} s after its first request.")
        most, _ = ATTEMPTS.get(self.name, (self.situation.requests, ""))
        if len(self.requests) > most:
            found.append(f"It sent {len(self.requests)} requests instead of {most} at most.")
        if self.situation.first not in (0, *self.requests[:1]):
            found.append(f"Its first request was not answered with {self.situation.first}.")
        if self.status is not None:
            found += self._wrong_end()
        return found

    def _wrong_end(self) -> list[str]:
        error, situation = self.shown.error, self.situation
        if error:
            if situation.wants == "text":
                return ["It failed."]
            seen = re.search(situation.reason, error) or OWN_WORDS.get(self.name, "\0") in error
            return [] if seen else ["The error does not show the reason."]
        if situation.wants == "error":
            return ["It ended as if all were well."]
        whole = self.expected_text in self.shown.text and self.shown.text.strip()
        return [] if whole else ["The text is not all there."]


def run_cell(client: Client, situation: Situation, setup: Setup, tools: Tools) -> Cell:
    """Arrange the situation, run the client in it, end both."""
    over = threading.Event()
    home = setup.folder / "home"
    home.mkdir()
    with situation.arrange(setup) as arranged:
        gateway = arranged.gateway
        run = Run(gateway.url, arranged.key, home, situation.mode, situation.prompt)
        meanwhile = threading.Thread(target=arranged.meanwhile, args=(over,), daemon=True)
        meanwhile.start()
        began_s = time.monotonic()
        try:
            status = run_command(client.command(tools, run), home, gateway, situation.seconds)
            seconds = time.monotonic() - began_s
        finally:
            over.set()
            meanwhile.join()
    stdout, stderr = ((home / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    shown = Shown("", "") if status is None else client.read(status, stdout, stderr)
    statuses = tuple(line["status"] for line in gateway.requests())
    return Cell(client, situation, status, seconds, statuses, shown, arranged.text)


def run_command(command: Command, folder: Path, gateway: CellGateway, seconds: float) -> int | None:
    """Run a program in a process group of its own; None if it had to be ended.

    It has START_S until its first request has ended, and `seconds` from then on.
    """
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command.arguments,
            env=command.environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            if ends(process, START_S, unless=lambda: bool(gateway.requests())) is None:
                ends(process, seconds)
            return process.poll()
        finally:
            with suppress(ProcessLookupError):  # it may have left children
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ends(
    process: "subprocess.Popen[bytes]", within_s: float, *, unless: Callable[[], bool] = lambda: False
) -> int | None:
    """Wait for the process's end, for so long or until the condition holds. Returns its status, None if it runs."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s and not unless():
        with suppress(subprocess.TimeoutExpired):
            return process.wait(LOOK_S)
    return process.poll()


# The table

PAGE_HEAD = """\
# What clients do if a request fails

What common clients and agents do in front of the gateway, and what their users see if a request fails. Each has its own
defaults, retries included. `make e2e-clients CLIENTS_PAGE=docs/CLIENT_FAILURES.md` runs all of them and writes this
page. Each run also writes what each one showed, word by word, to `~/.cache/llama-gguf-inference/clients-table.md`.

- *text*: the user gets the whole answer.
- *error*: the user gets an error that shows the gateway's reason, at once.
- *2 requests*: the client has repeated the request by itself, and the result is that of the last one.
- *no (expected)*: neither; the reason is below the table."""


def markdown(cells: Mapping[Name, Cell], versions: str) -> str:
    """All cells: an overview, then each situation with what every client did."""
    parts = ["# Clients and failures", versions, overview(cells)]
    for situation in SITUATIONS:
        of_it = [cell for cell in cells.values() if cell.situation is situation]
        if of_it:
            parts.append(f"## {situation.title[0].upper()}{situation.title[1:]}\n\n{details(of_it)}")
    return "\n\n".join(parts) + "\n"


def page(cells: Mapping[Name, Cell], versions: str) -> str:
    """The page for the docs, of all cells: what they mean, the overview, and what is known of single ones."""
    parts = [
        PAGE_HEAD,
        textwrap.fill(versions, 128, break_on_hyphens=False),
        overview(cells),
        "## Where the client or llama-server decides\n\n" + notes(EXPECTED),
        "## Where the client repeats more often\n\n" + notes({name: why for name, (_, why) in ATTEMPTS.items()}),
    ]
    return "\n\n".join(parts) + "\n"


def notes(reasons: Mapping[Name, str]) -> str:
    """A list of single cells and their reasons, those of one client and one reason together."""
    places: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        client, situation = BY_NAME[name]
        places.setdefault((client.title, reason.rstrip(".")), []).append(situation.title)
    return "\n".join(f"- {title} ({'; '.join(where)}): {reason}." for (title, reason), where in places.items())


def overview(cells: Mapping[Name, Cell]) -> str:
    situations = [each for each in SITUATIONS if any(cell.situation is each for cell in cells.values())]
    rows = [["Client", *(situation.title for situation in situations)], ["---"] * (len(situations) + 1)]
    for client in CLIENTS:
        found = [cells.get((client.name, situation.name)) for situation in situations]
        if any(found):
            rows.append([client.title, *(brief(cell) for cell in found)])
    return table(rows)


def brief(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    if cell.problems():
        return "no (expected)" if cell.name in EXPECTED else "**no**"
    outcome = "error" if cell.shown.error else "text"
    return outcome if len(cell.requests) == 1 else f"{outcome}, {len(cell.requests)} requests"


def details(cells: Iterable[Cell]) -> str:
    rows = [["Client", "Verdict", "Requests", "Seconds", "What it showed"], ["---"] * 5]
    for cell in cells:
        verdict = " ".join(cell.problems()) or "right"
        notes = [reason for _, reason in [ATTEMPTS.get(cell.name, (0, ""))] if reason]
        notes += [f"Expected: {EXPECTED[cell.name]}."] if cell.name in EXPECTED else []
        rows.append([cell.client.title, " ".join([verdict, *notes]), tally(cell), f"{cell.seconds:.1f}", summary(cell)])
    return table(rows)


def tally(cell: Cell) -> str:
    """The HTTP statuses in order, equal neighbours once: `3 × 429, 200`."""
    counts = Counter(cell.requests)
    return ", ".join(f"{number} × {status}" if number > 1 else f"{status}" for status, number in counts.items()) or "0"


def summary(cell: Cell) -> str:
    if cell.status is None:
        return "nothing; it was ended"
    shown = cell.shown
    text = f"text “{shorten(shown.text, 60)}”" if shown.text.strip() else ""
    error = f"`{shorten(shown.error.replace('`', chr(39)), 240)}`" if shown.error else ""
    return ", then ".join(part for part in (text, error) if part) or "nothing"


def shorten(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def table(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
