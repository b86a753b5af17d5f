"""health.py: what GET /health reports, and how long the backend has been silent."""

from typing import Any

from backend.readiness import DRAINING, LOADING, READY
from policy.fair_queue import FairQueue
from proxy.health import Health
from proxy.lifecycle import Lifecycle
from support.clock import Clock
from support.memory_gateway import ScriptedReadiness
from transport.backend_protocol import LastActivity


class Around:
    """What health reads."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.readiness: Any = ScriptedReadiness()
        self.queue = FairQueue(4, 0, self.clock)
        self.lifecycle = Lifecycle()
        self.activity = LastActivity()
        self.health = Health(
            readiness=self.readiness,
            queue=self.queue,
            lifecycle=self.lifecycle,
            last_activity=self.activity,
            connections=lambda: 7,
            work=lambda patterns: {"unanswered_bytes": 9},
            version="1.2.3",
            clock=self.clock,
        )


def test_the_report_has_the_state_and_the_numbers() -> None:
    around = Around()
    around.queue.acquire("alice")
    around.clock.advance(12.34)
    assert around.health.report() == {
        "unanswered_bytes": 9,
        "state": READY,
        "since": "1970-01-01T00:00:00Z",
        "backend": READY,
        "slots": 4,
        "active": 1,
        "queued": 0,
        "queued_slots": 0,
        "connections": 7,
        "backend_silent_s": 12.3,
        "idle_s": 0.0,
        "uptime_s": 12.3,
        "version": "1.2.3",
    }


def test_an_idle_gateway_reports_for_how_long() -> None:
    around = Around()
    around.clock.advance(5)
    assert around.health.report()["idle_s"] == 5.0


def test_a_gateway_that_drains_reports_the_backends_own_state_too() -> None:
    around = Around()
    around.lifecycle.drain()
    report = around.health.report()
    assert (report["state"], report["backend"]) == (DRAINING, READY)


def test_it_is_ready_when_the_backend_is() -> None:
    around = Around()
    assert around.health.is_ready
    around.readiness.state = LOADING
    assert not around.health.is_ready
    assert around.health.report()["state"] == LOADING


def test_any_byte_of_the_backend_ends_its_silence() -> None:
    around = Around()
    around.clock.advance(100)
    assert around.health.backend_silent_s() == 100
    around.activity.seen = True
    assert around.health.backend_silent_s() == 0
    around.clock.advance(3)
    assert around.health.backend_silent_s() == 3
