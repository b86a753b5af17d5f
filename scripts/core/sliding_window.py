"""A sliding window: what was counted within the last 60 seconds, in few buckets, however much it is."""

import math
from collections import deque

WINDOW_S = 60.0
BUCKET_S = 1.0  # what arrives within this time shares one bucket of the window


class Bucket:
    """What arrived within BUCKET_S of the first arrival."""

    __slots__ = ("count", "last_s", "started_s")

    def __init__(self, now_s: float) -> None:
        self.started_s = now_s  # the first arrival
        self.last_s = now_s  # the last arrival
        self.count = 0


# Takes the place of a newest bucket that was removed. It started so long ago that the next arrival starts another.
_NO_BUCKET = Bucket(-math.inf)


class SlidingWindow:
    """What still counts: a sliding window of buckets, oldest first.

    A bucket expires as a whole, WINDOW_S after its last arrival. `total` is the sum of the counts of the buckets.
    Arrivals are added to `newest` until BUCKET_S after it started. No bucket expires before `next_expiry_s`, so most
    arrivals need not look at the oldest bucket.
    """

    __slots__ = ("buckets", "newest", "next_expiry_s", "total")

    def __init__(self) -> None:
        self.buckets: deque[Bucket] = deque()
        self.newest = _NO_BUCKET
        self.next_expiry_s = math.inf
        self.total = 0

    def add(self, now_s: float, count: int) -> None:
        """Count an arrival. The caller has removed what has expired."""
        bucket = self.newest
        if now_s - bucket.started_s >= BUCKET_S:
            bucket = self.add_bucket(now_s)
        bucket.last_s = now_s
        bucket.count += count
        self.total += count

    def add_bucket(self, now_s: float) -> Bucket:
        bucket = self.newest = Bucket(now_s)
        self.buckets.append(bucket)
        self.next_expiry_s = min(self.next_expiry_s, now_s + WINDOW_S)
        return bucket

    def expire(self, now_s: float) -> None:
        """Remove the expired buckets."""
        buckets = self.buckets
        while buckets and buckets[0].last_s + WINDOW_S <= now_s:
            self.total -= buckets.popleft().count
        self.next_expiry_s = buckets[0].last_s + WINDOW_S if buckets else math.inf

    def remove(self, arrived_s: float, count: int) -> None:
        """Remove a part of what arrived at this time, or just after it, and has not expired."""
        for bucket in self.buckets:
            if bucket.last_s >= arrived_s:
                bucket.count -= count
                self.total -= count
                if bucket.count == 0:
                    self.buckets.remove(bucket)
                    if bucket is self.newest:
                        self.newest = _NO_BUCKET
                return

    def wait_s(self, limit: int, now_s: float) -> float:
        """Return the seconds until less than `limit` counts. At least `limit` must count now."""
        buckets = iter(self.buckets)
        remaining = self.total
        while remaining >= limit:
            bucket = next(buckets)
            remaining -= bucket.count
        return bucket.last_s + WINDOW_S - now_s

    def reset_s(self, now_s: float) -> float:
        """Return the seconds until nothing counts any more."""
        return self.buckets[-1].last_s + WINDOW_S - now_s if self.buckets else 0.0


class WindowTable(dict[str, SlidingWindow]):
    """The windows of all keys, by key id. A key of which nothing counts needs none."""

    def __init__(self, now_s: float) -> None:
        super().__init__()
        self._cleanup_s = now_s + WINDOW_S

    def add_key(self, key_id: str, now_s: float) -> SlidingWindow:
        """Give a key that has no window an empty one."""
        if now_s >= self._cleanup_s:
            self._remove_idle(now_s)
        window = self[key_id] = SlidingWindow()
        return window

    def used(self, key_id: str, now_s: float) -> tuple[int, float]:
        """Return what counts now of a key, and the seconds until nothing does."""
        window = self.get(key_id)
        if window is None:
            return 0, 0.0
        window.expire(now_s)
        return window.total, window.reset_s(now_s)

    def _remove_idle(self, now_s: float) -> None:
        """Runs at most once per WINDOW_S, and only when the table is about to grow."""
        self._cleanup_s = now_s + WINDOW_S
        for key_id, window in list(self.items()):
            window.expire(now_s)
            if not window.buckets:
                del self[key_id]
