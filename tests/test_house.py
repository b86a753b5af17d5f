"""The rules of CONTRIBUTING.md: names, test files, and the steps of "How do I …". Each message says what to do.

The few exceptions are listed with their reasons. An exception that is no longer needed fails.
"""

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from inspect import isclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import keyfile
from accounting.access_lines import FIELDS
from accounting.request_metrics import RequestMetrics
from auth import Caller, Keyring
from config.settings import SETTINGS, Config
from core import errors
from metrics import Registry
from policy.cors import Cors
from policy.routes import INFERENCE, TABLE, Routes
from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, event, send, stall
from support.gateway import CHAT, Stack, get, post, scenario, until
from support.heads import every_answer
from support.paths import ROOT, SCRIPTS, TESTS
from support.python_source import parse
from support.rawclient import Response
from support.router import Router

# --- Exceptions ---

# Not read after the start: it makes the default of another setting.
NOT_READ = {
    "WORKER_TYPE",
}

# --- What the rules read ---

# Words that are no longer used, and what to use.
RETIRED = {
    "Backlog": "DrainWaiter",
    "BackendWire": "BackendProtocol",
    "Borrowed, borrowed": "ScrapedFamilies, scraped families",
    "ClientWire": "ClientProtocol",
    "Columns, columns": "RecordBatch, batch",
    "Deadlines, watched": "Ticker, wants_tick",
    "Ending, Hopeless": "StartupError",
    "Exchange, exchange, exchanges": "RequestRecord, record",
    "Gate": "FairQueue",
    "LettingGo, Held": "SlotReclaimer, PendingRelease",
    "Meter, keep_whole": "TokenCounter, buffer_if_small",
    "Misused, Refused": "UsageError",
    "Observer, observer": "Recorder",
    "Opening, opening, open_response": "ResponseInfo, parse_response",
    "Outbox, letter": "WriteBatcher, write",
    "Parts": "App",
    "Patience, Pulse": "UpstreamTimeouts, LastActivity",
    "Plan, Planner, plan": "PreparedRequest, RequestCache",
    "Promise, Expectant": "Waiter",
    "Rates, give_back": "RateLimiter, refund",
    "Strangers, strangers": "InvalidKeyLog",
    "Usher": "handshake reader",
    "ahead, surplus, choked, feeder": "receive_buffer, trailing_data, write_paused, upstream",
    "conversation, converse": "request handler, run_handler",
    "fault, stand_in, no_plan": "error, fallback",
    "hear, hearer, heard": "expect_head, head waiter, saw_activity",
    "identify": "authenticate",
    "is_straight": "fast_path, if any is left",
    "let_go": "release",
    "make_room": "evict_idle, raise_fd_limit, shed_for_fairness",
    "plainly, tell, judge, wish": "describe, report, current_state, exit_request",
    "tells, told": "has_usage, usage source, reported",
    "words": "message, help, request_line",
}
# Modules in which a retired word has its everyday meaning: a measurement has a plan, a file can tell its position, a
# stream has opening events, and a model's answer consists of words.
RETIRED_BUT_FINE = {
    "opening": {"mock_backend.py", "mock/generation.py"},
    "plan": {"benchmark.py"},
    "tell": {"boot/model_download.py"},
    "words": {"mock/generation.py", "mock_backend.py"},
}
# Public, though they begin with an underscore.
PUBLIC = {"_asdict", "_exit", "_fields", "_make", "_replace"}


# Their attributes are not those that a rule looks for: an object's own, and those of a line of the keys file.
OWNERS = {"self", "entry"}
COUNTING = {"inc", "observe", "observe_all"}


class Source(NamedTuple):
    """What the rules read of one module of scripts/. Its tree is not kept: it is large, and walked once."""

    identifiers: frozenset[str]  # every name, without leading underscores
    attributes: frozenset[str]  # every `x.name` that is not an assignment, see OWNERS
    counted: frozenset[str]  # every name of `x.name.inc` and its like, see COUNTING
    constants: frozenset[object]
    classes: Sequence[str]
    metrics: Mapping[str, frozenset[str]]  # by their class: the attributes to which it assigns a counter or histogram


class TestSource(NamedTuple):
    """What the rules read of one module of tests/."""

    bare: Sequence[str]  # test functions without all their annotations
    numbered: Sequence[str]  # test functions whose names tell a number only
    private: Sequence[str]  # the private names that it uses, with their lines

    __test__ = False


@cache
def sources() -> Mapping[str, Source]:
    """Every module of scripts/, by its path."""
    return {module: read_source(nodes) for module, nodes in nodes_below(SCRIPTS)}


@cache
def sources_of_tests() -> Mapping[str, TestSource]:
    """Every module of tests/, by its path."""
    return {module: read_test_source(nodes) for module, nodes in nodes_below(TESTS)}


def nodes_below(folder: Path) -> Iterator[tuple[str, Sequence[ast.AST]]]:
    for path in sorted(folder.rglob("*.py")):
        if path.stem != "__init__":
            tree = parse(path.read_text(encoding="utf-8"))
            yield str(path.relative_to(folder)), list(ast.walk(tree))


def read_source(nodes: Sequence[ast.AST]) -> Source:
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    return Source(
        frozenset(identifiers(nodes)),
        frozenset(
            node.attr for node in attributes if not (isinstance(node.value, ast.Name) and node.value.id in OWNERS)
        ),
        frozenset(
            node.value.attr for node in attributes if node.attr in COUNTING and isinstance(node.value, ast.Attribute)
        ),
        frozenset(node.value for node in nodes if isinstance(node, ast.Constant)),
        [node.name for node in classes],
        {node.name: metrics_made_in(node) for node in classes},
    )


def read_test_source(nodes: Sequence[ast.AST]) -> TestSource:
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    tests = [node for node in functions if node.name.startswith("test")]
    return TestSource(
        [node.name for node in tests if not is_annotated(node)],
        [node.name for node in tests if re.search(r"pitfall_[0-9]", node.name)],
        sorted({f"{text} (line {line})" for line, text in private_names(nodes)}),
    )


def check(broken: Mapping[str, str], exceptions: Collection[str] = (), name: str = "") -> None:
    """Fail with the sentence of each broken rule, and with one for each exception that is no longer needed."""
    sentences = [broken[key] for key in sorted(broken) if key not in exceptions]
    kept = sorted(key for key in exceptions if key not in broken)
    sentences += [f"{key} keeps the rule now: delete it from {name} in tests/test_house.py." for key in kept]
    assert not sentences, "\n" + "\n".join(sentences)


def identifiers(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        names: tuple[str | None, ...] = ()
        if isinstance(node, ast.Name):
            names = (node.id,)
        elif isinstance(node, ast.Attribute):
            names = (node.attr,)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = (node.name,)
        elif isinstance(node, (ast.arg, ast.keyword)):
            names = (node.arg,)
        elif isinstance(node, ast.alias):
            names = (node.name.rpartition(".")[2], node.asname)
        yield from (name.lstrip("_") for name in names if name)


def read_outside(*modules: str) -> set[str]:
    """The attributes that are read in scripts/, except in these modules."""
    return set(chain.from_iterable(source.attributes for module, source in sources().items() if module not in modules))


# --- The rules ---


def test_every_module_has_its_test_file() -> None:
    broken = {}
    for module in sources():
        path = Path(module)
        own = path.parent / f"test_{path.stem}.py"
        if len(path.parts) == 1 and '__name__ == "__main__"' in (SCRIPTS / path).read_text(encoding="utf-8"):
            own = Path("programs") / own
        if not (TESTS / own).exists():
            broken[module] = f"scripts/{module} has no tests/{own}: write it."
    check(broken)


def test_retired_words_are_gone() -> None:
    retired = {word: instead for words, instead in RETIRED.items() for word in words.split(", ")}
    broken = {
        f"{word} in {module}": f"scripts/{module} has the retired word {word}: use {retired[word]}."
        for module, source in sources().items()
        for word in source.identifiers & retired.keys()
    }
    fine = [f"{word} in {module}" for word, modules in RETIRED_BUT_FINE.items() for module in modules]
    check(broken, fine, "RETIRED_BUT_FINE")


def test_no_two_classes_share_a_name() -> None:
    found: dict[str, list[str]] = {}
    for module, source in sources().items():
        for name in source.classes:
            found.setdefault(name, []).append(module)
    broken = {
        name: f"The class {name} is defined in {' and in '.join(modules)}: rename all but one."
        for name, modules in found.items()
        if len(modules) > 1
    }
    check(broken)


def test_test_functions_are_annotated() -> None:
    check(
        {
            module: f"tests/{module}: annotate {', '.join(source.bare)} (every parameter, and `-> None`)."
            for module, source in sources_of_tests().items()
            if source.bare
        }
    )


def is_annotated(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    given = function.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return function.returns is not None and all(each.annotation for each in parameters if each.arg != "self")


def test_test_names_say_what_they_mean() -> None:
    check(
        {
            module: f"tests/{module}: a number says nothing to a reader: rename {', '.join(source.numbered)}."
            for module, source in sources_of_tests().items()
            if source.numbered
        }
    )


def test_tests_use_public_names_only() -> None:
    check(
        {
            module: f"tests/{module} uses {', '.join(source.private)}: test through a public name, or make one public."
            for module, source in sources_of_tests().items()
            if source.private
        }
    )


def private_names(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """Private attributes of anything but the object itself, and private names that are imported."""
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()"):
                yield node.lineno, f"{owner}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


# --- CONTRIBUTING.md, "How do I …": each step that can be forgotten ---


def test_a_setting_has_its_row() -> None:
    rows = {setting.path for setting in SETTINGS}
    check(
        {
            path: f"Config.{path} has no setting: give the field a Setting in scripts/config/settings.py."
            for path in fields_of(Config) - {"warnings", "at_default"} - rows
        }
    )


def fields_of(kind: Any, prefix: str = "") -> set[str]:
    """The paths of the fields of a class of settings, and of the classes that they are made of."""
    inner = {name: part for name, part in kind.__annotations__.items() if isclass(part) and hasattr(part, "_fields")}
    paths = {prefix + name for name in kind.__annotations__.keys() - inner.keys()}
    return paths.union(*(fields_of(part, f"{name}.") for name, part in inner.items()))


def test_a_setting_is_read() -> None:
    read = read_outside("config/loader.py", "config/settings.py")
    check(
        {
            setting.name: f"Nothing reads Config.{setting.path} ({setting.name}): read it in the module that uses it, "
            "or hand it to that in scripts/proxy/app.py."
            for setting in SETTINGS
            if setting.path.rpartition(".")[2] not in read
        },
        NOT_READ,
        "NOT_READ",
    )


def test_a_setting_is_in_the_tests_of_the_loader() -> None:
    tested = (TESTS / "config" / "test_loader.py").read_text(encoding="utf-8")
    check(
        {
            setting.name: f"tests/config/test_loader.py does not test {setting.name}: add its default, and a value."
            for setting in SETTINGS
            if not re.search(rf"\b{setting.name}\b", tested)
            or ("." not in setting.path and lacks(setting.path, tested))
        }
    )


def lacks(path: str, tested: str) -> bool:
    """Whether a setting that is in no group is not looked at twice: its default, and a value."""
    return len(re.findall(rf"\bgot\b.*\b{path}\b", tested)) < 2


def test_a_route_has_its_row_in_the_tests_of_who_may_call_it() -> None:
    tested = (TESTS / "policy" / "test_routes.py").read_text(encoding="utf-8")
    check(
        {
            f"{method} {path}": f"tests/policy/test_routes.py does not say who may call {method} {path}: add it to the "
            "group of its callers."
            for method, path, _ in TABLE
            if f"{method} {path.replace(':id', '0')}" not in tested
        }
    )


def test_an_endpoint_has_its_handler() -> None:
    handled = sources()["proxy/endpoints.py"].constants
    check(
        {
            path: f"{method} {path} is the gateway's own by scripts/policy/routes.py: add its method, "
            "and its entry in HANDLERS, to scripts/proxy/endpoints.py."
            for method, path, kind in TABLE
            if kind.local and path not in handled
        }
    )


# They generate no text: nothing limits their tokens, and llama-server ignores a `"stream": true`.
NOT_GENERATING = {
    *("/v1/embeddings", "/embeddings", "/embedding", "/v1/rerank", "/rerank", "/v1/reranking", "/reranking"),
    *("/v1/audio/transcriptions", "/audio/transcriptions", "/v1/systemone"),
}


def test_an_inference_route_that_generates_is_limited_and_streams() -> None:
    routes = Routes()
    paths = {path: routes.find(method.encode(), path.encode()) for method, path, kind in TABLE if kind is INFERENCE}
    check(
        {
            path: f"Does POST {path} generate text? If not, list it in NOT_GENERATING in tests/test_house.py. If it "
            "does, add it to _LIMIT_MEMBERS and _STREAMING in scripts/policy/routes.py, and to _PINNING if it reads "
            "`id_slot`: else the key's max_tokens does not apply, and its streams get no heartbeats."
            for path, route in paths.items()
            if not route.limit_members
        },
        NOT_GENERATING,
        "NOT_GENERATING",
    )
    check(
        {
            path: f"POST {path} generates text, but its streams are not known as such: add it to _STREAMING in "
            "scripts/policy/routes.py."
            for path, route in paths.items()
            if route.limit_members and not route.streams
        }
    )


def test_an_endpoint_has_its_section_in_the_docs() -> None:
    page = (ROOT / "docs" / "API_REFERENCE.md").read_text(encoding="utf-8")
    check(
        {
            path: f'docs/API_REFERENCE.md has no section "### {method} {path}": write what the endpoint answers.'
            for method, path, kind in TABLE
            if kind.local and f"\n### {method} {path}\n" not in page
        }
    )


def documented_headers() -> Mapping[str, str]:
    """The header fields that docs/API_REFERENCE.md says the gateway adds, in lower case, and to which answers."""
    page = (ROOT / "docs" / "API_REFERENCE.md").read_text(encoding="utf-8")
    section = page.partition("\n## Answers\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| (`[^|]+) \| ([^|]*) \|", section)
    return {name.lower(): answers for names, answers in rows for name in re.findall(r"`([^`]+)`", names)}


async def kinds_of_answers(stack: Stack) -> Mapping[str, Response]:
    """Return one answer for each way in which the gateway makes a head."""
    found = {"GET /ping": await stack.ask(get(b"/ping")), "an error": await stack.ask(get(b"/nowhere"))}
    found["a relayed answer"] = await stack.ask(post())
    stream = send(STREAM_HEAD + chunk(event("1")) + LAST_CHUNK)
    stack.backend.script(stream)
    found["a relayed stream"] = await stack.ask(post())
    stack.backend.script(stall(stack.finish), stream)
    client = await stack.client()
    client.send(post(CHAT, b'{"stream": true}'))
    await stack.backend.call(2)
    stack.advance(15)
    found["a stream that the gateway begins"] = Response(await client.take_through(b"\r\n\r\n"), b"", b"")
    stack.finish.set()
    await client.take_through(LAST_CHUNK)
    return found


@scenario(SSE_HEARTBEAT="15")
async def test_a_header_is_documented_and_on_every_answer(stack: Stack) -> None:
    listed = documented_headers()
    everywhere = {name for name, answers in listed.items() if answers == "every answer"}
    assert "x-request-id" in everywhere
    broken = {}
    for kind, response in (await kinds_of_answers(stack)).items():
        names = {name.decode().lower() for name, _ in response.fields} - {"transfer-encoding"}
        for name in names - listed.keys():
            broken[f"{kind} {name}"] = (
                f"The gateway adds {name} to {kind}: list it in docs/API_REFERENCE.md, section Answers."
            )
        for name in everywhere - names:
            broken[f"{kind} {name}"] = (
                f"docs/API_REFERENCE.md says that every answer has {name}, but {kind} lacks it: add it to "
                "`lines` in Response.__init__ (scripts/proxy/response.py), so that all answers get it."
            )
    check(broken)


@scenario()
async def test_a_header_on_every_answer_is_the_gateways_alone(stack: Stack) -> None:
    everywhere = [name.encode() for name, answers in documented_headers().items() if answers == "every answer"]
    stack.backend.script(send(answer(HELLO, b"200 OK", *[b"%b: the backend's" % name for name in everywhere])))
    response = await stack.ask(post())
    check(
        {
            name.decode(): f"The backend's own {name.decode()} passes to the client: add it to "
            "_NOT_PASSED in scripts/proxy/response_info.py."
            for name in everywhere
            if b"the backend's" in response.all(name)
        }
    )


def test_a_header_on_every_answer_is_in_the_heads_that_tests_expect() -> None:
    expected = {line.partition(b":")[0].decode().lower() for line in every_answer(b"r-1").splitlines()}
    everywhere = {name for name, answers in documented_headers().items() if answers == "every answer"}
    check(
        {
            name: f"Tests that compare whole heads do not expect {name}: add its line to tests/support/heads.py, as "
            "Response.__init__ (scripts/proxy/response.py) has it."
            for name in everywhere - expected
        }
    )


def test_a_header_on_every_answer_can_be_read_by_web_pages() -> None:
    exposed = dict(Cors(("*",)).fields(None))[b"Access-Control-Expose-Headers"].decode().split(", ")
    tested = (TESTS / "policy" / "test_cors.py").read_text(encoding="utf-8")
    everywhere = [name for name, answers in documented_headers().items() if answers == "every answer"]
    check(
        {
            name: f"Web pages cannot read {name}: add it to the exposed headers in scripts/policy/cors.py."
            for name in everywhere
            if name not in exposed
        }
        | {
            f"{name} in the tests": f"tests/policy/test_cors.py does not expect {name}: add it to EXPOSED."
            for name in everywhere
            if name not in tested
        }
    )


def test_a_metric_is_counted() -> None:
    counted = set(chain.from_iterable(source.counted for source in sources().values()))
    check(
        {
            name: f"{kind}.{name} (scripts/{module}) is registered but never counted: count it in "
            "scripts/accounting/recorder.py."
            for module, source in sources().items()
            for kind, made in source.metrics.items()
            if kind.endswith("Metrics")
            for name in made - counted
        }
    )


def test_a_metric_is_in_the_tests() -> None:
    folder = TESTS / "accounting"
    tested = "".join(
        (folder / name).read_text(encoding="utf-8") for name in ("test_recorder.py", "test_request_metrics.py")
    )
    registry = Registry()
    RequestMetrics(registry, "shared", by_model=True)
    check(
        {
            family.name: f"tests/accounting/test_recorder.py does not count {family.name}: add a request that counts."
            for family in registry.families()
            if family.name not in tested
            and f'"{family.name.removeprefix("gateway_").removesuffix("_total")}"' not in tested
        }
    )


def metrics_made_in(kind: ast.ClassDef) -> frozenset[str]:
    return frozenset(
        target.attr
        for node in ast.walk(kind)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Attribute) and ast.unparse(node.value.func) in ("counter", "histogram")
    )


def test_metrics_are_found() -> None:
    assert len({name for source in sources().values() for made in source.metrics.values() for name in made}) >= 10


def test_an_access_log_field_is_in_the_tested_lines() -> None:
    tested = (TESTS / "accounting" / "test_access_lines.py").read_text(encoding="utf-8")
    leading = {"ts", "key", "request_line", "status"}  # without their names in the text form
    missing = "tests/accounting/test_access_lines.py lacks the field {} in the whole {} line: add it with its value."
    check(
        {
            f"{field.name} text": missing.format(field.name, "text")
            for field in FIELDS
            if field.text and field.name not in leading and f" {field.name}=" not in tested
        }
        | {
            f"{field.name} json": missing.format(field.name, "JSON")
            for field in FIELDS
            if field.json and f'"{field.name}": ' not in tested
        }
    )


def test_an_error_is_raised_somewhere() -> None:
    others = (source.identifiers for module, source in sources().items() if module != "core/errors.py")
    used = set(chain.from_iterable(others))
    names = {name for name, value in vars(errors).items() if isinstance(value, errors.Kind)}
    check(
        {
            name: f"errors.{name} is in the catalogue, but nothing raises it: raise it or delete it."
            for name in names - used
        }
    )


# The fields of an entry are the columns of its line, between colons, and its options: name=value words.
OPTION_OF = {option.field: name for name, option in keyfile.OPTIONS.items()}
KEY_OPTIONS = sorted(
    {OPTION_OF.get(field, field) for field in keyfile.Entry._fields} - {"key_id", "digest", "rate_limit", "expires_at"}
)
each_key_option = pytest.mark.parametrize("option", KEY_OPTIONS)


def test_a_key_option_has_its_field() -> None:
    check(
        {
            name: f"scripts/keyfile.py parses {name}=…, but Entry has no field {option.field}: add it as the last one."
            for name, option in keyfile.OPTIONS.items()
            if option.field not in keyfile.Entry._fields
        }
    )


@each_key_option
def test_a_key_option_is_parsed(option: str) -> None:
    """No option has an empty value: a parser refuses that."""
    assert option in keyfile.OPTIONS, (
        f"scripts/keyfile.py does not parse {option}=…: add it to OPTIONS, or name the field {option} in its option."
    )
    with suppress(keyfile.KeyFileError):
        keyfile.OPTIONS[option].parse("")
        pytest.fail(
            f"scripts/keyfile.py accepts {option}= without a value: give it a parser that refuses what is wrong."
        )


@each_key_option
def test_a_key_option_reaches_the_caller(option: str) -> None:
    field = keyfile.OPTIONS[option].field
    fields = {each.name for each in dataclasses.fields(Caller)}
    assert field in fields, f"auth.Caller has no field {field}: add it in scripts/auth.py, and fill it from the entry."
    used = field in read_outside("keyfile.py", "key_mgmt.py")
    assert used, f"Nothing reads Caller.{field}: use it in the module that applies it."
    given = keyfile.parse_networks("192.0.2.0/24")
    entry = keyfile.Entry("alice", bytes(32))._replace(**{field: given})
    caller = Keyring.of([entry]).find(entry.digest, lambda: 0.0, ["192.0.2.7"])
    assert getattr(caller, field) == given, (
        f"auth.Caller.{field} does not have the entry's value: pass it on in _caller (scripts/auth.py)."
    )


@each_key_option
def test_a_key_option_is_documented(option: str) -> None:
    page = (ROOT / "docs" / "AUTHENTICATION.md").read_text(encoding="utf-8")
    assert f"| `{option}=` |" in page, f"docs/AUTHENTICATION.md does not explain `{option}=`: add a row for it."
    name = "--" + option.replace("_", "-")
    assert f"`{name}`" in page, f"docs/AUTHENTICATION.md does not name {name}: add it to the options of `generate`."


@each_key_option
def test_a_key_option_is_in_the_tests(option: str) -> None:
    written = (TESTS / "test_keyfile.py").read_text(encoding="utf-8")
    assert f"{option}=" in written, (
        f"tests/test_keyfile.py has no line with {option}=: add one, and a value to random_entry."
    )
    given = (TESTS / "programs" / "test_key_mgmt.py").read_text(encoding="utf-8")
    assert f'"{option}": ' in given, (
        f"tests/programs/test_key_mgmt.py does not give {option}: add it to test_generate_accepts_every_limit and to "
        "test_list_shows_limits_and_never_a_key."
    )


# --- CONTRIBUTING.md: the slot of a cancelled request ---

each_answer = pytest.mark.parametrize("streamed", [True, False], ids=["stream", "no stream"])


@each_answer
@scenario(MAX_CONCURRENT_REQUESTS="1")
async def test_the_slot_of_a_cancelled_request_is_released_when_the_backend_has_stopped(
    stack: Stack, streamed: bool
) -> None:
    def show(busy: bool) -> None:
        stack.backend.own[b"/slots"] = answer(json.dumps([{"is_processing": busy}]).encode())

    await check_release(stack, show, "scripts/proxy/admission.py", streamed=streamed)


@each_answer
@scenario(STATE="loading", MODELS="router", MAX_CONCURRENT_REQUESTS="auto", MODELS_MAX="1")
async def test_the_slot_of_a_cancelled_request_for_a_model_is_released_when_the_model_has_stopped(
    stack: Stack, streamed: bool
) -> None:
    router = Router(stack.backend, "chat", slots=1)
    stack.set_state("ready")

    def show(busy: bool) -> None:
        router.busy = int(busy)

    await check_release(stack, show, "scripts/proxy/model_admission.py", streamed=streamed)


async def check_release(stack: Stack, show: Callable[[bool], None], module: str, *, streamed: bool) -> None:
    """Cancel a request while GET /slots shows its slot busy, then show it idle. `module` admits the request."""
    show(True)
    stack.backend.script(*((send(STREAM_HEAD),) if streamed else ()), stall())
    client = await stack.client()
    client.send(post(CHAT, b'{"model": "chat"}'))
    await stack.backend.call()
    if streamed:
        await client.take_through(b"\r\n\r\n")
    before = len(stack.backend.probes)

    def asked() -> int:
        return sum(target.startswith(b"/slots") for target in stack.backend.probes[before:])

    client.reset()
    await until(lambda: asked() > 1 or not stack.app.numbers.active, "GET /slots is asked after a client has left")
    assert asked(), (
        f"The slot of a cancelled request is free before GET /slots is asked: finish in scripts/proxy/request.py must "
        f"call release_unfinished, and that ({module}) must hand the slot to SlotReclaimer (scripts/backend/slots.py)."
    )
    assert stack.app.numbers.active == 1, (
        "The slot is free while GET /slots still shows it busy: SlotReclaimer (scripts/backend/slots.py) must hold it."
    )
    show(False)
    most = asked() + 15  # a few are enough
    await until(
        lambda: not stack.app.numbers.active or asked() > most, "GET /slots is asked until it shows no busy slot"
    )
    assert not stack.app.numbers.active, (
        "The slot is held though GET /slots shows it idle: SlotReclaimer (scripts/backend/slots.py) must release it."
    )
