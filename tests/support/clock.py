"""A monotonic clock that advances only if a test says so, and how much shorter the seconds of a scenario's loop are."""

HURRY = 4
PATIENCE_S = 60.0  # real seconds after which a test gives up; far more than it needs, for machines under load


class Clock:
    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
