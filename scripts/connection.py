"""One client's connection: its requests, one after the other, until one of the two sides ends it."""

from collections.abc import Callable

from client_wire import ClientWire
from errors import TOO_MANY_CONNECTIONS, GatewayError
from exchange import Stage
from parts import Parts
from request import Request

_PUBLIC_ONLY_CONNECTIONS = 16


class Backlog:
    """What a client has to take before it gets more."""

    __slots__ = ("_gone", "_taken")

    def __init__(self, taken: Callable[[], None], gone: Callable[[], None]) -> None:
        self._taken = taken
        self._gone = gone

    def keep(self, value: object) -> None:
        self._taken()

    def fail(self, error: Exception) -> None:
        self._gone()


class Connection:
    """Reads heads and hands each to a Request; what happens to that is the request's affair."""

    __slots__ = ("_client", "_parts")

    def __init__(self, parts: Parts, client: ClientWire) -> None:
        self._parts = parts
        self._client = client

    def begin(self) -> None:
        parts = self._parts
        parts.clients[self._client] = None
        if len(parts.public_only) > _PUBLIC_ONLY_CONNECTIONS and self._client in parts.public_only:
            self._refuse(GatewayError(TOO_MANY_CONNECTIONS))
        else:
            self._await_head(parts.header_s)

    def _await_head(self, idle_s: float | None = None) -> None:
        """Wait for the next head, `idle_s` for its first byte; as long as a kept connection may idle, if not told."""
        parts, client = self._parts, self._client
        parts.idle[client] = None
        client.read_head(self, parts.keepalive_s if idle_s is None else idle_s, parts.header_s)

    def keep(self, head: bytes) -> None:
        """The next head is here."""
        parts, client = self._parts, self._client
        del parts.idle[client]
        try:
            plan, length = parts.planner.find(head)
        except GatewayError as error:
            self._refuse(error, head)
            return
        request = client.request = Request(parts, client, plan, length)
        request.begin(self._go_on)

    def fail(self, error: Exception) -> None:
        """There will be no next head: it is wrong, its time is up, or the client has left."""
        self._parts.idle.pop(self._client, None)
        if isinstance(error, GatewayError):
            self._refuse(error)
        else:
            self._leave()

    def _go_on(self, request: Request, keep: bool) -> None:
        """A request is over: the next, if this connection can carry another."""
        client = self._client
        client.request = None
        if not keep:
            self._forget()
            request.close()
        elif client.choked:  # it asks for more before it has taken what it got
            client.expect_room(Backlog(self._await_head, self._give_up), self._parts.config.timeouts.stream_idle_s)
        else:
            self._await_head()

    def _refuse(self, error: GatewayError, head: bytes = b"") -> None:
        """Answer what never became a request, though its head may be here."""
        stand_in = self._parts.planner.stand_in(head)
        request = Request(self._parts, self._client, stand_in, None, Stage.READING_HEAD)
        request.refuse(error)
        request.finish()
        self._forget()
        request.close()

    def _leave(self) -> None:
        """The connection ends between requests, or its client left in the middle of a head."""
        self._end_between()
        if self._client.ended:
            self._client.abort()
        else:  # it may still be taking its last answer
            self._client.close(unread=False, flush_s=self._parts.config.timeouts.stream_idle_s)

    def _give_up(self) -> None:
        """The client has asked for more, and has taken nothing of what it got for too long."""
        self._end_between()
        self._client.abort()

    def _end_between(self) -> None:
        if self._client.has_unread:
            request = Request(self._parts, self._client, self._parts.planner.none, None, Stage.READING_HEAD)
            request.cancel()
            request.finish()
        self._forget()

    def _forget(self) -> None:
        self._parts.public_only.discard(self._client)
        self._client.request = None
        del self._parts.clients[self._client]
