#!/usr/bin/env python3
"""Measure a llama-server, a gateway in front of it, and what the gateway adds.

    GATEWAY_API_KEY=… python3 benchmark.py --direct http://127.0.0.1:8080 --gateway http://127.0.0.1:8000 --html r.html

With both addresses, each round measures both targets, so that the difference is caused by the gateway. Keys are read
from files or from the environment (GATEWAY_API_KEY, BACKEND_API_KEY), never from the command line. Figures go to
stdout, progress to stderr. Exit status: 0 success, 1 nothing was measured, requests failed or a file could not be
written, 2 wrong usage.
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

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python3 -P` leaves a script's own folder out

from bench import html_report, report
from bench.client import PATHS, Sample, Target, TargetConnection
from bench.stats import Result, Run, overheads, summarize
from core.installation import add_version, shown

SENTENCE = "The quick brown fox jumps over the lazy dog, and the lazy dog goes on sleeping. "
# The options that name a report file, and the format of each.
FORMATS: dict[str, Callable[[Result], str]] = {
    "json": report.to_json,
    "csv": report.to_csv,
    "html": html_report.to_html,
}


@dataclass(frozen=True)
class BenchmarkPlan:
    """What to measure, and the time limits. `concurrency` is measured for each value; `requests` are per run."""

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

    def runs(self) -> Iterator[tuple[str, int, int, Target]]:
        """Yield (kind, concurrency, round, target) of each run. The order of the targets alternates between rounds."""
        for kind in self.kinds:
            for concurrency in self.concurrency:
                for number in range(1, self.rounds + 1):
                    for target in self.targets[:: 1 if number % 2 else -1]:
                        yield kind, concurrency, number, target

    @property
    def run_count(self) -> int:
        return len(self.kinds) * len(self.concurrency) * self.rounds * len(self.targets)


# Requests


def make_prompt(serial: int, chars: int) -> str:
    """Return a prompt with a unique beginning, so that no target can reuse the prompt cache that another one filled."""
    text = f"Request {serial}. " + SENTENCE * (chars // len(SENTENCE) + 1)
    return text[: max(chars, 20)]


def make_body(kind: str, prompt: str, plan: BenchmarkPlan) -> dict[str, object]:
    """Return a request body whose answer has a fixed length. `ignore_eos` is an option of llama-server."""
    if kind == "embeddings":
        return {"model": plan.model, "input": prompt}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    length = {"max_tokens": plan.max_tokens, "ignore_eos": True, "temperature": 0}
    content = {"messages": [{"role": "user", "content": prompt}]} if kind == "chat" else {"prompt": prompt}
    return {"model": plan.model, **content, **length, **stream}


# Runs


class Progress:
    """Shows the progress: on a terminal as one line that is rewritten, otherwise as one line per run."""

    def __init__(self, total: int, out: TextIO, quiet: bool) -> None:
        self._total = total
        self._done = 0
        self._out = out
        self._quiet = quiet
        self._started_s = time.monotonic()

    def step(self, description: str) -> None:
        self._done += 1
        if self._quiet:
            return
        elapsed_s = time.monotonic() - self._started_s
        remaining_s = elapsed_s / self._done * (self._total - self._done)
        line = f"[{self._done}/{self._total}] {description}, about {remaining_s:.0f} s remaining"
        terminal = self._out.isatty()
        self._out.write(f"\r\x1b[K{line}" if terminal and self._done < self._total else f"{line}\n")
        self._out.flush()


class Runner:
    """Executes the runs of a plan in order and stops at its time limit."""

    def __init__(self, plan: BenchmarkPlan, progress: Progress) -> None:
        self._plan = plan
        self._progress = progress
        self._serial = 0
        self._deadline_s = time.monotonic() + plan.max_s
        self.stopped_early = False

    async def execute(self) -> list[Run]:
        runs: list[Run] = []
        warm: set[tuple[str, str]] = set()
        for kind, concurrency, number, target in self._plan.runs():
            if time.monotonic() >= self._deadline_s:
                self.stopped_early = True
                break
            if (kind, target.name) not in warm:
                warm.add((kind, target.name))
                await self._clients(kind, 1, 1, target)
            run = await self._run(kind, concurrency, number, target)
            self.stopped_early |= run.incomplete
            runs += [run] * bool(run.samples)
            self._progress.step(f"{kind}, concurrency {concurrency}, round {number}, {target.name}")
        return runs

    async def _run(self, kind: str, concurrency: int, number: int, target: Target) -> Run:
        per_client = math.ceil(self._plan.requests / concurrency)
        wall_s, samples = await self._clients(kind, concurrency, per_client, target)
        incomplete = len(samples) < concurrency * per_client
        return Run(kind, concurrency, number, target.name, wall_s, tuple(samples), incomplete)

    async def _clients(
        self, kind: str, concurrency: int, per_client: int, target: Target
    ) -> tuple[float, list[Sample]]:
        """Run concurrent clients that send per_client requests each, on connections opened beforehand.

        Returns the elapsed seconds and the samples of the requests that finished, with or without an error, before the
        time limit.
        """
        connections = [TargetConnection(target, self._plan.timeout_s) for _ in range(concurrency)]
        requests = [[self._request(kind, target) for _ in range(per_client)] for _ in connections]
        samples: list[Sample] = []
        try:
            opened = (connection.open() for connection in connections)
            await self._until_deadline(asyncio.gather(*opened, return_exceptions=True))
            started_s = time.perf_counter()
            clients = (self._client(*pair, samples) for pair in zip(connections, requests, strict=True))
            await self._until_deadline(asyncio.gather(*clients))
            return time.perf_counter() - started_s, samples
        finally:
            for connection in connections:
                connection.close()

    async def _client(self, connection: TargetConnection, requests: Sequence[bytes], samples: list[Sample]) -> None:
        for request in requests:
            # asyncio.wait_for may lose a cancellation that happens together with the completion of its task.
            if self._remaining_s() <= 0:
                return
            samples.append(await connection.measure(request))

    async def _until_deadline(self, work: "asyncio.Future[Any]") -> None:
        """Wait for the work until the time limit, then cancel it."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(work, self._remaining_s())

    def _remaining_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())

    def _request(self, kind: str, target: Target) -> bytes:
        self._serial += 1
        prompt = make_prompt(self._serial, self._plan.prompt_chars)
        return target.request("POST", PATHS[kind], make_body(kind, prompt, self._plan))


async def fetch_facts(plan: BenchmarkPlan) -> dict[str, object]:
    """Ask the targets for the name of the model and, if llama-server is measured directly, the number of its slots."""
    facts: dict[str, object] = {}
    for target in plan.targets:
        connection = TargetConnection(target, min(10.0, plan.timeout_s))
        try:
            models = (await connection.fetch("/v1/models")).get("data") or [{}]
            facts.setdefault("model", models[0].get("id"))
            if target.name == "direct":
                facts["slots"] = (await connection.fetch("/props")).get("total_slots")
        finally:
            connection.close()
    return {name: value for name, value in facts.items() if value is not None}


def make_notes(runs: Sequence[Run], plan: BenchmarkPlan, stopped_early: bool) -> list[str]:
    """Return what limits the meaning of the figures."""
    notes = []
    errors = {sample.error for run in runs for sample in run.samples if sample.error}
    if stopped_early:
        notes.append(
            f"stopped after {plan.max_s:g} s (--max-seconds); unfinished requests are left out, and the rest was not"
            " measured"
        )
    if errors:
        notes.append(
            "failed requests are in no percentile and in no rate, and their rounds are not in what the gateway adds"
        )
    if any(error.startswith("429") for error in errors):
        notes.append("429: the rate limit of the key was exceeded; use a key whose limit is far above the load")
    if any(error.startswith(("401", "403")) for error in errors):
        notes.append("401 or 403: set GATEWAY_API_KEY or BACKEND_API_KEY, or give --key-file or --backend-key-file")
    if any(len(run.successful) < 100 for run in runs) and runs:
        notes.append("a p99 of fewer than 100 requests is little more than the slowest request")
    return notes


# The command line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=shown("benchmark"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--direct", metavar="URL", help="address of llama-server")
    parser.add_argument("--gateway", metavar="URL", help="address of the gateway")
    parser.add_argument("--key-file", metavar="FILE", type=Path, help="the gateway's API key (else GATEWAY_API_KEY)")
    parser.add_argument(
        "--backend-key-file", metavar="FILE", type=Path, help="llama-server's API key (else BACKEND_API_KEY)"
    )
    plan = parser.add_argument_group("what to measure")
    defaults = BenchmarkPlan
    plan.add_argument(
        "--kinds", metavar="LIST", type=kinds, default=defaults.kinds, help=f"of {', '.join(PATHS)} (default: chat)"
    )
    plan.add_argument(
        "--concurrency",
        metavar="LIST",
        type=counts,
        default=defaults.concurrency,
        help="concurrent clients (default: 1,2,4)",
    )
    for name, default, meaning in (
        ("--rounds", defaults.rounds, "runs of each target"),
        ("--requests", defaults.requests, "requests per run"),
        ("--max-tokens", defaults.max_tokens, "tokens per answer"),
        ("--prompt-chars", defaults.prompt_chars, "characters per prompt"),
    ):
        plan.add_argument(name, metavar="N", type=count, default=default, help=f"{meaning} (default: %(default)s)")
    plan.add_argument("--model", metavar="NAME", default=defaults.model, help="model (default: %(default)s)")
    for name, limit_s, meaning in (
        ("--timeout", defaults.timeout_s, "seconds per request"),
        ("--max-seconds", defaults.max_s, "seconds in total"),
    ):
        plan.add_argument(name, metavar="S", type=seconds, default=limit_s, help=f"{meaning} (default: %(default)g)")
    add_version(parser)
    output = parser.add_argument_group("reports (the tables are always printed to stdout)")
    output.add_argument("--json", metavar="FILE", type=Path, help="everything except the gaps of each request")
    output.add_argument("--csv", metavar="FILE", type=Path, help="one line per kind, concurrency and target")
    output.add_argument("--html", metavar="FILE", type=Path, help="a self-contained page with charts")
    output.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def count(text: str) -> int:
    """Convert an integer from 1 to 100,000."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 100000")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(count(part.strip()) for part in text.split(",")))


def kinds(text: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [kind for kind in chosen if kind not in PATHS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PATHS)}")
    return chosen


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return value


def make_plan(options: argparse.Namespace, environ: Mapping[str, str]) -> BenchmarkPlan:
    """Convert the options to a plan. Raises ValueError with a message for the user."""
    keys = {
        "direct": read_key("--backend-key-file", options.backend_key_file, environ.get("BACKEND_API_KEY", "")),
        "gateway": read_key("--key-file", options.key_file, environ.get("GATEWAY_API_KEY", "")),
    }
    urls = {"direct": options.direct, "gateway": options.gateway}
    targets = tuple(Target(name, base_url(url), keys[name]) for name, url in urls.items() if url)
    if not targets:
        raise ValueError("give --direct, --gateway or both")
    for target in targets:
        target.validate()
    return BenchmarkPlan(
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


def read_key(option: str, file: Path | None, default: str) -> str:
    if file is None:
        return default
    try:
        return file.read_text("utf-8").strip()
    except OSError as error:
        raise ValueError(f"{option}: {file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{option}: {file} is not UTF-8 text") from None


def base_url(url: str) -> str:
    """Return the URL without a final /v1. OpenAI clients need it, and `make run` prints it."""
    return re.sub(r"(?<=[^/])/v1/?$", "", url)


def all_facts(plan: BenchmarkPlan, fetched: Mapping[str, object]) -> dict[str, object]:
    urls = {target.name: target.url for target in plan.targets}
    requests = f"{plan.prompt_chars} characters in, {plan.max_tokens} tokens out"
    rounds = f"{plan.rounds} rounds, {plan.requests} requests per run"
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    about = {"plan": rounds, "requests": requests, "when": when, "client": f"Python {platform.python_version()}"}
    return {**urls, **fetched, **about}


async def measure(plan: BenchmarkPlan, progress: Progress) -> Result:
    fetched = await fetch_facts(plan)
    runner = Runner(plan, progress)
    runs = await runner.execute()
    notes = make_notes(runs, plan, runner.stopped_early)
    summaries, added = tuple(summarize(runs)), tuple(overheads(runs))
    return Result(all_facts(plan, fetched), tuple(runs), summaries, added, tuple(notes))


def check_outputs(options: argparse.Namespace) -> None:
    """Check, before minutes of measuring, that the report files are writable. Raises ValueError."""
    for name in FORMATS:
        if (file := getattr(options, name)) and (reason := write_obstacle(file)):
            raise ValueError(f"--{name}: {file} cannot be written: {reason}")


def write_obstacle(file: Path) -> str:
    """Return why the file cannot be written, or an empty string. The file is not created.

    Some errors, such as a full disk, are only found when the file is written.
    """
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
    """Print the tables and write the report files. If one fails, write the others and return False."""
    sys.stdout.write(report.to_text(result))
    sys.stdout.flush()
    complete = True
    for name, serialize in FORMATS.items():
        file = getattr(options, name)
        try:
            if file:
                file.write_text(serialize(result), "utf-8")
        except OSError as error:
            print(f"benchmark: error: --{name}: {file} cannot be written: {error.strerror}", file=sys.stderr)
            complete = False
    return complete


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    options = make_parser().parse_args(argv)
    try:
        plan = make_plan(options, environ)
        check_outputs(options)
    except ValueError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 2
    try:
        result = asyncio.run(measure(plan, Progress(plan.run_count, sys.stderr, options.quiet)))
    except KeyboardInterrupt:
        return 130
    written = write(result, options)
    failed = any(summary.errors for summary in result.summaries)
    return 1 if failed or not written or not result.runs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
