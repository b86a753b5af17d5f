"""Heartbeats for a client that asked for a stream and receives nothing.

Proxies cut a connection that is silent for 100 s or so. A request that did not ask for a stream, or whose route has
none, is never answered early. One that did gets its head, and a heartbeat each interval until the backend's first byte:
it is queued, the model loads, or the prompt is processed. In the middle of a stream heartbeats come between two events.
"""

from math import inf

from http1.json_members import Members
from policy.slot_demand import asks_for_stream
from proxy.admission import Admission
from proxy.body_scan import BodyScans
from proxy.incoming_body import IncomingBody
from proxy.relay import Relay
from proxy.response import Response
from transport.client_protocol import ClientProtocol


def send_heartbeat(response: Response, position: int) -> None:
    """Send a heartbeat, after the stream's head if that is not sent yet.

    `position` is the request's place in the queue, 0 if it waits for something else.
    """
    if not response.started:
        response.begin_event_stream()
    response.send_event(response.dialect.heartbeat(position))


def send_heartbeat_between_events(response: Response, relay: Relay) -> None:
    """Send a heartbeat into a stream of the backend's, if it is between two events."""
    if response.accepts_events and relay.is_between_events():
        response.send_event(response.dialect.heartbeat(0))


class Heartbeats:
    """The heartbeats of one request that has waited for a while. `interval_s`: so long its client may hear nothing."""

    __slots__ = ("_admission", "_beaten_s", "_body", "_client", "_interval_s", "_response", "_scans", "_sent_bytes")

    def __init__(
        self,
        client: ClientProtocol,
        response: Response,
        body: IncomingBody,
        admission: Admission,
        scans: BodyScans,
        *,
        interval_s: float,
        since_s: float,
    ) -> None:
        """`since_s` is when the request began to wait, in monotonic seconds."""
        self._client = client
        self._response = response
        self._body = body
        self._admission = admission
        self._scans = scans
        self._interval_s = interval_s
        self._beaten_s = since_s  # when the client was last sent something; inf = no heartbeat is wanted
        self._sent_bytes = 0  # to the client, when it was last looked at

    def before_response(self, now_s: float) -> None:
        """Send a heartbeat if one is due, and the body asks for a stream."""
        if now_s < self._beaten_s + self._interval_s:
            return
        self._beaten_s = now_s
        body = self._body
        if self._response.started:
            self._send()
        elif body.members is not None:
            self._begin(body.members)
        elif body.scan is None:
            scan = body.scan = body.new_scan(None, is_complete=True)
            scan.waiter.on_done = self._on_members
            self._scans.read_on(scan)

    def _on_members(self) -> None:
        body = self._body
        assert body.scan is not None
        body.members = body.scan.waiter.result()
        assert body.members is not None  # there was no screen
        self._begin(body.members)

    def _begin(self, members: Members) -> None:
        if not asks_for_stream(members):
            self._beaten_s = inf
        elif not self._client.ended:
            self._send()

    def _send(self) -> None:
        send_heartbeat(self._response, self._admission.position())
        self._sent_bytes = self._client.sent_bytes

    def between_events(self, relay: Relay, now_s: float) -> None:
        """Send a heartbeat if nothing was passed on for so long, and the client has taken what was."""
        client = self._client
        if client.sent_bytes != self._sent_bytes:
            self._beaten_s = now_s
        elif now_s >= self._beaten_s + self._interval_s and not client.write_paused:
            send_heartbeat_between_events(self._response, relay)
            self._beaten_s = now_s
        self._sent_bytes = client.sent_bytes
