"""body_rules.py: which bodies are refused, each row of the table on both sides of its bound."""

import json
from collections.abc import Mapping

import pytest

from config.member_rules import RULES, Measure, parse_rules
from core.errors import BODY_TOO_DEEP, MEMBER_NOT_ALLOWED, GatewayError
from policy.body_rules import BodyRules
from policy.slot_demand import CHOICES
from proxy.body_scan import BodyScan

REFUSED = [
    name for rule in RULES if rule.default == "refuse" and rule.measure is Measure.PRESENCE for name in rule.members
]
ALLOWED = [name for rule in RULES if rule.default == "allow" for name in rule.members]


def check(body: object, rules: str = "", depth: int = 100, size: int = 1000) -> str:
    """Return "" if the body may pass, else the message of its refusal."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    policy = BodyRules(parse_rules(rules), depth)
    pieces: list[bytes | bytearray] = [raw[at : at + size] for at in range(0, len(raw), size)]
    scan = BodyScan(pieces, policy.screen(CHOICES), is_complete=True, max_depth=depth)
    while scan.step():
        pass
    members = scan.waiter.result()
    assert (members is not None) == policy.screen(CHOICES).is_suspect(raw)
    if members is None:
        return ""
    try:
        policy.check(members, pieces)
    except GatewayError as error:
        return error.message if error.kind in (BODY_TOO_DEEP, MEMBER_NOT_ALLOWED) and error.final else "another error"
    return ""


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_default_is_named(name: str) -> None:
    for value in (True, 1, "x", [1], {}, {"a": 1}):
        assert check({"prompt": "x", name: value}) == f"The member {name} is not allowed ({name} in MEMBER_RULES)."
        assert check({"prompt": "x", name: value}, f"{name}=allow") == ""
    for value in (None, False, [], ""):
        assert check({name: value}) == ""
    assert check({"tools": [{"parameters": {name: [1]}}]}) == ""


@pytest.mark.parametrize(
    ("spelt", "refused"),
    [
        (b'{"grammar_triggers": [1]}', True),
        (b'{"grammar\\u005ftriggers": [1]}', True),
        (b'{"\\u0067rammar_triggers" : [1]}', True),
        (b'{"grammar_triggers": [], "grammar_triggers": [1]}', True),
        (b'{"grammar_triggers": [1], "grammar_triggers": null}', False),  # the last one counts
        (b'\xef\xbb\xbf{"grammar_triggers": [1]}\0 more', True),
        (b'{"a": "\\"grammar_triggers\\": [1]"}', False),
        (b'{"a": ' + b"[" * 60 + b"]" * 60 + b', "grammar_triggers": [1]}', True),
        (b'{"a": "' + b"x" * 70_000 + b'", "grammar_triggers": [1]}', True),
        (b'["grammar_triggers", [1]]', False),
    ],
)
def test_a_member_is_found_in_every_spelling(spelt: bytes, refused: bool) -> None:
    assert bool(check(spelt)) is refused
    assert bool(check(spelt, size=3)) is refused


NUMBERS = [
    (name, int(rule.default))
    for rule in RULES
    if rule.measure is Measure.NUMBER and rule.default.isdigit()
    for name in rule.members
]


@pytest.mark.parametrize(("name", "most"), NUMBERS)
def test_a_number_is_bounded(name: str, most: int) -> None:
    for value in (0, 1, most, float(most), None, True, "9"):
        assert check({name: value}) == "", value
    for value in (most + 1, most + 0.5, -1, 400_000_000, 10**300):
        assert f"The member {name} exceeds its limit: at most {most} (" in check({name: value}), value
    assert check(b'{"%b": %b}' % (name.encode(), b"9" * 2000)) != ""
    assert check(b'{"%b": 1e999}' % name.encode()) != ""
    assert check({name: most + 1}, ",".join(f"{rule.name}={most + 1}" for rule in RULES if name in rule.members)) == ""


@pytest.mark.parametrize(
    ("name", "most"), [("dry_sequence_breakers", 32), ("samplers", 64), ("stop", 64), ("stop_sequences", 64)]
)
def test_elements_are_bounded(name: str, most: int) -> None:
    assert check({name: "x"}) == ""
    assert check({name: ["x"] * most}) == ""
    assert f"{name} exceeds its limit: at most {most} elements" in check({name: ["x"] * (most + 1)})
    long = "x" * (most * 256 - 2)
    assert check({name: [long[2:]] if name == "samplers" else long}) == ""
    assert f"{name} exceeds its limit: at most {most * 256} bytes" in check({name: ["x" * (most * 256 - 3)]})


def test_each_character_of_a_string_names_a_sampler() -> None:
    for within in ("k" * 64, "\U0001f600" * 64):
        assert check({"samplers": within}) == ""
    assert check(b'{"samplers": "%b"}' % (b"\\u006b" * 64)) == ""
    for excess in ("k" * 65, "\U0001f600" * 65, "k" * 300_000):
        assert "samplers exceeds its limit: at most 64 characters" in check({"samplers": excess})


def test_a_member_that_is_called_as_the_rule_of_hosts_is_no_address() -> None:
    assert check({"media_urls": ["http://a.example/"], "n": 1}) == ""


@pytest.mark.parametrize(
    ("name", "most"), [("logit_bias", 65536), ("grammar", 65536), ("json_schema", 131072), ("response_format", 131072)]
)
def test_bytes_are_bounded(name: str, most: int) -> None:
    def body(size: int) -> bytes:
        value = b'"' + b"x" * (size - 2) + b'"' if name == "grammar" else b'{"5": "' + b"x" * (size - 9) + b'"}'
        assert len(value) == size
        return b'{"%b": %b}' % (name.encode(), value)

    assert check(body(most)) == ""
    assert f"{name} exceeds its limit: at most {most} bytes" in check(body(most + 1))


@pytest.mark.parametrize("filler", ["", "x" * 3000])
def test_parentheses_of_a_grammar_are_bounded(filler: str) -> None:
    def grammar(depth: int) -> Mapping[str, object]:
        return {"grammar": f"root ::= {filler}" + "(" * depth + '"a"' + ")" * depth}

    assert check(grammar(100)) == ""
    assert "grammar exceeds its limit: at most 100 levels of parentheses" in check(grammar(101))
    assert "levels of parentheses" in check({"user": filler, **grammar(101), "seed": filler})
    assert check({"grammar": "( )" * 200 + filler}) == ""
    assert check({"grammar": ["(" * 200]}) == ""


def test_a_spelling_that_is_no_string_is_counted_as_it_is() -> None:
    assert "levels of parentheses" in check(b'{"grammar": "\\x' + b"(" * 2000 + b'"}')


@pytest.mark.parametrize("name", ["json_schema", "response_format"])
def test_the_depth_of_a_schema_is_bounded(name: str) -> None:
    def schema(depth: int) -> object:
        value: object = 1
        for number in range(depth):
            value = {"items": value} if number % 2 else [value]
        return {"a": value}

    assert check({"x": [[[1]]], name: schema(63)}) == ""
    assert f"{name} exceeds its limit: at most 64 levels" in check({"x": [[[1]]], name: schema(64)})
    assert check({name: [schema(64)]}) == ""  # llama-server refuses a list
    for text in ("[{" * 64, '"[{' * 64, "\\" + '"[{' * 64 + "\\"):
        assert check({name: {"a": text, text: 1}}) == ""
        assert "at most 64 levels" in check({name: {"a": text, text: schema(63)}})
    assert check({name: {"a": [[[]]] * 10_000}}) == ""


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_the_depth_of_a_body_is_bounded(size: int) -> None:
    def nested(depth: int, end: bytes = b"") -> bytes:
        return b'{"a":' + b"[" * (depth - 1) + (end or b"]" * (depth - 1) + b"}")

    assert check(nested(100), size=size) == ""
    message = "The request body is nested deeper than 100 levels (MAX_JSON_DEPTH)."
    assert check(nested(101), size=size) == message
    assert check(nested(500_000), size=size) == message
    assert check(nested(101, b" "), size=size) == message
    assert check(b"[" * 101, size=size) == message
    assert check(b'{"messages": [%b]}' % b",".join([b'{"content":"[{"}'] * 500), size=size) == ""
    assert check(nested(11), depth=10) != ""


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_allowed_can_be_refused(name: str) -> None:
    rule = next(rule for rule in RULES if name in rule.members)
    assert check({name: 7}) == ""
    assert name in check({name: 7}, f"{rule.name}=refuse")


def test_a_number_of_tokens_can_be_bounded() -> None:
    for name in ("max_tokens", "n_predict", "max_completion_tokens", "max_output_tokens"):
        assert check({name: 100}, "max_tokens=100") == ""
        assert name in check({name: -1}, "max_tokens=100")
        assert name in check({name: 101}, "max_tokens=100")


def image(url: str) -> Mapping[str, object]:
    return {"messages": [{"content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    ("url", "passes"),
    [
        ("data:image/png;base64,aaaa", True),
        ("http://a.example/x.png", True),
        ("https://A.example:8443", True),
        ("http://b.example/x.png", False),
        ("http://a.example@b.example/", False),
        ("http://a.example\\@b.example/", False),
        ("http://a.example.b.example/", False),
        ("httpx://a.example/", False),
        ("http:a.example", False),
        ("file:///etc/passwd", False),
    ],
)
def test_media_come_from_hosts_that_are_allowed(url: str, passes: bool) -> None:
    assert (check(image(url), "media_urls=a.example|[::1]") == "") is passes
    assert (check(image(url)) == "") is url.startswith("data:")
    assert check(image(url), "media_urls=allow") == ""


@pytest.mark.parametrize("url", ["http://a.example/@", f"http://a.example/{'x' * 2048}", "http://b.example/"])
def test_where_hosts_are_allowed_the_sentence_says_what_an_address_must_be(url: str) -> None:
    assert check(image(url), "media_urls=a.example") == (
        "Images, audio and video may come from listed hosts only, and an address may have no @ and at most 2048"
        " characters; a data: URL always works. (media_urls in MEMBER_RULES)"
    )
    refused = "llama-server may not fetch from the address of an image, audio or video; send a data: URL."
    assert check(image(url)) == f"{refused} (media_urls in MEMBER_RULES)"


@pytest.mark.parametrize("number", [0, 31, 32, 33, 500])
def test_no_number_of_allowed_addresses_hides_another_one(number: int) -> None:
    def images(origin: str, last: str) -> Mapping[str, object]:
        urls = [*(origin.format(at) for at in range(number)), last]
        return {"messages": [image(url) for url in urls]}

    allowed, elsewhere = "http://a.example/{}.png", "http://169.254.169.254/"
    assert check(images(allowed, "http://a.example/"), "media_urls=a.example") == ""
    assert "may come from listed hosts only" in check(images(allowed, elsewhere), "media_urls=a.example")
    ports = "http://a.example:{}/"
    assert (check(images(ports, "http://a.example/"), "media_urls=a.example") == "") is (number < 32)
    assert "media_urls in MEMBER_RULES" in check(images(ports, elsewhere), "media_urls=a.example")


def test_all_can_be_allowed() -> None:
    everything = ",".join(f"{rule.name}=allow" for rule in RULES)
    assert check({"grammar_triggers": [1], **image("http://a")}, everything) == ""
    assert check(b"[" * 101, everything) != ""
