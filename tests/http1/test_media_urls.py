"""media_urls.py: addresses of media in JSON, in every spelling and in pieces of any size."""

import json

import pytest

from http1.media_urls import MediaUrls
from policy.body_rules import BodyRules

URL = "http://10.0.0.1/a.png"
PLAIN = json.dumps({"messages": [{"content": [{"type": "image_url", "image_url": {"url": URL}}]}]}).encode()


def found(body: bytes, size: int = 1 << 15) -> tuple[str, ...]:
    urls = MediaUrls()
    for at in range(0, len(body), size):
        urls.feed(body[at : at + size])
        while urls.step():
            pass
    return urls.found


@pytest.mark.parametrize(
    "body",
    [
        PLAIN,
        b'{"input":[{"content":[{"type":"input_image","image_url":"http://10.0.0.1/a.png"}]}]}',
        b'{"messages":[{"content":[{"type":"image","source":{"type":"url","url":"http://10.0.0.1/a.png"}}]}]}',
        b'{"messages":[{"content":[{"type":"input_audio","input_audio":{"data":"http://10.0.0.1/a.png"}}]}]}',
        b'{"a": {"image_url" \n\t:\r { "x": "}", "url"'
        + b" " * 90_000
        + b":"
        + b"\n" * 90_000
        + b'"http://10.0.0.1/a.png" }}}',
        b'{"\\u0069mage_url":{"\\u0075rl":"\\u0068ttp:\\/\\/10.0.0.1/a.png"}}',
        b'{"image\\u005furl":{"url":"http://10.0.0.1/a.png"}}',
        b'{"x":"\\"","image_url":"ht\\u0074p://10.0.0.1/a.png"}',
        b'{"image_url":{"url":"http\\u003A//10.0.0.1/a.png"}}',
        b'{"url":"ftp://10.0.0.1/a.png","image_url":"http://10.0.0.1/a.png"}',
    ],
)
def test_an_address_is_found(body: bytes) -> None:
    assert found(body) == (URL,)
    assert found(body, 7) == (URL,)


@pytest.mark.parametrize("url", ["file\\u003a///etc/passwd", "file\\u003A///etc/passwd", "\\u0046ILE:///etc/passwd"])
def test_an_address_of_a_file_is_found_however_its_letters_and_its_colon_are_spelt(url: str) -> None:
    body = b'{"image_url":{"url":"%b"}}' % url.encode()
    assert BodyRules().screen(None).is_suspect(body)
    for size in (1 << 15, 7):
        assert [address.lower() for address in found(body, size)] == ["file:///etc/passwd"]


@pytest.mark.parametrize("before", ["", "a", "aa", "aaa"])
@pytest.mark.parametrize(
    "after", ["", "\\\\", "\\\\" * 999, "é" * 999, "\\u00e9" * 999, "\\ud83d\\ude00" * 999, '\\"/' * 999]
)
def test_an_escaped_address_is_found_whatever_follows(before: str, after: str) -> None:
    body = f'{{"image_url":{{"url":"\\u0068ttp://10.0.0.1/{before}{after}"}}}}'.encode()
    for size in (1 << 15, 7):
        (address,) = found(body, size)
        assert address.startswith("http://10.0.0.1/" + before)


@pytest.mark.parametrize(
    "url",
    [
        "http://a.example/@10.0.0.1/x",
        "http://a.example/?u=@10.0.0.1/x",
        "http://a.example#@10.0.0.1/x",
        "http://a.example/\\u004010.0.0.1/x",
        f"http://a.example/{'x' * 1500}@10.0.0.1/x",
        f"http://a.example/{'x' * 5000}@10.0.0.1/x",
        "http://a.example/" + "\\u00e9" * 2100,
    ],
)
def test_an_address_of_which_the_host_is_unclear_is_none(url: str) -> None:
    """Also if another address of the same origin has been found before it."""
    body = f'{{"image_url":{{"url":"http://a.example/"}},"b":{{"image_url":"{url}"}}}}'.encode()
    for size in (1 << 15, 1000, 7):
        assert set(found(body, size)) == {"http://a.example/", "no address"}


def test_the_longest_address_is_whole() -> None:
    for signs in (2048, 2049):
        url = "http" + "x" * signs
        body = f'{{"image_url":"{url}"}}'.encode()
        for size in (1 << 15, len(body) - 2, 7):
            assert found(body, size) == (url if signs == 2048 else "no address",)


@pytest.mark.parametrize("spelling", [b"\\u0068ttp://\xff", b"\\u0068\\x", b"http\\x"])
def test_what_is_no_json_raises_nothing(spelling: bytes) -> None:
    assert len(found(b'{"image_url":"%b"}' % spelling)) <= 1


@pytest.mark.parametrize("escaped", [f"\\u{ord(sign):04x}" for sign in ":PZ_az"])
def test_no_escape_of_a_sign_of_a_name_or_an_address_is_cleared(escaped: str) -> None:
    assert BodyRules().screen(None).is_suspect(b'{"a":"%b"}' % escaped.encode())


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[{"content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,aHR0cA=="}}]}]}',
        b'{"messages":[{"content":"http://10.0.0.1/a.png"}],"image_url":{}}',
        json.dumps({"messages": [{"content": PLAIN.decode()}]}).encode(),  # quoted in a text
        b'{"tools":[{"parameters":{"properties":{"url":{"default":"http://a"},"image_url":{"type":"string"}}}}]}',
        b'{"input":[{"annotations":[{"type":"url_citation","url":"http://a.example/"}]}]}',  # nothing fetches it
        b'{"url":"ftp://a","image_url":{}}',
        b'{"x":"http://a/","image_url":"files/a.png","url":"hile:"}',
    ],
)
def test_what_is_no_address_of_media_is_not(body: bytes) -> None:
    assert found(body) == ()


def test_a_file_and_several_hosts_are_found_and_a_number_of_them_is_kept() -> None:
    assert found(b'{"image_url":"file:///etc/passwd"}') == ("file:///etc/passwd",)
    many = json.dumps([{"image_url": f"http://{number}/"} for number in range(99)]).encode()
    assert len(found(many)) == 32
    assert found(b'{"image_url":"http://\xff"}') == ("http://ÿ",)


@pytest.mark.parametrize(
    ("member", "is_looked_at"),
    [
        (b'"url":"http"', True),
        (b'"\\u0075rl":"\\u0068ttp"', True),
        (b'"":"http"', False),
        (b'"\\n":"http"', False),
        (b'"url":"haaa"', False),
    ],
)
def test_a_number_of_members_that_may_be_addresses_is_looked_at_in_a_step(member: bytes, is_looked_at: bool) -> None:
    urls = MediaUrls()
    urls.feed(b'{"a":"http://a/",' + b",".join([member] * 1000) + b"}")
    steps = 0
    while urls.step():
        steps += 1
    assert (steps > 5) is is_looked_at
