"""How many bytes of requests may be held at once: bodies, and what clients have sent before it is a request."""

from core.errors import MEMORY_FULL, GatewayError


class MemoryBudget:
    """The bytes held now, of at most `limit_bytes` (MAX_BUFFERED_BYTES).

    Clients need no key for heads and pipelined requests. So these get at most half, and bodies always have the rest.
    """

    __slots__ = ("held_bytes", "limit_bytes", "unread_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.unread_bytes = 0  # of these, the bytes of heads and of pipelined requests

    def add(self, count: int) -> None:
        """Count bytes as held. Raises MEMORY_FULL if they are too many; they count all the same, until released."""
        self.held_bytes += count
        if self.held_bytes > self.limit_bytes:
            raise self._full()

    def release(self, count: int) -> None:
        self.held_bytes -= count

    def change_unread(self, count: int) -> None:
        """Count `count` more bytes (fewer, if negative) of heads and pipelined requests; as `add` otherwise."""
        self.held_bytes += count
        self.unread_bytes += count
        if count > 0 and (self.held_bytes > self.limit_bytes or self.unread_bytes > self.limit_bytes // 2):
            raise self._full()

    def _full(self) -> GatewayError:
        message = f"Request bodies and heads held exceed MAX_BUFFERED_BYTES ({self.limit_bytes} bytes)."
        return GatewayError(MEMORY_FULL, message)
