#!/usr/bin/env python3
"""Measure a llama-server, a gateway in front of it, and what the gateway adds.

    GATEWAY_API_KEY=… python3 benchmark.py --direct http://127.0.0.1:8080 --gateway http://127.0.0.1:8000 --html r.html

With both addresses the two take turns within each round, so that the difference is the gateway's own. Keys come from
files or from the environment (GATEWAY_API_KEY, BACKEND_API_KEY), never from the command line. Figures go to stdout,
progress to stderr. Exit status: 0 measured, 1 nothing could be measured, some requests failed or a file could
not be written, 2 wrong usage.
"""

import argparse
import asyncio
import errno
import math
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import bench_html
import bench_report
from bench_client import PATHS, Connection, Sample, Target
from bench_stats import Result, Turn, overheads, summarize

SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody has ever asked it why. "
# The options that name a file, and what is written to it.
FORMS: dict[str, Callable[[Result], str]] = {
    "json": bench_report.to_json,
    "csv": bench_report.to_csv,
    "html": bench_html.to_html,
}


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and when to give up."""

    targets: tuple[Target, ...]
    kinds: tuple[str, ...] = ("chat",)
    concurrency: tuple[int, ...] = (1, 2, 4)
    rounds: int = 3
    requests: int = 8
    max_tokens: int = 64
    prompt_chars: int = 400
    model: str = "default"
    timeout_s: float = 120.0
    max_s: float = 600.0

    def turns(self) -> Iterator[tuple[str, int, int, Target]]:
        """Yield kind, concurrency, round and target in order; who goes first changes with every round."""
        for kind in self.kinds:
            for concurrency in self.concurrency:
                for number in range(1, self.rounds + 1):
                    for target in self.targets[:: 1 if number % 2 else -1]:
                        yield kind, concurrency, number, target

    @property
    def turn_count(self) -> int:
        return len(self.kinds) * len(self.concurrency) * self.rounds * len(self.targets)


# Requests


def prompt_of(serial: int, chars: int) -> str:
    """Make a prompt whose beginning no other has, so that no target profits from what another left in the cache."""
    text = f"Request {serial}. " + SENTENCE * (chars // len(SENTENCE) + 1)
    return text[: max(chars, 20)]


def body_of(kind: str, prompt: str, plan: Plan) -> dict[str, object]:
    """Ask for an answer of a known length: `ignore_eos` is llama-server's."""
    if kind == "embeddings":
        return {"model": plan.model, "input": prompt}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    length = {"max_tokens": plan.max_tokens, "ignore_eos": True, "temperature": 0}
    asked = {"messages": [{"role": "user", "content": prompt}]} if kind == "chat" else {"prompt": prompt}
    return {"model": plan.model, **asked, **length, **stream}


# Turns


class Progress:
    """One line on stderr: rewritten in place on a terminal, a line a turn elsewhere."""

    def __init__(self, total: int, out: TextIO, quiet: bool) -> None:
        self._total = total
        self._done = 0
        self._out = out
        self._quiet = quiet
        self._began_s = time.monotonic()

    def step(self, what: str) -> None:
        self._done += 1
        if self._quiet:
            return
        spent_s = time.monotonic() - self._began_s
        left_s = spent_s / self._done * (self._total - self._done)
        line = f"[{self._done}/{self._total}] {what}, about {left_s:.0f} s left"
        terminal = self._out.isatty()
        self._out.write(f"\r\x1b[K{line}" if terminal and self._done < self._total else f"{line}\n")
        self._out.flush()


class Runner:
    """Runs a plan's turns one after the other, and keeps to its time."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan = plan
        self._progress = progress
        self._serial = 0
        self._deadline_s = time.monotonic() + plan.max_s
        self.stopped_early = False

    async def run(self) -> list[Turn]:
        turns: list[Turn] = []
        warm: set[tuple[str, str]] = set()
        for kind, concurrency, number, target in self._plan.turns():
            if time.monotonic() >= self._deadline_s:
                self.stopped_early = True
                break
            if (kind, target.name) not in warm:
                warm.add((kind, target.name))
                await self._clients(kind, 1, 1, target)
            turn = await self._turn(kind, concurrency, number, target)
            self.stopped_early |= turn.cut
            turns += [turn] * bool(turn.samples)
            self._progress.step(f"{kind}, {concurrency} at once, round {number}, {target.name}")
        return turns

    async def _turn(self, kind: str, concurrency: int, number: int, target: Target) -> Turn:
        each = math.ceil(self._plan.requests / concurrency)
        wall_s, samples = await self._clients(kind, concurrency, each, target)
        cut = len(samples) < concurrency * each
        return Turn(kind, concurrency, number, target.name, wall_s, tuple(samples), cut)

    async def _clients(self, kind: str, concurrency: int, each: int, target: Target) -> tuple[float, list[Sample]]:
        """Let so many clients at once send so many requests each, over connections opened beforehand.

        Returns what came to its end, well or not, before the time was up.
        """
        connections = [Connection(target, self._plan.timeout_s) for _ in range(concurrency)]
        requests = [[self._request(kind, target) for _ in range(each)] for _ in connections]
        samples: list[Sample] = []
        try:
            opened = (connection.open() for connection in connections)
            await self._in_time(asyncio.gather(*opened, return_exceptions=True))
            began_s = time.perf_counter()
            clients = (self._client(*pair, samples) for pair in zip(connections, requests, strict=True))
            await self._in_time(asyncio.gather(*clients))
            return time.perf_counter() - began_s, samples
        finally:
            for connection in connections:
                connection.close()

    async def _client(self, connection: Connection, requests: Sequence[bytes], samples: list[Sample]) -> None:
        for request in requests:
            # asyncio.wait_for may lose a cancellation that comes together with what it waits for.
            if self._left_s() <= 0:
                return
            samples.append(await connection.measure(request))

    async def _in_time(self, work: "asyncio.Future[Any]") -> None:
        """Wait for the work until the time is up; what is not done by then is cancelled."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(work, self._left_s())

    def _left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())

    def _request(self, kind: str, target: Target) -> bytes:
        self._serial += 1
        prompt = prompt_of(self._serial, self._plan.prompt_chars)
        return target.request("POST", PATHS[kind], body_of(kind, prompt, self._plan))


async def look_up(plan: Plan) -> dict[str, object]:
    """Ask what is being measured: the model's name and, where the backend is reached directly, its slots."""
    facts: dict[str, object] = {}
    for target in plan.targets:
        connection = Connection(target, min(10.0, plan.timeout_s))
        try:
            models = (await connection.fetch("/v1/models")).get("data") or [{}]
            facts.setdefault("model", models[0].get("id"))
            if target.name == "direct":
                facts["slots"] = (await connection.fetch("/props")).get("total_slots")
        finally:
            connection.close()
    return {name: value for name, value in facts.items() if value is not None}


def notes_of(turns: Sequence[Turn], plan: Plan, stopped_early: bool) -> list[str]:
    """Say what an operator should know before trusting the figures."""
    notes = []
    errors = {sample.error for turn in turns for sample in turn.samples if sample.error}
    if stopped_early:
        notes.append(
            f"stopped after {plan.max_s:g} s; what was under way then is left out, and the rest of the plan was not"
            " measured (--max-seconds)"
        )
    if errors:
        notes.append(
            "failed requests are in no percentile and in no rate, and their rounds not in what the gateway adds"
        )
    if any(error.startswith("429") for error in errors):
        notes.append("429: the key's rate limit is in the way; measure with a key whose limit is far above the load")
    if any(error.startswith(("401", "403")) for error in errors):
        notes.append("401 or 403: set GATEWAY_API_KEY or BACKEND_API_KEY, or give --key-file or --backend-key-file")
    if any(len(turn.good) < 100 for turn in turns) and turns:
        notes.append("a p99 of fewer than 100 requests is little more than the slowest one")
    return notes


# The command line


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--direct", metavar="URL", help="llama-server itself")
    made.add_argument("--gateway", metavar="URL", help="the gateway in front of it")
    made.add_argument("--key-file", metavar="FILE", type=Path, help="the gateway's API key (else GATEWAY_API_KEY)")
    made.add_argument("--backend-key-file", metavar="FILE", type=Path, help="llama-server's (else BACKEND_API_KEY)")
    plan = made.add_argument_group("what to measure")
    plan.add_argument("--kinds", metavar="LIST", type=kinds, default=Plan.kinds, help=f"of {', '.join(PATHS)} (chat)")
    plan.add_argument(
        "--concurrency", metavar="LIST", type=counts, default=Plan.concurrency, help="clients at once (1,2,4)"
    )
    plan.add_argument(
        "--rounds", metavar="N", type=count, default=Plan.rounds, help="turns of each target (%(default)s)"
    )
    plan.add_argument(
        "--requests", metavar="N", type=count, default=Plan.requests, help="requests a turn (%(default)s)"
    )
    plan.add_argument("--max-tokens", metavar="N", type=count, default=Plan.max_tokens, help="an answer (%(default)s)")
    plan.add_argument(
        "--prompt-chars", metavar="N", type=count, default=Plan.prompt_chars, help="a prompt (%(default)s)"
    )
    plan.add_argument("--model", metavar="NAME", default=Plan.model, help="as the request names it (%(default)s)")
    plan.add_argument("--timeout", metavar="S", type=seconds, default=Plan.timeout_s, help="a request (%(default)s)")
    plan.add_argument("--max-seconds", metavar="S", type=seconds, default=Plan.max_s, help="in all (%(default)s)")
    out = made.add_argument_group("what to write (stdout has the tables)")
    out.add_argument("--json", metavar="FILE", type=Path, help="everything, but for single gaps")
    out.add_argument("--csv", metavar="FILE", type=Path, help="one line a kind, concurrency and target")
    out.add_argument("--html", metavar="FILE", type=Path, help="a page with plots that needs nothing but itself")
    out.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return made


def count(text: str) -> int:
    """Convert a whole number from 1 to 100,000."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 100000")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(count(part.strip()) for part in text.split(",")))


def kinds(text: str) -> tuple[str, ...]:
    asked = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [kind for kind in asked if kind not in PATHS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PATHS)}")
    return asked


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return value


def plan_of(options: argparse.Namespace, environ: Mapping[str, str]) -> Plan:
    """Turn the options into a plan. Raises ValueError with words for the operator."""
    keys = {
        "direct": key_of("--backend-key-file", options.backend_key_file, environ.get("BACKEND_API_KEY", "")),
        "gateway": key_of("--key-file", options.key_file, environ.get("GATEWAY_API_KEY", "")),
    }
    given = {"direct": options.direct, "gateway": options.gateway}
    targets = tuple(Target(name, base_of(url), keys[name]) for name, url in given.items() if url)
    if not targets:
        raise ValueError("give --direct, --gateway or both")
    for target in targets:
        target.check()
    return Plan(
        targets,
        options.kinds,
        options.concurrency,
        rounds=options.rounds,
        requests=options.requests,
        max_tokens=options.max_tokens,
        prompt_chars=options.prompt_chars,
        model=options.model,
        timeout_s=options.timeout,
        max_s=options.max_seconds,
    )


def key_of(option: str, file: Path | None, inherited: str) -> str:
    if file is None:
        return inherited
    try:
        return file.read_text("utf-8").strip()
    except OSError as error:
        raise ValueError(f"{option}: {file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{option}: {file} is not UTF-8 text") from None


def base_of(url: str) -> str:
    """The address without the /v1 at its end, which OpenAI clients are given and `make run` prints."""
    return re.sub(r"(?<=[^/])/v1/?$", "", url)


def facts_of(plan: Plan, found: Mapping[str, object]) -> dict[str, object]:
    urls = {target.name: target.url for target in plan.targets}
    sizes = f"{plan.prompt_chars} characters in, {plan.max_tokens} tokens out"
    turns = f"{plan.rounds} rounds, {plan.requests} requests a turn"
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    about = {"plan": turns, "requests": sizes, "when": when, "client": f"Python {platform.python_version()}"}
    return {**urls, **found, **about}


async def measure(plan: Plan, progress: Progress) -> Result:
    found = await look_up(plan)
    runner = Runner(plan, progress)
    turns = await runner.run()
    notes = notes_of(turns, plan, runner.stopped_early)
    summaries, added = tuple(summarize(turns)), tuple(overheads(turns))
    return Result(facts_of(plan, found), tuple(turns), summaries, added, tuple(notes))


def check_outputs(options: argparse.Namespace) -> None:
    """Look before minutes of measuring whether what comes of them can be written. Raises ValueError."""
    for name in FORMS:
        if (file := getattr(options, name)) and (reason := why_not_writable(file)):
            raise ValueError(f"--{name}: {file} cannot be written: {reason}")


def why_not_writable(file: Path) -> str:
    """Say what is in the way, without making the file; what this cannot see is told when it is written."""
    try:
        if stat.S_ISDIR(file.stat().st_mode):
            return os.strerror(errno.EISDIR)
        return "" if os.access(file, os.W_OK) else os.strerror(errno.EACCES)
    except FileNotFoundError:
        if not file.parent.is_dir():
            return f"there is no folder {file.parent}"
        return "" if os.access(file.parent, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        return error.strerror or str(error)


def write(result: Result, options: argparse.Namespace) -> bool:
    """Print the tables and write each file that was asked for, whatever becomes of the others; False if one failed."""
    sys.stdout.write(bench_report.to_text(result))
    sys.stdout.flush()
    whole = True
    for name, form in FORMS.items():
        file = getattr(options, name)
        try:
            if file:
                file.write_text(form(result), "utf-8")
        except OSError as error:
            print(f"benchmark: --{name}: {file} cannot be written: {error.strerror}", file=sys.stderr)
            whole = False
    return whole


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    options = parser().parse_args(argv)
    try:
        plan = plan_of(options, environ)
        check_outputs(options)
    except ValueError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    try:
        result = asyncio.run(measure(plan, Progress(plan.turn_count, sys.stderr, options.quiet)))
    except KeyboardInterrupt:
        return 130
    written = write(result, options)
    failed = any(summary.errors for summary in result.summaries)
    return 1 if failed or not written or not result.turns else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
