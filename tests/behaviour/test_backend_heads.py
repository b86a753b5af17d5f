"""Response heads of the backend that can never be whole: they are refused at once, in any pieces."""

import pytest

from support.backend import answer, send, stall
from support.gateway import Stack, post, scenario

NEVER_WHOLE = {
    "lf": b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
    "lf in the status line": b"HTTP/1.1 200 OK\nContent-Length: 2\r\n",
    "lf in a field": b"HTTP/1.1 200 OK\r\nContent-Length: 2\n",
    "cr": b"HTTP/1.1 200 OK\rContent-Length: 2\r\r{}",
    "cr in a field": b"HTTP/1.1 200 OK\r\nA: b\rc",
    "lf after cr lf": b"HTTP/1.1 200 OK\r\n\nContent-Length: 2",
    "interim, then lf": b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
    "no http": b"SSH-2.0-OpenSSH_9.2\r\n",
}


@pytest.mark.parametrize("raw", NEVER_WHOLE.values(), ids=[name.replace(" ", "_") for name in NEVER_WHOLE])
@scenario()
async def test_such_a_head_is_not_waited_for(stack: Stack, raw: bytes) -> None:
    for piece in (len(raw), 1, 2, 17):
        stack.backend.script(send(raw, piece), stall())
        response = await stack.ask(post())
        assert (response.status, response.code) == (502, "backend_malformed")


@scenario()
async def test_a_head_in_pieces_is_read(stack: Stack) -> None:
    raw = answer(b"{}", b"200 OK", b"A: b")
    for piece in (1, 2, 3, 7):
        stack.backend.script(send(raw, piece))
        assert (await stack.ask(post())).body == b"{}"
