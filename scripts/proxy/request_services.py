"""What every request is served with: the parts of the gateway, handed over by name, and the limits of time."""

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from accounting.recorder import Recorder
from backend.models import Models
from backend.readiness import Readiness
from backend.slot_isolation import SlotIsolation
from backend.slots import SlotReclaimer
from config.settings import Limits
from policy.body_rules import BodyRules
from policy.fair_queue import FairQueue
from policy.memory_budget import MemoryBudget
from policy.suspects import Suspects
from proxy.access import AccessControl
from proxy.body_scan import BodyScans
from proxy.cheap_routes import CheapRoutes
from proxy.endpoints import Endpoints
from proxy.last_responses import LastResponses
from proxy.lifecycle import Lifecycle
from proxy.relay import UpstreamTimeouts
from proxy.response_info import DateField
from proxy.token_quotas import TokenQuotas
from transport.pool import ConnectionPool


@dataclass(frozen=True, slots=True)
class RequestTimeouts:
    """How long a request's phases may take, in seconds; 0 is no limit, except that heartbeats are then off."""

    client_body_s: float
    client_body_rate: int  # bytes per second, not seconds
    queue_s: float
    cold_start_s: float
    duration_s: float
    heartbeat_s: float
    flush_s: float  # for a client to take the end of its response


@dataclass(frozen=True, slots=True)
class RequestServices:
    """What every request is served with. The composition root makes it once."""

    clock: Callable[[], float]
    request_ids: Iterator[bytes]
    lifecycle: Lifecycle
    date: DateField
    access: AccessControl
    quotas: TokenQuotas
    endpoints: Endpoints
    limits: Limits
    timeouts: RequestTimeouts
    upstream_timeouts: UpstreamTimeouts
    memory: MemoryBudget
    queue: FairQueue
    cheap_routes: CheapRoutes
    readiness: Readiness
    pool: ConnectionPool
    reclaimer: SlotReclaimer
    isolation: SlotIsolation | None  # None: all keys share the slots' contents
    models: Models | None  # None: there is one model, which is always loaded
    reads_members: bool  # of every body, for one of these two
    last_responses: LastResponses
    body_scans: BodyScans
    body_rules: BodyRules
    suspects: Suspects
    suspects_lane: FairQueue
    backend_lives: Callable[[], Coroutine[Any, Any, bool]]
    recorder: Recorder
