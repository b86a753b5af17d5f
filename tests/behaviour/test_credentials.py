"""Which key counts if a request carries several credentials; an invalid one is refused before anything else."""

import pytest

from support.backend import HELLO
from support.gateway import CHAT, KEY, KEYS, OTHER_KEY, Stack, get, post, request, scenario

JWT = b"Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"
OTHER_SYSTEMS = [
    JWT,
    b"Basic eDp5",
    b"Bearer",
    b"Bearer ",
    b"",
    b"Bearer sk-other-system-0123456789",
    b"Digest a=b, c=d",
]
OURS = [b"x-api-key: " + KEY, b"api-key: " + KEY]


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("value", OTHER_SYSTEMS)
@scenario()
async def test_a_valid_key_counts_beside_another_systems_authorization(stack: Stack, value: bytes, ours: bytes) -> None:
    for lines in ((b"Authorization: " + value, ours), (ours, b"Authorization: " + value)):
        for _ in range(2):  # the second finds the prepared request
            assert (await stack.ask(post(CHAT, b"{}", *lines, key=None))).body == HELLO
    for call in stack.backend.calls:
        assert call.head.lower().count(b"authorization: ") == 1  # the backend's own
        assert b"api-key" not in call.fields
    await stack.stop()
    assert {line["key"] for line in stack.lines} == {"alice"}


@pytest.mark.parametrize("field", [b"x-api-key", b"api-key"])
@scenario()
async def test_a_valid_authorization_counts_beside_another_systems_key(stack: Stack, field: bytes) -> None:
    for value in (b"sk-ant-other-system-0123456789", b"short", b""):
        assert (await stack.ask(get(b"/v1/models", field + b": " + value))).status == 200


@scenario(KEYS=KEYS + "gone:sk-gone-0123456789abcdef::2001-01-01\nidle:sk-idle-0123456789abcdef:0\n")
async def test_which_of_several_keys_counts(stack: Stack) -> None:
    gone, idle = b"sk-gone-0123456789abcdef", b"sk-idle-0123456789abcdef"
    for first, second, status, code in (
        (KEY, OTHER_KEY, 401, "invalid_api_key"),
        (KEY, KEY, 200, ""),
        (gone, KEY, 200, ""),
        (KEY, gone, 200, ""),
        (gone, b"sk-nobody-0123456789", 401, "invalid_api_key"),
        (idle, b"sk-nobody-0123456789", 403, "key_suspended"),
        (idle, KEY, 401, "invalid_api_key"),
    ):
        response = await stack.ask(get(b"/v1/models", b"api-key: " + second, key=first))
        assert (response.status, response.code if status != 200 else "") == (status, code)
        if (first, second) == (KEY, OTHER_KEY):
            assert response.json["error"]["message"].startswith("The request carries two different API keys.")


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (b"Authorization: " + JWT,),
        (b"Authorization: Bearer sk-nobody-0123456789",),
        (b"x-api-key: sk-nobody-0123456789", b"Authorization: Basic eDp5"),
        (b"x-api-key: " + KEY, b"x-api-key: " + KEY),
        (b"x-api-key: " + KEY, b"Authorization: Basic eDp5", b"Authorization: Bearer " + KEY),
        (b"x-api-key: " + KEY, b"api-key: " + OTHER_KEY),
        (b"x-api-key: Bearer " + KEY,),
    ],
)
@scenario()
async def test_every_401_names_the_fields_that_were_looked_at(stack: Stack, lines: tuple[bytes, ...]) -> None:
    for target in (CHAT, b"/v1/messages", b"/nowhere"):
        response = await stack.ask(post(target, b"{}", *lines, key=None))
        assert (response.status, response.field(b"www-authenticate")) == (401, b"Bearer")
        message = response.json["error"]["message"]
        assert all(name in message for name in ("Authorization", "x-api-key", "api-key"))


WRONG = [
    (b"Content-Length: 1001", 413),
    (b"Content-Length: 99999999999", 413),
    (b"Content-Length: x", 400),
    (b"Content-Length: 2\r\nContent-Length: 2", 400),
    (b"Content-Length: 2\r\nTransfer-Encoding: chunked", 400),
    (b"Transfer-Encoding: gzip", 400),
    (b"Content-Length: 2\r\nExpect: x", 417),
]


@pytest.mark.parametrize(("lines", "status"), WRONG)
@scenario(MAX_REQUEST_BODY_SIZE="1000")
async def test_a_wrong_head_is_reported_to_those_with_a_key_only(stack: Stack, lines: bytes, status: int) -> None:
    for target in (CHAT, b"/nowhere"):
        for key, expected in ((None, 401), (b"sk-nobody-0123456789", 401), (KEY, status)):
            client = await stack.client()
            client.send(request(b"POST", target, None, lines, key=key) + b"{}" + get(b"/ping"))
            response = await client.response()
            assert (response.status, response.field(b"connection")) == (expected, b"close")
            assert await client.take_all() == b""  # what follows is never taken for a request
    response = await stack.ask(request(b"GET", b"/ping", None, lines, key=None))
    assert response.status == status  # without a key that is needed, there is nothing to hide
    assert not stack.backend.calls


@scenario(MAX_REQUEST_BODY_SIZE="1000")
async def test_an_error_in_the_head_has_the_routes_shape_and_label(stack: Stack) -> None:
    client = await stack.client()
    client.send(request(b"POST", b"/v1/messages", None, b"Content-Length: 1001"))
    response = await client.response()
    assert (response.status, response.json["type"]) == (413, "error")
    await stack.stop()
    (line,) = stack.lines
    assert (line["route"], line["key"]) == ("/v1/messages", "alice")
