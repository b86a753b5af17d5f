"""The benchmark: what it takes for a token, what it compares with what, and that no report says more than it saw."""

import asyncio
import csv
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import bench_client
import bench_html
import bench_report
import benchmark
from bench_client import Connection, Failed, Sample, Target
from bench_stats import Result, Spread, Turn, overheads, percentile, summarize
from benchmark import Plan, Progress, Runner
from mock_backend import MockBackend, Settings
from support.together import ENVIRON, aside

QUICK = {"tokens_per_second": 0.0, "prompt_ms": 0.0, "poll_ms": 20.0}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True}


@contextmanager
def served(handler) -> Iterator[str]:
    """Serve connections on a thread of its own, since the benchmark runs a loop of its own; yields the URL."""
    ready, stop, found = threading.Event(), [], []

    async def serve():
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        stop.append((asyncio.get_running_loop(), asyncio.Event()))
        found.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop[0][1].wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield f"http://127.0.0.1:{found[0]}"
    finally:
        loop, event = stop[0]
        loop.call_soon_threadsafe(event.set)
        thread.join(10)


@contextmanager
def mock(**settings) -> Iterator[str]:
    async def handler(reader, writer):
        await backend._serve(reader, writer)

    backend = MockBackend(Settings(**{**QUICK, **settings}))
    with served(handler) as url:
        yield url


def scripted(*answers: bytes):
    """A peer that answers each request with the next bytes, and closes after the last."""

    async def handler(reader, writer):
        for answer in answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            writer.write(answer)
        writer.close()

    return handler


def stream(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def event(data: object) -> bytes:
    return b"data: %b\n\n" % (data if isinstance(data, bytes) else json.dumps(data).encode())


def word(text: str) -> bytes:
    return event({"choices": [{"delta": {"content": text}}]})


def measure(url: str, body: object = CHAT, *, times: int = 1, timeout_s: float = 10.0) -> list[Sample]:
    async def run():
        target = Target("direct", url)
        connection = Connection(target, timeout_s)
        try:
            return [
                await connection.measure(target.request("POST", "/v1/chat/completions", body)) for _ in range(times)
            ]
        finally:
            connection.close()

    return asyncio.run(run())


def measure_answer(answer: bytes) -> Sample:
    with served(scripted(answer)) as url:
        return measure(url)[0]


DONE = event(b"[DONE]")
TIMED = event({"choices": [], "timings": {"cache_n": 4, "prompt_n": 6, "predicted_n": 9, "predicted_per_second": 50.0}})


# One request


def test_a_stream_is_followed_to_its_end():
    with mock(cached_tokens=10) as url:
        sample = measure(url)[0]
    assert (sample.error, sample.events, len(sample.gaps_s), sample.tokens) == ("", 5, 4, 5)
    assert (sample.prompt_tokens, sample.cached_tokens) == (53, 10)
    assert 0 < sample.first_s <= sample.total_s


def test_pitfall_49_tokens_are_the_backends_count_and_never_words():
    assert measure_answer(stream(word("many words in one event"), TIMED, DONE)).tokens == 9
    usage = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}})
    sample = measure_answer(stream(word("many words"), usage, DONE))
    assert (sample.tokens, sample.prompt_tokens) == (7, 3)
    assert measure_answer(stream(word("many words"), DONE)).tokens is None


def test_events_torn_over_chunks_and_heartbeats_are_read_alike():
    whole = word("a") + b": still here\n\n" + word("b") + TIMED + DONE
    for size in (1, 7, len(whole)):
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        sample = measure_answer(stream(*pieces))
        assert (sample.error, sample.events, sample.tokens) == ("", 2, 9)


def test_a_role_without_text_is_not_the_first_token():
    role = event({"choices": [{"delta": {"role": "assistant", "content": None}}]})
    assert measure_answer(stream(role, DONE)).first_s is None


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (stream(word("a"), TIMED), "stream ended early"),
        (stream(word("a"), end=b""), "connection closed early"),
        (stream(word("a"), event({"error": {"code": 500, "type": "server_error"}})), "error in stream: server_error"),
        (stream(event(b"{")), "answer is not JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", "answer is not JSON"),
        (
            b'HTTP/1.1 429 X\r\nContent-Length: 41\r\n\r\n{"error":{"code":"rate_limit_exceeded"}} ',
            "429 rate_limit_exceeded",
        ),
        (b"HTTP/1.1 502 X\r\nContent-Length: 3\r\n\r\nbad", "502 unknown"),
        (b"HTTP/1.1 503 X\r\n\r\n[]", "503 unknown"),
        (b"hello\r\n\r\n", "answer is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfive\r\n", "answer is not HTTP"),
        (b"", "connection closed early"),
    ],
)
def test_failures_are_named(answer, error):
    assert measure_answer(answer).error == error


def test_an_answer_delimited_by_close_is_read_to_the_end():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    assert measure_answer(head + word("a") + TIMED + DONE).tokens == 9


def test_nobody_listens():
    with mock() as url:
        pass
    assert measure(url)[0].error == "cannot connect: Connection refused"


def test_a_silent_target_times_out():
    with mock(prompt_ms=60_000.0) as url:
        assert measure(url, timeout_s=0.05)[0].error == "timed out"


def test_a_kept_connection_that_turns_out_closed_is_no_failure():
    with mock() as url:
        samples = measure(url, times=4)
    assert [(sample.error, sample.tokens) for sample in samples] == [("", 5)] * 4


def test_a_kept_connection_is_used_again():
    accepted = []

    async def handler(reader, writer):
        accepted.append(writer)
        await scripted(*[b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"] * 3)(reader, writer)

    with served(handler) as url:
        assert [sample.error for sample in measure(url, times=3)] == [""] * 3
    assert len(accepted) == 1


def test_the_request_goes_below_the_urls_path_with_the_key():
    request = Target("gateway", "http://[::1]:8000/llm/", "secret").request("POST", "/v1/embeddings", {"input": "x"})
    assert request.startswith(
        b"POST /llm/v1/embeddings HTTP/1.1\r\nHost: [::1]:8000\r\nAuthorization: Bearer secret\r\n"
    )
    assert Target("gateway", "https://example.org").address == ("example.org", 443, True)
    assert "secret" not in repr(Target("gateway", "http://x", "secret"))


def test_pages_are_fetched_or_not():
    async def fetch(url, path):
        connection = Connection(Target("direct", url), 5.0)
        try:
            return await connection.fetch(path)
        finally:
            connection.close()

    with mock(slots=7) as url:
        assert asyncio.run(fetch(url, "/props"))["total_slots"] == 7
        assert "error" in asyncio.run(fetch(url, "/nope"))
    assert asyncio.run(fetch(url, "/props")) == {}


def test_names_of_errors():
    assert bench_client.name_of(OSError("two of them")) == "OSError"
    with pytest.raises(Failed, match="cannot connect"):
        asyncio.run(Connection(Target("direct", "http://127.0.0.1:1"), 5.0).open())


# Figures


def test_percentiles_interpolate():
    assert [percentile([4, 1, 3, 2], percent) for percent in (0, 50, 90, 100)] == [1, 2.5, pytest.approx(3.7), 4]
    assert percentile([5], 99) == 5
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def turn(
    target: str, number: int, first_s: float, *, tokens: int | None = 10, error: str = "", at_once: int = 1
) -> Turn:
    sample = Sample(
        error, total_s=first_s * 10, first_s=first_s, gaps_s=(0.01, 0.03), tokens=tokens, predicted_per_second=40.0
    )
    return Turn("chat", at_once, number, target, 2.0, (sample, sample))


def test_a_summary_counts_good_requests_and_names_the_others():
    summary = summarize([turn("direct", 1, 0.1), turn("direct", 2, 0.3), turn("direct", 3, 9.0, error="timed out")])[0]
    assert (summary.requests, summary.errors) == (6, {"timed out": 2})
    assert summary.first_ms == Spread(4, 200.0, 300.0, 300.0)
    assert summary.gap_ms == Spread(8, pytest.approx(20.0), 30.0, 30.0)
    assert (summary.tokens, summary.tokens_per_second, summary.requests_per_second) == (40, 40 / 6, 4 / 6)
    assert summary.stream_tokens_per_second == Spread(4, 40.0, 40.0, 40.0)


def test_what_was_not_measured_is_none():
    summary = summarize([Turn("embeddings", 1, 1, "direct", 0.0, (Sample(total_s=0.1),))])[0]
    assert summary.first_ms is summary.gap_ms is summary.tokens is summary.tokens_per_second is None
    assert summary.requests_per_second == 0.0


def test_pitfall_49_the_gateway_is_compared_with_the_backend_reached_directly_round_by_round():
    turns = []
    # The machine slows down from round to round; what the gateway adds does not.
    for number, (slow_s, added_s) in enumerate([(0.1, 0.002), (0.5, 0.001), (0.9, 0.003)]):
        turns += [turn("direct", number, slow_s), turn("gateway", number, slow_s + added_s)]
    first = overheads(turns)[0]
    assert (first.measure, first.unit) == ("first token", "ms")
    assert (first.median, first.lowest, first.highest) == (pytest.approx(2.0), pytest.approx(1.0), pytest.approx(3.0))
    assert [each.measure for each in overheads(turns)][1:] == ["gap between tokens", "whole answer", "throughput"]
    assert overheads(turns)[-1].median == pytest.approx(0.0)


def test_nothing_is_compared_without_a_pair_or_with_failures():
    assert overheads([turn("direct", 1, 0.1), turn("direct", 2, 0.1)]) == []
    assert overheads([turn("direct", 1, 0.1), turn("gateway", 1, 0.1, error="502 x")]) == []
    assert overheads([turn("direct", 1, 0.1), replace(turn("gateway", 1, 0.1), cut=True)]) == []


# Running a plan


def test_targets_take_turns_and_the_first_goes_second_in_the_next_round():
    targets = (Target("direct", "http://a"), Target("gateway", "http://b"))
    plan = Plan(targets, kinds=("chat", "embeddings"), concurrency=(1, 2), rounds=3)
    turns = list(plan.turns())
    assert [target.name for *_, target in turns[:6]] == ["direct", "gateway", "gateway", "direct", "direct", "gateway"]
    assert len(turns) == plan.turn_count == 24


def test_no_two_prompts_begin_alike_and_all_are_as_long():
    prompts = [benchmark.prompt_of(serial, 400) for serial in (1, 12, 123)]
    assert len({prompt[:12] for prompt in prompts}) == 3
    assert {len(prompt) for prompt in prompts} == {400}


def run_plan(*targets: Target, **settings) -> tuple[list[Turn], Runner]:
    plan = Plan(targets, **{"rounds": 2, "requests": 4, "max_tokens": 3, "timeout_s": 10.0, **settings})
    runner = Runner(plan, Progress(plan.turn_count, io.StringIO(), quiet=True))
    return asyncio.run(runner.run()), runner


def test_a_plan_runs_as_many_requests_as_it_says():
    with mock(slots=2) as direct, mock() as gateway:
        targets = Target("direct", direct), Target("gateway", gateway)
        turns, runner = run_plan(*targets, kinds=tuple(bench_client.PATHS), concurrency=(1, 3))
    assert not runner.stopped_early
    assert [len(turn.samples) for turn in turns if turn.concurrency == 3] == [6] * 12
    assert {sample.error for turn in turns for sample in turn.samples} == {""}
    assert {sample.tokens for turn in turns if turn.kind != "embeddings" for sample in turn.samples} == {3}


def test_the_deadline_ends_a_plan():
    with mock() as url:
        turns, runner = run_plan(Target("direct", url), max_s=0.0)
    assert (turns, runner.stopped_early) == ([], True)


def test_what_the_deadline_cuts_is_left_out_and_no_error():
    with mock(prompt_ms=60_000.0) as url:
        turns, runner = run_plan(Target("direct", url), max_s=0.3)
    assert (turns, runner.stopped_early) == ([], True)


@aside
def test_what_was_done_before_the_deadline_stays():
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"] * 3

    async def handler(reader, writer):
        """Answer three requests in all, the one that warms up among them, and then no more."""
        with suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(answers.pop() if answers else b"")
        writer.close()

    with served(handler) as url:
        turns, runner = run_plan(Target("direct", url), concurrency=(1,), kinds=("embeddings",), max_s=2.0)
    assert runner.stopped_early
    assert [(len(turn.samples), turn.cut) for turn in turns] == [(2, True)]
    assert [sample.error for sample in turns[0].samples] == ["", ""]


def test_progress_is_one_line_on_a_terminal_and_lines_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, lines in ((Terminal(), 1), (io.StringIO(), 2)):
        progress = Progress(2, out, quiet=False)
        progress.step("first")
        progress.step("second")
        assert out.getvalue().count("\n") == lines
        assert "[2/2] second" in out.getvalue()


# Reports


def result(*, both: bool = True, error: str = "", facts: dict | None = None) -> Result:
    turns = []
    for at_once in (1, 4):
        for number in (1, 2):
            turns.append(turn("direct", number, 0.1, error=error, at_once=at_once))
            if both:
                turns.append(turn("gateway", number, 0.102, error=error, at_once=at_once))
    found = facts or {"model": "tiny"}
    return Result(found, tuple(turns), tuple(summarize(turns)), tuple(overheads(turns)), ("beware",))


def test_text_report():
    text = bench_report.to_text(result())
    assert "model tiny" in text
    assert "chat, 4 at once" in text
    assert re.search(r"direct +100\.0 +100\.0 +100\.0 +20\.0 ", text)
    assert re.search(r"chat: first token +1 +\+2\.00 ms +\+2\.00 ms +\+2\.00 ms", text)
    assert text.endswith("note: beware\n")
    assert "2 × timed out" not in text
    assert "4 × timed out" in bench_report.to_text(result(error="timed out"))


def test_numbers_keep_three_digits_or_so():
    assert [bench_report.number(value) for value in (None, 0.123, 12.34, 1234.5)] == ["–", "0.12", "12.3", "1234"]


def test_csv_report_has_a_line_a_cell():
    rows = list(csv.DictReader(io.StringIO(bench_report.to_csv(result()))))
    assert [(row["concurrency"], row["target"]) for row in rows] == [
        (n, t) for n in "14" for t in ("direct", "gateway")
    ]
    assert float(rows[0]["first_ms_p50"]) == pytest.approx(100.0)
    assert rows[0]["prompt_tokens_per_second_p50"] == ""


def test_json_report_holds_everything_but_gaps():
    data = json.loads(bench_report.to_json(result()))
    assert set(data) == {"facts", "notes", "summaries", "overheads", "turns"}
    assert data["turns"][0]["samples"][0]["first_s"] == 0.1
    assert "gaps_s" not in data["turns"][0]["samples"][0]


class Balance(HTMLParser):
    """Fails unless every element that is opened is closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    "made", [result(), result(both=False), result(error="timed out"), Result({}, (), (), (), ())], ids=range(4)
)
def test_html_report_is_whole_and_needs_nothing_but_itself(made):
    page = bench_html.to_html(made)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"https?:|url\(|@import|src=|href=|nan|inf\b", page)
    assert "prefers-color-scheme: dark" in page


def test_html_report_says_what_the_gateway_adds():
    page = bench_html.to_html(result())
    assert "<b>+2.00 ms</b>" in page
    assert page.count("<svg") == 6
    assert "Nothing was measured" in bench_html.to_html(Result({}, (), (), (), ()))
    assert "Medians of direct" in bench_html.to_html(result(both=False))


def test_html_report_escapes_what_comes_from_outside():
    page = bench_html.to_html(result(error="<script>", facts={"model": '<script>alert("x")</script>'}))
    assert "<script" not in page


def test_ticks_are_round_and_cover_the_range():
    assert bench_html.ticks(0.0, 9.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    low, *_, high = bench_html.ticks(-1.3, 0.4)
    assert low <= -1.3 < 0.4 <= high
    assert len(bench_html.ticks(0.0, 0.0)) >= 2


# The command line


def test_a_whole_run_writes_every_report(tmp_path, capsys):
    key = tmp_path / "key"
    key.write_text("sk-gateway\n")
    files = {form: tmp_path / f"report.{form}" for form in ("json", "csv", "html")}
    with mock(keys=frozenset({"sk-backend"}), slots=2) as direct, mock(keys=frozenset({"sk-gateway"})) as gateway:
        argv = ["--direct", direct, "--gateway", gateway, "--key-file", str(key), "--requests", "2", "--rounds", "1"]
        argv += ["--concurrency", "1,2", "--kinds", "chat,embeddings", "--max-tokens", "2"]
        argv += [word for form, file in files.items() for word in (f"--{form}", str(file))]
        assert benchmark.main(argv, {"BACKEND_API_KEY": "sk-backend"}) == 0
    out, err = capsys.readouterr()
    assert "slots 2" in out
    assert "[8/8] embeddings, 2 at once, round 1, gateway" in err
    for file in files.values():
        assert "sk-" not in file.read_text()
    assert json.loads(files["json"].read_text())["facts"]["model"] == "mock"


def test_failures_end_in_1_with_advice(capsys):
    with mock(keys=frozenset({"sk-backend"})) as url:
        assert benchmark.main(["--direct", url, "--rounds", "1", "--requests", "1", "--quiet"], {}) == 1
    out, err = capsys.readouterr()
    assert "1 × 401 authentication_error" in out
    assert "BACKEND_API_KEY" in out
    assert err == ""


def files_of(folder: Path) -> list[str]:
    return [word for form in ("json", "csv", "html") for word in (f"--{form}", str(folder / f"report.{form}"))]


QUICKLY = ["--rounds", "1", "--requests", "1", "--concurrency", "1", "--quiet"]


def test_one_report_that_cannot_be_written_keeps_no_other(tmp_path, capsys):
    (tmp_path / "report.csv").symlink_to("/dev/full")
    with mock() as url:
        assert benchmark.main(["--direct", url, *QUICKLY, *files_of(tmp_path)], {}) == 1
    out, err = capsys.readouterr()
    assert err == f"benchmark: --csv: {tmp_path / 'report.csv'} cannot be written: No space left on device\n"
    assert "direct" in out
    assert json.loads((tmp_path / "report.json").read_text())["turns"]
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nope/x", "there is no folder {folder}/nope"),
        ("file/x", "Not a directory"),
        (".", "Is a directory"),
        ("n" * 256, "File name too long"),
    ],
)
@pytest.mark.parametrize("option", ["--json", "--csv", "--html"])
def test_nothing_is_measured_where_the_report_cannot_be_written(tmp_path, capsys, option, target, reason):
    (tmp_path / "file").touch()
    file = tmp_path / target
    assert benchmark.main(["--direct", "http://127.0.0.1:1", *QUICKLY, option, str(file)], {}) == 2
    said = reason.format(folder=tmp_path)
    assert capsys.readouterr() == ("", f"benchmark: {option}: {file} cannot be written: {said}\n")


def test_a_report_that_can_be_written_is_not_made_beforehand(tmp_path):
    assert benchmark.why_not_writable(tmp_path / "new") == benchmark.why_not_writable(Path("/dev/null")) == ""
    assert list(tmp_path.iterdir()) == []


def test_an_address_may_end_as_openai_clients_have_it(capsys):
    assert [benchmark.base_of(url) for url in ("http://x/v1", "http://x/llm/v1/", "http://v1", "http://x/v12")] == [
        *["http://x", "http://x/llm", "http://v1", "http://x/v12"]
    ]
    with mock() as url:
        assert benchmark.main(["--direct", url + "/v1", *QUICKLY], {}) == 0
    assert "model mock" in capsys.readouterr().out


def test_notes_name_the_rate_limit_and_an_early_end():
    plan = Plan((Target("gateway", "http://x"),))
    notes = benchmark.notes_of([turn("gateway", 1, 0.1, error="429 rate_limit_exceeded")], plan, stopped_early=True)
    assert any("rate limit" in note for note in notes)
    assert any("--max-seconds" in note for note in notes)
    assert benchmark.notes_of([], plan, stopped_early=False) == []


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--direct", "ftp://x"],
        ["--direct", "http://"],
        ["--direct", "http://x:99999"],
    ],
)
def test_wrong_usage_ends_in_2(argv, capsys):
    assert benchmark.main(argv, {}) == 2
    assert capsys.readouterr().err.startswith("benchmark: ")


@pytest.mark.parametrize("option", ["--key-file", "--backend-key-file"])
def test_a_key_file_that_cannot_be_read_is_told_with_its_option(option, tmp_path, capsys):
    argv = ["--direct", "http://x", "--gateway", "http://y", option]
    assert benchmark.main([*argv, "/nope"], {}) == 2
    assert capsys.readouterr().err == f"benchmark: {option}: /nope cannot be read: No such file or directory\n"
    (tmp_path / "key").write_bytes(b"\xff")
    assert benchmark.main([*argv, str(tmp_path / "key")], {}) == 2
    assert capsys.readouterr().err == f"benchmark: {option}: {tmp_path / 'key'} is not UTF-8 text\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--concurrency", "0"],
        ["--concurrency", "1,x"],
        ["--rounds", "٣"],
        ["--kinds", "chat,music"],
        ["--timeout", "soon"],
        ["--max-seconds", "nan"],
    ],
)
def test_bad_values_are_refused_by_name(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--direct", "http://x", *argv], {})
    assert ended.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_a_key_that_no_header_can_carry_is_refused(capsys):
    assert benchmark.main(["--gateway", "http://x"], {"GATEWAY_API_KEY": "a\r\nb"}) == 2
    assert "key for --gateway" in capsys.readouterr().err


@aside
def test_the_help_of_make_bench_is_the_help_alone():
    command = [sys.executable, str(Path(__file__).parent.parent / "bench" / "run.py"), "--help"]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert "The gateway used" not in done.stdout


def test_every_option_is_documented():
    page = (Path(__file__).parent.parent / "docs" / "BENCHMARK.md").read_text()
    options = {
        name for action in benchmark.parser()._actions for name in action.option_strings if name.startswith("--")
    }
    assert {name for name in options if f"`{name}" not in page} == {"--help"}
