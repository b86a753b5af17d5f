"""Whether the gateway drains."""

from collections.abc import Callable


class Lifecycle:
    """`draining` is set once, for good; `on_drain` then begins the end."""

    def __init__(self) -> None:
        self.draining = False
        self.on_drain: Callable[[], None] = lambda: None

    def drain(self) -> None:
        if not self.draining:
            self.draining = True
            self.on_drain()
