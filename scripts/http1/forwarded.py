"""The client behind trusted proxies: X-Forwarded-For and Forwarded (RFC 7239), read from right to left. No I/O.

A client may send either field, with anything in it. A proxy adds the address that it sees at the right end. So a value
counts only as far as trusted proxies wrote it: from the right, up to the first address that is not a trusted proxy's.
Nothing to the left of that is looked at, and none of it can change how the right end is read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from core.addresses import Address, Network, is_within, parse_address

# Whatever a client sends costs little: so many elements are read, and so much of each field line.
_MAX_HOPS = 32
_MAX_LINE_BYTES = 1024
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_PAIR = re.compile(rf'[ \t]*(?:({_TOKEN})=({_TOKEN}|"(?:[^"\\]|\\.)*"))?[ \t]*(?:;|\Z)')
_QUOTED_PAIR = re.compile(r"\\(.)")
_COMMA_OR_QUOTE = re.compile('[,"]')
# RFC 7239 section 6, and as X-Forwarded-For has it: IPv6 with or without brackets, each but the latter with a port.
_PORT = r"(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]+))?"
_NODE = re.compile(rf"\[([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\]{_PORT}|([0-9.]+){_PORT}|([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)")


class TrustedProxies:
    """The proxies whose fields are believed, and what these say."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks

    def trusts(self, peer: str) -> bool:
        """Whether a connection comes from a trusted proxy."""
        return bool(self._networks) and is_within(parse_address(peer), self._networks)

    def clients(self, known: Mapping[bytes, Sequence[bytes]]) -> tuple[str, ...]:
        """Return the client's address by each of the two fields that a request has, X-Forwarded-For first.

        It holds if the request came from a trusted proxy. An address is empty if the field says nothing of use at its
        right end: then the proxy itself is the last that is known. Where a field stops to make sense, the trusted proxy
        to the right of that counts. A proxy sets one of the fields and may pass on a client's other one, so the caller
        must not believe an address that only one of them has.
        """
        if not self._networks:
            return ()
        lists = ((b"x-forwarded-for", _plain_nodes), (b"forwarded", _forwarded_nodes))
        return tuple([self._last_client(read(known[name])) for name, read in lists if name in known])

    def _last_client(self, nodes: Iterable[str | None]) -> str:
        client = ""
        for node in islice(nodes, _MAX_HOPS):
            if node is None:
                continue
            address = parse_node(node)
            if address is None:
                break
            client = str(address)
            if not is_within(address, self._networks):
                break
        return client


NO_PROXIES = TrustedProxies(())


def parse_node(text: str) -> Address | None:
    """Return the address of a node, with or without a port; None for `unknown`, an obfuscated one, and garbage."""
    match = _NODE.fullmatch(text)
    return parse_address(match[1] or match[2] or match[3]) if match else None


def _plain_nodes(lines: Sequence[bytes]) -> Iterator[str | None]:
    """Yield the nodes of X-Forwarded-For from right to left, None for an empty element."""
    for line in _ends(lines):
        for node in reversed(line.split(",")):
            yield node.strip(" \t") or None


def _forwarded_nodes(lines: Sequence[bytes]) -> Iterator[str | None]:
    """Yield the `for` of each element of Forwarded from right to left, None for an empty element.

    It is an empty text if the element has none or is malformed.
    """
    for line in _ends(lines):
        for element in _elements(line):
            yield _for_of(element) if element.strip(" \t") else None


def _ends(lines: Sequence[bytes]) -> Iterator[str]:
    """Yield the lines from the last to the first, since several are one list; of a long one only its end.

    A question mark takes the place of what is left out, so that the element that it cuts is malformed.
    """
    for line in reversed(lines):
        text = line[-_MAX_LINE_BYTES:].decode("latin-1")
        yield f"?{text}" if len(line) > _MAX_LINE_BYTES else text


def _elements(line: str) -> Iterator[str]:
    """Split at the commas outside of quoted strings, from right to left.

    Read so, a quotation mark that a client has left open cannot swallow what a proxy has added after it.
    """
    end, quoted = len(line), False
    for mark in reversed(list(_COMMA_OR_QUOTE.finditer(line))):
        at = mark.start()
        if mark[0] == '"':
            quoted = not quoted or _is_escaped(line, at)
        elif not quoted:
            yield line[at + 1 : end]
            end = at
    yield line[:end]


def _is_escaped(line: str, at: int) -> bool:
    first = at
    while first and line[first - 1] == "\\":
        first -= 1
    return (at - first) % 2 == 1


def _for_of(element: str) -> str:
    """Return the value of the one `for` parameter of an element, without quotes; empty if the element is malformed."""
    nodes, at = [], 0
    while at < len(element):
        pair = _PAIR.match(element, at)
        if pair is None:
            return ""
        if pair[1] and pair[1].lower() == "for":
            nodes.append(_QUOTED_PAIR.sub(r"\1", pair[2].strip('"')))
        at = pair.end()
    return nodes[0] if len(nodes) == 1 else ""
