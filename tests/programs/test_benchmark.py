"""benchmark.py: the runs of a plan, and the command line."""

import asyncio
import io
import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import benchmark
from bench.client import PATHS, Target
from bench.stats import Run
from benchmark import BenchmarkPlan, Progress, Runner
from support.benchmarks import make_run, mock, served
from support.boot import PATIENCE_S
from support.paths import ROOT
from support.together import ENVIRON, aside

# Running a plan


def test_the_order_of_the_targets_alternates_between_rounds() -> None:
    targets = (Target("direct", "http://a"), Target("gateway", "http://b"))
    plan = BenchmarkPlan(targets, kinds=("chat", "embeddings"), concurrency=(1, 2), rounds=3)
    runs = list(plan.runs())
    assert [target.name for *_, target in runs[:6]] == ["direct", "gateway", "gateway", "direct", "direct", "gateway"]
    assert len(runs) == plan.run_count == 24


def test_prompts_have_different_beginnings_and_the_same_length() -> None:
    prompts = [benchmark.make_prompt(serial, 400) for serial in (1, 12, 123)]
    assert len({prompt[:12] for prompt in prompts}) == 3
    assert {len(prompt) for prompt in prompts} == {400}


def execute(*targets: Target, **settings: Any) -> tuple[list[Run], Runner]:
    plan = BenchmarkPlan(targets, **{"rounds": 2, "requests": 4, "max_tokens": 3, "timeout_s": 10.0, **settings})
    runner = Runner(plan, Progress(plan.run_count, io.StringIO(), quiet=True))
    return asyncio.run(runner.execute()), runner


def test_a_plan_sends_its_number_of_requests() -> None:
    with mock(slots=2) as direct, mock() as gateway:
        targets = Target("direct", direct), Target("gateway", gateway)
        runs, runner = execute(*targets, kinds=tuple(PATHS), concurrency=(1, 3))
    assert not runner.stopped_early
    assert [len(run.samples) for run in runs if run.concurrency == 3] == [6] * 12
    assert {sample.error for run in runs for sample in run.samples} == {""}
    assert {sample.tokens for run in runs if run.kind != "embeddings" for sample in run.samples} == {3}


def test_a_plan_stops_at_its_time_limit() -> None:
    with mock() as url:
        runs, runner = execute(Target("direct", url), max_s=0.0)
    assert (runs, runner.stopped_early) == ([], True)


def test_requests_that_the_time_limit_interrupts_are_left_out_and_are_no_errors() -> None:
    with mock(prompt_ms=60_000.0) as url:
        runs, runner = execute(Target("direct", url), max_s=0.3)
    assert (runs, runner.stopped_early) == ([], True)


@aside
def test_requests_that_finished_before_the_time_limit_are_kept() -> None:
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"] * 3

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer three requests in total, one of them the warm-up, and no more."""
        with suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(answers.pop() if answers else b"")
        writer.close()

    with served(handler) as url:
        runs, runner = execute(Target("direct", url), concurrency=(1,), kinds=("embeddings",), max_s=6.0)
    assert runner.stopped_early
    assert [(len(run.samples), run.incomplete) for run in runs] == [(2, True)]
    assert [sample.error for sample in runs[0].samples] == ["", ""]


def test_progress_is_one_line_on_a_terminal_and_one_per_run_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, lines in ((Terminal(), 1), (io.StringIO(), 2)):
        progress = Progress(2, out, quiet=False)
        progress.step("first")
        progress.step("second")
        assert out.getvalue().count("\n") == lines
        assert "[2/2] second" in out.getvalue()


# The command line


def options(folder: Path) -> list[str]:
    """Return the options for all reports in a folder."""
    return [text for name in benchmark.FORMATS for text in (f"--{name}", str(folder / f"report.{name}"))]


def test_all_reports_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_text("sk-gateway\n")
    files = {name: tmp_path / f"report.{name}" for name in benchmark.FORMATS}
    with mock(keys=frozenset({"sk-backend"}), slots=2) as direct, mock(keys=frozenset({"sk-gateway"})) as gateway:
        argv = ["--direct", direct, "--gateway", gateway, "--key-file", str(key), "--requests", "2", "--rounds", "1"]
        argv += ["--concurrency", "1,2", "--kinds", "chat,embeddings", "--max-tokens", "2"]
        argv += options(tmp_path)
        assert benchmark.main(argv, {"BACKEND_API_KEY": "sk-backend"}) == 0
    out, err = capsys.readouterr()
    assert "slots 2" in out
    assert "[8/8] embeddings, concurrency 2, round 1, gateway" in err
    for file in files.values():
        assert "sk-" not in file.read_text()
    assert json.loads(files["json"].read_text())["facts"]["model"] == "mock"


def test_failed_requests_are_status_1_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    with mock(keys=frozenset({"sk-backend"})) as url:
        assert benchmark.main(["--direct", url, "--rounds", "1", "--requests", "1", "--quiet"], {}) == 1
    out, err = capsys.readouterr()
    assert "1 × 401 authentication_error" in out
    assert "BACKEND_API_KEY" in out
    assert err == ""


QUICKLY = ["--rounds", "1", "--requests", "1", "--concurrency", "1", "--quiet"]


def test_if_a_report_cannot_be_written_the_others_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.csv").symlink_to("/dev/full")
    with mock() as url:
        assert benchmark.main(["--direct", url, *QUICKLY, *options(tmp_path)], {}) == 1
    out, err = capsys.readouterr()
    assert err == f"benchmark: error: --csv: {tmp_path / 'report.csv'} cannot be written: No space left on device\n"
    assert "direct" in out
    assert json.loads((tmp_path / "report.json").read_text())["runs"]
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
def test_nothing_is_measured_if_a_report_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, target: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    file = tmp_path / target
    assert benchmark.main(["--direct", "http://127.0.0.1:1", *QUICKLY, option, str(file)], {}) == 2
    message = reason.format(folder=tmp_path)
    assert capsys.readouterr() == ("", f"benchmark: error: {option}: {file} cannot be written: {message}\n")


def test_checking_a_report_file_does_not_create_it(tmp_path: Path) -> None:
    assert benchmark.write_obstacle(tmp_path / "new") == benchmark.write_obstacle(Path("/dev/null")) == ""
    assert list(tmp_path.iterdir()) == []


def test_an_address_may_end_with_v1(capsys: pytest.CaptureFixture[str]) -> None:
    assert [benchmark.base_url(url) for url in ("http://x/v1", "http://x/llm/v1/", "http://v1", "http://x/v12")] == [
        *["http://x", "http://x/llm", "http://v1", "http://x/v12"]
    ]
    with mock() as url:
        assert benchmark.main(["--direct", url + "/v1", *QUICKLY], {}) == 0
    assert "model mock" in capsys.readouterr().out


def test_notes_name_the_rate_limit_and_an_early_end() -> None:
    plan = BenchmarkPlan((Target("gateway", "http://x"),))
    runs = [make_run("gateway", 1, 0.1, error="429 rate_limit_exceeded")]
    notes = benchmark.make_notes(runs, plan, stopped_early=True)
    assert any("rate limit" in note for note in notes)
    assert any("--max-seconds" in note for note in notes)
    assert benchmark.make_notes([], plan, stopped_early=False) == []


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--direct", "ftp://x"],
        ["--direct", "http://"],
        ["--direct", "http://x:99999"],
    ],
)
def test_wrong_usage_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(argv, {}) == 2
    assert capsys.readouterr().err.startswith("benchmark: error: ")


@pytest.mark.parametrize("option", ["--key-file", "--backend-key-file"])
def test_an_unreadable_key_file_is_reported_with_its_option(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--direct", "http://x", "--gateway", "http://y", option]
    assert benchmark.main([*argv, "/nope"], {}) == 2
    assert capsys.readouterr().err == f"benchmark: error: {option}: /nope cannot be read: No such file or directory\n"
    (tmp_path / "key").write_bytes(b"\xff")
    assert benchmark.main([*argv, str(tmp_path / "key")], {}) == 2
    assert capsys.readouterr().err == f"benchmark: error: {option}: {tmp_path / 'key'} is not UTF-8 text\n"


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
def test_an_invalid_value_is_reported_with_its_option(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["--direct", "http://x", *argv], {})
    assert caught.value.code == 2
    assert f"error: argument {argv[0]}: " in capsys.readouterr().err


def test_a_key_with_a_line_break_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--gateway", "http://x"], {"GATEWAY_API_KEY": "a\r\nb"}) == 2
    assert "key for --gateway" in capsys.readouterr().err


@aside
def test_the_help_of_make_bench_measures_nothing() -> None:
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--help"]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert "The gateway used" not in done.stdout


def test_every_option_is_documented() -> None:
    page = (ROOT / "docs" / "BENCHMARK.md").read_text()
    options_of_help = set(re.findall(r"--[a-z-]+", benchmark.make_parser().format_usage()))
    assert len(options_of_help) > 10
    assert {option for option in options_of_help if f"`{option}" not in page} == set()
