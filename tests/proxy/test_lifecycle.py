"""lifecycle.py: a drain begins once."""

from proxy.lifecycle import Lifecycle


def test_a_drain_begins_once() -> None:
    lifecycle, drains = Lifecycle(), []
    lifecycle.on_drain = lambda: drains.append(lifecycle.draining)
    assert not lifecycle.draining
    lifecycle.drain()
    lifecycle.drain()
    assert drains == [True]


def test_a_drain_needs_nothing_that_it_begins() -> None:
    lifecycle = Lifecycle()
    lifecycle.drain()
    assert lifecycle.draining
