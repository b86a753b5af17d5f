#!/usr/bin/env python3
"""The steps of a release that need no network; .github/workflows/cd.yml and a maintainer use them.

    release.py cut 1.2.3            move [Unreleased] of CHANGELOG.md to [1.2.3], and write VERSION
    release.py check v1.2.3         fail unless the tag is that of VERSION, and CHANGELOG.md has its section
    release.py notes 1.2.3          print the section of CHANGELOG.md
    release.py tags 1.2.3 --image ghcr.io/o/n --suffix=-cpu
                                    print the names under which the image is published

A pre-release (1.2.3-rc.1) gets only its own tag: 1.2, 1 and latest stay at the last release.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HEADING = re.compile(r"(?m)^## \[([^]]+)\].*\n")
# Semantic Versioning 2.0.0, without build metadata, which an image's tag cannot contain.
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?", re.ASCII)


class ReleaseError(Exception):
    """The step cannot be done; the message says why."""


class Version(NamedTuple):
    """A version by its parts. `pre_release` is empty for a release."""

    major: str
    minor: str
    patch: str
    pre_release: str

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}{self.pre_release}"


def parse_version(text: str) -> Version:
    """Parse a version, with or without the v of a tag. Raises ReleaseError."""
    match = VERSION.fullmatch(text.removeprefix("v"))
    if not match:
        raise ReleaseError(f"{text!r} is not a version such as 1.2.3 or 1.2.3-rc.1")
    return Version(*match.groups(default=""))


def sections(changelog: str) -> dict[str, str]:
    """Return the text of each section of the changelog by its version."""
    names, starts = zip(*((match[1], match) for match in HEADING.finditer(changelog)), strict=True)
    ends = [*(match.start() for match in starts[1:]), len(changelog)]
    return {name: changelog[match.end() : end].strip() for name, match, end in zip(names, starts, ends, strict=True)}


def notes(changelog: str, version: Version) -> str:
    """Return the section of a version. Raises ReleaseError if there is none, or if it is empty."""
    text = sections(changelog).get(str(version), "")
    if not text:
        raise ReleaseError(f"CHANGELOG.md has no section [{version}], or nothing in it")
    return text


def cut(changelog: str, version: Version, day: date) -> str:
    """Return the changelog with what is unreleased as the section of a version. Raises ReleaseError."""
    found = sections(changelog)
    if not found.get("Unreleased"):
        raise ReleaseError("CHANGELOG.md has nothing in [Unreleased]")
    if str(version) in found:
        raise ReleaseError(f"CHANGELOG.md has a section [{version}] already")
    return changelog.replace("## [Unreleased]\n", f"## [Unreleased]\n\n## [{version}] - {day.isoformat()}\n", 1)


def tags(version: Version, image: str, suffix: str) -> list[str]:
    """Return the full names of an image, the most exact one first."""
    names = [str(version)]
    if not version.pre_release:
        names += [f"{version.major}.{version.minor}", version.major, "latest"]
    return [f"{image}:{name}{suffix}" for name in names]


def write_cut(root: Path, version: Version, day: date) -> None:
    """Cut the changelog, write VERSION, and name its image in deploy/kubernetes. Raises ReleaseError."""
    page = root / "CHANGELOG.md"
    page.write_text(cut(page.read_text("utf-8"), version, day), "utf-8")
    (root / "VERSION").write_text(f"{version}\n")
    for path in (root / "deploy" / "kubernetes").glob("*.yaml"):
        text = path.read_text("utf-8")
        changed = re.sub(r"(?m)^( *image: \S+/llama-gguf-inference:)[^@\s]+", rf"\g<1>{version}", text)
        path.write_text(changed, "utf-8")


def check(root: Path, tag: str) -> None:
    """Raise ReleaseError unless the tag is that of VERSION, and the changelog has the version's section."""
    version = parse_version(tag)
    written = (root / "VERSION").read_text().strip()
    if tag != f"v{written}":
        raise ReleaseError(f"the tag is {tag}, but VERSION is {written}: the tag must be v{written}")
    notes((root / "CHANGELOG.md").read_text("utf-8"), version)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The steps of a release that need no network.", allow_abbrev=False)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("cut", "check", "notes", "tags"):
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("version", help="1.2.3, or the tag v1.2.3")
        if name == "cut":
            command.add_argument("--date", type=date.fromisoformat, help="default: today, in UTC")
        if name == "tags":
            command.add_argument("--image", required=True)
            command.add_argument("--suffix", default="")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        version = parse_version(options.version)
        if options.command == "cut":
            write_cut(options.root, version, options.date or datetime.now(timezone.utc).date())
        elif options.command == "check":
            check(options.root, options.version)
        elif options.command == "notes":
            print(notes((options.root / "CHANGELOG.md").read_text("utf-8"), version))
        else:
            print("\n".join(tags(version, options.image.lower(), options.suffix)))
    except (ReleaseError, OSError) as error:
        print(f"release: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
