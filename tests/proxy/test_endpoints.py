"""endpoints.py: what each of the gateway's own endpoints answers, and that the table of routes lists the same ones."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from accounting.ledger import Usage
from auth import Caller, Reload
from backend.readiness import DRAINING, LOADING, READY
from core.errors import BAD_REQUEST, RELOAD_FAILED, ROUTE_NOT_ALLOWED, GatewayError
from metrics import CONTENT_TYPES, Counter, Registry
from policy.model_names import Patterns
from policy.prepared_request import PreparedRequest
from policy.routes import TABLE
from proxy.endpoints import HANDLERS, EndpointCall, Endpoints, check_table
from proxy.own_page import own_page
from proxy.response import Response
from support.gateway import get, request
from support.heads import every_answer
from support.memory_gateway import ALICE, DATE, EPOCH, OLGA, prepare
from support.memory_transport import Link, run, turns_until

ROW = Usage("", "alice", 2, 10, 3, 20, 0, 1, 1800.0)
PING = b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: 5\r\n"
PING += b"Cache-Control: no-store\r\n"


class Health:
    state = READY

    def report(self, *, times: bool, patterns: Patterns) -> dict[str, object]:
        return {"state": self.state, "slots": 4, **({"idle_s": 1.0, "of": patterns} if times else {})}


class Scraped:
    """Metrics that are due until they have been scraped."""

    due = True

    async def refresh(self) -> None:
        self.due = False


class Ledger:
    """Answers any query with one row, or with an error."""

    def __init__(self) -> None:
        self.queries: list[tuple[str, str]] = []  # by, and the only key
        self.error: ValueError | None = None

    def query(self, since: str, by: str, only: str) -> list[Usage]:
        self.queries.append((by, only))
        if self.error is not None:
            raise self.error
        return [ROW]


class Limits:
    """Says for which keys the limits were asked."""

    def report(self, caller: Caller, only: str) -> list[dict[str, object]]:
        return [{"key_id": f"for {caller.key_id}", "only": only}]


class Viewers:
    """Keeps who was served."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []

    async def serve(self, client: object, response: Response, prepared: object, caller: Caller) -> None:
        self.callers.append(caller)
        response.send(200, b"text/event-stream", b"data: {}\n\n")


class Own:
    """The endpoints with doubles around them."""

    def __init__(self, **changes: Any) -> None:
        self.health, self.scraped, self.ledger = Health(), Scraped(), Ledger()
        self.viewers = Viewers()
        self.flushes = self.drains = 0
        self.pages: Any = None
        self.reloaded = Reload(True, 3, ("line 2: no key",))
        state = Registry()
        registry = Registry(state)
        operators = Registry(registry)
        state.register(Counter("shown_to_all_total", "For everyone."))
        registry.register(Counter("shown_to_keys_total", "For keys."))
        operators.register(Counter("shown_to_operators_total", "For operators."))
        parts: dict[str, Any] = {
            "health": self.health,
            "health_credential": None,
            "state_registry": state,
            "registry": registry,
            "operator_registry": operators,
            "metrics_public": False,
            "by_model": False,
            "scraped_metrics": self.scraped,
            "usage_ledger": self.ledger,
            "key_limits": Limits(),
            "gpu_cost_per_hour": None,
            "flush_accounts": self._flush,
            "reload_keys": self._reload,
            "drain": self._drain,
            "pages": self.pages,
            "props": self,
            "board": own_page("board.html", lambda name: b"<p>board"),
            "viewers": self.viewers,
        }
        self.endpoints = Endpoints(**{**parts, **changes})

    async def _reload(self) -> Reload:
        return self.reloaded

    async def find(self, client: object, prepared: PreparedRequest, caller: Caller) -> tuple[int, bytes]:
        return 203, b"of %b for %b" % (prepared.target, caller.key_id.encode())

    def _flush(self) -> None:
        self.flushes += 1

    def _drain(self) -> None:
        self.drains += 1

    def ask(self, raw: bytes, caller: Caller | None = OLGA, *, ui: bool = False) -> bytes:
        """Return the response as bytes. Raises what the handler raises."""
        link = Link()
        client = link.client()
        prepared = prepare(raw, ui=ui)
        call = EndpointCall(client, Response(client, prepared, b"r-1", EPOCH, True), prepared, caller)
        ends: list[Exception | None] = []

        async def handler() -> Exception | None:
            try:
                await self.endpoints.answer(call)
            except Exception as error:
                return error
            return None

        async def play() -> None:
            client.run_handler(handler(), ends.append)
            await turns_until(lambda: ends)

        run(play())
        if ends[0] is not None:
            raise ends[0]
        return link.sent(client)


def body_of(response: bytes) -> Any:
    return json.loads(response.partition(b"\r\n\r\n")[2])


# --- Each endpoint ---


def test_ping_is_answered_with_pong() -> None:
    assert Own().ask(get(b"/ping"), None) == PING + every_answer(b"r-1") + b"\r\npong\n"


def test_the_root_says_what_base_urls_look_like() -> None:
    response = Own().ask(get(b"/"), None)
    assert response.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"a base URL that ends in /v1" in response


class Pages:
    """Answers with a page, unless `has_page` is false."""

    has_page = True

    async def answer_index(self, client: object, response: Response, prepared: PreparedRequest) -> bool:
        if self.has_page:
            response.send(200, b"text/html", b"page of " + prepared.target)
        return self.has_page

    async def answer_file(self, client: object, response: Response, prepared: PreparedRequest) -> None:
        response.send(200, b"text/css", b"file of " + prepared.target)


def test_the_root_is_a_page_if_there_is_one_for_the_client() -> None:
    pages = Pages()
    assert Own(pages=pages).ask(get(b"/"), None).endswith(b"\r\n\r\npage of /")
    pages.has_page = False
    assert b"a base URL that ends in /v1" in Own(pages=pages).ask(get(b"/"), None)


def test_a_file_of_the_page_is_answered_by_what_has_the_pages() -> None:
    assert Own(pages=Pages()).ask(get(b"/sw.js"), None, ui=True).endswith(b"\r\n\r\nfile of /sw.js")


def test_properties_are_those_for_the_caller() -> None:
    response = Own().ask(get(b"/props?x=1"), ALICE, ui=True)
    assert response.startswith(b"HTTP/1.1 203 ")
    assert b"\r\nContent-Type: application/json\r\n" in response
    assert response.endswith(b"\r\n\r\nof /props?x=1 for alice")


@pytest.mark.parametrize("path", [b"/health", b"/v1/health"])
@pytest.mark.parametrize(("state", "status"), [(READY, b"200 OK"), (LOADING, b"503 Service Unavailable")])
def test_health_is_200_only_when_the_backend_is_ready(state: str, status: bytes, path: bytes) -> None:
    own = Own()
    own.health.state = state
    response = own.ask(get(path), None)
    assert response.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert b"\r\nCache-Control: no-store\r\n" in response
    assert body_of(response) == {"state": state, "slots": 4}


@pytest.mark.parametrize(
    ("caller", "public", "seen"),
    [
        (None, False, [b"all"]),
        (None, True, [b"all", b"keys"]),
        (ALICE, False, [b"all", b"keys"]),
        (OLGA, False, [b"all", b"keys", b"operators"]),
    ],
)
def test_metrics_of_keys_are_for_operators(caller: Caller | None, public: bool, seen: list[bytes]) -> None:
    own = Own(metrics_public=public)
    response = own.ask(get(b"/metrics"), caller)
    assert re.findall(rb"(?m)^shown_to_(\w+)_total 0$", response) == seen
    assert own.flushes == 1  # what has ended by now is counted


@pytest.mark.parametrize("public", [False, True])
def test_a_key_for_some_models_sees_of_the_metrics_by_model_what_strangers_see(public: bool) -> None:
    some = replace(ALICE, models=("chat-*",))
    for by_model in (False, True):
        response = Own(metrics_public=public, by_model=by_model).ask(get(b"/metrics"), some)
        assert (b"shown_to_keys_total" in response) == (public or not by_model)


def test_health_is_asked_for_what_the_key_may_use() -> None:
    some = replace(ALICE, models=("chat-*",))
    assert body_of(Own().ask(get(b"/health"), some))["of"] == ["chat-*"]


@pytest.mark.parametrize(("accept", "fmt"), [(b"*/*", "text"), (b"application/json", "json")])
def test_metrics_come_in_the_format_that_is_asked_for(accept: bytes, fmt: str) -> None:
    response = Own().ask(get(b"/metrics", b"Accept: " + accept))
    assert b"\r\nContent-Type: " + CONTENT_TYPES[fmt] + b"\r\n" in response


def test_the_backends_metrics_are_scraped_only_when_they_are_due() -> None:
    own = Own()
    own.ask(get(b"/metrics"), None)  # they are not for this client
    assert own.scraped.due
    own.ask(get(b"/metrics"))
    assert not own.scraped.due
    own.ask(get(b"/metrics"))


@pytest.mark.parametrize(
    ("query", "since", "by"),
    [
        (b"", "30d", "key"),
        (b"?since=2026-01-31&by=day", "2026-01-31", "day"),
        (b"?since=7d&since=2026-01-31", "2026-01-31", "key"),
        (b"?since=2026%2D01%2D31", "2026-01-31", "key"),
    ],
)
def test_usage_is_what_the_ledger_says(query: bytes, since: str, by: str) -> None:
    own = Own()
    report = body_of(own.ask(get(b"/usage" + query)))
    assert (report["since"], report["by"]) == (since, by)
    assert report["rows"] == [
        {
            "day": "",
            "key_id": "alice",
            "requests": 2,
            "prompt": 10,
            "cached": 3,
            "completion": 20,
            "errors": 0,
            "cancelled": 1,
            "gpu_s": 1800.0,
            "estimated": 0,
        }
    ]
    assert own.ledger.queries == [(by, "")]
    assert report["keys"] == [{"key_id": "for olga", "only": ""}]
    assert own.flushes == 1  # what has ended by now is charged


@pytest.mark.parametrize(
    ("query", "caller", "only"),
    [(b"", ALICE, "alice"), (b"?key=alice", ALICE, "alice"), (b"?key=bob", OLGA, "bob"), (b"?key=", OLGA, "")],
)
def test_a_key_sees_its_own_usage_and_an_operator_all(query: bytes, caller: Caller, only: str) -> None:
    own = Own()
    report = body_of(own.ask(get(b"/usage" + query), caller))
    assert own.ledger.queries == [("key", only)]
    assert report["keys"] == [{"key_id": f"for {caller.key_id}", "only": only}]


def test_the_usage_of_another_key_needs_an_operators() -> None:
    own = Own()
    with pytest.raises(GatewayError) as refused:
        own.ask(get(b"/usage?key=olga"), ALICE)
    assert refused.value.kind is ROUTE_NOT_ALLOWED
    assert own.ledger.queries == []


def test_usage_has_a_cost_if_a_gpu_hour_has_a_price() -> None:
    report = body_of(Own(gpu_cost_per_hour=2.5).ask(get(b"/usage")))
    assert report["rows"][0]["cost"] == 1.25


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (b"?since=never", None, "since: expected a number of days such as 7d, or a date such as 2026-01-31"),
        (b"?by=week", ValueError("by: expected one of key, day"), "by: expected one of key, day"),
    ],
)
def test_a_question_that_the_ledger_cannot_answer_is_a_bad_request(
    query: bytes, error: ValueError | None, message: str
) -> None:
    own = Own()
    own.ledger.error = error
    with pytest.raises(GatewayError) as raised:
        own.ask(get(b"/usage" + query))
    assert (raised.value.kind, raised.value.message) == (BAD_REQUEST, message)


def test_a_reload_reports_the_keys_and_the_complaints() -> None:
    report = body_of(Own().ask(request(b"POST", b"/reload", b"")))
    assert report == {"keys": 3, "complaints": ["line 2: no key"]}


def test_a_reload_that_failed_says_why() -> None:
    own = Own()
    own.reloaded = Reload(False, 3, (), "the keys file is a directory")
    with pytest.raises(GatewayError, match=r"the last good keys stay\. Reason: the keys file is a directory$") as error:
        own.ask(request(b"POST", b"/reload", b""))
    assert error.value.kind is RELOAD_FAILED


def test_a_drain_begins_and_its_connection_ends() -> None:
    own = Own()
    response = own.ask(request(b"POST", b"/drain", b""))
    assert response.startswith(b"HTTP/1.1 202 Accepted\r\n")
    assert b"\r\nConnection: close\r\n" in response
    assert (own.drains, body_of(response)) == (1, {"state": DRAINING})


# --- The table of routes ---


def test_every_local_route_of_the_table_has_a_handler() -> None:
    check_table(HANDLERS)
    assert set(HANDLERS) == {path for _, path, kind in TABLE if kind.local}


def test_a_route_without_a_handler_is_named_with_both_files() -> None:
    handlers = {path: handler for path, handler in HANDLERS.items() if path != "/ping"}
    message = "policy/routes.py lists ['/ping'], but proxy/endpoints.py has no handler for it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_table(handlers)


def test_a_handler_without_a_route_is_named_with_both_files() -> None:
    message = "proxy/endpoints.py handles ['/pong'], but policy/routes.py does not list it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_table({**HANDLERS, "/pong": Endpoints.answer_ping})


def test_tables_that_differ_are_noticed_when_the_endpoints_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HANDLERS, "/pong", Endpoints.answer_ping)
    with pytest.raises(ValueError, match=r"policy/routes\.py"):
        Own()


# --- The board ---


def test_the_board_is_a_page_with_its_own_policy() -> None:
    head, _, body = Own().ask(get(b"/ui"), None, ui=True).partition(b"\r\n\r\n")
    assert b"\r\nContent-Type: text/html; charset=utf-8\r\n" in head
    assert b"\r\nContent-Security-Policy: default-src 'none'" in head
    assert body == b"<p>board"


def test_the_boards_stream_is_its_callers() -> None:
    own = Own()
    assert own.ask(get(b"/ui/events"), ALICE, ui=True).endswith(b"data: {}\n\n")
    assert own.viewers.callers == [ALICE]


def test_a_head_of_the_boards_stream_opens_none() -> None:
    own = Own()
    assert b"\r\nContent-Type: text/event-stream\r\n" in own.ask(request(b"HEAD", b"/ui/events"), ALICE, ui=True)
    assert own.viewers.callers == []
