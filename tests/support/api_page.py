"""The tables of docs/API_REFERENCE.md, made from the product's own. To renew them:

python3 tests/support/api_page.py
"""

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "API_REFERENCE.md"
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "scripts")]

import errors  # noqa: E402
import routes  # noqa: E402
from config import load_config  # noqa: E402
from metrics import Family  # noqa: E402
from parts import Parts  # noqa: E402
from routes import RouteClass  # noqa: E402

WHO = {routes.Role.PUBLIC: "anybody", routes.Role.INFER: "any key", routes.Role.OPERATOR: "an operator's key"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- Routes ---


def routes_table() -> str:
    listed: dict[RouteClass, list[str]] = {}
    for method, path, kind in routes.TABLE:
        listed.setdefault(kind, []).append(f"`{method} {path}`")
    listed[routes.ALLOWED] = ["whatever else `ALLOW_PATHS` names"]
    listed[routes.BLOCKED] = [f"`{path}` and all below" for path in routes.BLOCKED_PATHS]
    head = ("class", "who", "slot", "rate", "tokens", "routes")
    return table(head, [class_row(kind, names) for kind, names in listed.items()])


def class_row(kind: RouteClass, names: Sequence[str]) -> Sequence[str]:
    marks = ["yes" if flag else "–" for flag in (kind.slot, kind.rated, kind.metered)]
    return [kind.name, who(kind), *marks, "<br>".join(names)]


def who(kind: RouteClass) -> str:
    if kind.blocked:
        return "nobody"
    return WHO[kind.role] + (", with `ADMIN_ROUTES=true`" if kind.changing else "")


# --- Errors ---


def errors_table() -> str:
    head = ("status", "code", "type", "message, unless a more exact one is given", "Retry-After", "connection")
    return table(head, [error_row(kind) for kind in errors.CATALOGUE])


def error_row(kind: errors.Kind) -> Sequence[str]:
    retry = "–" if kind.retry_after_s is None else str(kind.retry_after_s)
    return [str(kind.status), f"`{kind.code}`", kind.type, kind.message, retry, "closes" if kind.closes else "stays"]


# --- Metrics ---


def metrics_table() -> str:
    return table(("metric", "type", "meaning"), [metric_row(family) for family in metric_families()])


def metric_row(family: Family) -> Sequence[str]:
    return [f"`{family.name}`", family.kind, family.help]


def metric_families() -> list[Family]:
    """What an operator's key sees of a gateway that has just been made."""
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(load_config({"DATA_DIR": folder, "USAGE_FILE": ""}))
        try:
            return list(parts.operator_registry.families())
        finally:
            parts.ledger.close()
            if parts.access_log is not None:
                parts.access_log.close()


# --- The page ---

TABLES: Mapping[str, Callable[[], str]] = {"routes": routes_table, "errors": errors_table, "metrics": metrics_table}


def with_tables(page: str) -> str:
    """The page with each table renewed between its two markers."""
    for name, make in TABLES.items():
        before, begin, rest = page.partition(f"<!-- {name}: made by tests/support/api_page.py -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not end:
            raise ValueError(f"the page lacks a marker of the table of {name}")
        page = before + begin + make() + end + after
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
