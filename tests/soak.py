#!/usr/bin/env python3
"""Load, cancel and break the gateway for at most five minutes, and report what was lost or leaked (`make soak`).

    python3 tests/soak.py [--seconds 300] [--seed 1] [fair churn slow cold memory turn faults]

It runs a gateway and a mock backend as processes on loopback, with the Python standard library only. Each part has its
own stack. At its end, gateway and backend must hold nothing that they did not hold at rest. With fewer seconds all
parts shrink, and targets are not checked. A part that has no time left has missed its target, and has lost nothing.
`--seconds 600 faults` breaks the whole of start.sh for ten minutes. Exit status: 0 nothing was lost or leaked and no
target was missed; 1 something was; 2 wrong usage.
"""

import argparse
import asyncio
import contextlib
import platform
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.fault_soaking import DRAIN_S, Books, FaultSoak, Service
from support.fault_soaking import Load as AskingLoad
from support.soaking import LOST, WAYS, Client, Finding, Stack, chat

ENDLESS = 1_000_000  # tokens
DESCRIPTORS = 16384

OVERLOAD = 10.0
LEAST_SHARE = 0.8
LEAST_JAIN = 0.95
MOST_PING_MS = 50.0
MOST_GROWTH_BYTES = 5 << 20


@dataclass(frozen=True)
class Plan:
    """The size of all parts, in proportion to the seconds that the whole may take."""

    folder: Path
    seconds: float = 300.0
    seed: int = 1
    alone: bool = False  # one part has all the time

    def many(self, number: int, least: int) -> int:
        return max(least, round(number * self.seconds / 300))

    def random(self, part: str) -> random.Random:
        return random.Random(f"{self.seed} {part}")

    @property
    def fault_seconds(self) -> float:
        """How long new faults begin: the last one, the audit and the end take a while."""
        return self.seconds - 60 if self.alone and self.seconds > 120 else self.seconds * 0.2

    @property
    def whole(self) -> bool:
        """Whether it is long enough to check the targets."""
        return self.seconds >= 300


# --- Fair: 20 keys request ten times the capacity, one of them as much as all others together ---


async def fair(plan: Plan, finding: Finding) -> None:
    keys, slots, service_s = 20, 8, 0.2
    seconds = plan.seconds / 5
    mock = {"MOCK_PROMPT_MS": "50", "MOCK_TOKENS_PER_SECOND": "20"}
    async with Stack(plan.folder / "fair", finding, keys=keys, slots=slots, mock=mock) as stack:
        load = Load(stack, plan.random("fair"), rate=OVERLOAD * slots / service_s)
        await load.run(seconds)
        served = [load.served[key] for key in stack.keys]
        await load.finish()
        await stack.settle()
    finding.lost += load.lost
    share, jain = min(served) * keys / max(1, sum(served)), jain_index(served)
    finding.figures[:0] = [
        f"{keys} keys for {seconds:g} s, {load.offered / seconds:.0f} requests per second for {slots} slots",
        f"served {sum(served)} ({sum(served) / seconds:.0f} per second), {load.refused} refused by a full queue",
        f"the greedy key got {served[0]}, the others {min(served[1:])} to {max(served[1:])}",
        f"least share {share:.1%} of the fair one, Jain's index {jain:.4f}",
    ]
    if plan.whole and (share < LEAST_SHARE or jain < LEAST_JAIN):
        finding.missed.append(f"fair: least share {share:.1%} (target {LEAST_SHARE:.0%}), Jain's index {jain:.3f}")


def jain_index(shares: Sequence[float]) -> float:
    """Return Jain's fairness index: 1 if all shares are equal, 1/n if one has everything."""
    squares = len(shares) * sum(share * share for share in shares)
    return sum(shares) ** 2 / squares if squares else 0.0


class Load:
    """Requests that arrive at a fixed rate, whether or not others are answered. The first key sends half of them."""

    def __init__(self, stack: Stack, random_: random.Random, rate: float) -> None:
        self._stack = stack
        self._random = random_
        self._rate = rate
        self._weights = [len(stack.keys) - 1.0] + [1.0] * (len(stack.keys) - 1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: list[Client] = []
        self.served: Counter[str] = Counter()
        self.offered = 0
        self.refused = 0
        self.lost: list[str] = []

    async def run(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        end_s = next_s + seconds
        while (next_s := next_s + self._random.expovariate(self._rate)) < end_s:
            await asyncio.sleep(max(0.0, next_s - loop.time()))
            self.offered += 1
            (key,) = self._random.choices(self._stack.keys, self._weights)
            task = asyncio.ensure_future(self._ask(key, self.offered))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, key: str, number: int) -> None:
        stream = number % 2 == 0
        try:
            client = self._idle.pop() if self._idle else await self._stack.client()
            status, body = await client.ask(chat(key, f"fair-{number}", tokens=4, stream=stream), stream=stream)
        except LOST as error:
            self.lost.append(f"fair: request {number}: {error!r}")
            return
        self._idle.append(client)
        if status == 200:
            self.served[key] += 1
        elif status == 503 and b'"queue_full"' in body:
            self.refused += 1
        else:
            self.lost.append(f"fair: request {number}: {status} {body!r}")

    async def finish(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)
        for client in self._idle:
            client.close()


# --- Churn: half of the clients leave, in different phases and ways ---


async def churn(plan: Plan, finding: Finding) -> None:
    clients = plan.many(1000, 60)
    settings = {"MAX_QUEUE_SIZE": "0", "MAX_CONNECTIONS": "4096"}
    async with Stack(plan.folder / "churn", finding, keys=10, slots=16, settings=settings) as stack:
        arrivals = Arrivals(stack, plan.random("churn"), over_s=clients / 200)
        await asyncio.gather(*(arrivals.one(number) for number in range(clients)))
        await stack.settle()
    finding.lost += arrivals.lost
    lines = stack.access_lines()
    gone = Counter(line["stage"] for line in lines if line["outcome"] == "cancelled")
    queued = {line["id"] for line in lines if line["outcome"] == "cancelled" and line["stage"] == "queued"}
    finding.lost += [f"churn: {name} left while queued, but reached the backend" for name in queued & set(stack.seen)]
    phases = ", ".join(f"{stage} {number}" for stage, number in sorted(gone.items()))
    finding.figures[:0] = [
        f"{clients} clients, {arrivals.whole} whole responses to {clients // 2} clients that stayed",
        f"{sum(arrivals.left.values())} left ({', '.join(f'{way} {n}' for way, n in sorted(arrivals.left.items()))})",
        f"cancelled by phase: {phases}",
        f"{len(queued)} left while queued, {len(queued & set(stack.seen))} of them reached the backend",
    ]
    phases_wanted = {"reading_head", "reading_body", "queued", "awaiting_response", "streaming"}
    if plan.whole and phases_wanted - set(gone):
        finding.missed.append(f"churn: no client left while {', '.join(sorted(phases_wanted - set(gone)))}")


class Arrivals:
    """Clients that arrive one after the other. Every second one leaves before its response is whole."""

    def __init__(self, stack: Stack, random_: random.Random, over_s: float) -> None:
        self._stack = stack
        self._over_s = over_s
        self._random = random_
        self.whole = 0
        self.left: Counter[str] = Counter()
        self.lost: list[str] = []

    async def one(self, number: int) -> None:
        draw = random.Random(self._random.random())
        await asyncio.sleep(draw.uniform(0, self._over_s))
        try:
            client = await self._stack.client()
            await (self._leave(client, number, draw) if number % 2 else self._stay(client, number, draw))
            client.close()
        except LOST as error:
            self.lost.append(f"churn: client {number}: {error!r}")

    async def _stay(self, client: Client, number: int, draw: random.Random) -> None:
        stream = draw.random() < 0.5
        request = chat(draw.choice(self._stack.keys), f"churn-{number}", tokens=4, stream=stream)
        status, body = await client.ask(request, stream=stream)
        assert status == 200, f"{status} {body!r}"
        self.whole += 1

    async def _leave(self, client: Client, number: int, draw: random.Random) -> None:
        phase = draw.choice(("head", "body", "any", "any", "stream"))
        stream = phase == "stream" or draw.random() < 0.5
        request = chat(draw.choice(self._stack.keys), f"churn-{number}", tokens=ENDLESS, stream=stream)
        body_at = request.index(b"\r\n\r\n") + 4
        cut = {"head": (1, body_at - 1), "body": (body_at, len(request) - 1)}.get(phase)
        client.send(request[: draw.randint(*cut)] if cut else request)
        if phase == "stream":
            for _ in range(draw.randrange(1, 6)):
                await client.take_through(b"\n\n")
        else:
            await asyncio.sleep(draw.uniform(0, self._over_s * (2 if phase == "any" else 0.2)))
        way = draw.choice(WAYS)
        self.left[way] += 1
        await client.leave(way)


# --- Slow: slow heads, bodies and readers, and many idle connections ---


async def slow(plan: Plan, finding: Finding) -> None:
    idle, crawling, seconds = plan.many(2000, 100), plan.many(50, 5), max(2.0, plan.seconds / 15)
    settings = {"MAX_CONNECTIONS": "8192"}
    mock = {"MOCK_TOKENS_PER_SECOND": "100"}  # each; at full speed the mock would be the bottleneck
    async with Stack(plan.folder / "slow", finding, slots=crawling, settings=settings, mock=mock) as stack:
        alone = Pings(await ping(stack, seconds / 4))
        others = [await stack.client() for _ in range(idle)]
        request = chat("k00", "slow", tokens=ENDLESS, stream=True)
        others += [await drip(stack, request[:-1], 20) for _ in range(crawling)]
        others += [await drip(stack, request[:-1], request.index(b"\r\n\r\n") + 4) for _ in range(crawling)]
        readers = [await slow_reader(stack, request) for _ in range(crawling)]
        crowded = Pings(await ping(stack, seconds))
        held = await stack.held()
        for client in (*others, *readers):
            client.close()
        await stack.settle()
    finding.figures[:0] = [
        f"{idle} idle connections, {crawling} slow heads, {crawling} slow bodies, {crawling} slow readers",
        f"{held['client connections']} connections at once, {held['requests']} of them served",
        f"/ping meanwhile: {crowded}",
        f"/ping before, alone: {alone}",
    ]
    if held["client connections"] < idle + 3 * crawling:
        finding.lost.append(f"slow: only {held['client connections']} connections stayed")
    if plan.whole and crowded.at(0.99) >= MOST_PING_MS:
        finding.missed.append(f"slow: p99 of /ping {crowded.at(0.99):.1f} ms (target {MOST_PING_MS:g} ms)")


class Pings:
    """Response times in milliseconds."""

    def __init__(self, took_ms: Sequence[float]) -> None:
        self._took_ms = sorted(took_ms)

    def at(self, part: float) -> float:
        return self._took_ms[min(len(self._took_ms) - 1, int(len(self._took_ms) * part))]

    def __str__(self) -> str:
        figures = f"p50 {self.at(0.5):.1f} ms, p99 {self.at(0.99):.1f} ms, longest {self.at(1):.1f} ms"
        return f"{figures} ({len(self._took_ms)} times)"


async def drip(stack: Stack, request: bytes, at_once: int) -> Client:
    """Return a client that sends the first part at once, and then one byte every half second until it is closed."""
    client = await stack.client()
    client.send(request[:at_once])
    left = iter(request[at_once:])

    def more() -> None:
        byte = next(left, None)
        if byte is not None and not client.transport.is_closing():
            client.send(bytes([byte]))
            asyncio.get_running_loop().call_later(0.5, more)

    more()
    return client


async def slow_reader(stack: Stack, request: bytes) -> Client:
    """Return a client that reads the beginning of an endless stream and then nothing."""
    client = await stack.client(receive_buffer=4096)
    client.send(request)
    await client.take_through(b"\n\n")
    client.transport.pause_reading()
    return client


async def ping(stack: Stack, seconds: float) -> list[float]:
    """Request /ping, alternately on a new connection, as a probe does, and on a kept one. Returns milliseconds."""
    loop = asyncio.get_running_loop()
    kept = await stack.client()
    took_ms: list[float] = []
    end_s = loop.time() + seconds
    while (begun_s := loop.time()) < end_s:
        client = await stack.client() if len(took_ms) % 2 else kept
        client.send(b"GET /ping HTTP/1.1\r\nHost: gateway\r\n\r\n")
        assert (await client.response()).status in (200, 204)
        took_ms.append((loop.time() - begun_s) * 1000)
        if client is not kept:
            client.close()
        await asyncio.sleep(0.02)
    kept.close()
    return took_ms


# --- Cold: requests that arrive while the model loads ---


async def cold(plan: Plan, finding: Finding) -> None:
    requests, load_s, heartbeat_s = 100, plan.seconds * 0.3, max(0.5, plan.seconds / 60)
    mock = {"MOCK_LOAD_SECONDS": f"{load_s:g}"}
    settings = {"SSE_HEARTBEAT": f"{heartbeat_s:g}"}
    draw = plan.random("cold")
    beats: list[int] = []
    waits_s: list[float] = []
    loop = asyncio.get_running_loop()

    async def one(stack: Stack, number: int, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        stream = number % 2 == 0
        begun_s = loop.time()
        try:
            client = await stack.client()
            request = chat(stack.keys[number % 5], f"cold-{number}", tokens=4, stream=stream)
            status, body = await client.ask(request, stream=stream)
            client.close()
            assert status == 200, f"{status} {body!r}"
        except LOST as error:
            finding.lost.append(f"cold: request {number}: {error!r}")
            return
        waits_s.append(loop.time() - begun_s)
        if stream:
            beats.append(body.count(b"\n: ") + body.startswith(b": "))

    async with Stack(plan.folder / "cold", finding, keys=5, settings=settings, mock=mock, probing=True) as stack:
        await asyncio.gather(*(one(stack, number, draw.random()) for number in range(requests)))
        await stack.settle()
    finding.figures[:0] = [
        f"{len(waits_s)} of {requests} requests answered, posted within 1 s of the start of a load of {load_s:g} s",
        f"they took {min(waits_s, default=0):.1f} to {max(waits_s, default=0):.1f} s;"
        f" {min(beats, default=0)} to {max(beats, default=0)} heartbeats per stream (every {heartbeat_s:g} s)",
    ]


# --- Memory: the growth after ten thousand requests and a thousand cancelled streams ---


async def memory(plan: Plan, finding: Finding) -> None:
    requests, cancelled = plan.many(10_000, 400), plan.many(1000, 40)
    mock = {"MOCK_TOKENS_PER_SECOND": "500", "MOCK_PROMPT_MS": "0", "MOCK_POLL_MS": "50"}
    loop = asyncio.get_running_loop()
    async with Stack(plan.folder / "memory", finding, keys=20, slots=32, mock=mock) as stack:
        await keep_asking(stack, finding, 100)
        early_bytes, begun_s, begun_cpu_s = stack.gateway.rss_bytes, loop.time(), stack.gateway.cpu_s
        await keep_asking(stack, finding, requests)
        rate, cpu_ms = requests / (loop.time() - begun_s), (stack.gateway.cpu_s - begun_cpu_s) * 1000 / requests
        await cancel_streams(stack, finding, cancelled)
        await stack.settle()
        late_bytes = stack.gateway.rss_bytes
    grown = late_bytes - early_bytes
    finding.figures[:0] = [
        f"resident after 100 requests {early_bytes / 2**20:.1f} MiB, after {requests} more and {cancelled} cancelled"
        f" streams {late_bytes / 2**20:.1f} MiB: {grown / 2**20:+.2f} MiB",
        f"{rate:.0f} requests per second, {cpu_ms:.2f} ms of the gateway's CPU each",
    ]
    if plan.whole and grown > MOST_GROWTH_BYTES:
        finding.missed.append(f"memory: grew by {grown / 2**20:.1f} MiB (target {MOST_GROWTH_BYTES >> 20} MiB)")


async def keep_asking(stack: Stack, finding: Finding, requests: int) -> None:
    """Send so many requests over 32 kept connections, every second one a stream."""
    numbers = iter(range(requests))

    async def one() -> None:
        client = await stack.client()
        for number in numbers:
            stream = number % 2 == 0
            request = chat(stack.keys[number % len(stack.keys)], f"memory-{number}", tokens=4, stream=stream)
            try:
                status, body = await client.ask(request, stream=stream)
                assert status == 200, f"{status} {body!r}"
            except LOST as error:
                finding.lost.append(f"memory: request {number}: {error!r}")
                client = await stack.client()
        client.close()

    await asyncio.gather(*(one() for _ in range(stack.slots)))


async def cancel_streams(stack: Stack, finding: Finding, streams: int) -> None:
    numbers = iter(range(streams))

    async def one() -> None:
        for number in numbers:
            client = await stack.client()
            client.send(chat(stack.keys[number % len(stack.keys)], f"left-{number}", tokens=ENDLESS, stream=True))
            await client.take_through(b"\n\n")
            await client.leave(WAYS[number % len(WAYS)])

    try:
        await asyncio.gather(*(one() for _ in range(stack.slots)))
    except LOST as error:
        finding.lost.append(f"memory: a cancelled stream: {error!r}")


# --- Turn: one key has sent fifty long requests, another one sends one ---


async def turn(plan: Plan, finding: Finding) -> None:
    async with Stack(plan.folder / "turn", finding, keys=2) as stack:
        first, second = stack.keys
        many = [await stack.client() for _ in range(50)]
        for number, client in enumerate(many):
            client.send(chat(first, f"many-{number}", tokens=ENDLESS, stream=True))
        await held_is(stack, "waiters", len(many) - stack.slots)
        lone = await stack.client()
        lone.send(chat(second, "lone", tokens=4, stream=True))
        await held_is(stack, "waiters", len(many) - stack.slots + 1)
        before = len(stack.seen)
        many[int(stack.seen[0].removeprefix("many-"))].close()
        answer = await lone.response()
        await stack.held()
        place = stack.seen.index("lone") - before + 1
        for client in (*many, lone):
            client.close()
        await stack.settle()
    finding.figures[:0] = [f"one request behind 46 of another key's was number {place} to be served"]
    if answer.status != 200 or place != 1:
        finding.missed.append(f"turn: the lone request got {answer.status} as number {place}")


async def held_is(stack: Stack, name: str, number: int) -> None:
    while (await stack.held())[name] != number:
        await asyncio.sleep(0.05)


# --- Faults: start.sh while volumes hang, fail and fill up, and processes are stopped and killed ---


async def faults(plan: Plan, finding: Finding) -> None:
    folder = plan.folder / "faults"
    folder.mkdir(parents=True)
    books, service = Books(), Service(folder, [f"k{number:02}" for number in range(4)])
    service.write_keys()
    load = AskingLoad(service, books, clients=8)
    play = FaultSoak(service, books, load, finding, plan.random("faults"))
    await service.start()
    try:
        await service.stop()
        await play.play(plan.fault_seconds)
    finally:
        await load.end()
        if service.process.returncode is None:
            service.process.kill()
    known = {line["id"] for line in service.access_lines()}
    lost = len(set(books.answered) - known)
    output = (folder / "output.log").read_text(errors="replace")
    finding.lost += [f"faults: {line}" for line in output.splitlines() if "Traceback" in line]
    finding.figures[:0] = [
        f"{len(books.answered)} requests answered whole, {books.broken} broken visibly, {len(known)} access lines",
        f"{lost} lines lost at {len(books.excused)} kills and stops of hanging programs, none besides",
        f"episodes: {', '.join(f'{name} {times}' for name, times in sorted(play.played.items()))}",
        f"{len(play.stops_s)} stops took {min(play.stops_s, default=0):.1f} to {max(play.stops_s, default=0):.1f} s"
        f" (DRAIN_TIMEOUT {DRAIN_S:g} s)",
    ]
    if service.faults is None:
        finding.figures.append("no C compiler: without faults of volumes")


# --- All of it ---

Part = Callable[[Plan, Finding], Awaitable[None]]
PARTS: dict[str, Part] = {
    **{"turn": turn, "fair": fair, "churn": churn, "slow": slow, "memory": memory, "cold": cold},
    "faults": faults,
}
CONCURRENT = "cold"  # it mostly waits, so the others run meanwhile


async def run_part(plan: Plan, name: str) -> Finding:
    """Run one part. What ends it early counts as lost."""
    finding = Finding(name)
    try:
        await PARTS[name](plan, finding)
    except asyncio.CancelledError:
        finding.missed.append(f"{name}: it did not finish in time")
    except (*LOST, RuntimeError, asyncio.TimeoutError) as error:
        finding.lost.append(f"{name}: it could not continue: {error!r}")
    return finding


async def soak(plan: Plan, names: Sequence[str], report: Callable[[Finding], None]) -> list[Finding]:
    """Run the parts one after the other, no longer than the plan allows."""
    findings: list[Finding] = []

    async def in_order(these: Sequence[str]) -> None:
        for name in these:
            findings.append(await run_part(plan, name))
            report(findings[-1])

    concurrent = [name for name in names if name == CONCURRENT]
    others = [name for name in names if name not in concurrent]
    tasks = [asyncio.ensure_future(in_order(these)) for these in (concurrent, others)]
    _, late = await asyncio.wait(tasks, timeout=plan.seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    findings += [Finding(name, missed=[f"{name}: there was no time left"]) for name in missing(names, findings)]
    return findings


def missing(names: Sequence[str], findings: Sequence[Finding]) -> list[str]:
    return [name for name in names if name not in {finding.name for finding in findings}]


def print_figures(finding: Finding) -> None:
    for number, figure in enumerate(finding.figures or ["-"]):
        print(f"{finding.name if not number else '':8}{figure}", flush=True)


def verdict(findings: Sequence[Finding]) -> tuple[str, int]:
    """Return what was lost, leaked and missed, as text, and the exit status."""
    lines = []
    for name in ("lost", "leaked", "missed"):
        items = [item for finding in findings for item in getattr(finding, name)]
        shown = [f"\n  {item}" for item in items[:20]] + [f"\n  … and {len(items) - 20} more"] * (len(items) > 20)
        lines.append(f"{name}: {len(items) or 'nothing'}{''.join(shown)}")
    return "\n".join(lines), int(any(finding.lost or finding.leaked or finding.missed for finding in findings))


def raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="the time limit (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="the seed of all random choices (%(default)s)")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)} (default: all)")
    options = parser.parse_args(argv)
    if not 10 <= options.seconds <= 3600 or set(options.parts) - set(PARTS):
        unknown = set(options.parts) - set(PARTS)
        parser.error("there is no such part" if unknown else "--seconds must be from 10 to 3600")
    raise_descriptor_limit()
    names = [name for name in PARTS if name in (options.parts or PARTS)]
    print(f"soak    Python {platform.python_version()}, seed {options.seed}, {options.seconds:g} s at most", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        plan = Plan(Path(folder), options.seconds, options.seed, alone=len(names) == 1)
        findings = asyncio.run(soak(plan, names, print_figures))
    text, status = verdict(findings)
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
