"""Whether a stream whose client has left had more tokens than events, as GET /slots shows it.

Most streams have an event for each token. What makes no event, half a character say, shows in a slot only. It is not
known whose slot that is; but if all streams are at work, what they had besides their events is in the difference of
the sums.
"""

from collections.abc import Callable, Sequence
from math import inf

from backend.slot_listing import Slot, decoded_of, is_busy, is_streamed

# How many tokens may be on their way as events: of each stream, and as a part of all that have come.
_IN_FLIGHT = 16
_PART = 8
_EMPTY_EVENTS = 3  # of a stream: those with which it begins and ends have no token
# Between the first looks: a slot may have ended whose request is not known to have, or the other way round.
_PACE_S = 0.05
_LOOKS = 4
_GOOD_FOR_S = 2.0  # how long after a look a request may have gone on, and what was seen still says what it has had


def has_silent_tokens(slots: Sequence[Slot], known_slots: int, events: Sequence[int]) -> bool | None:
    """Return whether streams have had tokens that made no events; None if that does not follow from the slots.

    `known_slots` is how many slots all known requests have, and `events` how many events of each stream have come.
    """
    busy = [slot for slot in slots if is_busy(slot)]
    decoded = sorted([decoded_of(slot) for slot in busy if is_streamed(slot)], reverse=True)
    come = sorted(events, reverse=True)
    if len(busy) > known_slots or len(decoded) < len(come):
        return None
    if any(had + _EMPTY_EVENTS < shown for had, shown in zip(decoded, come, strict=False)):
        return None  # the slot of one of the streams is not at work any more
    return sum(decoded) - sum(come) > _IN_FLIGHT * len(events) + sum(come) // _PART


def most_decoded(slots: Sequence[Slot]) -> int:
    """Return how many tokens a request at work has had at most."""
    return max([decoded_of(slot) for slot in slots if is_busy(slot)], default=0)


class LeftStream:
    """One stream whose client has left.

    `on_end` is called once all of the stream has come and its slot is released: whether it surely had no token without
    an event.
    """

    def __init__(self, count_events: Callable[[], int], on_end: Callable[[bool], None]) -> None:
        self._count_events = count_events
        self._on_end = on_end
        self._has_silent: bool | None = None  # tokens, as far as has been seen
        self._looks = 0
        self._seen_s = 0.0  # when the slots said something last
        self._has_come = self._is_released = False

    @property
    def events(self) -> int:
        return self._count_events()

    @property
    def pause_s(self) -> float:
        """How long to wait before the next look at most."""
        if not self._looks:
            return 0.0
        return _PACE_S if self._has_silent is None and self._looks < _LOOKS else inf

    def look(self, has_silent: bool | None, now_s: float) -> None:
        """The slots were seen: see `has_silent_tokens`."""
        self._looks += 1
        if has_silent is not None:
            self._has_silent = has_silent or self._has_silent is True
            self._seen_s = now_s
        elif not self._has_come and self._has_silent is False and now_s - self._seen_s > _GOOD_FOR_S:
            self._has_silent = None

    def note_end(self) -> None:
        """Its connection has ended."""
        self._has_come = True
        self._end_if_over()

    def end(self) -> None:
        """llama-server works on it no more, or it is not waited for any longer."""
        self._is_released = True
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._has_come and self._is_released:
            self._on_end(self._has_silent is False)
