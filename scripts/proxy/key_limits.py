"""Reports on the limits of keys: what is used of each, what is left, and when that changes."""

from collections.abc import Iterable
from itertools import islice

from auth import Caller, KeyStore, RateLimiter
from proxy.token_quotas import TokenQuotas, standing


class KeyLimits:
    """The limits of the keys in force."""

    def __init__(self, keys: KeyStore, rate_limiter: RateLimiter, quotas: TokenQuotas) -> None:
        self._keys = keys
        self._rate_limiter = rate_limiter
        self._quotas = quotas

    def report(self, caller: Caller, only: str) -> list[dict[str, object]]:
        """Return the report on the key `only`, or on all if that is empty, sorted by id.

        Of several keys with one id the caller's own counts, else the last one in the file.
        """
        callers = {each.key_id: each for each in (*self._keys.keyring, caller) if only in ("", each.key_id)}
        return [self.of(callers[key_id]) for key_id in sorted(callers)]

    def listed(self, first: Iterable[str], most: int) -> tuple[list[dict[str, object]], int]:
        """Return the reports on at most so many keys in force, and how many there are. Those in `first` come first."""
        callers = {each.key_id: each for each in self._keys.keyring}
        ordered = dict.fromkeys([*(key_id for key_id in first if key_id in callers), *callers])
        return [self.of(callers[key_id]) for key_id in islice(ordered, most)], len(callers)

    def of(self, caller: Caller) -> dict[str, object]:
        used, resets_in_s = self._rate_limiter.used(caller.key_id)
        return {
            "key_id": caller.key_id,
            "requests_per_minute": standing(caller.rate_limit, used, resets_in_s),
            **self._quotas.report(caller),
            "parallel": caller.parallel,
        }
