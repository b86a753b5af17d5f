"""What each key has spent in each day and month, in tokens: the sums that quotas are compared with.

The sums are kept by day, and no day is dropped at midnight: so a clock that is set back past it finds what was spent.
"""

from collections.abc import Mapping

_MAX_DAYS = 64  # in memory, besides those that were read from files
_MONTH = slice(7)  # of an ISO 8601 date

# By day, by key.
Spent = Mapping[str, Mapping[str, int]]


class Spending:
    """The tokens of each key by day (ISO 8601), and by month.

    `before` is what this instance spent before it started, `elsewhere` what the other instances have spent. Another
    thread may replace the two.
    """

    def __init__(self) -> None:
        self._own: dict[str, dict[str, int]] = {}
        self.before: Spent = {}
        self.elsewhere: Spent = {}

    def add(self, day: str, tokens: Mapping[str, int]) -> None:
        """Count tokens by key."""
        spent = self._own.get(day)
        if spent is None:
            if len(self._own) >= _MAX_DAYS:
                del self._own[next(iter(self._own))]
            spent = self._own[day] = {}
        for key_id, number in tokens.items():
            spent[key_id] = spent.get(key_id, 0) + number

    def of_day(self, day: str, key_id: str) -> int:
        return sum(part[day].get(key_id, 0) for part in (self._own, self.before, self.elsewhere) if day in part)

    def of_month(self, day: str, key_id: str) -> int:
        """Return what a key has spent in the month of a day."""
        month = day[_MONTH]
        parts = (self._own, self.before, self.elsewhere)
        return sum(spent.get(key_id, 0) for part in parts for each, spent in part.items() if each[_MONTH] == month)
