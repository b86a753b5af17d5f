"""Monotonic seconds that pass only when a test says so, and how much shorter those of a scenario's loop are."""

HURRY = 4


class Clock:
    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
