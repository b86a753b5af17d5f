"""addresses.py: addresses of clients, and whether they are in a list of networks."""

from ipaddress import ip_network

import pytest

from core.addresses import is_within, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:DB8::0:1", "2001:db8::1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::ffff:c000:207", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_an_address_has_one_form(text: str, address: str) -> None:
    assert str(parse_address(text)) == address


@pytest.mark.parametrize("text", ["", "local", "192.0.2", "192.0.2.07", "192.0.2.7:80", "[::1]", "1", "unknown"])
def test_anything_else_is_no_address(text: str) -> None:
    assert parse_address(text) is None


def test_an_address_is_within_networks_of_its_version() -> None:
    networks = [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")]
    inside = ["10.255.0.1", "::ffff:10.0.0.1", "2001:db8:1::"]
    outside = ["11.0.0.1", "2001:db9::1", "::10.0.0.1", "local"]
    assert [is_within(parse_address(text), networks) for text in inside + outside] == [True] * 3 + [False] * 4
    assert not is_within(parse_address("10.0.0.1"), [])
