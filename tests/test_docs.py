"""The documentation agrees with the product: routes, errors, settings, make targets, links and examples."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import advice
import check_links
import generate
from accounting.access_lines import FIELDS
from accounting.ledger import Usage
from auth import allowance, unauthorized
from boot import shutdown
from config.loader import load_config
from config.settings import SETTINGS, Limits
from core.dialects import ANTHROPIC, DIALECTS, OPENAI, Dialect
from core.errors import BACKEND_UNAVAILABLE, CATALOGUE, GatewayError
from http1.grammar import parse_request_head
from policy.cors import Cors
from policy.routes import TABLE, Routes
from support.gateway import OPERATOR_KEY, Stack, get, request, scenario

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REQUEST_ID = "req-5f2b8c1d9a3e-7"
REFERENCE = (ROOT / "docs" / "API_REFERENCE.md").read_text(encoding="utf-8")

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
    """The lines of code on a page: fenced, indented, or between backquotes."""
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
    """The targets of a `make` at the beginning of a command, or after `&&` or `;`."""
    found = re.findall(r"(?:^|&& |; |\$ )make((?: [a-z][a-z0-9-]*)+)(?= [A-Z]|$| *#|  | &&|;)", command)
    return [target for targets in found for target in targets.split()]


@each_page
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))
    files = {name for name in named if re.fullmatch(r"(?:bench|deploy|docs|scripts|tests)/[\w./-]+", name)}
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    tests = {name for name in named if re.fullmatch(r"test_\w+", name)}
    assert sorted(tests - defined_tests()) == []


def test_modules_that_the_design_names_exist() -> None:
    """In the prose of docs/DESIGN.md `room/module.py` stands for a file in scripts/."""
    page = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?!scripts/|tests/)[a-z0-9]+/\w+\.py)`", page))
    assert "proxy/request.py" in named
    assert [name for name in sorted(named) if not (ROOT / "scripts" / name).exists()] == []


def defined_tests() -> set[str]:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    return {name for source in sources for name in re.findall(r"(?m)^(?:async )?def (test_\w+)", source)}


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
    assert load_config({"BACKEND_API_KEY": key}).backend.api_key == key


# --- Generated tables ---


def test_generated_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def test_generate_names_a_stale_page_and_rewrites_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in generate.PAGES:
        shutil.copy(ROOT / "docs" / name, tmp_path)
    (tmp_path / "images").mkdir()
    generate.main([], tmp_path)
    capsys.readouterr()
    page = tmp_path / "CONFIGURATION.md"
    page.write_text(page.read_text(encoding="utf-8").replace("`MAX_HEADERS`", "`OLD_NAME`"), encoding="utf-8")
    assert generate.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().out == "docs/CONFIGURATION.md is stale: run `make generate` and commit the page.\n"
    assert generate.main([], tmp_path) == 0
    assert capsys.readouterr().out == "docs/CONFIGURATION.md rewritten\n"
    assert generate.main(["--check"], tmp_path) == 0


# --- What the code does not say: docs/advice.py ---

KNOWN: dict[str, tuple[set[object], set[object]]] = {
    "SETTINGS": (set(advice.SETTINGS), {setting.name for setting in SETTINGS}),
    "ERRORS": (set(advice.ERRORS), {kind.code for kind in CATALOGUE}),
    "FIELDS": (set(advice.FIELDS), {field.name for field in FIELDS}),
    "EXIT_STATUSES": (
        set(advice.EXIT_STATUSES),
        {1} | {value for name, value in vars(shutdown).items() if name[:5] == "EXIT_"},  # 1: Python's own, for a bug
    ),
    "METRICS": (set(advice.METRICS), {family.name for family in generate.metric_families()}),
}


@pytest.mark.parametrize("table", KNOWN)
def test_advice_is_complete(table: str) -> None:
    has, known = KNOWN[table]
    different = ", ".join(sorted(map(str, has ^ known)))
    assert not different, f"docs/advice.py: {table} must have exactly what the code has: add or remove {different}"


def test_every_setting_is_in_one_group() -> None:
    names = [name for _, names in advice.SETTING_GROUPS.values() for name in names]
    known = {setting.name for setting in SETTINGS}
    wrong = sorted(name for name in {*names, *known} if names.count(name) != (name in known))
    assert not wrong, f"docs/advice.py: put {', '.join(wrong)} into one group of SETTING_GROUPS"


@pytest.mark.parametrize("name", advice.SETTINGS)
def test_the_example_of_a_setting_is_accepted(name: str) -> None:
    example = dict(line.split("=", 1) for line in advice.SETTINGS[name].example.splitlines())
    assert name in example
    load_config(example)


def test_every_alert_has_its_section() -> None:
    rules = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
    names = re.findall(r"- alert: (\w+)", rules)
    assert names
    assert [name for name in names if f"\n### {name}\n" not in page] == []


def test_every_page_is_on_the_site() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert [page for page in sorted(pages) if f"\n{page}\n" not in index] == []


def test_a_broken_link_of_the_site_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.html").write_text("<a href='b.html#here'></a><a href='https://example.org'></a>")
    (tmp_path / "b.html").write_text("<p id='here'></p><a href='a.html'></a><a href='#top'></a>")
    assert check_links.main([str(tmp_path)]) == 0
    (tmp_path / "c.html").write_text("<a href='b.html#there'></a><img src='no.png'>")
    assert check_links.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "c.html: b.html#there: the page has no such anchor",
        "c.html: no.png: there is no such file",
    ]


def test_generate_refuses_a_page_without_its_markers() -> None:
    with pytest.raises(ValueError, match="begin routes"):
        generate.renew("", {"routes": generate.routes_table})


def test_tables_hold_every_setting_route_and_error() -> None:
    for setting in SETTINGS:
        assert f"| [`{setting.name}`](SETTINGS.md#{setting.name.lower()})" in generate.settings_table()
    for method, path, _ in TABLE:
        assert f"`{method} {path}`" in generate.routes_table()
    assert generate.errors_table().count("\n") == 2 + len(CATALOGUE)


def test_the_table_of_modules_holds_every_module() -> None:
    listed = re.findall(r"(?m)^\| `(scripts/[\w/.]+)` \| \S", generate.modules_table())
    modules = [path for path in (ROOT / "scripts").rglob("*") if path.suffix in (".py", ".sh")]
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in modules if path.stem != "__init__")
    rooms = {path.parent.name for path in modules if path.stem == "__init__"}
    assert rooms <= set(re.findall(r"(?m)^\| `(\w+)` \| \S", generate.rooms_table()))


# --- The reference of the API ---


def test_settings_that_it_names_exist() -> None:
    named = set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)(?:=[a-z]+)?`", REFERENCE))
    assert len(named) > 8
    assert named <= {setting.name for setting in SETTINGS}


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
    sent = [dialect.envelope(unauthorized(), REQUEST_ID).decode() + "\n" for dialect in (OPENAI, ANTHROPIC)]
    assert examples("json")[:2] == sent


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_examples_of_error_events_are_what_is_sent(dialect: Dialect) -> None:
    lines = dialect.error_event(GatewayError(BACKEND_UNAVAILABLE), REQUEST_ID, 0).decode().rstrip().splitlines()
    assert "".join(f"    {line}".rstrip() + "\n" for line in lines) in section("## Streams")


def test_routes_that_stream_are_listed() -> None:
    routes = Routes()
    streaming = [f"`{path}`" for method, path, _ in TABLE if routes.find(method.encode(), path.encode()).streams]
    listed = section("## Streams").replace("\n", " ")
    assert f"{', '.join(streaming[:-1])} and {streaming[-1]}" in listed


@scenario()
async def test_examples_of_endpoints_have_the_fields_that_are_sent(stack: Stack) -> None:
    health = await stack.ask(get(b"/health"))
    assert example("### GET /health").keys() == health.json.keys()
    reload = await stack.ask(request(b"POST", b"/reload", b"", key=OPERATOR_KEY))
    assert example("### POST /reload").keys() == reload.json.keys()
    usage = await stack.ask(get(b"/usage", key=OPERATOR_KEY))
    assert example("### GET /usage").keys() == usage.json.keys()


def test_the_example_of_usage_has_the_fields_of_a_row() -> None:
    rows = example("### GET /usage")["rows"]
    assert isinstance(rows, list)
    names = [field.name for field in dataclasses.fields(Usage) if field.name != "model"]  # only of reports by model
    assert list(rows[0]) == [*names, "cost"]


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
