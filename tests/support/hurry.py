"""An event loop whose seconds are shorter."""

from selectors import SelectorKey

from support.clock import HURRY
from transport.write_batching import BatchingLoop, BatchingSelector


class HurriedSelector(BatchingSelector):
    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        return super().select(timeout and timeout / HURRY)


class HurriedLoop(BatchingLoop):
    """A loop whose seconds are shorter: its ticks and timeouts come HURRY times as soon."""

    def time(self) -> float:
        return super().time() * HURRY
