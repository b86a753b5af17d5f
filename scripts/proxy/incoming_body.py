"""The body of a request on its way in: received, held within the memory budget, and read for its members."""

from collections.abc import Sequence
from hashlib import blake2b

from core.errors import QUEUE_TIMEOUT
from http1.added_members import with_members
from http1.bodies import RequestBody
from http1.grammar import CONTINUE, CRLF
from http1.json_members import Members
from http1.member_screen import MemberScreen, shortened
from http1.request_lines import CR, RequestLines, check_lines
from policy.prepared_request import PreparedRequest
from proxy.body_scan import BodyScan
from proxy.request_services import RequestServices
from transport.client_protocol import ClientProtocol

_DIGEST_BYTES = 512 << 10  # of a large body's start and of its end
_SCANNED_AT_ONCE_BYTES = 64 << 10  # of a body; a larger one is searched while it comes


class IncomingBody:
    """The body of one request.

    `length` is what its head says, in bytes, and `size` what was received. `unread`: more bytes may come. `scan` is the
    search for its members, and `members` what that found; None if nothing depends on them yet. `key_id` is of the key
    with which it takes turns in that, once the caller is known.
    """

    __slots__ = (
        "_client",
        "_digest",
        "_held_bytes",
        "_pieces",
        "_prepared",
        "_services",
        "added",
        "added_field",
        "key_id",
        "length",
        "members",
        "scan",
        "size",
        "unread",
    )

    def __init__(
        self, services: RequestServices, client: ClientProtocol, prepared: PreparedRequest, length: int | None
    ) -> None:
        """`length` is in bytes, None if the body is chunked."""
        self._services = services
        self._client = client
        self._prepared = prepared
        self.length = length
        self._pieces: Sequence[bytes | bytearray] = ()
        self._held_bytes = 0
        self._digest: bytes | None = None  # of route and body, if it was needed
        self.size = 0
        self.unread = length != 0 or prepared.error is not None
        self.key_id = ""
        self.scan: BodyScan | None = None  # the search for its members
        self.members: Members | None = None
        self.added: dict[str, int | str] | None = None
        self.added_field = b""  # a part of a form

    # --- Receiving ---

    def take_if_received(self) -> bool:
        """Take the body if all of it has been received; return whether that is so. Raises what `read` does."""
        length = self.length
        if length is None:
            return False
        received = self._client.take_body_if_received(length)
        if received is None:
            return False
        self.unread = False
        self._pieces = (received,)
        self.size = self._held_bytes = length
        self._services.memory.add(length)
        # Next to the screen's search: each of them fills the processor's cache with the body. Little JSON has a CR.
        if CR in received:
            check_lines(received)
        return True

    async def read(self, *, for_members: bool) -> None:
        """Read the body. It is searched while it comes, if it is large; `for_members`: whatever it looks like.

        Raises what ClientProtocol.read_body does.
        """
        services = self._services
        if self._prepared.expects_continue and not self._client.has_unread:
            self._client.write(CONTINUE)
        body = RequestBody(self.length, services.limits, RequestLines())
        self._pieces = body.pieces
        screen = self._prepared.route.screen
        if screen is not None and (self.length is None or self.length > _SCANNED_AT_ONCE_BYTES):
            self.scan = self.new_scan(None if for_members or self._prepared.boundary else screen)
        try:
            await self._client.read_body(
                body, services.timeouts.client_body_s, services.timeouts.client_body_rate, self._hold
            )
        finally:
            self.size = body.payload_bytes
        self.unread = False

    def _hold(self, count: int) -> None:
        self._held_bytes += count
        self._services.memory.add(count)
        if self._prepared.route.kind.bounded:
            self._services.cheap_routes.check_size(self._held_bytes)
        if self.scan is not None:
            self._services.body_scans.read_on(self.scan)

    def skip(self) -> bool:
        """Drop a body that will not be read; return whether the connection can carry another request after it."""
        if self.unread:
            framed = self.length if self._prepared.error is None else 0  # a wrong head does not say what a body is
            self.unread = not framed or self._client.take_body_if_received(framed) is None
        return not self.unread

    def release(self, *, keeps_bytes: int = 0) -> None:
        """Let go of the body: the backend has it, or will not get it.

        One of at most `keeps_bytes` is kept for `members_if_small`, and counts as part of its connection.
        """
        if self._held_bytes:
            self._services.memory.release(self._held_bytes)
            self._held_bytes = 0
        if self.size > keeps_bytes:
            self._pieces = ()
        if self.scan is not None:  # it holds the body too
            self.scan.cancel()

    # --- What it says ---

    def is_cleared(self) -> bool:
        """Whether no member that matters to the gateway can be in a body that was received at once."""
        screen, pieces = self._prepared.route.screen, self._pieces
        if screen is None:
            return True
        if self._prepared.boundary:  # a form spells the names of its fields in more ways than the screen knows
            return False
        # To shorten the pieces first saves a copy of the body.
        return not screen.is_suspect(pieces[0] if len(pieces) == 1 else b"".join(map(shortened, pieces)))

    async def find_members(self) -> Members | None:
        """Read the body for its members, all of which has been received. None if the screen has cleared it."""
        scan = self.scan = self.scan or self.new_scan(None)
        scan.complete()
        self._services.body_scans.read_on(scan)
        self.members = await self._client.wait(scan.waiter, 0, QUEUE_TIMEOUT)
        if self.members is None:
            self.scan = None
        else:
            self._services.body_rules.check(self.members, self._pieces)
        return self.members

    def members_if_small(self) -> Members | None:
        """Return the body's members, found now if it is small.

        None if they are not known, and it is large, takes long to read, or is gone.
        """
        if self.members is not None or not 0 < self.size <= _SCANNED_AT_ONCE_BYTES or not self._pieces:
            return self.members
        return self._services.body_scans.read_now(self.new_scan(None, is_complete=True))

    def new_scan(self, screen: MemberScreen | None, *, is_complete: bool = False) -> BodyScan:
        """Return a search in the body. Without a screen it is read to its end."""
        return BodyScan(
            self._pieces,
            screen,
            is_complete=is_complete,
            max_depth=self._services.body_rules.max_depth,
            boundary=self._prepared.boundary,
            key_id=self.key_id,
        )

    @property
    def pieces(self) -> Sequence[bytes | bytearray]:
        return self._pieces

    def add(self, name: str, value: int | str) -> None:
        """Let the backend get a member at the end of the body's object."""
        self.added = {**(self.added or {}), name: value}

    def add_field(self, name: str, value: str) -> None:
        """Let the backend get a field at the beginning of a form."""
        boundary = self._prepared.boundary
        head = b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n' % (boundary, name.encode())
        self.added_field = head + value.encode() + CRLF

    def request(self, request_id: bytes) -> bytes | Sequence[bytes | bytearray]:
        """Return the request for the backend, in pieces if it is large."""
        if self.added is None:
            if not self.added_field:
                return self._prepared.backend_request(request_id, self.size, self._pieces)
            size = self.size + len(self.added_field)
            return self._prepared.backend_request(request_id, size, (self.added_field, *self._pieces))
        assert self.members is not None  # which said where the object in the body ends
        pieces, added_bytes = with_members(self._pieces, self.members, self.added)
        return self._prepared.backend_request(request_id, self.size + added_bytes, pieces)

    def digest(self) -> bytes:
        """Return what the request is recognised by. Once asked for, it outlives the body."""
        if self._digest is None:
            self._digest = digest_of(self._prepared.route.label, self._pieces)
        return self._digest


def digest_of(label: str, pieces: Sequence[bytes | bytearray]) -> bytes:
    """Return a digest of a route and a body; of a large body its length, start and end count, since hashing blocks."""
    size = sum(map(len, pieces))
    digest = blake2b(b"%b %d " % (label.encode(), size), digest_size=16)
    head_ends, tail_begins = (_DIGEST_BYTES, size - _DIGEST_BYTES) if size > 2 * _DIGEST_BYTES else (size, size)
    at = 0
    for piece in pieces:
        digest.update(piece[: max(0, head_ends - at)])
        digest.update(piece[max(0, tail_begins - at) :])
        at += len(piece)
    return digest.digest()
