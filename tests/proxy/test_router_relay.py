"""router_relay.py: an end that the router makes of a model's death is no end of the response."""

import pytest

from core.errors import BACKEND_UNAVAILABLE, GatewayError
from proxy.relay import UpstreamTimeouts
from proxy.response import Response
from proxy.response_info import parse_response
from proxy.router_relay import RouterRelay
from support.backend import LAST_CHUNK, STREAM_HEAD, chunk, event
from support.gateway import post
from support.memory_gateway import EPOCH, prepare
from support.memory_transport import Link, MemoryTransport

ONE, TWO = chunk(event("1")), chunk(event("proxy error: is only text"))
CUT = chunk(b"proxy error: Failed to read connection")


class Relayed:
    """A stream that is relayed: `ends` has how it ended, `sent` what the client got."""

    def __init__(self, first: bytes) -> None:
        self.link = Link()
        self.client = self.link.client(MemoryTransport())
        self.end = MemoryTransport()
        self.backend = self.link.backend(self.end)
        received = self.backend.send_request(b"POST / HTTP/1.1\r\n\r\n")
        self.end.receive(STREAM_HEAD + first)
        self.info = parse_response(received.result(), b"POST")
        response = Response(self.client, prepare(post()), b"r-1", EPOCH, True)
        self.relay = RouterRelay(self.client, response, None, UpstreamTimeouts(10, 600, 300))
        self.ends: list[object] = []
        self.client.run_handler(self._run(), self.ends.append)

    async def _run(self) -> object:
        try:
            return await self.relay.run(self.backend, self.info)
        except GatewayError as error:
            return error.kind

    @property
    def sent(self) -> bytes:
        return self.link.sent(self.client).partition(b"\r\n\r\n")[2]


def test_a_whole_stream_passes_as_it_is() -> None:
    relayed = Relayed(ONE)
    relayed.end.receive(TWO)
    relayed.end.receive(ONE + LAST_CHUNK)
    assert relayed.sent == ONE + TWO + ONE + LAST_CHUNK
    assert relayed.relay.error is None


@pytest.mark.parametrize(
    "pieces", [(CUT + LAST_CHUNK,), (CUT, LAST_CHUNK), (TWO + CUT,), (CUT[:4], CUT[4:] + LAST_CHUNK)]
)
def test_the_routers_own_text_is_not_passed_on_and_its_end_is_none(pieces: tuple[bytes, ...]) -> None:
    relayed = Relayed(ONE)
    for piece in pieces:
        relayed.end.receive(piece)
    assert b"proxy error: Failed" not in relayed.sent
    assert relayed.relay.error is not None
    assert relayed.relay.error.kind is BACKEND_UNAVAILABLE
    assert not relayed.relay.complete


def test_if_nothing_was_passed_on_it_is_an_error() -> None:
    relayed = Relayed(ONE + CUT + LAST_CHUNK)
    assert relayed.ends == [BACKEND_UNAVAILABLE]
    assert relayed.sent == b""
