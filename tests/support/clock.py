"""Clocks for tests: one that passes only when a test says so, and one of an event loop that has no time to lose."""

from selectors import SelectorKey

from turns import TurnLoop, TurnSelector

HURRY = 4


class Clock:
    """Monotonic seconds that pass only when a test says so."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class HurriedSelector(TurnSelector):
    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        return super().select(timeout and timeout / HURRY)


class HurriedLoop(TurnLoop):
    """A loop whose seconds are shorter: its ticks, looks and time-outs come HURRY times as soon."""

    def time(self) -> float:
        return super().time() * HURRY
