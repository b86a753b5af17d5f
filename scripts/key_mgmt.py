#!/usr/bin/env python3
"""Generate, list, change, rotate and remove API keys.

This program edits the keys file. It needs only keyfile.py in its folder; the command `usage` also needs accounting/,
config/ and core/, and `--version` core/. It connects to no gateway and restarts nothing: a running gateway notices the
changed file. Data goes to stdout, messages to stderr. Exit status: 0 success, 1 the command failed, 2 wrong usage.
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
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python3 -P` leaves a script's own folder out

import keyfile
from keyfile import Document, Entry, ParsedFile

_HOME = os.path.dirname(os.path.realpath(__file__))  # a .pyz file has this program under the name of a command
PROGRAM = f"{os.path.basename(_HOME)} keys" if os.path.isfile(_HOME) else "key_mgmt.py"

HELP = """\
examples:
  python3 key_mgmt.py generate --name alice --rate-limit 120 --expires 90d
  python3 key_mgmt.py generate --name ops --role operator --json
  python3 key_mgmt.py list
  python3 key_mgmt.py set --name alice --parallel 2 --tokens-per-day 2000000
  python3 key_mgmt.py set --name alice --rate-limit 0             # suspend: 403 key_suspended
  python3 key_mgmt.py set --name alice --rate-limit default       # resume
  python3 key_mgmt.py set --name alice --models 'chat-*,embed'     # others are 403 model_not_allowed
  python3 key_mgmt.py set --name alice --from 10.0.0.0/8           # elsewhere it is an unknown key
  python3 key_mgmt.py rotate --name alice --overlap 24h           # the old key works for 24 hours more
  python3 key_mgmt.py --quiet remove --name alice
  python3 key_mgmt.py check
  python3 key_mgmt.py generate --name bob --file ./team.txt       # --file, --json and --quiet may come
  python3 key_mgmt.py --file ./team.txt list --json               # before or after the command
  printf %s "$KEY" | python3 key_mgmt.py hash                     # your own key in the format of the file
  printf %s "$KEY" | python3 key_mgmt.py hash --line --name bob   # a line for API_KEYS
  python3 key_mgmt.py usage --since 7d --by day --csv
  python3 key_mgmt.py usage --quotas --key alice                  # limits, what is left, when it resets

The keys file is --file, else AUTH_KEYS_FILE, else api_keys.txt in DATA_DIR. Without DATA_DIR the folder is the one that
the gateway uses: the first of /runpod-volume, /workspace and /data that is mounted and writable, else /data if it is
writable, else ./data. A key is shown only once, when it is generated. The file contains its SHA-256 digest, or with
--plain the key itself.
"""

# Of a line that `hash` prints without a name.
FIRST_NAME = "first"
VOLUMES = ("/runpod-volume", "/workspace", "/data")
# 99999 days from now is still a valid date.
DURATION = re.compile(r"([0-9]{1,5})([dhm])")
UNITS = {"d": "days", "h": "hours", "m": "minutes"}
# The fields of an entry that arguments set.
LIMITS = ("rate_limit", "expires_at", *[option.field for option in keyfile.OPTIONS.values()])


class CommandError(Exception):
    """The command cannot be carried out, for example because the key does not exist."""

    status = 1


class UsageError(CommandError):
    """The arguments or the environment are wrong."""

    status = 2


# Settings and arguments


def probe_folder(path: str) -> tuple[bool, bool]:
    """Return whether a folder is a mount point and whether it is writable."""
    return os.path.ismount(path), os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def data_dir(environ: Mapping[str, str], probe: Callable[[str], tuple[bool, bool]] = probe_folder) -> str:
    """Return DATA_DIR, or the folder that the gateway uses if it is unset."""
    if environ.get("DATA_DIR"):
        return environ["DATA_DIR"]
    mounted = [volume for volume in VOLUMES if all(probe(volume))]
    return mounted[0] if mounted else "/data" if probe("/data")[1] else "./data"


def resolve_file(given: str | None, setting: str, name: str) -> Path:
    """Return the file that an option gives, else the one that a setting names, else the default in DATA_DIR."""
    if given is not None:
        return Path(given)
    return Path(os.environ.get(setting) or os.path.join(data_dir(os.environ), name))


def keys_file(arguments: argparse.Namespace) -> Path:
    return resolve_file(arguments.file, "AUTH_KEYS_FILE", "api_keys.txt")


def ledger_file(arguments: argparse.Namespace) -> Path:
    # The gateway distinguishes an empty USAGE_FILE from an unset one.
    if arguments.usage_file is None and os.environ.get("USAGE_FILE") == "":
        raise CommandError("USAGE_FILE is empty: usage is only in the memory of the gateway; request GET /usage")
    return resolve_file(arguments.usage_file, "USAGE_FILE", "usage.db")


def setting(name: str, accepts: str, parse: Callable[[str], Any]) -> Any:
    """Parse a setting from the environment as the gateway does. Returns None if it is unset or empty."""
    text = os.environ.get(name)
    try:
        return parse(text) if text else None
    except ValueError as problem:
        raise UsageError(f"{name}: the value {text!a} {problem}; accepted: {accepts}") from None


def now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


def parse_duration(text: str) -> timedelta:
    match = DURATION.fullmatch(text)
    if not match:
        raise keyfile.KeyFileError("a duration is 1 to 5 digits and d, h or m, like 30d, 24h or 60m")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


def parse_when(text: str) -> datetime:
    if DURATION.fullmatch(text):
        return now() + parse_duration(text)
    try:
        return keyfile.parse_expiration(text)
    except keyfile.KeyFileError as error:
        raise keyfile.KeyFileError(f"{error}, or a duration like 30d, 24h or 60m, or never") from None


# The commands


def generate(arguments: argparse.Namespace) -> int:
    secret, limits = _new_key(arguments)
    entry = Entry(arguments.name, keyfile.parse_secret(secret), **limits)

    def add(document: Document) -> None:
        if document.find(entry.key_id):
            raise CommandError(
                f"{entry.key_id} already has a key: use rotate to replace it or set to change its limits"
            )
        document.lines.append(keyfile.serialize_entry(entry, secret if arguments.plain else ""))

    return _show_key(arguments, _rewrite(arguments, add, create=True), secret, f"added {entry.key_id} to")


def list_keys(arguments: argparse.Namespace) -> int:
    with _file_errors(arguments) as path:
        document = Document(keyfile.read(path))
    records = [
        {**_record(line.parsed), "stored": "hashed" if line.secret.startswith("sha256$") else "plain"}
        for line in document.lines
        if isinstance(line.parsed, Entry)
    ]
    _warn_of_invalid_lines(arguments, document)
    return _print_json(records) if arguments.json else _print_table([_with_default(record) for record in records])


def _with_default(record: Mapping[str, Any]) -> dict[str, Any]:
    """Name the default rate as `set` does. In the other columns nothing is no limit."""
    return {**record, "rate_limit": "default" if record["rate_limit"] is None else record["rate_limit"]}


def remove(arguments: argparse.Namespace) -> int:
    def delete(document: Document) -> None:
        for index, _ in reversed(_find(document, arguments)):
            del document.lines[index]

    _rewrite(arguments, delete)
    _report(f"removed {arguments.name}", arguments.quiet)
    with suppress(CommandError):  # the key is removed, whatever is wrong with API_KEYS
        if any(entry.key_id == arguments.name for entry in given_keys().entries):
            warning = f"warning: API_KEYS has a key of {arguments.name}, which is in force now: remove it there"
            _report(warning, arguments.quiet)
    return _print_json({"key_id": arguments.name, "removed": True}) if arguments.json else 0


def rotate(arguments: argparse.Namespace) -> int:
    secret, limits = _new_key(arguments)

    def add_and_retire(document: Document) -> None:
        old_lines = _find(document, arguments)
        newest, last = old_lines[-1]
        entry = last._replace(digest=keyfile.parse_secret(secret), **limits)
        if _state(entry) == "expired":
            raise CommandError(f"{arguments.name} has expired: give the new key an expiration with --expires")
        document.lines.insert(newest + 1, keyfile.serialize_entry(entry, secret if arguments.plain else ""))
        for index, old in reversed(old_lines):
            _retire(document, index, old, arguments.overlap)

    ends = (
        f"works until {keyfile.serialize_time(now() + arguments.overlap)} at most" if arguments.overlap else "has ended"
    )
    done = f"rotated {arguments.name}, whose old key {ends}, in"
    return _show_key(arguments, _rewrite(arguments, add_and_retire), secret, done)


def _retire(document: Document, index: int, entry: Entry, overlap: timedelta) -> None:
    """Delete the line of an old key, or let it expire after the overlap, or earlier if it already expires earlier."""
    if not overlap:
        del document.lines[index]
        return
    _change(document, index, entry, {"expires_at": _earlier(entry.expires_at, now() + overlap)})


def _change(document: Document, index: int, entry: Entry, limits: Mapping[str, Any]) -> None:
    """Rewrite a line with other limits. Its secret is kept as it is, plain or hashed."""
    document.lines[index] = keyfile.serialize_entry(entry._replace(**limits), document.lines[index].secret)


def set_limits(arguments: argparse.Namespace) -> int:
    limits = _limits(arguments)
    if not limits:
        raise UsageError("give at least one option that set can change")

    def change(document: Document) -> None:
        (*older, newest) = _find(document, arguments)
        for index, entry in older:
            # An old key in its overlap may expire earlier because of this, never later.
            expires_at = _earlier(entry.expires_at, limits.get("expires_at"))
            _change(document, index, entry, {**limits, "expires_at": expires_at})
        _change(document, *newest, limits)

    entries = [entry for _, entry in _rewrite(arguments, change).find(arguments.name)]
    _report(f"changed {arguments.name} (now {_state(entries[-1])})", arguments.quiet)
    return _print_json([_record(entry) for entry in entries]) if arguments.json else 0


def check(arguments: argparse.Namespace) -> int:
    path, given = keys_file(arguments), given_keys()
    parsed = _parse_if_needed(arguments, given)
    entries, clashes = keyfile.merge(parsed.entries, given.entries)
    of_given = [*given.complaints, *([given.error] if given.error else []), *clashes]
    complaints = [*parsed.complaints, *([parsed.error] if parsed.error else []), *[f"API_KEYS: {c}" for c in of_given]]
    if arguments.json:
        _print_json({"ok": not complaints, "keys": len(entries), "complaints": complaints})
    else:
        _print("".join(complaint + "\n" for complaint in complaints))
    more = f" and {len(entries) - len(parsed.entries)} of API_KEYS" if given.entries else ""
    _report(f"{path}: {_count(parsed.entries, 'key')}{more}, {_count(complaints, 'complaint')}", arguments.quiet)
    return 1 if complaints else 0


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def given_keys() -> ParsedFile:
    """Return the keys of API_KEYS or API_KEYS_FILE; none if neither is set."""
    text, path = os.environ.get("API_KEYS"), os.environ.get("API_KEYS_FILE")
    if text and path:
        raise UsageError("API_KEYS and API_KEYS_FILE contradict each other: set one of them")
    if path:
        try:
            text = keyfile.read(Path(path)).decode(errors="replace")
        except OSError as error:
            raise CommandError(f"API_KEYS_FILE: the file cannot be read: {error.strerror}") from None
    return keyfile.parse_list(text or "")


def _parse_if_needed(arguments: argparse.Namespace, given: ParsedFile) -> ParsedFile:
    """Read and parse the keys file. With given keys there need not be one. Raises CommandError."""
    with _file_errors(arguments) as path:
        try:
            return keyfile.parse(keyfile.read(path))
        except FileNotFoundError:
            if not given.entries:
                raise
            return keyfile.parse(b"")


def hash_key(arguments: argparse.Namespace) -> int:
    limits = _limits(arguments)
    if not arguments.line and (limits or hasattr(arguments, "name")):
        raise UsageError("a name and limits are part of a line: give --line")
    if sys.stdin is None:
        raise CommandError("stdin is closed: there is no key to read")
    text = sys.stdin.buffer.read(4096).decode("ascii", "replace").rstrip("\r\n")
    digest = keyfile.parse_secret(text)
    if arguments.line:
        line = keyfile.serialize_entry(Entry(getattr(arguments, "name", FIRST_NAME), digest, **limits)).text
        _report("put the line in single quotes: a shell would replace what follows the $", arguments.quiet)
        return _print_json({"line": line}) if arguments.json else _print(line + "\n")
    hashed = "sha256$" + digest.hex()
    return _print_json({"api_key": hashed}) if arguments.json else _print(hashed + "\n")


def show_usage(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.csv:
        raise UsageError("--json and --csv cannot be used together")
    try:
        from accounting import ledger, ledger_files  # noqa: PLC0415
        from config import converters  # noqa: PLC0415 - only this command needs these modules
    except ModuleNotFoundError as error:
        room = (error.name or "").partition(".")[0]
        raise CommandError(f"the command usage needs {room}/ in the folder of key_mgmt.py") from None
    if arguments.quotas:
        return _show_quotas(arguments, ledger)
    path, price = ledger_file(arguments), setting("GPU_COST_PER_HOUR", converters.PRICE.accepts, converters.PRICE.parse)
    try:
        since = ledger.first_day(arguments.since, time.time()) if arguments.since else ""
        rows = ledger.query(path, since, arguments.by, arguments.key or "")
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    except ledger_files.LedgerUnreadable as error:
        raise CommandError(str(error)) from None
    costs = [{} if price is None else {"cost": round(ledger.cost(row.gpu_s, price), 4)} for row in rows]
    if not rows:
        use = f"use of {arguments.key}" if arguments.key else "use"
        _report(f"no {use} is recorded in {path}", arguments.quiet)
    full = [{**asdict(row), "gpu_s": round(row.gpu_s, 1), **cost} for row, cost in zip(rows, costs, strict=True)]
    records = [{name: value for name, value in record.items() if value != ""} for record in full]
    return _print_json(records) if arguments.json else _print_table(records, comma=arguments.csv)


def _show_quotas(arguments: argparse.Namespace, ledger: ModuleType) -> int:
    """Show the quotas of each key, what is used of them and left, and when they reset."""
    path, given = ledger_file(arguments), given_keys()
    entries, _ = keyfile.merge(_parse_if_needed(arguments, given).entries, given.entries)
    at = now()
    today, midnight = str(at.date()), datetime(at.year, at.month, at.day, tzinfo=timezone.utc)
    try:
        rows = ledger.query(path, today[:8] + "01", "key-day")
    except ledger.LedgerMissing as error:
        _report(f"{error}: the quotas are unused", arguments.quiet)
        rows = []
    except ledger.LedgerUnreadable as error:
        raise CommandError(str(error)) from None
    spent: dict[str, list[int]] = {}
    for row in rows:
        of_key = spent.setdefault(row.key_id, [0, 0])
        of_key[0] += (row.prompt + row.completion) * (row.day == today)
        of_key[1] += row.prompt + row.completion
    next_month = (midnight.replace(day=1) + timedelta(days=31)).replace(day=1)
    resets = (keyfile.serialize_time(midnight + timedelta(days=1)), keyfile.serialize_time(next_month))
    chosen = {entry.key_id: entry for entry in entries if arguments.key in (None, entry.key_id)}
    records = [_quota_record(entry, spent.get(key_id, [0, 0]), resets) for key_id, entry in chosen.items()]
    return _print_json(records) if arguments.json else _print_table(records, comma=arguments.csv)


def _quota_record(entry: Entry, spent: Sequence[int], resets: Sequence[str]) -> dict[str, Any]:
    """Return the quotas of a key. `spent` and `resets` are those of the day and of the month."""
    record: dict[str, Any] = {"key_id": entry.key_id}
    limits = (entry.tokens_per_day, entry.tokens_per_month)
    for period, limit, used, reset in zip(("day", "month"), limits, spent, resets, strict=True):
        left = None if limit is None else max(limit - used, 0)
        record |= {
            f"tokens_per_{period}": limit,
            f"{period}_used": used,
            f"{period}_left": left,
            f"{period}_ends": reset,
        }
    return record | {"tokens_per_minute": entry.tokens_per_minute, "max_tokens": entry.max_tokens}


# Shared by the commands


@contextmanager
def _file_errors(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yield the path of the keys file, and turn errors of the file into CommandError with the path in the message."""
    path = keys_file(arguments)
    try:
        yield path
    except FileNotFoundError:
        found = "" if arguments.file is not None else "it is the --file, else AUTH_KEYS_FILE, else in DATA_DIR, and "
        raise CommandError(f"there is no {os.path.abspath(path)}: {found}generate makes it") from None
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from None
    except keyfile.KeyFileError as error:
        raise CommandError(f"{path}: {error}") from None


def _rewrite(arguments: argparse.Namespace, change: Callable[[Document], None], *, create: bool = False) -> Document:
    warned = set[str]()

    def warn(message: str) -> None:
        if message not in warned:
            _report(f"warning: {path}: {message}", arguments.quiet)
        warned.add(message)

    with _file_errors(arguments) as path:
        if create:
            if not path.parent.parent.exists():
                raise CommandError(f"there is no folder {path.parent.parent}, which {path.parent} would be in")
            _make_folder(path.parent)
        document = keyfile.rewrite(path, change, create=create, warn=warn)
        if message := keyfile.detached(path.stat()):
            warn(message)
    _warn_of_invalid_lines(arguments, document)
    return document


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(mode=0o700)
        owner = folder.parent.stat()
        with suppress(OSError):  # not root, or a volume without owners
            os.chown(folder, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _limits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the limits that were given as options. None removes a limit."""
    return {name: getattr(arguments, name) for name in LIMITS if hasattr(arguments, name)}


def _new_key(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    limits = _limits(arguments)
    if limits.get("expires_at") is not None and limits["expires_at"] <= now():
        raise UsageError("--expires is in the past: the new key would be expired already")
    # With stdout closed the new key would be lost.
    if sys.stdout is None:
        raise CommandError("stdout is closed: the key could not be shown")
    # 32 random bytes are 43 characters. Clients and secret scanners know the prefix.
    return "sk-" + secrets.token_urlsafe(32), limits


def _find(document: Document, arguments: argparse.Namespace) -> list[tuple[int, Entry]]:
    name, path = arguments.name, keys_file(arguments)
    if lines := document.find(name):
        return lines
    if complaint := document.complaint_about(name):
        raise CommandError(f"{path} has that name in a line that is not valid; edit {complaint}")
    raise CommandError(f"there is no key named {name} in {path}")


def _earlier(first: datetime | None, second: datetime | None) -> datetime | None:
    """Return the earlier of two expirations; None is never."""
    return min((at for at in (first, second) if at is not None), default=None)


def _show_key(arguments: argparse.Namespace, document: Document, secret: str, done: str) -> int:
    """Show a new key; `done` says what has been done in the file whose path follows."""
    name = arguments.name
    entry = document.find(name)[-1][1]
    record = {**_record(entry), "api_key": secret}
    try:
        _print(json.dumps(record, indent=2) + "\n" if arguments.json else secret + "\n")
    except OSError as error:
        message = f"the new key of {name} is in the file but could not be shown ({error.strerror}): rotate or remove it"
        raise CommandError(message) from None
    expiration = f"; it expires at {record['expires_at']}" if entry.expires_at is not None else ""
    _report(f"{done} {os.path.abspath(keys_file(arguments))}; the key is shown only once{expiration}", arguments.quiet)
    return 0


def _state(entry: Entry) -> str:
    if entry.expires_at is not None and entry.expires_at <= now():
        return "expired"
    return "suspended" if entry.rate_limit == 0 else "active"


def _record(entry: Entry) -> dict[str, Any]:
    """Return an entry as it is shown: everything except the digest."""
    expires_at = None if entry.expires_at is None else keyfile.serialize_time(entry.expires_at)
    record = {"key_id": entry.key_id, "state": _state(entry), "rate_limit": entry.rate_limit, "expires_at": expires_at}
    for name, option in keyfile.OPTIONS.items():
        value = getattr(entry, option.field)
        record[name] = (option.serialize(value) or None) if isinstance(value, tuple) else value
    return record


def _print(text: str) -> int:
    # Flushed here, where an error can be reported. At interpreter exit it would be a traceback.
    print(text, end="", flush=True)
    return 0


def _print_json(value: object) -> int:
    return _print(json.dumps(value, indent=2) + "\n")


def _print_table(records: Sequence[Mapping[str, object]], *, comma: bool = False) -> int:
    """Print a header and one line per record, in columns or as CSV. No value contains a comma or a quote."""
    if not records:
        return _print("")
    absent = "" if comma else "-"
    rows = [list(records[0]), *([absent if cell is None else str(cell) for cell in r.values()] for r in records)]
    if comma:
        return _print("".join(",".join(row) + "\n" for row in rows))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return _print("".join(line + "\n" for line in lines))


def _warn_of_invalid_lines(arguments: argparse.Namespace, document: Document) -> None:
    for complaint in document.complaints:
        _report(f"warning: {complaint} (the gateway ignores this line)", arguments.quiet)


def _report(message: str, quiet: bool = False) -> None:
    # print(file=None) writes to stdout.
    if sys.stderr is not None and not quiet:
        with suppress(OSError):
            print(f"key_mgmt: {message}", file=sys.stderr, flush=True)


# The command line


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = _parser().parse_args(argv, argparse.Namespace(file=None, quiet=False, json=False))
        return int(arguments.run(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    except (CommandError, keyfile.KeyFileError) as error:
        _report(f"error: {error}")
        return getattr(error, "status", 1)
    except OSError as error:
        _report(f"error: stdout: {error.strerror}")
    except KeyboardInterrupt:
        _report("interrupted")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Generate, list, change, rotate and remove API keys. COMMAND --help shows a command's options.",
        epilog=HELP.replace("key_mgmt.py", PROGRAM),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    _add(parser, COMMON)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, options, sentence) in COMMANDS.items():
        command = commands.add_parser(
            name, help=sentence, description=sentence[0].upper() + sentence[1:], allow_abbrev=False
        )
        command.set_defaults(run=run)
        _add(command, [*options, *COMMON])
    return parser


class _ShowVersion(argparse.Action):
    """Imports what it needs when it is used: the other commands need only keyfile.py."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from core.installation import version_line  # noqa: PLC0415

        print(version_line(PROGRAM))
        parser.exit()


def _add(parser: argparse.ArgumentParser, options: Sequence[str]) -> None:
    # Without SUPPRESS the default of an option after the command would overwrite a value given before the command.
    # An option in brackets is not required.
    for option in options:
        name = option.strip("[]")
        optional = {"required": False} if option != name else {}
        parser.add_argument(name, **{"default": argparse.SUPPRESS, **OPTIONS[name], **optional})


def _value(metavar: str, parse: Callable[[str], object], sentence: str, **more: Any) -> dict[str, Any]:
    """Describe an option with a value. The text `blank` means None. Error messages never repeat the given value."""
    blank = more.pop("blank", None)

    def convert(text: str) -> object:
        try:
            return None if text == blank else parse(text)
        except keyfile.KeyFileError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return {"metavar": metavar, "type": convert, "help": sentence, **more}


def _argument(name: str) -> str:
    """Return the argument that sets an option of a line."""
    return "--" + name.replace("_", "-")


def _value_of(option: keyfile.Option) -> dict[str, Any]:
    default = Entry._field_defaults[option.field]
    return _value(
        option.metavar,
        lambda text: default if option.unset and text == option.unset else option.parse(text),
        option.help,
        dest=option.field,
    )


FLAG = {"action": "store_true"}
EXPIRATION_HELP = "2026-12-31, 2026-12-31T23:59:59+02:00 (UTC without an offset), 30d, 24h, 60m, or never"
OPTIONS: dict[str, dict[str, Any]] = {
    "--name": _value("ID", keyfile.parse_key_id, "the key id", required=True),
    "--expires": _value("WHEN", parse_when, EXPIRATION_HELP, blank="never", dest="expires_at"),
    "--rate-limit": _value(
        "N", keyfile.parse_rate_limit, "requests per minute; 0 suspends the key; or default", blank="default"
    ),
    **{_argument(name): _value_of(option) for name, option in keyfile.OPTIONS.items()},
    "--plain": {**FLAG, "default": False, "help": "store the key itself instead of its SHA-256 digest"},
    "--line": {**FLAG, "default": False, "help": "print a whole line, for the file or for API_KEYS"},
    "--overlap": _value("TIME", parse_duration, "how long the old key keeps working (24h, 7d)", default=timedelta(0)),
    "--usage-file": _value("PATH", str, "default: USAGE_FILE, else usage.db in DATA_DIR", default=None),
    "--since": _value("WHEN", str, "a date, or a number of days with today, such as 7d", default=None),
    "--by": {
        "choices": ("key", "day", "key-day", "model"),
        "default": "key",
        "help": "what each line sums up (default: key)",
    },
    "--key": _value("ID", keyfile.parse_key_id, "show this key alone", default=None),
    "--quotas": {**FLAG, "default": False, "help": "show the quotas of the keys, what is left, and when they reset"},
    "--csv": {**FLAG, "default": False, "help": "print CSV"},
    "--file": _value("PATH", str, "the keys file"),
    "--json": {**FLAG, "help": "print JSON"},
    "--quiet": {**FLAG, "help": "print only data and errors"},
}
COMMON = ("--file", "--json", "--quiet")
LIMIT_OPTIONS = ("--expires", "--rate-limit", *map(_argument, keyfile.OPTIONS))
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], tuple[str, ...], str]] = {
    "generate": (generate, ("--name", *LIMIT_OPTIONS, "--plain"), "generate a key and show it, only this once"),
    "list": (list_keys, (), "show the key ids with their limits, never the keys"),
    "remove": (remove, ("--name",), "revoke all keys of a name"),
    "rotate": (rotate, ("--name", "--overlap", "--expires", "--plain"), "give a name a new key with the same limits"),
    "set": (set_limits, ("--name", *LIMIT_OPTIONS), "change limits and keep the key"),
    "check": (check, (), "report errors in the file and in API_KEYS; exit status 1 if there are any"),
    "usage": (
        show_usage,
        ("--usage-file", "--since", "--by", "--key", "--quotas", "--csv"),
        "show the usage of the keys",
    ),
    "hash": (
        hash_key,
        ("--line", "[--name]", *LIMIT_OPTIONS),
        "read a key from stdin and print its digest in the format of the file",
    ),
}


def _drop_unwritten() -> None:
    """Drop what a full device has not taken: the interpreter would write it again at its end, and exit with 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # noqa: PERF203
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    exit_status = main()
    _drop_unwritten()
    sys.exit(exit_status)
