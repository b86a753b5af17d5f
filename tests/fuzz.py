"""Feed seeded random bytes to everything that parses input from the network: what `make fuzz` runs.

    python3 tests/fuzz.py [--rounds 20000] [--seed 0]

Round N uses the seed N, so that one number repeats a failure. test_fuzz.py runs the same checks for a few rounds. An
input that fails becomes a corpus file.
"""

import argparse
import json
import random
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent / "scripts")]

from config.settings import Limits  # noqa: E402
from core.dialects import DIALECTS  # noqa: E402
from core.errors import CATALOGUE, GatewayError  # noqa: E402
from http1.bodies import ChunkedBody  # noqa: E402
from http1.grammar import CRLF, RequestHead, parse_request_head  # noqa: E402
from policy import routes  # noqa: E402
from policy.cors import Cors  # noqa: E402
from support.feeds import FEEDS, ResponseReader, read_requests, read_response  # noqa: E402

LIMITS = Limits(request_line_bytes=120, header_line_bytes=80, headers=6, body_bytes=40)
CODES = {kind.code for kind in CATALOGUE if kind.status in (400, 413, 414, 417, 431, 505)}
FRAGMENTS = (
    *b"GET POST OPTIONS HTTP/1.1 HTTP/1.0 HTTP/2.0 / * /v1/models ?a=b # Host Host: : , ; = \\ chunked gzip".split(),
    *b"Content-Length: Transfer-Encoding: Connection: Expect: 100-continue keep-alive X-A: 1;a=b x-a:b 200".split(),
    *b"204 OK close 0 1 5 -1 +5 0x5 a A f ffffffffffffffff 99999999999999999999".split(),
    *(b'"', b" ", b"\t", b"\r\n", b"\r\n\r\n", b"\r", b"\n", b"\0", b"\x7f", b"\xe9", b"0\r\n\r\n", b"5\r\nhello\r\n"),
)
GET_HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
TOKEN = b"!#$%&'*+-.^_`|~09AZaz"
TEXT = bytes(byte for byte in range(256) if byte == 0x09 or (byte >= 0x20 and byte != 0x7F))
LABELS = {path for _, path, _ in routes.TABLE} | set(routes.BLOCKED_PATHS) | {"unknown", "other", "OPTIONS"}
TABLES = [
    routes.Routes(allow_paths=allow, admin_routes=admin) for allow in ((), ("*",), ("/x/*",)) for admin in (False, True)
]


# --- Random input ---


@cache
def corpus(folder: str) -> list[bytes]:
    return [path.read_bytes().partition(b"\n")[2] for path in sorted((TESTS / "corpus" / folder).glob("*.http"))]


def sample(choose: random.Random, alphabet: Sequence[int], most: int, least: int = 0) -> bytes:
    return bytes(choose.choices(alphabet, k=choose.randint(least, most)))


def noise(choose: random.Random) -> bytes:
    return choose.randbytes(choose.randint(0, 100))


def fragments(choose: random.Random) -> bytes:
    return b"".join(choose.choices(FRAGMENTS, k=choose.randint(1, 30)))


def mutated(choose: random.Random, *folders: str) -> bytes:
    """A corpus file with a few bytes changed, removed, inserted, doubled, or replaced by another file's end."""
    raw = bytearray(choose.choice(corpus(choose.choice(folders))))
    for _ in range(choose.randint(1, 4)):
        start = choose.randint(0, len(raw))
        end = min(len(raw), start + choose.randint(0, 8))
        other = choose.choice(corpus(choose.choice(folders)))[start:]
        new = (b"", choose.choice(FRAGMENTS), choose.randbytes(1), bytes(raw[start:end] * 2), other)
        raw[start:end] = choose.choice(new)
    return bytes(raw)


def torn(choose: random.Random, raw: bytes) -> list[bytes]:
    cuts = sorted(choose.choices(range(len(raw) + 1), k=choose.randint(0, 6)))
    return [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


# --- What must hold ---


def check_requests(choose: random.Random, raw: bytes) -> None:
    """Any bytes are requests, an error or incomplete, and the same in whatever pieces they arrive."""
    seen = [read_requests(feed(raw), LIMITS) for feed in FEEDS.values()]
    seen.append(read_requests(torn(choose, raw), LIMITS))
    first = seen[0]
    for reader in seen:
        assert (reader.heads, reader.payloads) == (first.heads, first.payloads)
        assert (reader.error is None, reader.incomplete) == (first.error is None, first.incomplete)
        assert reader.error is None or (reader.error.kind.code in CODES and reader.error.kind.closes)
    for head, payload in zip(first.heads, first.payloads, strict=True):
        check_head(head)
        assert len(payload) <= LIMITS.body_bytes
        assert parse_request_head(serialized(head), Limits()) == head


def check_head(head: RequestHead) -> None:
    """An accepted head can be relayed: no byte in it ends a line, and it is within every limit."""
    assert re.fullmatch(rb"[!-~]+", head.method + head.target)
    assert len(head.fields) == len(head.names) <= LIMITS.headers
    for (name, value), lower in zip(head.fields, head.names, strict=True):
        assert name.lower() == lower
        assert re.fullmatch(rb"[!-9;-~]+", name)
        assert not re.search(rb"[\x00-\x08\x0a-\x1f\x7f]|^[ \t]|[ \t]$", value)
        assert len(name) + 1 + len(value) <= LIMITS.header_line_bytes
        assert lower not in head.known or value in head.known[lower]


def serialized(head: RequestHead) -> bytes:
    lines = [b"%b %b HTTP/1.%d" % head[:3], *(b"%b: %b" % field for field in head.fields), b"", b""]
    return CRLF.join(lines)


def check_response(choose: random.Random, raw: bytes) -> None:
    """Any bytes are a response, malformed or incomplete, in whatever pieces; the relayed bytes carry the payload."""
    method = choose.choice((b"GET", b"HEAD"))
    whole = read_response([raw], method)
    for pieces in [*(feed(raw) for feed in FEEDS.values()), torn(choose, raw)]:
        reader = read_response(pieces, method)
        assert reader.summary() == whole.summary()
        assert reader.error is not None or reader.payload == whole.payload
        check_relayed(reader)


def check_relayed(reader: ResponseReader) -> None:
    if isinstance(reader.body, ChunkedBody):
        again = ChunkedBody()
        assert again.feed(reader.relayed + CRLF if reader.body.done else reader.relayed) == reader.payload
        assert again.done == reader.body.done


def check_good_head(choose: random.Random, raw: bytes) -> None:
    """A head that fits the grammar is accepted, and parsed without loss."""
    fields = [
        (sample(choose, TOKEN, 6, 1), sample(choose, TEXT, 12).strip(b" \t")) for _ in range(choose.randint(0, 5))
    ]
    blanks = (b"", b" ", b"\t ", b"   ")
    lines = [b"%b:%b%b%b" % (name, choose.choice(blanks), value, choose.choice(blanks)) for name, value in fields]
    head = parse_request_head(CRLF.join([GET_HEAD[:-2], *lines, b"", b""]), LIMITS)
    assert list(head.fields) == [(b"Host", b"a"), *fields]
    check_head(head)


def check_good_chunks(choose: random.Random, raw: bytes) -> None:
    """A body that fits the grammar of chunked coding is accepted, with the same payload in whatever pieces."""
    pieces = [raw[at : at + 7] for at in range(0, len(raw), 7)]
    extensions = (b"", b";a", b' ;\ta="\\"\r;"'.replace(b"\r", b""), b";a = b;c")
    forms = (b"%x", b"%X", b"00%x")
    coded = b"".join(
        b"%b%b\r\n%b\r\n" % (choose.choice(forms) % len(piece), choose.choice(extensions), piece) for piece in pieces
    )
    coded += choose.choice((b"0\r\n\r\n", b"000;a=b\r\n\r\n", b"0\r\nX-A: 1\r\nX-B:\r\n\r\n"))
    reader = ResponseReader(b"GET")
    for piece in torn(choose, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + coded + b"more"):
        reader.feed(piece)
    assert reader.error is None
    assert reader.body is not None
    assert reader.body.done
    assert (reader.payload, reader.body.trailing_data) == (raw, b"more")
    check_relayed(reader)


def check_route(choose: random.Random, raw: bytes) -> None:
    """Any target has a route, with a label from the table."""
    target = b"/" + bytes(byte for byte in raw if 0x21 <= byte <= 0x7E and byte != 0x23)
    for table in TABLES:
        route = table.find(choose.choice((b"GET", b"POST", b"OPTIONS", b"TRACE")), target)
        assert route.label in LABELS
        if route.refusal is not None:
            assert isinstance(route.error(), GatewayError)


def check_cors(choose: random.Random, raw: bytes) -> None:
    """Only listed origins and tokens are echoed, and never a line end."""
    text = raw.translate(None, bytes(range(32)) + b"\x7f")[:40]
    names = (b"Origin", b"Access-Control-Request-Method", b"Access-Control-Request-Headers")
    lines = [b"%b: %b" % (name, choose.choice((text, b"https://a.example"))) for name in names]
    head = parse_request_head(CRLF.join([GET_HEAD[:-2], *lines, b"", b""]), LIMITS)
    for cors in (Cors(("https://a.example",)), Cors(("*",))):
        for name, value in cors.fields(head) + cors.preflight(head):
            assert name != b"Access-Control-Allow-Origin" or value in (b"*", b"https://a.example")
            assert re.fullmatch(rb"[ \t!#$%&'*+,\-.^_`|~0-9A-Za-z:/]+", value)


def check_envelope(choose: random.Random, raw: bytes) -> None:
    """Any detail results in one JSON object and one event."""
    error = GatewayError(choose.choice(CATALOGUE), raw.decode("latin-1"))
    for dialect in DIALECTS:
        assert json.loads(dialect.envelope(error, "req-1"))["error"]["message"] == error.message
        events = dialect.error_event(error, "req-1", 1)
        assert events.count(b"\n\n") == 1 + dialect.ends_stream
        assert b"\r" not in events


SOURCES: tuple[Callable[[random.Random], bytes], ...] = (
    noise,
    fragments,
    lambda choose: GET_HEAD + fragments(choose),
    lambda choose: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + fragments(choose),
    lambda choose: mutated(choose, "accepted", "refused"),
    lambda choose: mutated(choose, "responses"),
)
CHECKS = (
    check_requests,
    check_response,
    check_good_head,
    check_good_chunks,
    check_route,
    check_cors,
    check_envelope,
)


def run_round(seed: int) -> None:
    """Run every check on one input from each source. Any exception is a finding."""
    choose = random.Random(seed)
    for source in SOURCES:
        raw = source(choose)
        for check in CHECKS:
            check(choose, raw)


def finding(seed: int) -> str:
    """The traceback of a failing round and how to repeat it; empty if nothing fails."""
    try:
        run_round(seed)
    except Exception:
        return f"{traceback.format_exc()}\nAgain: python3 tests/fuzz.py --rounds 1 --seed {seed}"
    return ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Feed seeded random bytes to the parsers.")
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="the first round's; one more for each further round")
    arguments = parser.parse_args(argv)
    for seed in range(arguments.seed, arguments.seed + arguments.rounds):
        if found := finding(seed):
            print(found, file=sys.stderr)
            return 1
    print(f"{arguments.rounds} rounds of {len(SOURCES)} inputs and {len(CHECKS)} checks: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
