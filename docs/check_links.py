#!/usr/bin/env python3
"""Check every internal link of the built site: its page exists, and so does its anchor (`make docs` runs it).

    python3 docs/check_links.py docs/_build/html

Exit status 0 if all links lead somewhere, 1 with one line per broken link.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

TARGETS = ("href", "src")


class Page(HTMLParser):
    """What one page links to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in TARGETS:
                self.links.add(value)
            elif value and name == "id":
                self.anchors.add(value)


def broken_links(pages: Mapping[Path, Page]) -> Iterator[str]:
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                yield f"{path.name}: {link}: there is no such file"
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{path.name}: {link}: the page has no such anchor"


def main(argv: Sequence[str]) -> int:
    folder = Path(argv[0]).resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    broken = list(broken_links(pages))
    print("\n".join([*broken, f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links"]))
    return 1 if broken or not pages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
