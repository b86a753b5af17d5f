"""An event loop that has no time to lose: its seconds are shorter."""

from selectors import SelectorKey

from support.clock import HURRY
from turns import TurnLoop, TurnSelector


class HurriedSelector(TurnSelector):
    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        return super().select(timeout and timeout / HURRY)


class HurriedLoop(TurnLoop):
    """A loop whose seconds are shorter: its ticks, looks and time-outs come HURRY times as soon."""

    def time(self) -> float:
        return super().time() * HURRY
