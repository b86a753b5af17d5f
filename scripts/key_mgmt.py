#!/usr/bin/env python3
"""Make, list, change, rotate and remove API keys.

The command line of the keys file. It needs keyfile.py beside it and nothing else (`usage` needs accept.py, usage.py and
meter.py too), talks to no gateway and restarts nothing: a running gateway sees the changed file by itself. Data goes to
stdout, talk to stderr. The exit status is 0 when it is done, 1 when the state of things forbids it and 2 when the
command is wrong.
"""

import argparse
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import keyfile
from keyfile import Document, Entry

HELP = """\
examples:
  python3 key_mgmt.py generate --name alice --rate-limit 120 --expires 90d
  python3 key_mgmt.py generate --name ops --role operator --json
  python3 key_mgmt.py list
  python3 key_mgmt.py set --name alice --parallel 2 --tokens-per-day 2000000
  python3 key_mgmt.py set --name alice --rate-limit 0             # suspend: 403 key_suspended
  python3 key_mgmt.py set --name alice --rate-limit default       # and back
  python3 key_mgmt.py rotate --name alice --overlap 24h           # the old key works until then
  python3 key_mgmt.py --quiet remove --name alice
  python3 key_mgmt.py check
  python3 key_mgmt.py generate --name bob --file ./team.txt       # --file, --json and --quiet
  python3 key_mgmt.py --file ./team.txt list --json               # stand before the command or behind it
  printf %s "$KEY" | python3 key_mgmt.py hash                     # a key of your own, as the file wants it
  python3 key_mgmt.py usage --since 7d --by day --csv

The keys file is --file, else AUTH_KEYS_FILE, else api_keys.txt in DATA_DIR. Without DATA_DIR it is the gateway's own
choice: the first of /runpod-volume, /workspace and /data that is mounted and writable, else /data if that is writable,
else ./data. A key is shown once, when it is made; the file holds its SHA-256 (with --plain the key itself).
"""

VOLUMES = ("/runpod-volume", "/workspace", "/data")
# 99999 days are within the calendar, whichever way they are counted.
DURATION = re.compile(r"([0-9]{1,5})([dhm])")
UNITS = {"d": "days", "h": "hours", "m": "minutes"}
# The fields of an entry that options set, in the order in which they are shown.
LIMITS = ("rate_limit", "expires_at", "role", "parallel", "priority", "tokens_per_day")


class Refused(Exception):
    """What is asked for does not go with what is there."""

    status = 1


class Misused(Refused):
    """What is asked for makes no sense."""

    status = 2


# Words to values


def probe_folder(path: str) -> tuple[bool, bool]:
    """Tell whether a folder is a mount point and whether it can be written to."""
    return os.path.ismount(path), os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def data_dir(environ: Mapping[str, str], probe: Callable[[str], tuple[bool, bool]] = probe_folder) -> str:
    """Find the folder that the gateway would choose, where nobody names one."""
    if environ.get("DATA_DIR"):
        return environ["DATA_DIR"]
    mounted = [volume for volume in VOLUMES if all(probe(volume))]
    return mounted[0] if mounted else "/data" if probe("/data")[1] else "./data"


def chosen_file(given: str | None, setting: str, name: str) -> Path:
    if given is not None:
        return Path(given)
    return Path(os.environ.get(setting) or os.path.join(data_dir(os.environ), name))


def keys_file(arguments: argparse.Namespace) -> Path:
    return chosen_file(arguments.file, "AUTH_KEYS_FILE", "api_keys.txt")


def ledger_file(arguments: argparse.Namespace) -> Path:
    # To the gateway an empty USAGE_FILE is not an unset one.
    if arguments.usage_file is None and os.environ.get("USAGE_FILE") == "":
        raise Refused("USAGE_FILE is empty, so that usage is in the gateway's memory only: ask GET /usage")
    return chosen_file(arguments.usage_file, "USAGE_FILE", "usage.db")


def setting(name: str, accepts: str, parse: Callable[[str], Any]) -> Any:
    """Read a setting of the gateway's as the gateway does; None where it is unset."""
    text = os.environ.get(name)
    try:
        return parse(text) if text else None
    except ValueError as problem:
        raise Misused(f"{name}: the value {text!a} {problem}; accepted: {accepts}") from None


def now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


def parse_duration(text: str) -> timedelta:
    match = DURATION.fullmatch(text)
    if not match:
        raise keyfile.Invalid("a duration is 1 to 5 digits and d, h or m, like 30d, 24h or 60m")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


def parse_when(text: str) -> datetime:
    return now() + parse_duration(text) if text[-1:] in UNITS else keyfile.parse_expiration(text)


# The commands


def generate(arguments: argparse.Namespace) -> int:
    secret, limits = _new_key(arguments)
    entry = Entry(arguments.name, keyfile.parse_secret(secret), **limits)

    def add(document: Document) -> None:
        if document.find(entry.key_id):
            raise Refused(f"{entry.key_id} has a key: rotate gives it a new one, set changes what it may do")
        document.lines.append(keyfile.serialize_entry(entry, secret if arguments.plain else ""))

    return _hand_out(arguments, _rewrite(arguments, add, create=True), secret)


def list_keys(arguments: argparse.Namespace) -> int:
    path = keys_file(arguments)
    with _refusing(path):
        document = Document(keyfile.read(path)[0])
    records = [
        {**_record(line.found), "stored": "hashed" if line.secret.startswith("sha256$") else "plain"}
        for line in document.lines
        if isinstance(line.found, Entry)
    ]
    _complain(arguments, document)
    return _print_json(records) if arguments.json else _print_table(records)


def remove(arguments: argparse.Namespace) -> int:
    def cut(document: Document) -> None:
        for index, _ in reversed(_found(document, arguments.name)):
            del document.lines[index]

    _rewrite(arguments, cut)
    _say(f"removed {arguments.name}", arguments.quiet)
    return _print_json({"key_id": arguments.name, "removed": True}) if arguments.json else 0


def rotate(arguments: argparse.Namespace) -> int:
    secret, limits = _new_key(arguments)

    def turn(document: Document) -> None:
        found = _found(document, arguments.name)
        newest, last = found[-1]
        entry = replace(last, digest=keyfile.parse_secret(secret), **limits)
        if _state(entry) == "expired":
            raise Refused(f"{arguments.name} has expired: --expires gives the new key another end")
        document.lines.insert(newest + 1, keyfile.serialize_entry(entry, secret if arguments.plain else ""))
        for index, old in reversed(found):
            _end(document, index, old, arguments.overlap)

    return _hand_out(arguments, _rewrite(arguments, turn), secret)


def _end(document: Document, index: int, entry: Entry, overlap: timedelta) -> None:
    """Let an old key end after the overlap, or sooner where it would have ended sooner; without one, now."""
    if not overlap:
        del document.lines[index]
        return
    _change(document, index, entry, {"expires_at": _sooner(entry.expires_at, now() + overlap)})


def _change(document: Document, index: int, entry: Entry, limits: Mapping[str, Any]) -> None:
    """Write a line anew; its key stands as it stood, plain or hashed."""
    document.lines[index] = keyfile.serialize_entry(replace(entry, **limits), document.lines[index].secret)


def set_limits(arguments: argparse.Namespace) -> int:
    limits = _limits(arguments)
    if not limits:
        raise Misused("set changes something: give at least one of its options")

    def change(document: Document) -> None:
        (*older, newest) = _found(document, arguments.name)
        for index, entry in older:
            # An old key that a rotation lets live for a while may end sooner by this, never later.
            ends_at = _sooner(entry.expires_at, limits.get("expires_at"))
            _change(document, index, entry, {**limits, "expires_at": ends_at})
        _change(document, *newest, limits)

    entries = [entry for _, entry in _rewrite(arguments, change).find(arguments.name)]
    _say(f"changed {arguments.name}, which is {_state(entries[-1])}", arguments.quiet)
    return _print_json([_record(entry) for entry in entries]) if arguments.json else 0


def check(arguments: argparse.Namespace) -> int:
    path = keys_file(arguments)
    with _refusing(path):
        parsed = keyfile.parse(keyfile.read(path)[0])
    complaints = [*parsed.complaints, *([parsed.distrust] if parsed.distrust else [])]
    if arguments.json:
        _print_json({"ok": not complaints, "keys": len(parsed.entries), "complaints": complaints})
    else:
        _print("".join(complaint + "\n" for complaint in complaints))
    _say(f"{path}: {len(parsed.entries)} keys, {len(complaints)} complaints", arguments.quiet)
    return 1 if complaints else 0


def hash_key(arguments: argparse.Namespace) -> int:
    if sys.stdin is None:
        raise Refused("there is no stdin to read the key from")
    text = sys.stdin.buffer.read(4096).decode("ascii", "replace").rstrip("\r\n")
    hashed = "sha256$" + keyfile.parse_secret(text).hex()
    return _print_json({"api_key": hashed}) if arguments.json else _print(hashed + "\n")


def show_usage(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.csv:
        raise Misused("--json and --csv exclude each other: give one of them")
    try:
        import accept  # noqa: PLC0415 - nothing but this command needs the two
        import usage  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise Refused(f"usage needs {error.name}.py beside key_mgmt.py") from None
    path, price = ledger_file(arguments), setting("GPU_COST_PER_HOUR", accept.PRICE.accepts, accept.PRICE.parse)
    try:
        since = usage.first_day(arguments.since, time.time()) if arguments.since else ""
        rows = usage.query(path, since, arguments.by)
    except ValueError as error:
        raise Misused(f"--{error}") from None
    except usage.LedgerUnreadable as error:
        raise Refused(f"{path}: {error}") from None
    costs = [{} if price is None else {"cost": round(usage.cost(row.gpu_s, price), 4)} for row in rows]
    told = [{**asdict(row), "gpu_s": round(row.gpu_s, 1), **cost} for row, cost in zip(rows, costs, strict=True)]
    records = [{name: value for name, value in record.items() if value != ""} for record in told]
    return _print_json(records) if arguments.json else _print_table(records, comma=arguments.csv)


# What the commands share


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what is wrong with a file into a sentence that names it."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    except keyfile.Invalid as error:
        raise Refused(f"{path}: {error}") from None


def _rewrite(arguments: argparse.Namespace, change: Callable[[Document], None], *, create: bool = False) -> Document:
    path = keys_file(arguments)
    with _refusing(path):
        if create:
            _make_folder(path.parent)
        document = keyfile.rewrite(path, change, create=create)
    _complain(arguments, document)
    return document


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(mode=0o700)
        owner = folder.parent.stat()
        with suppress(PermissionError):
            os.chown(folder, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _limits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those limits that were given; None takes one away."""
    return {name: getattr(arguments, name) for name in LIMITS if hasattr(arguments, name)}


def _new_key(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    limits = _limits(arguments)
    if limits.get("expires_at") is not None and limits["expires_at"] <= now():
        raise Misused("--expires is a time that has passed: such a key would be of no use")
    # A closed stdout would make a key that nobody ever sees.
    if sys.stdout is None:
        raise Refused("there is no stdout to show the key on")
    # 32 random bytes are 43 characters, behind the prefix that clients and secret scanners know.
    return "sk-" + secrets.token_urlsafe(32), limits


def _found(document: Document, key_id: str) -> list[tuple[int, Entry]]:
    found = document.find(key_id)
    if not found:
        raise Refused(f"there is no key of the name {key_id}")
    return found


def _sooner(first: datetime | None, second: datetime | None) -> datetime | None:
    """The sooner of two ends; None never comes."""
    return min((end for end in (first, second) if end is not None), default=None)


def _hand_out(arguments: argparse.Namespace, document: Document, secret: str) -> int:
    name = arguments.name
    entry = document.find(name)[-1][1]
    record = {**_record(entry), "api_key": secret}
    try:
        _print(json.dumps(record, indent=2) + "\n" if arguments.json else secret + "\n")
    except OSError as error:
        reason = f"the key of {name} is in the file but could not be shown ({error.strerror}): rotate or remove it"
        raise Refused(reason) from None
    end = f" and ends at {record['expires_at']}" if entry.expires_at is not None else ""
    _say(f"{name} is in {keys_file(arguments)}; its key is shown this once{end}", arguments.quiet)
    return 0


def _state(entry: Entry) -> str:
    if entry.expires_at is not None and entry.expires_at <= now():
        return "expired"
    return "suspended" if entry.rate_limit == 0 else "active"


def _record(entry: Entry) -> dict[str, Any]:
    """An entry as it is shown: all but the digest."""
    record = {"key_id": entry.key_id, "state": _state(entry), **{name: getattr(entry, name) for name in LIMITS}}
    if entry.expires_at is not None:
        record["expires_at"] = keyfile.serialize_time(entry.expires_at)
    return record


def _print(text: str) -> int:
    # Flushed here, where a failure can be told; at the interpreter's end it would be a traceback.
    print(text, end="", flush=True)
    return 0


def _print_json(value: object) -> int:
    return _print(json.dumps(value, indent=2) + "\n")


def _print_table(records: Sequence[Mapping[str, object]], *, comma: bool = False) -> int:
    """Print a header and a line a record: in columns, or as CSV (no value holds a comma or a quote)."""
    if not records:
        return _print("")
    absent = "" if comma else "-"
    rows = [list(records[0]), *([absent if cell is None else str(cell) for cell in r.values()] for r in records)]
    if comma:
        return _print("".join(",".join(row) + "\n" for row in rows))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return _print("".join(line + "\n" for line in lines))


def _complain(arguments: argparse.Namespace, document: Document) -> None:
    for complaint in document.complaints:
        _say(f"warning: {complaint} (the gateway skips it)", arguments.quiet)


def _say(text: str, quiet: bool = False) -> None:
    # print(file=None) would write to stdout.
    if sys.stderr is not None and not quiet:
        with suppress(OSError):
            print(f"key_mgmt: {text}", file=sys.stderr, flush=True)


# The command line


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = _parser().parse_args(argv, argparse.Namespace(file=None, quiet=False, json=False))
        return int(arguments.run(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    except (Refused, keyfile.Invalid) as error:
        _say(str(error))
        return getattr(error, "status", 1)
    except OSError as error:
        _say(f"stdout: {error.strerror}")
    except KeyboardInterrupt:
        _say("interrupted")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="key_mgmt.py",
        description="Make, list, change, rotate and remove API keys. COMMAND --help tells a command's options.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add(parser, COMMON)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, options, sentence) in COMMANDS.items():
        command = commands.add_parser(name, help=sentence, description=sentence.capitalize(), allow_abbrev=False)
        command.set_defaults(run=run)
        _add(command, [*options, *COMMON])
    return parser


def _add(parser: argparse.ArgumentParser, options: Sequence[str]) -> None:
    # What is not given is not there: a default behind the command would undo what stands before it.
    for option in options:
        parser.add_argument(option, **{"default": argparse.SUPPRESS, **OPTIONS[option]})


def _value(metavar: str, parse: Callable[[str], object], sentence: str, **more: Any) -> dict[str, Any]:
    """Describe an option with a value; the word `blank` stands for none. A complaint never repeats what was given."""
    blank = more.pop("blank", None)

    def convert(text: str) -> object:
        try:
            return None if text == blank else parse(text)
        except keyfile.Invalid as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return {"metavar": metavar, "type": convert, "help": sentence, **more}


SWITCH = {"action": "store_true"}
ENDS = "2026-12-31, 2026-12-31T23:59:59+02:00 (UTC without an offset), 30d, 24h, 60m, or never"
OPTIONS: dict[str, dict[str, Any]] = {
    "--name": _value("ID", keyfile.parse_key_id, "whose key", required=True),
    "--expires": _value("WHEN", parse_when, ENDS, blank="never", dest="expires_at"),
    "--rate-limit": _value("N", keyfile.parse_rate_limit, "a minute; 0 suspends; or default", blank="default"),
    "--role": {"choices": keyfile.ROLES, "help": "an operator may also reload, and read slots, props and metrics"},
    "--parallel": _value("N", keyfile.parse_parallel, "requests at a time, more wait; or none", blank="none"),
    "--priority": _value("N", keyfile.parse_priority, "0 unless given; higher is served sooner"),
    "--tokens-per-day": _value("N", keyfile.parse_tokens_per_day, "from midnight UTC on; or none", blank="none"),
    "--plain": {**SWITCH, "default": False, "help": "put the key itself in the file, not its SHA-256"},
    "--overlap": _value("TIME", parse_duration, "let the old key work for so long (24h, 7d)", default=timedelta(0)),
    "--usage-file": _value("PATH", str, "else USAGE_FILE, else usage.db in DATA_DIR", default=None),
    "--since": _value("WHEN", str, "7d (today is one of them) or a date; else all", default=None),
    "--by": {"choices": ("key", "day", "key-day"), "default": "key", "help": "what a line stands for (key)"},
    "--csv": {**SWITCH, "default": False, "help": "print CSV"},
    "--file": _value("PATH", str, "the keys file"),
    "--json": {**SWITCH, "help": "print JSON"},
    "--quiet": {**SWITCH, "help": "print data and errors only"},
}
COMMON = ("--file", "--json", "--quiet")
LIMIT_OPTIONS = ("--expires", "--rate-limit", "--role", "--parallel", "--priority", "--tokens-per-day")
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], tuple[str, ...], str]] = {
    "generate": (generate, ("--name", *LIMIT_OPTIONS, "--plain"), "make a key and show it, this once"),
    "list": (list_keys, (), "show whose keys there are and what they may do, never the keys"),
    "remove": (remove, ("--name",), "revoke the keys of a name, all of them"),
    "rotate": (rotate, ("--name", "--overlap", "--expires", "--plain"), "give a name a new key with the same limits"),
    "set": (set_limits, ("--name", *LIMIT_OPTIONS), "change limits; the key stays"),
    "check": (check, (), "say what is wrong with the file; exit status 1 if anything is"),
    "usage": (show_usage, ("--usage-file", "--since", "--by", "--csv"), "show what the keys have used"),
    "hash": (hash_key, (), "read a key from stdin and print it as the file wants it"),
}


if __name__ == "__main__":
    sys.exit(main())
