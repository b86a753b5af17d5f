"""The field lines that are on every answer, for tests that compare whole heads."""


def every_answer(request_id: bytes) -> bytes:
    """Return the lines in the order of `Response.__init__` (scripts/proxy/response.py), each with its CRLF."""
    return b"X-Request-Id: " + request_id + b"\r\n"
