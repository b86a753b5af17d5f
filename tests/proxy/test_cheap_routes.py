"""cheap_routes.py: what each bound refuses, on a clock that a test advances."""

import pytest

from auth import Caller
from config.settings import CheapSettings
from core.errors import PAYLOAD_TOO_LARGE, RATE_LIMIT_EXCEEDED, GatewayError
from proxy.cheap_routes import CheapRoutes
from support.clock import Clock

ALICE, BOB = Caller("alice", "infer", 1), Caller("bob", "infer", 1000)


def routes(clock: Clock, *, rated: bool = True) -> CheapRoutes:
    return CheapRoutes(CheapSettings(2, 3, 1000), 1, clock, rated=rated)


def test_a_body_has_a_largest_size() -> None:
    routes(Clock()).check_size(1000)
    with pytest.raises(GatewayError, match=r"MAX_CHEAP_BODY_SIZE \(1000 bytes\)") as caught:
        routes(Clock()).check_size(1001)
    assert caught.value.kind is PAYLOAD_TOO_LARGE


def test_each_key_has_the_same_rate_whatever_its_own_limit_is() -> None:
    clock = Clock()
    cheap = routes(clock)
    for caller in (ALICE, BOB):
        for _ in range(3):
            cheap.count(caller)
        with pytest.raises(
            GatewayError, match="limited to 3 requests per minute that tokenize, fill a template"
        ) as caught:
            cheap.count(caller)
        assert (caught.value.kind, caught.value.retry_after_s) == (RATE_LIMIT_EXCEEDED, 60)
    clock.now_s += 61
    cheap.count(ALICE)


def test_without_a_rate_any_number_passes() -> None:
    cheap = routes(Clock(), rated=False)
    for _ in range(10):
        cheap.count(ALICE)


def test_the_queue_admits_as_many_as_the_settings_say() -> None:
    cheap = routes(Clock())
    assert [cheap.queue.try_acquire("alice", None, 0) for _ in range(3)] == [True, True, False]
