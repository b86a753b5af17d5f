#!/usr/bin/env python3
"""Write the generated parts of docs/ from the code: settings, log fields, routes, errors, metrics, statuses, modules.

A part stands between two markers in its page, `<!-- begin NAME: … -->` and `<!-- end NAME -->`. The pages of modules/
and the diagram are generated whole. What the code does not say about a setting or an error is in advice.py. Exit status
0 if every page is up to date, 1 if `--check` finds a stale one.

    make generate                      rewrite the tables
    python3 docs/generate.py --check   change nothing; name each stale page
"""

import argparse
import ast
import asyncio
import json
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
SCRIPTS = DOCS.parent / "scripts"
ARCHITECTURE = DOCS.parent / "tests" / "test_architecture.py"
DIAGRAM = DOCS / "images" / "overview.txt"
COMMAND = "make generate"
sys.path[:0] = [str(SCRIPTS), str(DOCS)]

import advice  # noqa: E402
import diagram  # noqa: E402
from accounting.access_lines import FIELDS, Field  # noqa: E402
from boot.exit_status import CAUSES, FILE_REASONS, FILES, SIGNALS  # noqa: E402
from config.loader import load_config  # noqa: E402
from config.member_rules import RULES, Measure, MemberRule  # noqa: E402
from config.settings import SETTINGS, Setting  # noqa: E402
from core.dialects import ANTHROPIC  # noqa: E402
from core.errors import CATALOGUE, GatewayError, Kind  # noqa: E402
from metrics import Family  # noqa: E402
from policy import routes  # noqa: E402
from policy.routes import RouteClass  # noqa: E402
from proxy.app import App  # noqa: E402

CALLERS = {routes.Role.PUBLIC: "anyone", routes.Role.INFER: "any key", routes.Role.OPERATOR: "an operator's key"}
NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def said(part: str, name: str) -> Any:
    """Return what advice.py says about a name. Raises SystemExit with a message for the developer."""
    try:
        return getattr(advice, part)[name]
    except KeyError:
        raise SystemExit(f"docs/advice.py: {part} has no {name}; CONTRIBUTING.md says what to add") from None


# --- Settings ---


def settings_table() -> str:
    return table(("setting", "default", "unit", "accepted", "meaning"), map(setting_row, SETTINGS))


def setting_row(setting: Setting) -> Sequence[str]:
    name = f"[`{setting.name}`](SETTINGS.md#{setting.name.lower()})"
    name += f", `{setting.name}_FILE`" if setting.secret else ""
    default = f"`{setting.default}`" if setting.default else NONE
    return name, default, setting.unit or NONE, setting.converter.accepts, setting.help


def settings_sections() -> str:
    """Write a section per setting, by group: what it is, its default, its bounds, when to change it, an example."""
    return "\n".join(setting_group(title, about, names) for title, (about, names) in advice.SETTING_GROUPS.items())


def setting_group(title: str, about: str, names: Sequence[str]) -> str:
    known = {setting.name: setting for setting in SETTINGS}
    return f"## {title}\n\n{about}\n\n" + "\n".join(setting_section(known[name]) for name in names if name in known)


def setting_section(setting: Setting) -> str:
    _, default, unit, accepted, meaning = setting_row(setting)
    more = said("SETTINGS", setting.name)
    lines = [f"### `{setting.name}`", "", f"{meaning}", "", f"- Default: {default}"]
    lines += [f"- Unit: {unit}"] if setting.unit else []
    lines += [f"- Accepted: {accepted}"]
    lines += [f"- From a file: `{setting.name}_FILE`"] if setting.secret else []
    lines += ["", more.when, "", "```sh", *shell_words(more.example), "```", ""]
    return "\n".join(lines)


def shell_words(example: str) -> Iterable[str]:
    """Return the lines of an environment as a shell takes them: a value with a blank in quotes."""
    for line in example.splitlines():
        name, _, value = line.partition("=")
        yield f"{name}={shlex.quote(value) if value else ''}"


# --- The access log ---


def access_log_table() -> str:
    return table(("field", "forms", "meaning"), map(field_row, FIELDS))


def field_row(field: Field) -> Sequence[str]:
    forms = "text, json" if field.text and field.json else "text" if field.text else "json"
    return f"`{field.name}`", forms, field.help


def access_log_sections() -> str:
    return "\n".join(map(field_section, FIELDS))


def field_section(field: Field) -> str:
    _, forms, meaning = field_row(field)
    return f"### `{field.name}`\n\n{meaning} Forms: {forms}.\n\n{said('FIELDS', field.name)}\n"


# --- Routes ---


def routes_table() -> str:
    listed: dict[RouteClass, list[str]] = {}
    for method, path, kind in routes.TABLE:
        listed.setdefault(kind, []).append(f"`{method} {path}`")
    listed[routes.ALLOWED] = ["every other path that `ALLOW_PATHS` names"]
    listed[routes.BLOCKED] = [f"`{path}` and every path below it" for path in routes.BLOCKED_PATHS]
    head = ("class", "needs", "slot", "rate", "tokens", "routes")
    return table(head, (class_row(kind, names) for kind, names in listed.items()))


def class_row(kind: RouteClass, names: Sequence[str]) -> Sequence[str]:
    marks = ["yes" if flag else NONE for flag in (kind.slot, kind.rated, kind.metered)]
    return [kind.name, needs(kind), *marks, "<br>".join(names)]


def needs(kind: RouteClass) -> str:
    if kind.blocked:
        return "always refused"
    return CALLERS[kind.role] + (", and `ADMIN_ROUTES=true`" if kind.changing else "")


# --- Errors ---


def errors_table() -> str:
    message = "message, unless a more exact one is given"
    head = ("status", "code", "type", "Anthropic's type", message, "Retry-After", "x-should-retry", "connection")
    return table(head, map(error_row, CATALOGUE))


def error_row(kind: Kind) -> Sequence[str]:
    retry = NONE if kind.retry_after_s is None else str(kind.retry_after_s)
    may_retry = "false" if kind.final else NONE
    connection = "closes" if kind.closes else "stays open"
    return (
        str(kind.status),
        f"`{kind.code}`",
        kind.type,
        anthropic_type(kind),
        kind.message,
        retry,
        may_retry,
        connection,
    )


def anthropic_type(kind: Kind) -> str:
    return str(json.loads(ANTHROPIC.envelope(GatewayError(kind), ""))["error"]["type"])


# --- What bodies may ask for ---


def member_rules_table() -> str:
    head = ("name in `MEMBER_RULES`", "members", "default", "a bound counts", "why")
    return table(head, map(member_rule_row, RULES))


def member_rule_row(rule: MemberRule) -> Sequence[str]:
    is_hosts = rule.measure is Measure.HOSTS
    members = "addresses of images, audio and video" if is_hosts else ", ".join(f"`{name}`" for name in rule.members)
    measure = NONE if rule.measure is Measure.PRESENCE else rule.measure.value
    return f"`{rule.name}`", members, f"`{rule.default}`", measure.replace("|", "\\|"), rule.reason


def errors_sections() -> str:
    return "\n".join(map(error_section, CATALOGUE))


def error_section(kind: Kind) -> str:
    more = said("ERRORS", kind.code)
    head = f"### `{kind.code}`\n\nStatus {kind.status}. “{kind.message}”\n\n"
    return f"{head}- Cause: {more.cause}\n- What to do: {more.remedy}\n"


# --- Exit statuses, and why llama-server ended ---


def exit_status_sections() -> str:
    return "\n".join(
        f"### Exit status {status}\n\n{more.cause}\n\n{more.remedy}\n" for status, more in advice.EXIT_STATUSES.items()
    )


def causes_table() -> str:
    rows = [(f"`{readable(pattern)}`", hidden(message)) for pattern, message in (*CAUSES, *FILE_REASONS, *FILES)]
    rows += [(f"killed by {signal.Signals(number).name}", meaning) for number, meaning in SIGNALS.items()]
    return table(("llama-server's last lines contain", "what the log says"), rows)


def hidden(message: str) -> str:
    """Return a message with dots for what llama-server says itself."""
    text = re.sub(r"\{\w+\}", "…", message)
    return "llama-server's own reason" if text == "…" else text


def readable(pattern: str) -> str:
    """Return a pattern of a line as text for people: what varies as dots, alternatives with a slash."""
    text = pattern.replace(r"\(", "⟨").replace(r"\)", "⟩").rstrip("$")
    text = re.sub(r"\\S\+|\.[*+]|\[[^\]]*\][*+]", "…", text)
    group = re.compile(r"\((?:\?:|\?P<\w+>)([^()]*)\)\??")
    while group.search(text):
        text = group.sub(r"\1", text)
    return re.sub("…+", "…", text).replace('\\"', '"').replace("⟨", "(").replace("⟩", ")").replace("|", " / ")


# --- Metrics ---


LABELS = {"model": "`model` (`MODELS=router`)"}


def metrics_table() -> str:
    return table(("metric", "type", "labels", "meaning"), map(metric_row, metric_families()))


def metric_row(family: Family) -> Sequence[str]:
    labels = ", ".join(LABELS.get(label, f"`{label}`") for label in family.labels) or NONE
    return f"`{family.name}`", family.kind, labels, family.help


def metrics_sections() -> str:
    return "\n".join(map(metric_section, metric_families()))


def metric_section(family: Family) -> str:
    name, kind, labels, meaning = metric_row(family)
    labelled = f" Labels: {labels}." if family.labels else ""
    title = f"### {name}\n\n{meaning} Type: {kind}.{labelled}\n\n"
    return f"{title}{said('METRICS', family.name)}\n"


def metric_families() -> list[Family]:
    """What an operator's key reads from a gateway that has just started, in front of several models."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_metric_families({"DATA_DIR": folder, "USAGE_FILE": "", "MODELS": "router"}))


async def _metric_families(environ: Mapping[str, str]) -> list[Family]:
    app = App(load_config(environ))
    try:
        return list(app.operator_registry.families())
    finally:
        await app.close()


# --- Rooms and modules ---


def rooms_table() -> str:
    rows = [
        (f"`{name}`", purpose(room_file(name)), ", ".join(f"`{each}`" for each in allowed.split()) or NONE)
        for name, allowed in allowed_imports().items()
    ]
    return table(("room or plain module", "what it holds", "may import"), rows)


def allowed_imports() -> Mapping[str, str]:
    """Return ROOMS of tests/test_architecture.py: each room or plain module, and the ones that it may import."""
    for node in ast.parse(ARCHITECTURE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS":
            rooms: dict[str, str] = ast.literal_eval(node.value)
            return rooms
    raise ValueError(f"{ARCHITECTURE.name} has no ROOMS")


def room_file(name: str) -> Path:
    folder = SCRIPTS / name
    return folder / "__init__.py" if folder.is_dir() else SCRIPTS / f"{name}.py"


def modules_table() -> str:
    """List the programs first, then every module of each room."""
    top = sorted([*SCRIPTS.glob("*.py"), *SCRIPTS.glob("*.sh")])
    of_rooms = [path for name in allowed_imports() for path in sorted((SCRIPTS / name).glob("*.py"))]
    paths = [*top, *(path for path in of_rooms if path.stem != "__init__")]
    return table(("module", "purpose"), [(f"`{path.relative_to(DOCS.parent)}`", purpose(path)) for path in paths])


def purpose(path: Path) -> str:
    """Return the first paragraph of a module's docstring, or of a shell script's leading comment, as one line."""
    text = path.read_text(encoding="utf-8")
    first = (
        ast.get_docstring(ast.parse(text))
        if path.suffix == ".py"
        else re.sub("(?m)^#[! ]?", "", text.partition("\n")[2])
    )
    return " ".join((first or "").partition("\n\n")[0].split()).replace("|", "\\|")


def module_pages() -> Mapping[str, str]:
    """Return the pages of modules/ with their text: one per room, one for what lies at the top of scripts/."""
    rooms = {name: purpose(room_file(name)) for name in allowed_imports() if (SCRIPTS / name).is_dir()}
    top = [path.stem for path in sorted(SCRIPTS.glob("*.py")) if path.stem != "__main__"]
    pages = {"programs": module_page("Programs and plain modules", "The files at the top of `scripts/`.", top)}
    for room, meaning in rooms.items():
        modules = [f"{room}.{path.stem}" for path in sorted((SCRIPTS / room).glob("*.py")) if path.stem != "__init__"]
        pages[room] = module_page(f"The room `{room}`", meaning, modules)
    listed = "\n".join(["```{toctree}", ":maxdepth: 2", "", *pages, "```"])
    about = "The docstrings of every module. [DESIGN.md](../DESIGN.md) explains how they work together."
    pages["index"] = f"# Modules\n\n{about}\n\n{listed}\n"
    return {f"modules/{name}.md": text for name, text in pages.items()}


def module_page(title: str, about: str, modules: Sequence[str]) -> str:
    sections = [f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n" for name in modules]
    return "\n".join([f"# {title}\n\n{about}\n", *sections])


# --- Pages ---

PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "CONFIGURATION.md": {"settings": settings_table, "access-log": access_log_table},
    "API_REFERENCE.md": {"routes": routes_table, "errors": errors_table, "metrics": metrics_table},
    "ISOLATION.md": {"member-rules": member_rules_table},
    "DESIGN.md": {"rooms": rooms_table, "modules": modules_table},
    "SETTINGS.md": {"setting-sections": settings_sections},
    "ACCESS_LOG.md": {"field-sections": access_log_sections},
    "MONITORING.md": {"metric-sections": metrics_sections},
    "TROUBLESHOOTING.md": {
        "error-sections": errors_sections,
        "exit-statuses": exit_status_sections,
        "causes": causes_table,
    },
}


def renew(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Return the page with each table made again. Raises ValueError for a table without its two markers."""
    for name, make in tables.items():
        found = re.findall(rf"<!-- begin {name}\b.*? -->\n|<!-- end {name} -->", page)
        if len(found) != 2:
            raise ValueError(f"there must be one <!-- begin {name} --> and one <!-- end {name} -->")
        before, begin, rest = page.partition(found[0])
        _, end, after = rest.partition(found[1])
        page = before + begin + make() + end + after
    return page


def main(argv: Sequence[str] | None = None, folder: Path = DOCS) -> int:
    parser = argparse.ArgumentParser(description="Write the generated tables of docs/ from the code.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with status 1 if a page is stale")
    arguments = parser.parse_args(argv)
    pages = {name: renew((folder / name).read_text(encoding="utf-8"), tables) for name, tables in PAGES.items()}
    pages |= module_pages() | {"images/overview.svg": diagram.draw(DIAGRAM.read_text(encoding="utf-8"))}
    stale = [name for name, text in pages.items() if not is_current(folder / name, text)]
    for name in stale:
        if arguments.check:
            print(f"docs/{name} is stale: run `{COMMAND}` and commit the page.")
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(pages[name], encoding="utf-8")
            print(f"docs/{name} rewritten")
    return 1 if stale and arguments.check else 0


def is_current(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
