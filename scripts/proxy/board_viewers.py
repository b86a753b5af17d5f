"""The viewers of the board: each one's event stream, written once a second by one listener of the ticker.

A view is made and serialized once for all who see the same: for all operators, and for each other key. An event has
what has changed since the last one. A viewer takes no slot, and does not count as work: it delays no drain, and an idle
gateway ends it.
"""

import json
from collections.abc import Callable

from accounting.request_history import MOST_ROWS, KeyHistory
from auth import Caller
from core.errors import TOO_MANY_VIEWERS, GatewayError
from policy.prepared_request import PreparedRequest
from proxy.board import BoardReader
from proxy.board_view import Sections, key_row, key_view, operator_view, request_row
from proxy.key_limits import KeyLimits
from proxy.response import Response
from transport.client_protocol import ClientProtocol
from transport.waiter import Waiter

MOST_VIEWERS = 64
MOST_OF_KEY = 8  # of one key that is not an operator's
KEPT_FOR_OPERATORS = 8  # of MOST_VIEWERS
BEAT_S = 0.9  # at the next tick after that: once a second
STALLED_BEATS = 15  # after which a viewer that takes nothing is dropped
# Platforms count an open stream as work. A board that is left open must not keep such a machine running.
IDLE_S = 600.0
_KEYS_EVERY_S = 5.0  # reading the limits of many keys takes milliseconds
MOST_KEYS = 100  # in the list of keys

# Why a stream ends, for the page.
DRAINING, KEY, CHANGED, IDLE = "draining", "key", "changed", "idle"


def encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class Feed:
    """What one audience sees: all operators, or one other key. `delta` is the event for those that got the last one."""

    def __init__(self) -> None:
        self._sections: dict[str, bytes] = {}
        self._rows_seen = 0
        self._history = KeyHistory()
        self._time = b""
        self._series_end = 0
        self._epoch_s = 0.0
        self.delta = b""

    def update(self, now_at: float, epoch_s: float, sections: Sections, history: KeyHistory) -> None:
        """Take the sections of one moment; one that is missing has not been read again."""
        self._time, self._history, self._epoch_s = encode(round(now_at, 1)), history, epoch_s
        if sections["series"]["end"] == self._series_end:  # else it would be most of each event
            sections = {name: section for name, section in sections.items() if name != "series"}
        else:
            self._series_end = sections["series"]["end"]
        encoded = {name: encode(section) for name, section in sections.items()}
        changed = {name: data for name, data in encoded.items() if self._sections.get(name) != data}
        self._sections |= encoded
        more = history.added - self._rows_seen
        self._rows_seen = history.added
        if more > 0:
            changed["more"] = self._rows(more)
        self.delta = self._event(changed)

    def whole(self) -> bytes:
        """Return the event for a viewer that has seen nothing, or not the last event."""
        unseen = max(0, self._history.added - self._rows_seen)  # of the next event
        return self._event({**self._sections, "requests": self._rows(MOST_ROWS, unseen)})

    def _rows(self, count: int, without: int = 0) -> bytes:
        return encode([request_row(row, self._epoch_s) for row in self._history.newest(count)[without:]])

    def _event(self, members: dict[str, bytes]) -> bytes:
        body = b"".join(b',"%b":%b' % (name.encode(), data) for name, data in members.items())
        return b'data: {"t":%b%b}\n\n' % (self._time, body)


class Viewer:
    """One event stream. `behind`: it has not got the last event, so it needs all."""

    __slots__ = ("behind", "caller", "client", "ended", "prepared", "response", "since_s", "skipped")

    def __init__(
        self, client: ClientProtocol, response: Response, prepared: PreparedRequest, caller: Caller, since_s: float
    ) -> None:
        self.client = client
        self.response = response
        self.prepared = prepared
        self.caller = caller
        self.since_s = since_s
        self.ended: Waiter[str] = Waiter()
        self.behind = True
        self.skipped = 0

    @property
    def audience(self) -> Caller | None:
        """Those who see the same; None for operators."""
        return None if self.caller.is_operator else self.caller

    @property
    def takes_nothing(self) -> bool:
        return self.client.write_paused or self.client.transport.get_write_buffer_size() > 0


class BoardViewers:
    """All event streams of the board. `find_caller` returns the caller of a request now, or raises GatewayError."""

    def __init__(
        self,
        reader: BoardReader,
        key_limits: KeyLimits,
        find_caller: Callable[[ClientProtocol, PreparedRequest], Caller | None],
        clock: Callable[[], float],
    ) -> None:
        self._reader = reader
        self._key_limits = key_limits
        self._find_caller = find_caller
        self._clock = clock
        self._viewers: dict[Viewer, None] = {}
        self._feeds: dict[Caller | None, Feed] = {}
        self._next_beat_s = 0.0
        self._next_keys_s = 0.0

    def __len__(self) -> int:
        return len(self._viewers)

    async def serve(
        self, client: ClientProtocol, response: Response, prepared: PreparedRequest, caller: Caller
    ) -> None:
        """Stream to one viewer until it leaves or the stream is ended. Raises TOO_MANY_VIEWERS."""
        self._check_room(caller)
        viewer = Viewer(client, response, prepared, caller, self._clock())
        client.limit_waits(0)  # MAX_REQUEST_DURATION is for work
        response.begin_event_stream()
        self._viewers[viewer] = None
        try:
            reason = await client.wait(viewer.ended, 0, None)
        finally:
            self._forget(viewer)
        response.keep_alive = False
        response.send_event(b"event: end\ndata: %b\n\n" % encode({"reason": reason}))
        client.write(response.end_of_close_delimited())

    def _check_room(self, caller: Caller) -> None:
        most = MOST_VIEWERS if caller.is_operator else MOST_VIEWERS - KEPT_FOR_OPERATORS
        own = sum(viewer.caller.key_id == caller.key_id for viewer in self._viewers)
        if len(self._viewers) >= most:
            raise GatewayError(TOO_MANY_VIEWERS)
        if own >= MOST_OF_KEY and not caller.is_operator:
            raise GatewayError(TOO_MANY_VIEWERS, f"This API key has {own} streams of the board open already.")

    def _forget(self, viewer: Viewer) -> None:
        self._viewers.pop(viewer, None)
        if all(other.audience != viewer.audience for other in self._viewers):
            self._feeds.pop(viewer.audience, None)

    def end(self, reason: str = DRAINING) -> None:
        """End all streams. A viewer that takes nothing is cut: it must not delay a drain."""
        for viewer in tuple(self._viewers):
            if viewer.takes_nothing:
                viewer.client.hang_up()
            else:
                viewer.ended.set_result(reason)

    # --- Once a second ---

    def on_tick(self, now_s: float) -> None:
        if not self._viewers:
            return
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + BEAT_S
            self._beat(now_s)
        else:
            self._welcome(now_s)

    def _welcome(self, now_s: float) -> None:
        """Send new viewers what the others have got last."""
        for viewer in self._viewers:
            if viewer.behind and not viewer.skipped:
                if viewer.audience not in self._feeds:
                    self._update_feeds(now_s, {viewer.audience})
                viewer.response.send_event(self._feeds[viewer.audience].whole())
                viewer.behind = False

    def _beat(self, now_s: float) -> None:
        idle_s = self._reader.idle_s()
        for viewer in tuple(self._viewers):
            reason = self._reason_to_end(viewer, min(idle_s, now_s - viewer.since_s))
            if reason:
                viewer.ended.set_result(reason)
        viewers = [viewer for viewer in tuple(self._viewers) if self._may_write(viewer)]
        if viewers:
            self._update_feeds(now_s, {viewer.audience for viewer in viewers})
        for viewer in viewers:
            feed = self._feeds[viewer.audience]
            viewer.response.send_event(feed.whole() if viewer.behind else feed.delta)
            viewer.behind = False

    def _reason_to_end(self, viewer: Viewer, idle_s: float) -> str:
        """Return why a stream must end now: its key is not what it was, or nothing has happened for long."""
        try:
            caller = self._find_caller(viewer.client, viewer.prepared)
        except GatewayError:
            return KEY
        if caller != viewer.caller:
            return CHANGED
        return IDLE if idle_s >= IDLE_S else ""

    @staticmethod
    def _may_write(viewer: Viewer) -> bool:
        """Whether a viewer has taken all that was written; drop it if it has taken nothing for too long."""
        if not viewer.takes_nothing:
            viewer.skipped = 0
            return True
        viewer.behind = True
        viewer.skipped += 1
        if viewer.skipped > STALLED_BEATS:
            viewer.client.hang_up()
        return False

    def _update_feeds(self, now_s: float, audiences: set[Caller | None]) -> None:
        reader, history = self._reader, self._reader.history
        state = reader.read(["" if audience is None else audience.key_id for audience in audiences], len(self))
        for audience in audiences:
            own = history.all if audience is None else history.of(audience.key_id)
            if audience is None:
                sections = {**operator_view(state, own), **self._operator_keys(now_s)}
            else:
                sections = {**key_view(state, own, audience), **self._own_key(audience)}
            feed = self._feeds.get(audience)
            if feed is None:
                feed = self._feeds[audience] = Feed()
            feed.update(state.now_s + state.epoch_s, state.epoch_s, sections, own)

    def _operator_keys(self, now_s: float) -> Sections:
        """Return the limits of keys, those served last first; nothing if they were read just now."""
        if None in self._feeds and now_s < self._next_keys_s:
            return {}
        self._next_keys_s = now_s + _KEYS_EVERY_S
        rows, of = self._key_limits.listed(self._reader.history.key_ids, MOST_KEYS)
        return {"keys": {"rows": [key_row(row) for row in rows], "of": of}}

    def _own_key(self, caller: Caller) -> Sections:
        return {"keys": {"rows": [key_row(self._key_limits.of(caller))], "of": 1}}
