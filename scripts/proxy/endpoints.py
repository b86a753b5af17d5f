"""The gateway's own endpoints: the root, liveness, health, metrics, usage, reload and drain.

A new endpoint is a row in the table of routes (policy/routes.py), a method here and an entry in HANDLERS. The two
tables are compared at the start.
"""

import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import metrics
from accounting import ledger
from auth import Caller, Reload
from backend.readiness import DRAINING, READY
from backend.scraped_metrics import ScrapedMetrics
from core.errors import BAD_REQUEST, KEY_NOT_FOUND, RELOAD_FAILED, ROUTE_NOT_ALLOWED, GatewayError
from core.off_loop import run_off_loop
from policy.prepared_request import PreparedRequest
from policy.routes import TABLE
from proxy.board_viewers import BoardViewers
from proxy.health import Health
from proxy.key_limits import KeyLimits
from proxy.own_page import OwnPage
from proxy.pages import Pages
from proxy.response import Response
from proxy.shown_props import ShownProps
from transport.client_protocol import ClientProtocol

_TEXT = b"text/plain; charset=utf-8"
_JSON = b"application/json"
# The same on every gateway: it says nothing of this one to a caller without a key.
_ROOT = b"This is an API. OpenAI's clients need a base URL that ends in /v1, Anthropic's one without it.\n"


@dataclass(frozen=True, slots=True)
class EndpointCall:
    """One request for an endpoint. `caller` is None if the route is public and there is no valid key."""

    client: ClientProtocol
    response: Response
    prepared: PreparedRequest
    caller: Caller | None


@dataclass(frozen=True)
class Endpoints:
    """The handlers and what they need.

    `state_registry` has the metrics that a client without a key sees, `registry` those of any key, or of every
    client if `metrics_public`, and `operator_registry` those of an operator's key. `by_model`: they name the
    models, so a key that may use only some of these sees what a client without a key does. `flush_accounts` counts
    all requests that have ended by now. `health_credential` is the digest of the supervisor's credential, None
    without a supervisor. `pages` is None with UI=off.
    """

    health: Health
    health_credential: bytes | None
    state_registry: metrics.Registry
    registry: metrics.Registry
    operator_registry: metrics.Registry
    metrics_public: bool
    by_model: bool
    scraped_metrics: ScrapedMetrics
    usage_ledger: ledger.Ledger
    key_limits: KeyLimits
    gpu_cost_per_hour: float | None
    flush_accounts: Callable[[], None]
    reload_keys: Callable[[], Coroutine[Any, Any, Reload]]
    drain: Callable[[], None]
    pages: Pages | None
    props: ShownProps
    board: OwnPage
    viewers: BoardViewers

    def __post_init__(self) -> None:
        check_table(HANDLERS)

    async def answer(self, call: EndpointCall) -> None:
        await HANDLERS[call.prepared.route.label](self, call)

    async def answer_root(self, call: EndpointCall) -> None:
        """Send a page to browsers. Clients ask with HEAD whether a base URL is alive, without a key: 200, not 404."""
        pages = self.pages
        if pages is None or not await pages.answer_index(call.client, call.response, call.prepared):
            call.response.send(200, _TEXT, _ROOT)

    async def answer_page_file(self, call: EndpointCall) -> None:
        assert self.pages is not None  # else there is no such route
        await self.pages.answer_file(call.client, call.response, call.prepared)

    async def answer_props(self, call: EndpointCall) -> None:
        assert call.caller is not None  # the route is not public
        status, properties = await self.props.find(call.client, call.prepared, call.caller)
        call.response.send(status, _JSON, properties)

    async def answer_ping(self, call: EndpointCall) -> None:
        call.response.send(200, _TEXT, b"pong\n")

    async def answer_health(self, call: EndpointCall) -> None:
        known = call.caller is not None or (self.health_credential or b"") == call.prepared.credential
        report = self.health.report(times=known, patterns=None if call.caller is None else call.caller.models)
        send_json(call.response, 200 if report["state"] == READY else 503, report)

    async def answer_metrics(self, call: EndpointCall) -> None:
        registry = self._registry_for(call.caller)
        if self.scraped_metrics.due and registry is not self.state_registry:
            await call.client.run(self.scraped_metrics.refresh(), 0, None)
        self.flush_accounts()
        fmt = metrics.negotiate(call.prepared.accept)
        call.response.send(200, metrics.CONTENT_TYPES[fmt], metrics.render(registry, fmt))

    def _registry_for(self, caller: Caller | None) -> metrics.Registry:
        if caller is None or (self.by_model and caller.models is not None):
            return self.registry if self.metrics_public else self.state_registry
        return self.operator_registry if caller.is_operator else self.registry

    async def answer_usage(self, call: EndpointCall) -> None:
        """Send the ledger's sums, and what the limits leave. The sums are read off the event loop."""
        query = parse_qs(call.prepared.target.partition(b"?")[2].decode("ascii"))
        since, by = query.get("since", ["30d"])[-1], query.get("by", ["key"])[-1]
        caller = call.caller
        assert caller is not None  # the route is not public
        only = _key_of_report(caller, query.get("key", [""])[-1])
        try:
            self.flush_accounts()
            first_day = ledger.first_day(since, time.time())
            work = run_off_loop(partial(self.usage_ledger.query, first_day, by, only))
            rows = await call.client.wait_for(work, 0, None)
        except ValueError as error:
            raise GatewayError(BAD_REQUEST, str(error)) from error
        keys = self.key_limits.report(caller, only)
        if only and not rows and not keys:
            await self._check_recorded(call, only)
        report = {"since": since, "by": by, "rows": [self._usage_row(row) for row in rows]}
        send_json(call.response, 200, {**report, "keys": keys})

    async def _check_recorded(self, call: EndpointCall, key_id: str) -> None:
        """Raise KEY_NOT_FOUND if a key that is not in force has no use on record, as a removed one may have."""
        work = run_off_loop(partial(self.usage_ledger.query, "", "key", key_id))
        if not await call.client.wait_for(work, 0, None):
            raise GatewayError(KEY_NOT_FOUND, "No key of this name is in force, and none has use on record.")

    def _usage_row(self, row: ledger.Usage) -> dict[str, object]:
        price = self.gpu_cost_per_hour
        return row.record() if price is None else {**row.record(), "cost": ledger.cost(row.gpu_s, price)}

    async def answer_reload(self, call: EndpointCall) -> None:
        """Read keys and certificates again. Raises RELOAD_FAILED if the keys file cannot be trusted."""
        result = await call.client.run(self.reload_keys(), 0, None)
        if not result.ok:
            raise GatewayError(RELOAD_FAILED, f"{RELOAD_FAILED.message} Reason: {result.reason}")
        send_json(call.response, 200, {"keys": result.keys, "complaints": list(result.complaints)})

    async def answer_drain(self, call: EndpointCall) -> None:
        self.drain()
        call.response.keep_alive = False
        send_json(call.response, 202, {"state": DRAINING})

    async def answer_board(self, call: EndpointCall) -> None:
        self.board.send(call.response, call.prepared)

    async def answer_board_events(self, call: EndpointCall) -> None:
        """Stream the board's numbers to one viewer."""
        caller = call.caller
        assert caller is not None  # the route is not public
        if call.prepared.method == b"HEAD":
            call.response.send(200, b"text/event-stream", b"")
        else:
            await self.viewers.serve(call.client, call.response, call.prepared, caller)


HANDLERS: dict[str, Callable[[Endpoints, EndpointCall], Awaitable[None]]] = {
    "/": Endpoints.answer_root,
    "/:page": Endpoints.answer_page_file,
    "/props": Endpoints.answer_props,
    "/ping": Endpoints.answer_ping,
    "/health": Endpoints.answer_health,
    "/v1/health": Endpoints.answer_health,
    "/metrics": Endpoints.answer_metrics,
    "/usage": Endpoints.answer_usage,
    "/ui": Endpoints.answer_board,
    "/ui/events": Endpoints.answer_board_events,
    "/reload": Endpoints.answer_reload,
    "/drain": Endpoints.answer_drain,
}


def _key_of_report(caller: Caller, key_id: str) -> str:
    """Return the key of which a caller gets the report; empty for all. Raises ROUTE_NOT_ALLOWED."""
    if caller.is_operator:
        return key_id
    if key_id not in ("", caller.key_id):
        raise GatewayError(ROUTE_NOT_ALLOWED, "The usage of another key needs an operator's key.")
    return caller.key_id


def check_table(handlers: Mapping[str, object]) -> None:
    """Compare the handlers with the table of routes. Raises ValueError, a mistake of the program."""
    labels = {path for _, path, kind in TABLE if kind.local}
    if missing := labels - handlers.keys():
        raise ValueError(f"policy/routes.py lists {sorted(missing)}, but proxy/endpoints.py has no handler for it")
    if unrouted := handlers.keys() - labels:
        raise ValueError(f"proxy/endpoints.py handles {sorted(unrouted)}, but policy/routes.py does not list it")


def send_json(response: Response, status: int, value: object) -> None:
    response.send(status, _JSON, json.dumps(value).encode() + b"\n")
