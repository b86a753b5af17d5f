"""Who is calling: the client's address behind TRUSTED_PROXIES, in the logs and for keys with `from=`."""

import pytest

from support.gateway import CHAT, KEY, Stack, get, post, scenario

TRUSTED = "127.0.0.1,10.0.0.0/8"
HERE_KEY = b"sk-here-0123456789abcdef"
OFFICE_KEY = b"sk-office-0123456789abcdef"
OFFICE_OPERATOR_KEY = b"sk-boss-0123456789abcdef"
SUSPENDED_KEY = b"sk-gone-0123456789abcdef"
KEYS = f"""alice:{KEY.decode()}:1000000
here:{HERE_KEY.decode()} from=127.0.0.0/8,::1
office:{OFFICE_KEY.decode()}:1000000 from=192.0.2.0/24,2001:db8::/32
boss:{OFFICE_OPERATOR_KEY.decode()} role=operator from=192.0.2.7
gone:{SUSPENDED_KEY.decode()}:0 from=192.0.2.7
"""
MODELS = b"/v1/models"


def forwarded_for(value: bytes) -> bytes:
    return b"X-Forwarded-For: " + value


# --- The address in the logs ---


@scenario(TRUSTED_PROXIES=TRUSTED)
async def test_the_access_log_names_the_client_of_each_request(stack: Stack) -> None:
    fields: list[list[bytes]] = [
        [],
        [forwarded_for(b"192.0.2.7")],
        [forwarded_for(b"198.51.100.1, 192.0.2.7, 10.1.1.1")],
        [forwarded_for(b"198.51.100.1"), forwarded_for(b"[2001:db8::7]:4711")],
        [forwarded_for(b"192.0.2.7, garbage")],
        [forwarded_for(b"192.0.2.7, unknown, 10.1.1.1")],
        [b'Forwarded: for=198.51.100.1, for="[2001:db8::8]:80";proto=https'],
        [b"Forwarded: for=_hidden", forwarded_for(b"192.0.2.9")],
    ]
    client = await stack.client()
    for each in fields:
        client.send(get(MODELS, *each))
        assert (await client.response()).status == 200
    await stack.stop()
    assert [line["peer"] for line in stack.lines] == [
        "127.0.0.1",
        "192.0.2.7",
        "192.0.2.7",
        "2001:db8::7",
        "127.0.0.1",
        "10.1.1.1",
        "2001:db8::8",
        "192.0.2.9",
    ]


@pytest.mark.parametrize(("target", "lines"), [(b"/ping", 0), (MODELS, 1), (b"/nowhere", 1)])
@scenario(TRUSTED_PROXIES=TRUSTED)
async def test_the_log_of_failed_credentials_names_the_client(stack: Stack, target: bytes, lines: int) -> None:
    await stack.ask(get(target, forwarded_for(b"192.0.2.7"), key=None))
    stack.app.recorder.flush()
    assert sum(line.startswith("no valid key: 192.0.2.7 for ") for line in stack.logged()) == lines


@scenario()
async def test_without_trusted_proxies_the_fields_say_nothing(stack: Stack) -> None:
    await stack.ask(get(MODELS, forwarded_for(b"192.0.2.7"), b"Forwarded: for=192.0.2.7"))
    await stack.stop()
    assert [line["peer"] for line in stack.lines] == ["127.0.0.1"]


@scenario(TRUSTED_PROXIES="10.0.0.0/8")
async def test_another_peer_is_not_believed(stack: Stack) -> None:
    await stack.ask(get(MODELS, forwarded_for(b"192.0.2.7")))
    await stack.stop()
    assert [line["peer"] for line in stack.lines] == ["127.0.0.1"]


@scenario(TRUSTED_PROXIES=TRUSTED)
async def test_the_backend_gets_the_fields_as_they_came(stack: Stack) -> None:
    fields = [forwarded_for(b"198.51.100.1"), b"X-Forwarded-For:  192.0.2.7,10.1.1.1", b"Forwarded: for=unknown"]
    await stack.ask(post(CHAT, b"{}", *fields))
    head = (await stack.backend.call()).head
    assert (
        b"\r\nX-Forwarded-For: 198.51.100.1\r\nX-Forwarded-For: 192.0.2.7,10.1.1.1\r\nForwarded: for=unknown\r\n"
        in head
    )


# --- Keys that work from some addresses only ---


@scenario(KEYS=KEYS)
async def test_a_key_works_from_its_networks(stack: Stack) -> None:
    assert (await stack.ask(get(MODELS, key=HERE_KEY))).status == 200


@scenario(KEYS=KEYS, TRUSTED_PROXIES=TRUSTED)
async def test_behind_a_proxy_the_clients_address_counts(stack: Stack) -> None:
    answers = [
        (await stack.ask(get(MODELS, forwarded_for(client), key=OFFICE_KEY))).status
        for client in (b"192.0.2.200", b"2001:db8::1", b"192.0.3.1", b"192.0.2.1, 198.51.100.1", b"192.0.2.1, unknown")
    ]
    assert answers == [200, 200, 401, 401, 401]


@scenario(KEYS=KEYS)
async def test_elsewhere_it_is_an_unknown_key_to_the_client(stack: Stack) -> None:
    def anonymous(head: bytes) -> list[bytes]:
        return [line for line in head.split(b"\r\n") if not line.lower().startswith((b"date", b"x-request-id"))]

    for raw in (get(MODELS, b"X-Request-Id: r", key=None), post(CHAT, b"{}", b"X-Request-Id: r", key=None)):
        answers = [
            await stack.ask(raw.replace(b"Host:", b"x-api-key: " + key + b"\r\nHost:", 1))
            for key in (OFFICE_KEY, SUSPENDED_KEY, OFFICE_OPERATOR_KEY, b"sk-unknown-0123456789abcdef")
        ]
        assert {answer.status for answer in answers} == {401}
        assert len({(*anonymous(answer.head), answer.body) for answer in answers}) == 1


@scenario(KEYS=KEYS)
async def test_the_logs_say_what_it_is(stack: Stack) -> None:
    await stack.ask(get(MODELS, b"X-Request-Id: r-1", key=OFFICE_KEY))
    stack.app.recorder.flush()
    assert "key office from elsewhere than its from=: 127.0.0.1 for /v1/models (request r-1)" in stack.logged()
    assert stack.counted("unauthorized") == 1
    await stack.stop()
    (line,) = stack.lines
    assert (line["key"], line["peer"], line["status"], line["outcome"]) == ("office", "127.0.0.1", 401, "refused")


@scenario(KEYS=KEYS, TRUSTED_PROXIES=TRUSTED)
async def test_a_field_that_the_proxy_passes_on_does_not_open_a_key(stack: Stack) -> None:
    """A proxy sets one of the two fields, and the client sends the other: both must allow it."""
    inside, outside = b"192.0.2.7", b"198.51.100.1"
    for plain, other in ((inside, outside), (outside, inside), (inside, b"unknown"), (b"unknown", inside)):
        fields = (forwarded_for(plain), b"Forwarded: for=" + other)
        assert (await stack.ask(get(MODELS, *fields, key=OFFICE_KEY))).status == 401
    fields = (forwarded_for(inside), b"Forwarded: for=" + inside)
    assert (await stack.ask(get(MODELS, *fields, key=OFFICE_KEY))).status == 200


@scenario(KEYS=KEYS, TRUSTED_PROXIES=TRUSTED)
async def test_the_logs_have_the_address_that_is_not_allowed(stack: Stack) -> None:
    fields = (forwarded_for(b"192.0.2.7"), b"Forwarded: for=198.51.100.1", b"X-Request-Id: r-1")
    assert (await stack.ask(get(MODELS, *fields, key=OFFICE_KEY))).status == 401
    stack.app.recorder.flush()
    assert "key office from elsewhere than its from=: 198.51.100.1 for /v1/models (request r-1)" in stack.logged()
    await stack.stop()
    assert [line["peer"] for line in stack.lines] == ["198.51.100.1"]


@scenario(KEYS=KEYS)
async def test_a_valid_key_beside_one_that_does_not_work_from_here_counts(stack: Stack) -> None:
    assert (await stack.ask(get(MODELS, b"x-api-key: " + OFFICE_KEY))).status == 200
    assert (await stack.ask(get(MODELS, b"x-api-key: " + HERE_KEY))).status == 401
    assert (await stack.ask(get(MODELS, b"x-api-key: sk-other-0123456789abcdef", key=OFFICE_KEY))).status == 401
    stack.app.recorder.flush()
    assert sum("key office from elsewhere" in line for line in stack.logged()) == 1


@scenario(KEYS=KEYS, METRICS_AUTH_ENABLED="false")
async def test_an_operators_key_shows_nothing_more_elsewhere(stack: Stack) -> None:
    await stack.ask(get(MODELS))
    assert b"alice" not in (await stack.ask(get(b"/metrics", key=OFFICE_OPERATOR_KEY))).body


@scenario(KEYS=KEYS, HOST="::1")
async def test_an_ipv6_client_has_its_own_address(stack: Stack) -> None:
    client = await stack.client(host="::1")
    client.send(get(MODELS, key=HERE_KEY))
    assert (await client.response()).status == 200
