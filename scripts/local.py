"""What the gateway answers itself: liveness, health, metrics, usage, reload and drain."""

import asyncio
import json
import time
from dataclasses import asdict
from urllib.parse import parse_qs

import metrics
import usage
from answer import Answer
from auth import Caller
from client_wire import ClientWire
from errors import BAD_REQUEST, RELOAD_FAILED, GatewayError
from parts import Parts
from plan import Plan
from readiness import DRAINING, READY

_TEXT = b"text/plain; charset=utf-8"
_JSON = b"application/json"


async def serve(parts: Parts, client: ClientWire, answer: Answer, plan: Plan, caller: Caller | None) -> None:
    """Answer one of the gateway's own routes."""
    route = plan.route
    if route.label == "/ping":
        answer.send(200, _TEXT, b"pong\n")
    elif route.label == "/health":
        health = health_of(parts)
        send_json(answer, 200 if health["state"] == READY else 503, health)
    elif route.label == "/metrics":
        if parts.backend_page.due:
            await client.run(parts.backend_page.renew(), 0, None)
        send_metrics(parts, answer, plan, caller)
    elif route.label == "/usage":
        await send_usage(parts, client, answer, plan)
    elif route.label == "/reload":
        send_json(answer, 200, reload(parts))
    else:
        parts.drain()
        answer.keep_alive = False
        send_json(answer, 202, {"state": DRAINING})


def send_json(answer: Answer, status: int, value: object) -> None:
    answer.send(status, _JSON, json.dumps(value).encode() + b"\n", ((b"Cache-Control", b"no-store"),))


# --- Health and metrics ---


def health_of(parts: Parts) -> dict[str, object]:
    """The state for people and machines, from memory only: no backend call, no key, no key count."""
    return {
        "state": DRAINING if parts.draining else parts.readiness.state,
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(parts.readiness.since_at)),
        "backend": parts.readiness.state,
        "slots": parts.gate.slots,
        "active": parts.gate.active,
        "queued": parts.gate.queued,
        "connections": len(parts.clients),
        "backend_silent_s": round(parts.backend_silent_s(), 1),
        "idle_s": round(parts.idle_s(), 1),
        "uptime_s": round(parts.uptime_s(), 1),
        "version": parts.version,
    }


def send_metrics(parts: Parts, answer: Answer, plan: Plan, caller: Caller | None) -> None:
    parts.observer.flush()
    fmt = metrics.negotiate(plan.accept)
    operator = caller is not None and caller.is_operator
    page = metrics.render(parts.operator_registry if operator else parts.registry, fmt)
    answer.send(200, metrics.CONTENT_TYPES[fmt], page)


# --- Usage ---


async def send_usage(parts: Parts, client: ClientWire, answer: Answer, plan: Plan) -> None:
    """The ledger's sums for an operator; they are read off the event loop."""
    query = parse_qs(plan.target.partition(b"?")[2].decode("ascii"))
    since, by = query.get("since", ["30d"])[-1], query.get("by", ["key"])[-1]
    try:
        parts.observer.flush()
        first_day = usage.first_day(since, time.time())
        work = asyncio.get_running_loop().run_in_executor(None, parts.ledger.query, first_day, by)
        rows = await client.wait_for(work, 0, None)
    except ValueError as error:
        raise GatewayError(BAD_REQUEST, str(error)) from error
    send_json(answer, 200, {"since": since, "by": by, "rows": [usage_row(parts, row) for row in rows]})


def usage_row(parts: Parts, row: usage.Usage) -> dict[str, object]:
    price = parts.config.usage.gpu_cost_per_hour
    return asdict(row) if price is None else {**asdict(row), "cost": usage.cost(row.gpu_s, price)}


# --- Reload ---


def reload(parts: Parts) -> dict[str, object]:
    """Read keys and certificates again. Raises RELOAD_FAILED where the keys file cannot be trusted."""
    result = parts.reload()
    if not result.ok:
        raise GatewayError(RELOAD_FAILED, f"{RELOAD_FAILED.message} Reason: {result.reason}")
    return {"keys": result.keys, "complaints": list(result.complaints)}
