"""The documents: what they say of routes, errors, settings, targets and each other is so."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import config
import local
from auth import allowance, unauthorized
from cors import Cors
from errors import BACKEND_TIMEOUT, CATALOGUE, Dialect, GatewayError, envelope, event
from http1 import Limits, parse_request_head
from parts import Parts
from routes import TABLE
from support import api_page
from usage import Usage

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = api_page.PAGE.read_text(encoding="utf-8")

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


# --- Every page ---


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(path: Path) -> set[str]:
    """The names that headings have as targets of links."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def commands(text: str) -> Iterator[str]:
    """What stands in code: fenced, indented, or between backquotes."""
    for block in re.findall(r"^```.*?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    yield from re.findall(r"^    +(.+)$", text, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


@each_page
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.MULTILINE))
    assert {"help", "run", "test"} <= targets
    named = [target for line in commands(page.read_text(encoding="utf-8")) for target in made(line)]
    assert [target for target in named if target not in targets] == []


def made(command: str) -> list[str]:
    """The targets of a `make` at the beginning of a command, or behind `&&` or `;`."""
    found = re.findall(r"(?:^|&& |; |\$ )make((?: [a-z][a-z0-9-]*)+)(?= [A-Z]|$| *#|  | &&|;)", command)
    return [target for targets in found for target in targets.split()]


def test_targets_are_found_in_commands() -> None:
    assert made("make check test ARGS=-v") == ["check", "test"]
    assert made("cd x && make run") == ["run"]
    assert made("make test    # the test suite") == ["test"]
    assert made("make it so, they said") == []


@pytest.mark.parametrize("page", ["CONFIGURATION.md", "BENCHMARK.md"])
def test_the_command_that_makes_a_backends_key_makes_one(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (command,) = [line for line in commands(text) if "gateway-" in line and line.startswith("python3 -c ")]
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True, check=True)
    key = done.stdout.rstrip("\n")
    assert config.load_config({"BACKEND_API_KEY": key}).backend.api_key == key


# --- The reference of the API ---


def test_tables_are_those_of_the_product() -> None:
    assert api_page.with_tables(REFERENCE) == REFERENCE, "run python3 tests/support/api_page.py"


def test_tables_hold_every_route_and_error() -> None:
    for method, path, _ in TABLE:
        assert f"`{method} {path}`" in api_page.routes_table()
    assert api_page.errors_table().count("\n") == 2 + len(CATALOGUE)


def test_a_page_without_its_markers_is_told() -> None:
    with pytest.raises(ValueError, match="routes"):
        api_page.with_tables("")


def test_settings_that_it_names_exist() -> None:
    named = set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)(?:=[a-z]+)?`", REFERENCE))
    assert len(named) > 8
    assert named <= {setting.name for setting in config.SETTINGS}


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", REFERENCE, re.MULTILINE | re.DOTALL)


def section(heading: str) -> str:
    return REFERENCE.partition(f"\n{heading}\n")[2].partition("\n## ")[0].partition("\n### ")[0]


def example(heading: str) -> dict[str, object]:
    (text,) = re.findall(r"^```json\n(.*?)^```$", section(heading), re.MULTILINE | re.DOTALL)
    answer = json.loads(text)
    assert isinstance(answer, dict)
    return answer


def test_examples_of_errors_are_what_is_sent() -> None:
    sent = [envelope(unauthorized(), dialect).decode() + "\n" for dialect in (Dialect.OPENAI, Dialect.ANTHROPIC)]
    assert examples("json")[:2] == sent


@pytest.mark.parametrize("dialect", Dialect)
def test_examples_of_error_events_are_what_is_sent(dialect: Dialect) -> None:
    lines = event(GatewayError(BACKEND_TIMEOUT), dialect).decode().strip().splitlines()
    assert "".join(f"    {line}\n" for line in lines) in section("## Streams")


def test_examples_of_the_gateways_own_endpoints_have_the_fields_that_are_sent(tmp_path: Path) -> None:
    parts = Parts(config.load_config({"DATA_DIR": str(tmp_path), "ACCESS_LOG": "", "USAGE_FILE": ""}))
    try:
        assert example("### GET /health").keys() == local.health_of(parts).keys()
        (tmp_path / "api_keys.txt").write_text("")
        assert example("### POST /reload").keys() == local.reload(parts).keys()
    finally:
        parts.ledger.close()
    rows = example("### GET /usage")["rows"]
    assert isinstance(rows, list)
    assert list(rows[0]) == [*(field.name for field in dataclasses.fields(Usage)), "cost"]


def test_fields_that_are_added_are_listed() -> None:
    head = parse_request_head(
        b"OPTIONS / HTTP/1.1\r\nHost: a\r\nOrigin: https://a\r\nAccess-Control-Request-Method: GET\r\n"
        b"Access-Control-Request-Headers: a\r\n\r\n",
        Limits(),
    )
    cors = Cors(("https://a",))
    added = cors.fields(head) + cors.preflight(head) + allowance(1, 1, 1.0) + unauthorized().fields
    for name, _ in added:
        assert f"`{name.decode()}`" in section("## Answers")
