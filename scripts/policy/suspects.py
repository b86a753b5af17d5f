"""Which requests may have ended the backend, and what follows: they run alone, or not at all, and so do their keys.

A death has as suspects all requests that were at work. The only one, and one that was at work in two deaths, is held
back for an hour. The others run one at a time, so that they are not at work in one more death together. A request that
is answered is cleared, and so are those that were at work with one that was found out. A key whose suspects are left in
most deaths of the last minutes gets one request at a time, then none for a while.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from core.errors import CALLER_PAUSED, REQUEST_HELD_BACK, GatewayError

log = logging.getLogger("gateway")

HELD_S = 3600.0
DEATHS_S = 300.0  # how long a death counts against a key
PAUSE_S = 60.0  # of a key after its third death, twice as long after each further one
MAX_PAUSE_S = 480.0
ABANDONED_S = 15.0  # how long a request whose client has left may still be at work
CUT_S = 5.0  # until a connection that was cut shows to be a death
_MAX_KEPT = 4096
_ONE_AT_A_TIME, _PAUSED = 2, 3  # deaths of a key


class Suspect(NamedTuple):
    """A request as it is recognised: the id of its key, and the digest of its route and body."""

    key_id: str
    digest: bytes


@dataclass
class Death:
    """An end of the backend. `suspects` are those that have not been cleared, `left` those whose clients had left."""

    at_s: float
    suspects: set[Suspect] = field(default_factory=set)
    left: frozenset[Suspect] = frozenset()


class Suspects:
    """What is known of the last deaths. It costs nothing while there was none: `active` is False then.

    `deaths` is their number since the start.
    """

    def __init__(
        self, at_work: Callable[[str | None], Iterable[Suspect]], clock: Callable[[], float], shared_key: str = ""
    ) -> None:
        """`at_work` returns the requests that a model works on; None: any. Each of several models dies alone.

        The key `shared_key` is everyone's: it is not paused.
        """
        self._at_work = at_work
        self._shared = shared_key
        self._clock = clock
        self._abandoned: deque[tuple[float, Suspect, str]] = deque(maxlen=_MAX_KEPT)
        # Connections were cut, those of a model or of all (None): a death, if that turns out to be gone.
        self._cuts: dict[str | None, Death] = {}
        self._deaths: deque[Death] = deque(maxlen=_MAX_KEPT)
        self._suspected: dict[bytes, float] = {}  # until when a request is a suspect, by digest
        self._held: dict[bytes, float] = {}  # until when, by digest
        self.active = False
        self.deaths = 0

    # --- What happens to the backend ---

    def note_cut(self, model: str | None = None) -> None:
        """The backend, or one model of it, has cut the response to a request at work; others' may follow at once."""
        now_s = self._clock()
        cut = self._cuts.get(model)
        if cut is None or now_s - cut.at_s > CUT_S:
            left = frozenset(
                suspect for at_s, suspect, of in self._abandoned if now_s - at_s <= ABANDONED_S and model in (None, of)
            )
            self._cuts[model] = Death(now_s, set(left.union(self._at_work(model))), left)

    def note_alive(self) -> None:
        """The backend accepts connections: it has cut one on purpose."""
        self._cuts.pop(None, None)

    def note_down(self, model: str | None = None) -> None:
        """The backend (None), or the model, is not there: what was cut just before was cut by its death."""
        if model is None and None not in self._cuts:
            deaths, self._cuts = list(self._cuts.values()), {}
        else:
            deaths = [self._cuts.pop(model)] if model in self._cuts else []
            if model is None:  # that has all requests
                self._cuts = {}
        for death in deaths:
            if self._clock() - death.at_s <= CUT_S and death.suspects:
                self._note_death(death)

    def _note_death(self, death: Death) -> None:
        self._abandoned.clear()
        self._forget_old()
        self._deaths.append(death)
        self.deaths += 1
        self.active = True
        alone = len(death.suspects) == 1
        culprits = [suspect for suspect in death.suspects if alone or suspect.digest in self._suspected]
        # Suspects run one at a time: what runs with one whose client has left was sent when the backend hung already.
        culprits = [suspect for suspect in culprits if suspect in death.left] or culprits
        for suspect in death.suspects:
            self._keep(self._suspected, suspect)
        key_ids = sorted({suspect.key_id for suspect in death.suspects})
        log.warning("llama-server ended while it worked on requests of the keys %s", ", ".join(key_ids))
        if culprits:
            self._hold(culprits)
        self._log_consequences(key_ids, culprits)

    def _log_consequences(self, key_ids: Sequence[str], culprits: Collection[Suspect]) -> None:
        for key_id in sorted({culprit.key_id for culprit in culprits}):
            log.warning("a request of key %s is held back for an hour: it was at work alone, or in two deaths", key_id)
        for key_id in key_ids:
            pause_s = self._pause_s(key_id)
            if pause_s > 0:
                log.warning(
                    "key %s gets nothing for %d s: its requests were at work in most of the last deaths",
                    key_id,
                    pause_s,
                )

    def was_cut_recently(self) -> bool:
        """Whether requests were at work when the backend ended, if it ended now."""
        now_s = self._clock()
        last = [*self._cuts.values(), *list(self._deaths)[-1:]]
        return any(now_s - death.at_s <= CUT_S for death in last)

    # --- What happens to requests ---

    def abandon(self, suspect: Suspect, model: str = "") -> None:
        """The client of a request at work has left: the backend may not know that yet."""
        self._abandoned.append((self._clock(), suspect, model))

    def clear(self, suspect: Suspect) -> None:
        """A suspect was answered."""
        self._suspected.pop(suspect.digest, None)
        for death in self._deaths:
            death.suspects.discard(suspect)

    def _keep(self, kept: dict[bytes, float], suspect: Suspect) -> None:
        """Keep a request for an hour from now on, behind those that are kept for less."""
        kept.pop(suspect.digest, None)
        kept[suspect.digest] = self._clock() + HELD_S

    def _hold(self, culprits: Collection[Suspect]) -> None:
        """Hold requests back, and clear those that were at work in the deaths that they have caused."""
        for culprit in culprits:
            self._keep(self._held, culprit)
        for death in self._deaths:
            guilty = death.suspects.intersection(culprits)
            if guilty:
                for suspect in death.suspects - guilty:
                    self._suspected.pop(suspect.digest, None)
                death.suspects = guilty

    # --- What follows for requests ---

    def check_caller(self, key_id: str) -> None:
        """Raise CALLER_PAUSED for a key that gets nothing at the moment. Forgets what is too long ago."""
        self._forget_old()
        pause_s = self._pause_s(key_id)
        if pause_s > 0:
            raise GatewayError(CALLER_PAUSED, retry_after_s=ceil(pause_s))

    def _pause_s(self, key_id: str) -> float:
        """Return for how long a key gets nothing from now on; 0 or less if it is not paused."""
        deaths, last_s = self._deaths_of(key_id) if key_id != self._shared else (0, 0.0)
        if deaths < _PAUSED:
            return 0.0
        pause_s: float = min(MAX_PAUSE_S, PAUSE_S * 2 ** (deaths - _PAUSED))
        return last_s + pause_s - self._clock()

    def is_limited(self, key_id: str) -> bool:
        """Whether a key gets one request at a time."""
        return key_id != self._shared and self._deaths_of(key_id)[0] >= _ONE_AT_A_TIME

    def _deaths_of(self, key_id: str) -> tuple[int, float]:
        """Return in how many deaths suspects of the key are left, 0 if these are not most deaths, and the last time."""
        self._forget_old()
        own = [death.at_s for death in self._deaths if any(suspect.key_id == key_id for suspect in death.suspects)]
        return (len(own), own[-1]) if own and 2 * len(own) > len(self._deaths) else (0, 0.0)

    def must_run_alone(self, suspect: Suspect) -> bool:
        """Return whether a request is a suspect. Raises REQUEST_HELD_BACK if it has been found out."""
        until_s = self._held.get(suspect.digest)
        if until_s is not None:
            if self._clock() < until_s:
                raise GatewayError(REQUEST_HELD_BACK)
            self._held.pop(suspect.digest)
        return suspect.digest in self._suspected

    def _forget_old(self) -> None:
        now_s = self._clock()
        while self._deaths and now_s - self._deaths[0].at_s > DEATHS_S:
            self._deaths.popleft()
        for kept in (self._suspected, self._held):
            while kept and (len(kept) > _MAX_KEPT or next(iter(kept.values())) <= now_s):
                del kept[next(iter(kept))]
        self.active = bool(self._deaths or self._suspected or self._held)
