"""forwarded.py: the client behind trusted proxies, read from right to left."""

import random

import pytest

from http1.forwarded import NO_PROXIES, TrustedProxies, parse_node
from keyfile import parse_networks

PROXIES = TrustedProxies(parse_networks("10.0.0.0/8,2001:db8:10::/48,127.0.0.1"))


def by_list(*lines: str) -> str:
    (client,) = PROXIES.clients({b"x-forwarded-for": [line.encode("latin-1") for line in lines]})
    return client


def by_forwarded(*lines: str) -> str:
    (client,) = PROXIES.clients({b"forwarded": [line.encode("latin-1") for line in lines]})
    return client


# --- Who is trusted ---


@pytest.mark.parametrize("peer", ["10.1.2.3", "::ffff:10.1.2.3", "2001:db8:10::1", "127.0.0.1"])
def test_a_proxy_in_the_networks_is_trusted(peer: str) -> None:
    assert PROXIES.trusts(peer)


@pytest.mark.parametrize("peer", ["192.0.2.7", "2001:db8:11::1", "::1", "local", ""])
def test_no_other_peer_is_trusted(peer: str) -> None:
    assert not PROXIES.trusts(peer)


def test_without_proxies_nothing_is_read() -> None:
    assert not NO_PROXIES.trusts("127.0.0.1")
    assert NO_PROXIES.clients({b"x-forwarded-for": [b"192.0.2.7"]}) == ()


def test_a_request_without_the_fields_says_nothing() -> None:
    assert PROXIES.clients({b"host": [b"a"]}) == ()


# --- X-Forwarded-For ---


@pytest.mark.parametrize(
    ("line", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:4711", "192.0.2.7"),
        ("2001:DB8::7", "2001:db8::7"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("[2001:db8::7]:4711", "2001:db8::7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("198.51.100.1, 192.0.2.7", "192.0.2.7"),
        ("192.0.2.7,10.0.0.1", "192.0.2.7"),
        ("192.0.2.7 ,\t10.0.0.2, [2001:db8:10::1]:80", "192.0.2.7"),
        ("10.0.0.9, 10.0.0.1", "10.0.0.9"),
        ("192.0.2.7,, ", "192.0.2.7"),
        ("198.51.100.1, garbage, 192.0.2.7, 10.0.0.1", "192.0.2.7"),
    ],
)
def test_the_first_address_from_the_right_that_is_no_proxys_is_the_client(line: str, client: str) -> None:
    assert by_list(line) == client


@pytest.mark.parametrize(
    "garbage", ["unknown", "_hidden", "a b", "192.0.2.7 192.0.2.8", '"', "192.0.2.300", "\xff", "-"]
)
def test_garbage_stops_at_the_last_proxy_that_was_named(garbage: str) -> None:
    assert by_list(f"192.0.2.7, {garbage}") == ""
    assert by_list(f"192.0.2.7, {garbage}, 10.0.0.1") == "10.0.0.1"
    assert by_list(f"192.0.2.7, {garbage}, 10.0.0.2, 10.0.0.1") == "10.0.0.2"


def test_several_lines_are_one_list() -> None:
    assert by_list("198.51.100.1", "192.0.2.7") == "192.0.2.7"
    assert by_list("198.51.100.1, 192.0.2.7", "10.0.0.2", "10.0.0.1") == "192.0.2.7"
    assert by_list("192.0.2.7", "") == "192.0.2.7"


def test_an_empty_field_says_nothing() -> None:
    assert by_list("") == by_list(", ,") == by_forwarded("") == by_forwarded(",;,") == ""


# --- Forwarded ---


@pytest.mark.parametrize(
    ("line", "client"),
    [
        ("for=192.0.2.7", "192.0.2.7"),
        ("FOR=192.0.2.7;proto=https", "192.0.2.7"),
        ('for="192.0.2.7:4711"', "192.0.2.7"),
        ('for="[2001:db8::7]"', "2001:db8::7"),
        ('by=10.0.0.1;for="[2001:db8::7]:_port" ; host="a, for=198.51.100.1"', "2001:db8::7"),
        ('for="[2001\\:db8::7]"', "2001:db8::7"),
        ("for=192.0.2.7, for=10.0.0.1", "192.0.2.7"),
        ('for=198.51.100.1, for=192.0.2.7;host="\\"",for="10.0.0.1:80"', "192.0.2.7"),
        ("for=192.0.2.7;", "192.0.2.7"),
    ],
)
def test_forwarded_names_the_client(line: str, client: str) -> None:
    assert by_forwarded(line) == client


@pytest.mark.parametrize(
    "element",
    [
        "for=unknown",
        "for=_hidden",
        'for="_hidden:80"',
        "proto=https",
        "for=192.0.2.7;for=192.0.2.8",
        "for=[2001:db8::7]",
        "for=192.0.2.7:80",
        'for="192.0.2.7',
        "for",
        "for=",
        "for=192.0.2.7 proto=https",
        '="192.0.2.7"',
    ],
)
def test_an_element_that_names_no_address_stops_there(element: str) -> None:
    assert by_forwarded(element) == ""
    assert by_forwarded(f"for=198.51.100.1, {element}", "for=10.0.0.2, for=10.0.0.1") == "10.0.0.2"


@pytest.mark.parametrize("open_end", ['for="', 'for="a\\', 'for=";host="', "for=", '"', '"\\"', "for=10.0.0.9;x"])
@pytest.mark.parametrize(
    "added", ["for=192.0.2.7", 'for="192.0.2.7:80";host="h, for=10.0.0.5"', "proto=http;for=192.0.2.7"]
)
def test_what_a_client_leaves_open_cannot_hide_what_the_proxy_adds(open_end: str, added: str) -> None:
    assert by_forwarded(f"{open_end}, {added}") == by_forwarded(open_end, added) == "192.0.2.7"


def test_several_lines_of_forwarded_are_one_list() -> None:
    assert by_forwarded("for=198.51.100.1", 'for=192.0.2.7, for="10.0.0.2"', "for=10.0.0.1") == "192.0.2.7"


# --- Both ---


def test_each_field_gives_its_own_address() -> None:
    known = {b"forwarded": [b"for=10.0.0.5"], b"x-forwarded-for": [b"192.0.2.7"]}
    assert PROXIES.clients(known) == ("192.0.2.7", "10.0.0.5")


@pytest.mark.parametrize(
    ("text", "address"),
    [("1.2.3.4", "1.2.3.4"), ("[::1]:123456", None), ("::1:80:", None), ("[1.2.3.4]", None), ("", None)],
)
def test_nodes(text: str, address: str | None) -> None:
    assert parse_node(text) == (address and parse_networks(address)[0].network_address)


def test_what_a_client_sends_never_decides() -> None:
    """Whatever stands before the address that the proxy has added, this address is the result."""
    rng = random.Random(7)
    alphabet = [*'",;=\\[]: \t', "for", "for=10.0.0.5", "10.0.0.5", "unknown", '"10.0.0.5"', "_x", "\xff"]
    for _ in range(2000):
        sent = "".join(rng.choices(alphabet, k=rng.randrange(12)))
        assert by_list(f"{sent}, 192.0.2.7") == "192.0.2.7"
        assert by_forwarded(f"{sent}, for=192.0.2.7") == by_forwarded(sent, 'for="192.0.2.7"') == "192.0.2.7"


def test_of_a_long_line_the_end_is_read() -> None:
    assert by_list("198.51.100.1, " * 1000 + "192.0.2.7, 10.0.0.1") == "192.0.2.7"
    assert by_list("192.0.2.7, " + "10.0.0.1, " * 20 + "10.0.0.2") == "192.0.2.7"
    assert by_forwarded("for=192.0.2.7;" + "x=y;" * 1000) == ""
    assert by_list("192.0.2.7" * 200) == ""


def test_no_more_than_32_elements_are_read() -> None:
    hops = [f"10.0.0.{number}" for number in range(1, 41)]
    assert by_list("192.0.2.7, " + ", ".join(hops)) == "10.0.0.9"
    assert by_list("192.0.2.7" + "," * 32) == ""
    assert by_list("192.0.2.7" + "," * 31) == "192.0.2.7"
